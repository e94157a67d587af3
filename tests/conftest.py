"""No test touches the network or the user's cache."""

import os
from pathlib import Path

import pytest
from processes import ROOT

SHARED = Path(os.environ.get("MNIST_DIST_SHARED_DATA", ROOT.parent / "shared" / "data")).resolve()


@pytest.fixture(autouse=True, scope="session")
def sealed_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Point cache and download at places of this test session; nothing listens on port 9."""
    os.environ["MNIST_DIST_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["MNIST_DIST_URL"] = "http://127.0.0.1:9/mnist.pkl.gz"
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def full_mnist() -> Path:
    """The directory with the full MNIST in both formats."""
    if not (SHARED / "mnist.pkl.gz").exists():
        pytest.skip(f"no full MNIST at {SHARED}; set MNIST_DIST_SHARED_DATA to its directory")
    return SHARED
