"""`--step manual`: the MLP's forward and backward pass written out, on CPUs.

Everything that only this step needs is in this package; mnist_dist/job.py imports it on demand. To
remove it, delete the package and the branches that `grep manual` finds in job.py and config.py.
"""

from mnist_dist.fast.manual_step import ManualStep as ManualStep
from mnist_dist.fast.manual_step import check_manual_step as check_manual_step
