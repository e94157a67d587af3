"""What `--recipe tuned` reaches, over several seeds.

python -m benchmarks.recipe --seeds 5
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from benchmarks.jobs import train


def main() -> None:
    """Print one row per seed, and the mean."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="auto")
    parser.add_argument("--recipe", default="tuned")
    parser.add_argument("--seeds", type=int, default=5)
    chosen = parser.parse_args()
    print("| seed | best val loss | test accuracy |\n|---|---|---|")
    accuracies = []
    for seed in range(chosen.seeds):
        with tempfile.TemporaryDirectory() as directory:
            flags = [f"--data={chosen.data}", f"--recipe={chosen.recipe}", f"--seed={seed}"]
            *epochs, test = train(Path(directory) / "run", 1, *flags)
        best = min(epoch["val/loss"] for epoch in epochs)
        accuracies.append(test["test/accuracy"])
        print(f"| {seed} | {best:.4f} | {accuracies[-1]:.2%} |", flush=True)
    print(f"| mean | | {statistics.mean(accuracies):.2%} |")


if __name__ == "__main__":
    main()
