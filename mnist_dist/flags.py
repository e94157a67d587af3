"""A frozen dataclass as a command line, whose mistakes are one line each."""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

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
    except BrokenPipeError:  # the reader of --help has gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except SystemExit as end:
        if end.code == 0:
            raise
        raise UserError(_one_line(said.getvalue(), kind)) from None


_PLAINER = (
    (r"Error parsing (\S+): invalid literal for int.*?: (.*)", r"\1 \2: expected a whole number"),
    (r"Error parsing (\S+): could not convert string.*?: (.*)", r"\1 \2: expected a number"),
    (r"Error parsing (\S+): ", r"\1: "),
    (r"Missing from [^:]+: (\S+).*", r"\1 is missing"),
)


def _one_line(box: str, kind: type[Any]) -> str:
    """Tyro's framed error as one line: its message, the flag that is most alike, where help is."""
    rows = [line.strip("│╭╮╰╯ ").strip() for line in box.splitlines()[1:-1]]
    message = " ".join(rows).partition("─")[0].strip() or "the command line could not be read"
    for pattern, plain in _PLAINER:
        message = re.sub(pattern, plain, message)
    before, unknown, words = message.partition("Unrecognized options: ")
    if unknown:
        message = f"{before}unknown: {words.replace(', ', ' ')}{_most_alike(words, kind)}"
    return f"{message.rstrip('.')}; --help lists every flag"


def _most_alike(words: str, kind: type[Any]) -> str:
    """The flags of `kind` that were probably meant."""
    known = [field.name.replace("_", "-") for field in dataclasses.fields(kind)]
    given = re.findall(r"--([\w-]+)", words.replace("_", "-"))
    meant = [f"--{name}" for flag in given for name in difflib.get_close_matches(flag, known, 1)]
    return f"; perhaps you meant {', '.join(meant)}" if meant else ""
