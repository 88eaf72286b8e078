"""Bounds on what one case of a property-based test may take."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import target

SECONDS, MEBIBYTES = 10.0, 1024.0


@contextmanager
def bounded() -> Iterator[None]:
    """Fails if the block takes more than 10 s of processor time, or raises peak memory by more than 1 GiB.

    Hypothesis searches for the largest figures, and shows them with --hypothesis-show-statistics.
    """
    peak, began = peak_mebibytes(), time.process_time()
    yield
    seconds, memory = time.process_time() - began, peak_mebibytes() - peak
    target(seconds, label="seconds of a case")
    target(memory, label="MiB by which a case raised peak memory")
    assert seconds < SECONDS, f"the case took {seconds:.1f} s"
    assert memory < MEBIBYTES, f"the case took {memory:.0f} MiB"


def peak_mebibytes() -> float:
    """The most memory that this process has held, in MiB (Linux gives KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
