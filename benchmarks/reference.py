"""Record the curve that `mnist-dist doctor --train` compares with, after a change of the job.

python -m benchmarks.reference
"""

import argparse
import json
from pathlib import Path

from mnist_dist.commands.doctor.train_check import REFERENCE, record_reference


def main() -> None:
    """Write the file in the package."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    Path(str(REFERENCE)).write_text(json.dumps(record_reference(), indent=1) + "\n")
    print(f"wrote  {REFERENCE}")


if __name__ == "__main__":
    main()
