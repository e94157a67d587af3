"""The command `mnist-dist`, also `python -m mnist_dist`, for an installed package.

`torchrun -m mnist_dist train` is `torchrun train_ddp.py` without a checkout.
"""

import sys
from collections.abc import Sequence

from mnist_dist import __version__

_USAGE = """usage: mnist-dist COMMAND

  train [FLAGS]   train the classifier; --help lists the flags
  --version       say the version
  --help          say this"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    match words:
        case ["train", *flags]:
            import train_ddp  # takes as long as importing torch

            train_ddp.run(flags)
        case ["--version"]:
            print(f"mnist-dist {__version__}")
        case ["--help" | "-h"] | []:
            print(_USAGE)
        case [unknown, *_]:
            print(f"mnist-dist: error: no command {unknown!r}; see --help", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
