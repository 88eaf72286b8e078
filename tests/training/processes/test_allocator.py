import ctypes
import os
import subprocess
import sys

import pytest

from training.processes.allocator import keep_freed_memory

STEPS = """
import resource, sys
from training.processes.allocator import keep_freed_memory
if sys.argv[1] == "kept": assert keep_freed_memory()
import torch
def step(): torch.zeros(16 << 20)  # 64 MiB
for _ in range(20): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_a_freed_buffer_costs_no_page_faults_again() -> None:
    def faults(mode: str) -> int:
        found = subprocess.run([sys.executable, "-c", STEPS, mode], capture_output=True, text=True, check=True)
        return int(found.stdout)

    assert faults("kept") < 50 < faults("handed back")


def test_what_the_user_has_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert not keep_freed_memory()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
