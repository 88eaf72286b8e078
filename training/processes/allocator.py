"""Makes glibc keep freed memory in the process.

The buffers of a long sequence exceed 32 MiB, the size from which glibc returns each freed buffer to the system. Every
step would then get its memory anew, zeroed, at one page fault per 4 KiB. docs/results.md has what that costs.
"""

import ctypes
import os

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # parameters of mallopt(3)
MAPPED_FROM = 1 << 30  # bytes; larger buffers are still mapped and returned one by one
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # makes PyTorch ask for large pages, where the system leaves that to programs
USERS_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")  # a user's own settings stand


def keep_freed_memory() -> bool:
    """Keep freed memory and ask for large pages. False where the C library is not glibc or the user has chosen.

    Call it before the first tensor is allocated: PyTorch reads its setting once.
    """
    os.environ.setdefault(LARGE_PAGES, "1")
    if any(name in os.environ for name in USERS_OWN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(MMAP_THRESHOLD, MAPPED_FROM) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
