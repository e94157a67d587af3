"""`--step manual`: the MLP's forward and backward pass written out, on CPUs.

Everything that only this step needs is in this package: train_ddp.py imports it on demand, nothing
else does. To remove it, delete the package and the two places that grep finds for `manual`.
"""

from mnist_dist.fast.manual_step import ManualStep as ManualStep
from mnist_dist.fast.manual_step import check_manual_step as check_manual_step
