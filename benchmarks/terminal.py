"""Run a command at a terminal and render the terminal's screen."""

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
    """Run a command at a new terminal; return its exit code and every byte it wrote there.

    Raises:
        TimeoutError: it was killed after `timeout` seconds.
    """
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        command,
        cwd=directory,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**plain, "TERM": "xterm", **(environment or {})},
        start_new_session=True,
    )
    os.close(terminal)
    output, deadline = b"", time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            if not select.select([controller], [], [], 0.5)[0]:
                continue
            part = b""
            with contextlib.suppress(OSError):  # on Linux: the other end is closed
                part = os.read(controller, 65536)
            if not part:
                return process.wait(30), output
            output += part
        raise TimeoutError(f"still running after {timeout} s; on the terminal: {output.decode()}")
    finally:
        os.close(controller)
        if process.poll() is None:
            process.kill()
            process.wait()


def screen(output: bytes, columns: int = 120, rows: int = 40) -> "pyte.Screen":
    """Return a terminal's screen after `output`, without the rows that scrolled off."""
    shown = pyte.Screen(columns, rows)
    pyte.ByteStream(shown).feed(output)
    return shown
