"""Real MNIST in every common format, as three splits of bytes.

One process per host calls `locate`, which finds, downloads, verifies, converts and caches; then
every process calls `load`, which only maps the cache into memory.
"""

from mnist_dist.data.errors import DataError
from mnist_dist.data.source import Located, load, locate
from mnist_dist.data.splits import Dataset, Split

__all__ = ["DataError", "Dataset", "Located", "Split", "load", "locate"]
