"""No test touches the network or the user's cache."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from processes import ROOT, completed_run

from mnist_dist.lock import FileLock

SHARED = Path(os.environ.get("MNIST_DIST_SHARED_DATA", ROOT.parent / "shared" / "data")).resolve()

# Tests wait as much as they compute: four at a time take half as long as one after the other, on
# two cores. More would take the cores from jobs that other tests wait for.
_AT_A_TIME = 4


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes run the tests: none but this one if some tests are named."""
    return _AT_A_TIME if config.args == config.getini("testpaths") else 0


# Another job may hold the cores: no test asserts a time, and none of hypothesis's do.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# What takes longest comes first, so that the processes end at about the same time.
_FIRST = ("slurm", "faults", "hosts", "gpu", "gpu_emulated", "commands")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by their folders."""

    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        return _FIRST.index(folder) if folder in _FIRST else len(_FIRST)

    items.sort(key=place)


@pytest.fixture(autouse=True, scope="session")
def sealed_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Point cache and download at places of this test session; nothing listens on port 9."""
    os.environ["MNIST_DIST_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["MNIST_DIST_URL"] = "http://127.0.0.1:9/mnist.pkl.gz"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Jobs inherit signals that are ignored, as by nohup or in a shell's background.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def threads_as_before() -> Iterator[None]:
    """Give torch back the number of threads that it had before the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def full_mnist() -> Path:
    """The directory with the full MNIST in both formats."""
    if not (SHARED / "mnist.pkl.gz").exists():
        pytest.skip(f"no full MNIST at {SHARED}; set MNIST_DIST_SHARED_DATA to its directory")
    return SHARED


def trained_once(factory: pytest.TempPathFactory, name: str, world_size: int, *flags: str) -> Path:
    """A completed run that all processes of this test session share."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    lock = FileLock(root / f"{name}.lock")
    lock.acquire(wait=250, notify=print)
    try:
        if (root / name / "done").exists():
            return root / name / f"run-{world_size}"
        run = completed_run(root / name, world_size, *flags)
        (root / name / "done").touch()
        return run
    finally:
        lock.release()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run on the bundled digits, good enough to be used. To be read only."""
    return trained_once(tmp_path_factory, "trained", 1, "--data=bundled", "--recipe=tuned")


@pytest.fixture(scope="session")
def trained_on_all(full_mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short tuned run on full MNIST, in two processes. To be read only."""
    flags = [f"--data={full_mnist}", "--recipe=tuned", "--epochs=5"]
    return trained_once(tmp_path_factory, "trained-on-all", 2, *flags)
