"""A command's screen, as a person at a terminal sees it."""

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyte


def record(
    command: Sequence[str],
    columns: int = 120,
    rows: int = 40,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    timeout: float = 300,
) -> tuple[int, bytes]:
    """Run a command at a terminal of its own; its exit code, and every byte that it wrote there.

    Raises:
        TimeoutError: it did not end within `timeout` seconds; it is killed.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        command,
        cwd=directory,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**plain, "TERM": "xterm", **(environment or {})},
        start_new_session=True,
    )
    os.close(theirs)
    said, deadline = b"", time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 0.5)[0]:
                continue
            part = b""
            with contextlib.suppress(OSError):  # Linux' way to say that the other end is closed
                part = os.read(ours, 65536)
            if not part:
                return process.wait(30), said
            said += part
        raise TimeoutError(f"no end in {timeout} s; on the terminal: {said.decode()}")
    finally:
        os.close(ours)
        if process.poll() is None:
            process.kill()
            process.wait()


def screen(said: bytes, columns: int = 120, rows: int = 40) -> "pyte.Screen":
    """A terminal's screen after it was sent `said`; rows that scrolled off are gone."""
    shown = pyte.Screen(columns, rows)
    pyte.ByteStream(shown).feed(said)
    return shown
