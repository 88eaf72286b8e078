import pytest
import torch

from model.errors import UserError
from scripts import bench
from scripts.benchmarks.peers import plain_config
from scripts.benchmarks.timing import OURS, alternate, peak_bytes, rows_of
from training.settings.schema import Settings


def test_a_peer_that_can_not_run_says_why_and_the_others_are_timed() -> None:
    def broken() -> None:
        raise NotImplementedError("no kernel for this window\nand a long story")

    rows = rows_of("x", "case", {OURS: int, "works": int, "broken": broken}, 2, "fp32", limits={"works": 2.0})
    works, refused = rows
    assert works.ratio is not None
    assert works.limit == 2.0
    assert (refused.peer_s, refused.note) == (None, "NotImplementedError: no kernel for this window")


def test_our_own_failure_is_no_peer_missing() -> None:
    def broken() -> None:
        raise ValueError("ours")

    with pytest.raises(RuntimeError, match="our own side of the benchmark failed: ValueError: ours"):
        alternate({OURS: broken}, 1)


def test_peak_counts_what_is_alive_at_once() -> None:
    x = torch.zeros(1000)

    def work() -> None:
        for _ in range(5):
            y = x + 1
            y += 1
            del y

    assert peak_bytes(work) == 4000


def test_a_stack_that_mistral_can_not_express_has_no_peer(settings: Settings) -> None:
    mixed = settings.model.model_dump() | {"layers": [{"kind": "sliding"}, {"kind": "full"}]}
    with pytest.raises(UserError, match="so Mistral is no peer for it"):
        plain_config(Settings.model_validate(settings.model_dump() | {"model": mixed}))


@pytest.mark.parametrize("name", ["rounds", "threads", "rows", "prompt-tokens", "new-tokens"])
def test_a_count_below_one_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--{name} 0: give at least 1"):
        bench.parse(["train", f"--{name}=0"])
