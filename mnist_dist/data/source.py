"""Find the data: in the cache, on disk, on the network, or in the package."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mnist_dist.data import bundled, cache, download
from mnist_dist.data.errors import DataError, naming_file
from mnist_dist.data.formats import detect_format, parse_pickle
from mnist_dist.data.splits import MNIST_SHA256, Dataset, assemble, describe

# Where the original script looked, relative to the working directory.
LOCAL_FILE = Path("data/mnist/mnist.pkl.gz")
MNIST_ENTRY = "mnist.pt"


@dataclass(frozen=True)
class DataLocation:
    """Where the processes of this node load the data from. Plain and picklable.

    ``cache_file`` is None for the bundled digits. ``warnings`` are for the user, once per job.
    ``memory`` is the path of a copy in memory, while the process that found the data lives.
    """

    cache_file: Path | None
    description: str
    warnings: tuple[str, ...] = ()
    memory: Path | None = None


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
        return DataLocation(None, bundled.DESCRIPTION)
    directory = cache.directory(cache_dir)
    if data == "auto":
        return _find_or_create(directory / MNIST_ENTRY, None, partial(_get_mnist, directory))
    source = detect_format(Path(data))
    entry = directory / source.cache_entry()
    return _find_or_create(entry, source.name, lambda target: _write(source.read(), target, entry))


def load(location: DataLocation) -> Dataset:
    """Open the data; all processes of a node share one copy in memory.

    Raises:
        DataError: the cache entry was damaged or removed after `find_data`.
    """
    if location.cache_file is None:
        return bundled.load()
    dataset = None
    if location.memory is not None:
        # Another container's processes cannot be seen: they map the file.
        with suppress(DataError):
            dataset = cache.read(location.memory)
    dataset = dataset or cache.read(location.cache_file)
    return replace(dataset, description=location.description)


def _find_or_create(
    entry: Path, source: str | None, create: Callable[[cache.CacheDir], DataLocation]
) -> DataLocation:
    try:
        return _cached(entry, source)
    except DataError as error:
        refused = error
    with cache.exclusive(entry) as target:
        try:  # the previous holder of the lock may have created it
            return _cached(entry, source)
        except DataError:
            found = create(target)
    if isinstance(refused.__cause__, cache.UntrustedError):
        warning = f"not used: {refused.problem}"
        found = replace(found, warnings=(warning, *found.warnings))
    return found


def _cached(entry: Path, source: str | None) -> DataLocation:
    """Verify an entry. Raises `DataError` if there is none that can be used."""
    dataset, memory = cache.hold(entry)
    if entry.name == MNIST_ENTRY and dataset.fingerprint != MNIST_SHA256:
        raise DataError(f"{entry}: is not MNIST", cache.REMEDY)
    if source is not None:
        # The same content may have been converted from another path.
        description = describe(dataset.splits, dataset.fingerprint, source)
        dataset = replace(dataset, description=description)
    return DataLocation(entry, dataset.description, _doubts(dataset), memory)


def _doubts(dataset: Dataset) -> tuple[str, ...]:
    if dataset.fingerprint == MNIST_SHA256 or not bundled.are_transposed(dataset.test):
        return ()
    return (
        f"{dataset.description}: the digits look transposed, as in EMNIST's files; give "
        "those their own names (emnist-digits-*, emnist-mnist-*), and they are turned upright",
    )


def _write(dataset: Dataset, target: cache.CacheDir, entry: Path) -> DataLocation:
    """Write `dataset` as `entry` to `target`, or to a private directory if that fails."""
    try:
        return _write_to(target, dataset, entry.name)
    except (OSError, DataError) as error:
        target = cache.private_dir(target.directory, error)
    with naming_file(target.directory / entry.name, cache.REMEDY):
        return _write_to(target, dataset, entry.name)


def _write_to(target: cache.CacheDir, dataset: Dataset, name: str) -> DataLocation:
    cache.write(target.directory / name, dataset)
    found = _cached(target.directory / name, None)
    return replace(found, warnings=(*target.warnings, *found.warnings))


def _get_mnist(directory: Path, target: cache.CacheDir) -> DataLocation:
    try:
        return _take_local_file(directory, target)
    except DataError as error:
        local_error = error
    try:
        found = _download(target)
    except DataError as network_error:
        warning = _fallback_warning(local_error, network_error)
        return DataLocation(None, bundled.DESCRIPTION, (warning,))
    if LOCAL_FILE.exists():
        found = replace(found, warnings=(*found.warnings, f"not used: {local_error}"))
    return found


def _take_local_file(directory: Path, target: cache.CacheDir) -> DataLocation:
    source = detect_format(LOCAL_FILE)
    own_entry = directory / source.cache_entry()
    with suppress(DataError):
        return _cached(own_entry, source.name)
    dataset = source.read()
    # Runs in other directories must find only genuine MNIST under --data auto.
    genuine = dataset.fingerprint == MNIST_SHA256
    return _write(dataset, target, directory / MNIST_ENTRY if genuine else own_entry)


def _download(target: cache.CacheDir) -> DataLocation:
    url = os.environ.get("MNIST_DIST_URL") or download.URL
    content = download.fetch(url)
    with naming_file(url, download.REMEDY):
        dataset = assemble(parse_pickle(content), url)
    # Compared by content: gzip files of the same data differ between mirrors.
    if dataset.fingerprint != MNIST_SHA256:
        raise DataError(f"{url}: serves data other than MNIST", download.REMEDY)
    return _write(dataset, target, target.directory / MNIST_ENTRY)


def _fallback_warning(local: DataError, network: DataError) -> str:
    return (
        f"using the {bundled.DESCRIPTION}, since full MNIST was not found "
        f"({local.problem}; {network.problem}); to use all of it, pass --data an mnist.pkl.gz, an "
        f"mnist.npz or a directory of IDX files, or {network.remedy}"
    )
