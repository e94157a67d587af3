"""The command `mnist-dist`, also `python -m mnist_dist`, for an installed package.

`torchrun -m mnist_dist train` is `torchrun train_ddp.py` without a checkout.
"""

import importlib
import sys
from collections.abc import Sequence

from mnist_dist import __version__
from mnist_dist.distributed.launcher import set_interrupts_fatal
from mnist_dist.errors import ReportedError, UserError, prepare_streams, print_line, print_result

# Each module has `run(flags)`, which returns the exit code or exits the process. Only the module of
# the command is imported, since importing torch takes seconds.
_COMMANDS = {
    "train": ("train_ddp", "train the classifier"),
    "evaluate": ("mnist_dist.commands.evaluate", "evaluate a trained model"),
    "predict": ("mnist_dist.commands.predict", "classify images of digits"),
    "export": ("mnist_dist.commands.export", "export a model with torch.export or to ONNX"),
    "doctor": ("mnist_dist.commands.doctor.command", "check this machine or cluster"),
    "runs": ("mnist_dist.commands.runs", "list runs"),
    "compare": ("mnist_dist.commands.compare", "compare the losses of runs"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    prepare_streams()
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except ReportedError as error:
        print_line(f"{error.kind}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _run(words: Sequence[str]) -> int:
    match words:
        case ["--version"]:
            print_result(f"mnist-dist {__version__}")
        case ["--help" | "-h"] | []:
            print_result(_usage())
        case [command, *flags] if command in _COMMANDS:
            set_interrupts_fatal(True)
            module = importlib.import_module(_COMMANDS[command][0])
            set_interrupts_fatal(False)
            code: int = module.run(flags)
            return code
        case [unknown, *_]:
            raise UserError(f"no command {unknown!r}; see --help")
    return 0


def _usage() -> str:
    lines = [f"  {name:16}{summary}" for name, (_, summary) in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: mnist-dist COMMAND [ARGUMENTS]",
            "",
            *lines,
            "  --version       print the version",
            "  --help          print this help; COMMAND --help lists a command's flags",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
