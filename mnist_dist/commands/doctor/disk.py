"""The disk under the run directory. What is written has no name, so nothing is left there."""

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20
_BLOCKS = 16
_SYNCS = 5
# Beyond that a slow disk has been measured well enough.
_ENOUGH_S = 1.5
# Of one kernel: another host that has the same numbers there has another disk.
_LOCAL = frozenset(
    ["ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay", "rootfs"]
)


def look(path: Path, boot: str) -> dict[str, Any]:
    """Which directory `path` is, or will be made in; nothing is touched.

    Args:
        path: of the runs, absolute.
        boot: names the running kernel.

    Returns:
        `directory`, the nearest that exists, and whether `path` `exists` itself; `kind` of file
        system; `identity`, which is equal on two hosts exactly where they see the same directory:
        on a disk of their own kernel its device and inode, on a network's its inode and the
        nanosecond of its last change; `error` alone if it cannot be read.
    """
    try:
        directory = next(place for place in (path, *path.parents) if place.exists())
        handle = os.open(directory, os.O_RDONLY)  # NFS asks its server again when it is opened
        status = os.fstat(handle)
        os.close(handle)
    except OSError as error:
        return {"error": error.strerror or str(error)}
    kind, exists = _file_system(directory), directory == path
    whose = [boot, status.st_dev] if kind in _LOCAL else [kind, status.st_ctime_ns]
    identity = [*whose, status.st_ino, exists]
    return {"directory": str(directory), "exists": exists, "kind": kind, "identity": identity}


def measure(look: Mapping[str, Any]) -> dict[str, Any]:
    """Write and flush an unnamed file in the directory that `look` found.

    Returns:
        `bytes_per_second` with the flush, `fsync_seconds` of a small write, `free_bytes`; or
        `error`.
    """
    if "error" in look:
        return {"error": look["error"]}
    directory = look["directory"]
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            block, begun, written = os.urandom(_BLOCK), time.perf_counter(), 0
            while written < _BLOCKS * _BLOCK and time.perf_counter() - begun < _ENOUGH_S:
                written += file.write(block)
            os.fsync(file.fileno())
            speed = written / (time.perf_counter() - begun)
            syncs: list[float] = []
            while len(syncs) < _SYNCS and sum(syncs) < _ENOUGH_S:
                begun = time.perf_counter()
                file.write(block[:4096])
                os.fsync(file.fileno())
                syncs.append(time.perf_counter() - begun)
        return {
            "bytes_per_second": speed,
            "fsync_seconds": statistics.median(syncs),
            "free_bytes": shutil.disk_usage(directory).free,
        }
    except OSError as error:
        return {"error": error.strerror or str(error)}


def _file_system(directory: Path) -> str:
    """Its type as the kernel calls it, such as `ext4` or `nfs4`; empty where nothing tells."""
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
