"""Measure how cost grows with ten times the data and with up to 16 processes.

python -m benchmarks.growth --data ../shared/data/mnist.pkl.gz

The larger data set holds every image ten times. Memory is that of `benchmarks.start`, per process.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import start
from benchmarks.jobs import epochs_after_the_first, train
from mnist_dist.data import find_data, load

_TIMES = 10
_PROCESSES = [1, 2, 4, 8, 16]


def write_larger(data: str, file: Path) -> None:
    """Write an .npz like Keras's; its loader holds out the last sixth for validation."""
    splits = load(find_data(data, None))
    both = (splits.train, splits.validation)
    arrays = {
        "x_train": np.concatenate([split.images.numpy() for split in both]).reshape(-1, 28, 28),
        "y_train": np.concatenate([split.labels.numpy() for split in both]),
        "x_test": splits.test.images.numpy().reshape(-1, 28, 28),
        "y_test": splits.test.labels.numpy(),
    }
    repeated = {name: np.concatenate([a] * _TIMES) for name, a in arrays.items()}
    np.savez(file, allow_pickle=False, **repeated)


def by_data(data: str, directory: Path) -> Iterator[str]:
    """Yield the lines of a table with a row for each data set."""
    larger = directory / "larger.npz"
    write_larger(data, larger)
    yield (
        "| data | training samples | conversion, once per node (s) | cache read (s) "
        "| s/epoch | us/sample | MiB/process |"
    )
    yield "|---" * 7 + "|"
    for name, path in (("full", data), (f"{_TIMES} times", str(larger))):
        os.environ["MNIST_DIST_CACHE"] = str(directory / f"cache-{name}")
        convert, read = (float(start.run_python(start.READ, path)) for _ in range(2))
        seconds, samples = (
            epoch_seconds(directory / name, 1, path),
            len(load(find_data(path, None)).train),
        )
        cells = [f"{convert:.2f}", f"{read:.3f}", f"{seconds:.2f}"]
        cells += [f"{1e6 * seconds / samples:.1f}", f"{start.our_memory(path, 1):.0f}"]
        yield "| " + " | ".join([name, f"{samples:,}", *cells]) + " |"


def by_processes(data: str, directory: Path) -> Iterator[str]:
    """Yield the lines of a table with a row for each number of processes."""
    yield "| processes | start to first step (s) | s/epoch | MiB/process |"
    yield "|---" * 4 + "|"
    for processes in _PROCESSES:
        first_step = start.seconds_until_output(
            start.OUR_START, "--data", data, processes=processes
        )
        seconds = epoch_seconds(directory / str(processes), processes, data)
        memory = start.our_memory(data, processes) / processes
        yield f"| {processes} | {first_step:.1f} | {seconds:.2f} | {memory:.0f} |"


def epoch_seconds(run: Path, processes: int, data: str) -> float:
    """Return the median of the seconds to train and validate an epoch."""
    records = train(run, processes, f"--data={data}", "--epochs=4")
    return statistics.median(seconds for seconds, _ in epochs_after_the_first(records))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="auto", help="as for train_ddp.py")
    chosen = parser.parse_args()
    data = chosen.data if chosen.data in ("auto", "bundled") else str(Path(chosen.data).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        for lines in (by_processes, by_data):
            for line in lines(data, Path(temporary)):
                print(line, flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
