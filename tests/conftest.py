"""Tests marked `cuda` run where there is an NVIDIA GPU: bash scripts/test.sh -m cuda"""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("any machine", deadline=None)  # else an example fails where the machine is busy
hypothesis.settings.load_profile("any machine")

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, and so do the processes that they start
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def without_determinism() -> Iterator[None]:
    """A training in this process asks for deterministic kernels, which changes what `auto` may choose."""
    yield
    torch.use_deterministic_algorithms(False)


def pytest_xdist_auto_num_workers() -> int:
    """A process for each core, but at most eight, because each takes 2 GB; none besides where tests share a GPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if torch.cuda.is_available() else min(8, cores)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
