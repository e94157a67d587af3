"""Ends of a run that are not bugs, reported once, in one line, without a traceback."""

import contextlib
import errno
import io
import os
import sys
from typing import Any, ClassVar, Literal


def print_line(line: str) -> None:
    """Print `mnist-dist: LINE` on stderr; ignore a lost terminal, a full disk or a closed stream.

    In one write, so that lines of several ranks do not mix.
    """
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.write(f"mnist-dist: {printable(line)}\n")
        sys.stderr.flush()


class ReportedError(Exception):
    """An end that every rank reaches together and rank 0 explains in one line."""

    exit_code: ClassVar[int]
    kind: ClassVar[str] = "error"
    status: ClassVar[Literal["failed", "preempted"]] = "failed"
    store: Any = None
    """The store through which all ranks got this error, where there is no process group."""

    def with_message(self, text: str) -> "ReportedError":
        """Return a UserError, JobError or Preempted, as this is, with another text."""
        kinds: tuple[type[ReportedError], ...] = (UserError, JobError, Preempted)
        return next(kind for kind in kinds if isinstance(self, kind))(text)


class UserError(ReportedError):
    """Bad input. The line names the flag or file, the value and the remedy."""

    exit_code = 2


class NodeError(UserError):
    """Input that does not fit one node. The first rank of each node that has it prints it."""


class JobError(ReportedError):
    """The run cannot continue. The line gives the step, the rank, the cause and the remedy."""

    exit_code = 1


class RendezvousError(JobError):
    """The ranks could not connect. The first rank of each node prints it for its node."""


class Preempted(ReportedError):  # noqa: N818 - not an error
    """The run was asked to stop, has saved its state, and can be continued.

    The exit code is that of sysexits.h for "try again later".
    """

    exit_code = 75
    kind = "stopped"
    status = "preempted"


def print_result(text: str) -> None:
    """Print the result of a command. A reader that has gone, as after `| head`, is no error.

    Raises:
        JobError: it cannot be written.
    """
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        print(text, flush=True)
    except OSError as error:
        if sys.stdout is not None:  # at exit, Python flushes it once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise JobError(
                f"the result cannot be written to standard output ({error.strerror}); "
                "write it elsewhere"
            ) from error


def prepare_streams() -> None:
    """Let no output raise for its characters, nor go into a file that the program opens.

    Characters that an encoding lacks are printed as escapes. If a standard stream is closed, the
    next file opened would get its descriptor, and with it what libraries write there.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor: this one
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def printable(value: object, limit: int | None = None) -> str:
    """Format text from outside in one line: escape control characters and what is not text.

    File names may contain newlines and invalid UTF-8. The rest beyond `limit` is cut off.
    """
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)
    )
    return text if limit is None or len(text) <= limit else f"{text[:limit]}..."


def counted(count: int, noun: str) -> str:
    """Format a count for a message: `1 CPU`, `2 CPUs`."""
    return f"{count} {noun}{'s' * (count != 1)}"
