"""Compare the loss curves of the same run at several world sizes.

python -m benchmarks.invariance --world-sizes 1 2 4
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.jobs import train


def main() -> None:
    """Print one row per world size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="auto")
    parser.add_argument("--recipe", default="baseline")
    parser.add_argument("--global-batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 4])
    chosen = parser.parse_args()
    flags = [f"--data={chosen.data}", f"--recipe={chosen.recipe}"]
    if chosen.global_batch_size is not None:
        flags.append(f"--global-batch-size={chosen.global_batch_size}")
    difference = "largest relative difference from one process's val loss, over all epochs"
    print(f"| processes | final val loss | test accuracy | {difference} |")
    print("|---|---|---|---|")
    first: list[float] = []
    for world_size in chosen.world_sizes:
        with tempfile.TemporaryDirectory() as directory:
            run = Path(directory) / "run"
            *epochs, test = train(run, world_size, *flags)
        losses = [epoch["val/loss"] for epoch in epochs]
        first = first or losses
        largest = max(abs(a - b) / b for a, b in zip(losses, first, strict=True))
        print(
            f"| {world_size} | {losses[-1]:.6f} | {test['test/accuracy']:.2%} | {largest:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
