"""Find the data: in the cache, on disk, on the network, or in the package."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mnist_dist.data import bundled, cache, download, pickles
from mnist_dist.data.errors import DataError, naming_file
from mnist_dist.data.formats import detect_format
from mnist_dist.data.splits import MNIST_SHA256, Dataset, assemble

# Where the original script looked, relative to the working directory.
LOCAL_FILE = Path("data/mnist/mnist.pkl.gz")
MNIST_ENTRY = "mnist.pt"


@dataclass(frozen=True)
class DataLocation:
    """Where the processes of this node load the data from. Plain and picklable.

    ``cache_file`` is None for the bundled digits. ``warnings`` are for the user, once per job.
    """

    cache_file: Path | None
    description: str
    warnings: tuple[str, ...] = ()


def find_data(data: str, cache_dir: str | Path | None) -> DataLocation:
    """Find the data and make sure that it is in the cache. Call it on one process per node.

    Args:
        data: ``auto`` (the cache, else ``data/mnist/mnist.pkl.gz``, else one download, else the
            bundled digits with a warning), ``bundled``, or a path, which never falls back.
        cache_dir: None for MNIST_DIST_CACHE, else the user's cache directory.

    Raises:
        DataError: `data` is a path and cannot be used, or the lock of the cache is never released.
    """
    if data == "bundled":
        return _use_bundled()
    directory = cache.directory(cache_dir)
    if data == "auto":
        return _find_or_create(directory / MNIST_ENTRY, partial(_get_mnist, directory))
    source = detect_format(Path(data))
    entry = directory / source.cache_entry()
    return _find_or_create(entry, lambda target: _write(source.read(), target, entry))


def load(location: DataLocation) -> Dataset:
    """Open the data; all processes of a node share one copy in memory.

    Raises:
        DataError: the cache entry was damaged or removed after `find_data`.
    """
    return bundled.load() if location.cache_file is None else cache.read(location.cache_file)


def _find_or_create(entry: Path, create: Callable[[cache.CacheDir], DataLocation]) -> DataLocation:
    if found := _cached(entry):
        return found
    with cache.exclusive(entry) as target:
        # The previous holder of the lock may have created it.
        return _cached(entry) or create(target)


def _cached(entry: Path) -> DataLocation | None:
    try:
        cache.verify(entry)
        return DataLocation(entry, cache.read(entry).description)
    except DataError:
        return None


def _write(dataset: Dataset, target: cache.CacheDir, entry: Path) -> DataLocation:
    """Write `dataset` as `entry` to `target`, or to a private directory if that fails."""
    try:
        kept = target.directory / entry.name
        cache.write(kept, dataset)
    except OSError as error:
        target = cache.private_dir(target.directory, error)
        kept = target.directory / entry.name
        with naming_file(kept, cache.REMEDY):
            cache.write(kept, dataset)
    return DataLocation(kept, dataset.description, target.warnings)


def _get_mnist(directory: Path, target: cache.CacheDir) -> DataLocation:
    """Get MNIST from the first source that works."""
    try:
        return _take_local_file(directory, target)
    except DataError as error:
        local_error = error
    try:
        found = _download(target)
    except DataError as network_error:
        return _use_bundled(_fallback_warning(local_error, network_error))
    if LOCAL_FILE.exists():
        found = replace(found, warnings=(*found.warnings, f"not used: {local_error}"))
    return found


def _take_local_file(directory: Path, target: cache.CacheDir) -> DataLocation:
    source = detect_format(LOCAL_FILE)
    own_entry = directory / source.cache_entry()
    if found := _cached(own_entry):
        return found
    dataset = source.read()
    # Runs in other directories must find only genuine MNIST under --data auto.
    genuine = dataset.fingerprint == MNIST_SHA256
    return _write(dataset, target, directory / MNIST_ENTRY if genuine else own_entry)


def _download(target: cache.CacheDir) -> DataLocation:
    url = os.environ.get("MNIST_DIST_URL") or download.URL
    entry = target.directory / MNIST_ENTRY
    with cache.temporary_file(entry) as file:
        download.fetch(url, file)
        with naming_file(url, download.REMEDY):
            dataset = assemble(pickles.read(file), url)
    # Compared by content: gzip files of the same data differ between mirrors.
    if dataset.fingerprint != MNIST_SHA256:
        raise DataError(f"{url}: serves another data set than MNIST", download.REMEDY)
    return _write(dataset, target, entry)


def _use_bundled(*warnings: str) -> DataLocation:
    return DataLocation(None, bundled.DESCRIPTION, warnings)


def _fallback_warning(local: DataError, network: DataError) -> str:
    return (
        f"using the {bundled.DESCRIPTION}, since full MNIST was not found "
        f"({local.problem}; {network.problem}); for all of it give --data a mnist.pkl.gz, a "
        f"mnist.npz or a directory of IDX files, or {network.remedy}"
    )
