"""What becomes of memory that this process no longer needs."""

import contextlib
import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_MIB = 1 << 20


def keep_freed_memory() -> None:
    """Let malloc keep what is freed: the next batch will want as much again.

    Left to itself glibc gives back a tensor of some hundred KiB, and the kernel clears every page
    of the next one: evaluation took two to three times as long (docs/performance.md). C libraries
    without `mallopt` stay as they are (https://man7.org/linux/man-pages/man3/mallopt.3.html).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)  # the most that it takes
        mallopt(_M_TRIM_THRESHOLD, 256 * _MIB)
