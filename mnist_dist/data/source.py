"""Find the data: in the cache, on disk, on the network, or at last in the package itself."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mnist_dist.data import cache, download, pickles, subset
from mnist_dist.data.errors import DataError, blaming
from mnist_dist.data.formats import recognise
from mnist_dist.data.splits import GENUINE_MNIST, Dataset, assemble

# Where the original script looked, below the working directory.
LOCAL_FILE = Path("data/mnist/mnist.pkl.gz")
MNIST_ENTRY = "mnist.pt"


@dataclass(frozen=True)
class Located:
    """Where this host's processes find the data. Plain and picklable.

    ``cache_file`` is None for the bundled digits. ``warnings`` are for the user, once per job.
    """

    cache_file: Path | None
    description: str
    warnings: tuple[str, ...] = ()


def locate(data: str, cache_dir: str | Path | None) -> Located:
    """Find the data and see that it lies in the cache. To be called by one process per host.

    Args:
        data: ``auto`` (the cache, else ``data/mnist/mnist.pkl.gz``, else one download, else the
            bundled digits with a warning), ``bundled``, or a path, which never falls back.
        cache_dir: None for MNIST_DIST_CACHE, else the user's cache directory.

    Raises:
        DataError: `data` is a path and cannot be used, or the cache's lock is never released.
    """
    if data == "bundled":
        return _bundled()
    directory = cache.directory(cache_dir)
    if data == "auto":
        return _once(directory / MNIST_ENTRY, partial(_obtain, directory))
    source = recognise(Path(data))
    entry = directory / source.cache_entry()
    return _once(entry, lambda place: _keep(source.read(), place, entry))


def load(located: Located) -> Dataset:
    """Open what `locate` found. Quick, and every process of the host shares one copy in memory.

    Raises:
        DataError: the cache entry has been damaged or removed since.
    """
    return subset.load() if located.cache_file is None else cache.read(located.cache_file)


def _once(entry: Path, make: Callable[[cache.Place], Located]) -> Located:
    if found := _cached(entry):
        return found
    with cache.exclusive(entry) as place:
        # Whoever held the lock before may have made it.
        return _cached(entry) or make(place)


def _cached(entry: Path) -> Located | None:
    try:
        cache.verify(entry)
        return Located(entry, cache.read(entry).description)
    except DataError:
        return None


def _keep(dataset: Dataset, place: cache.Place, entry: Path) -> Located:
    """Write `dataset` as `entry` in `place`, or where that fails (a full disk) in a private one."""
    try:
        kept = place.directory / entry.name
        cache.write(kept, dataset)
    except OSError as error:
        place = cache.private_place(place.directory, error)
        kept = place.directory / entry.name
        with blaming(kept, cache.REMEDY):
            cache.write(kept, dataset)
    return Located(kept, dataset.description, place.warnings)


def _obtain(directory: Path, place: cache.Place) -> Located:
    """MNIST where `directory` has none yet; an error here is a reason to try the next source."""
    try:
        return _take_local_file(directory, place)
    except DataError as error:
        local_error = error
    try:
        found = _download(place)
    except DataError as network_error:
        return _bundled(_last_resort(local_error, network_error))
    if LOCAL_FILE.exists():
        found = replace(found, warnings=(*found.warnings, f"not used: {local_error}"))
    return found


def _take_local_file(directory: Path, place: cache.Place) -> Located:
    source = recognise(LOCAL_FILE)
    own_entry = directory / source.cache_entry()
    if found := _cached(own_entry):
        return found
    dataset = source.read()
    # Only the genuine set may answer to a later run's "auto" in another directory.
    genuine = dataset.fingerprint == GENUINE_MNIST
    return _keep(dataset, place, directory / MNIST_ENTRY if genuine else own_entry)


def _download(place: cache.Place) -> Located:
    url = os.environ.get("MNIST_DIST_URL") or download.URL
    entry = place.directory / MNIST_ENTRY
    with cache.temporary_file(entry) as file:
        download.fetch(url, file)
        with blaming(url, download.REMEDY):
            dataset = assemble(pickles.read(file), url)
    # By content: the bytes of a gzip differ between mirrors that serve the same data.
    if dataset.fingerprint != GENUINE_MNIST:
        raise DataError(f"{url}: serves another data set than MNIST", download.REMEDY)
    return _keep(dataset, place, entry)


def _bundled(*warnings: str) -> Located:
    return Located(None, subset.DESCRIPTION, warnings)


def _last_resort(local: DataError, network: DataError) -> str:
    return (
        f"using the {subset.DESCRIPTION}, since full MNIST was not found "
        f"({local.problem}; {network.problem}); for all of it give --data a mnist.pkl.gz, a "
        f"mnist.npz or a directory of IDX files, or {network.remedy}"
    )
