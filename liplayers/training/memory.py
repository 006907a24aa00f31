"""How the C library keeps memory that tensors free."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Have glibc keep the memory that tensors free, for the next ones; whether it does (another C library does not).

    glibc gives blocks above 32 MiB back to the system as soon as they are free, and the system clears each page again
    before the next use: elementwise operations on large activations take several times as long. The process holds the
    most memory that it has needed until it ends.

    >>> keep_freed_memory() in (True, False)
    True
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
