"""Freed memory stays with the process.

A long row's buffers are larger than 32 MiB, from where on glibc hands each one back to the system when it is freed:
every step then gets its memory anew, zeroed, a page fault for each 4 KiB. docs/results.md has what that costs.
"""

import ctypes
import os

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # parameters of mallopt(3)
FROM = 1 << 30  # bytes from which a buffer is still mapped and handed back by itself
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # PyTorch asks for them, where the system leaves that to programs


THEIRS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")  # a user's own choice


def keep_freed_memory() -> bool:
    """Keep what is freed, and ask for large pages. False where the C library is not glibc or the user has chosen.

    To be called before the first tensor is made: PyTorch reads its setting once.
    """
    os.environ.setdefault(LARGE_PAGES, "1")
    if any(name in os.environ for name in THEIRS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(MMAP_THRESHOLD, FROM) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
