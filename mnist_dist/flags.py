"""A frozen dataclass as a command line, whose mistakes are one line each."""

import contextlib
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

from mnist_dist.errors import UserError

T = TypeVar("T")


def parse_flags(kind: type[T], argv: Sequence[str], program: str) -> T:
    """Read `argv` as the fields of the dataclass `kind`; its docstrings are the help.

    Args:
        kind: field `run_dir` is the flag `--run-dir`.
        argv: without the program's name.
        program: what --help calls it.

    Raises:
        UserError: one line that names the flag, the value and the remedy.
        SystemExit: with code 0 after --help.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=argv, prog=program)
    except SystemExit as end:
        if end.code == 0:
            raise
        raise UserError(_one_line(said.getvalue())) from None


_PLAINER = (
    (r"Error parsing (\S+): invalid literal for int.*?: (.*)", r"\1 \2: expected a whole number"),
    (r"Error parsing (\S+): could not convert string.*?: (.*)", r"\1 \2: expected a number"),
    (r"Error parsing (\S+): ", r"\1: "),
    (r"Missing from [^:]+: (\S+).*", r"\1 is missing"),
)


def _one_line(box: str) -> str:
    """Tyro's framed error as one line: its message, the flag it suggests, where the help is."""
    rows = [line.strip("│╭╮╰╯ ").strip() for line in box.splitlines()[1:-1]]
    sections = " ".join(rows).split("─")
    parts = [part.strip() for part in sections if part.strip()]
    message = parts[0] if parts else "the command line could not be read"
    for pattern, plain in _PLAINER:
        message = re.sub(pattern, plain, message)
    hints = [re.search(r"Perhaps you meant:\s+(--[\w-]+)", part) for part in parts]
    suggestion = "".join(f"; perhaps you meant {hint[1]}" for hint in hints if hint)
    return f"{message}{suggestion}; --help lists every flag"
