"""MNIST in every common format, as three splits of uint8 tensors.

One process per node calls `find_data`, which finds or downloads, verifies, converts and caches the
data. Then every process calls `load`, which memory-maps the cache.
"""

from mnist_dist.data.errors import DataError
from mnist_dist.data.source import DataLocation, find_data, load
from mnist_dist.data.splits import Dataset, Split

__all__ = ["DataError", "DataLocation", "Dataset", "Split", "find_data", "load"]
