"""Files that are replaced whole or not at all, and directories that survive power loss."""

import os
from collections.abc import Callable
from pathlib import Path

TEMPORARY_SUFFIX = ".partial"


def write_atomically(
    path: Path, content: bytes, check: Callable[[Path], None] = lambda written: None
) -> None:
    """Replace `path` by `content`, or leave it as it was; after the return it survives power loss.

    The temporary file is in the same directory, since a rename is atomic only within one file
    system, and the directory is flushed too, since the rename itself lives there.

    Args:
        path: where to; its directory exists.
        content: all of the new file.
        check: looks at the written file before it takes its name; what it raises goes on to the
            caller, and nothing is left behind.

    Raises:
        OSError: the disk is full or the directory cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        check(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in the directory `path` survive power loss: created, renamed or deleted."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create the directory `path`, and parents as needed, so that they survive power loss."""
    missing = [path, *(parent for parent in path.parents if not parent.exists())]
    path.mkdir(parents=True, exist_ok=True)
    # Those of `path` even if it existed: a killed process may have created it just before.
    for directory in missing:
        sync_directory(directory.parent)
