"""`--step manual`: the MLP's forward and backward pass written out, on CPUs.

Everything that only this step needs is in this package, which steps.py and job.py import on demand.
To remove it, delete the package and the branches that `grep manual` finds there and in config.py.
"""

from mnist_dist.fast.manual_step import ManualStep as ManualStep
from mnist_dist.fast.manual_step import check_manual_step as check_manual_step
