import time

import pytest
import torch

from training.processes.precision import Machine, matmul_rate


@pytest.mark.parametrize(
    ("fp32", "bf16", "wanted", "chosen"),
    [
        (1e11, 4e11, "auto", "bf16"),
        (1e11, 1.2e11, "auto", "fp32"),
        (1e11, 4e11, "fp32", "fp32"),
        (9, 1, "bf16", "bf16"),
    ],
)
def test_bf16_is_chosen_where_its_matmul_is_clearly_faster(fp32: float, bf16: float, wanted: str, chosen: str) -> None:
    assert Machine(fp32, bf16).choose(wanted) == chosen


def test_a_processor_without_bfloat16_computes_in_float32_whatever_a_busy_machine_measures() -> None:
    assert Machine(1e7, 4e9, has_bf16=False).choose("auto") == "fp32"
    assert Machine(1e7, 4e9, has_bf16=False).choose("bf16") == "bf16"


def test_measured_rate_is_plausible() -> None:
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32, size=256, seconds=0.02) < 1e14


def test_a_process_that_is_held_up_measures_a_rate_all_the_same() -> None:
    """All of its time is over before the first matrix product that counts."""
    assert matmul_rate(torch.device("cpu"), torch.float32, size=256, seconds=0.0) > 1e7


def test_measuring_takes_no_longer_where_the_matmul_is_slow() -> None:
    """float16 and bfloat16 have no fast kernel on many CPUs: one matmul of 1,024 rows takes seconds there."""
    cpu = torch.device("cpu")
    slow = min((torch.float16, torch.bfloat16), key=lambda dtype: matmul_rate(cpu, dtype, seconds=0.02))
    began = time.process_time()
    assert matmul_rate(cpu, slow, seconds=0.02) > 1e6
    assert time.process_time() - began < 1.0
