"""Measure the disk under the run directory, through an unnamed file that leaves nothing there."""

import errno
import fcntl
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from mnist_dist.files import sync_directory
from mnist_dist.lock import NO_LOCKS

_BLOCK = 1 << 20
_BLOCKS = 16
_SYNCS = 5
# Beyond that a slow disk has been measured well enough.
_ENOUGH_S = 1.5
# Local to one kernel: equal numbers on another host mean another disk.
_LOCAL = frozenset(
    ["ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "rootfs"]
)


def identify(path: Path, boot: str) -> dict[str, Any]:
    """Find the directory that `path` is or will be created in, without touching it.

    Args:
        path: of the runs, absolute.
        boot: identifies the running kernel.

    Returns:
        `directory`, the nearest that exists, and whether `path` itself `exists`; `kind` of file
        system; `identity`, which is equal on two nodes exactly where they see the same directory:
        device and inode on a local disk, inode and nanosecond of the last change on a network's;
        `error` alone if the directory cannot be read.
    """
    try:
        directory = next(place for place in (path, *path.parents) if place.exists())
        # Opening it makes NFS ask its server again.
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        status = os.fstat(handle)
        os.close(handle)
    except OSError as error:
        return {"error": error.strerror or str(error)}
    kind, exists = _file_system(directory), directory == path
    volume = [boot, status.st_dev] if kind in _LOCAL else [kind, status.st_ctime_ns]
    identity = [*volume, status.st_ino, exists]
    return {"directory": str(directory), "exists": exists, "kind": kind, "identity": identity}


def measure(path: Path, boot: str) -> dict[str, Any]:
    """Write and flush an unnamed file in the directory that `identify` finds.

    Returns:
        What `identify` returns, and `bytes_per_second` including the flush, `fsync_seconds` of a
        small write, `free_bytes`, `locks` and `flushes_directories`, whether the file system can
        do so; or `error`, with `directory` if it was found.
    """
    found = identify(path, boot)
    if "error" in found:
        return found
    directory = found["directory"]
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            block, start, written = os.urandom(_BLOCK), time.perf_counter(), 0
            while written < _BLOCKS * _BLOCK and time.perf_counter() - start < _ENOUGH_S:
                written += file.write(block)
            os.fsync(file.fileno())
            speed = written / (time.perf_counter() - start)
            syncs: list[float] = []
            while len(syncs) < _SYNCS and sum(syncs) < _ENOUGH_S:
                start = time.perf_counter()
                file.write(block[:4096])
                os.fsync(file.fileno())
                syncs.append(time.perf_counter() - start)
            locks = _can_lock(file.fileno())
        return found | {
            "locks": locks,
            "flushes_directories": sync_directory(Path(directory)),
            "bytes_per_second": speed,
            "fsync_seconds": statistics.median(syncs),
            "free_bytes": shutil.disk_usage(directory).free,
        }
    except OSError as error:
        full, space = error.errno == errno.ENOSPC, os.statvfs(directory)
        if full and space.f_files and not space.f_ffree:
            return found | {"error": "no inode is free for another file: delete some"}
        return found | {"error": error.strerror or str(error)}


def _can_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _file_system(directory: Path) -> str:
    """Return its type in the kernel's words, such as `ext4` or `nfs4`; empty if unknown."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    real, best, kind = directory.resolve(), -1, ""
    for mount in mounts:
        before, _, after = mount.partition(" - ")
        point = Path(before.split()[4].replace("\\040", " "))
        if real.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split()[0]
    return kind
