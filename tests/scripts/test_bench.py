import json
import sys
from pathlib import Path

import pytest
import torch

from model.decoder import WindreachForCausalLM
from model.errors import UserError
from scripts import bench
from training.processes import allocator, precision

KEYS = ["bench", "case", "peer", "ours_s", "peer_s", "ratio", "limit", "ours_bytes", "peer_bytes", "dtype", "threads"]


def test_the_command_prints_a_table_and_writes_rows_with_the_fixed_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(WindreachForCausalLM, "compile_decoding", lambda self: None)
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: None)
    threads: list[int | None] = []
    monkeypatch.setattr(precision, "set_up_threads", lambda wanted, local_processes: threads.append(wanted))
    command = (
        "bench.py decode --config configs/tiny.yaml --rounds 1 --batches 2,1 --new-tokens 3 --device cpu --threads 9"
    )
    monkeypatch.setattr(sys, "argv", [*command.split(), "--json", str(tmp_path / "bench.json")])
    bench.main()
    rows = json.loads((tmp_path / "bench.json").read_text())
    assert all(list(row) == [*KEYS, "note"] for row in rows)
    assert [row["case"].split(", W")[0] for row in rows] == ["tiny: 1 x 3 tokens after 48"] * 3 + [
        "tiny: 2 x 3 tokens after 48"
    ] * 3
    printed = capsys.readouterr().out
    assert threads == [9]
    assert printed.startswith(f"{torch.get_num_threads()} threads; matmul fp32 ")
    assert f"{rows[0]['ratio']:.2f} x (aim: 3)" in printed


def test_stream_and_lists_of_lengths_have_defaults() -> None:
    arguments = bench.parse(["all", "model.hidden_size=64", "--lengths", "512,256,512"])
    assert (arguments.lengths, arguments.windows) == ((256, 512), (16, 32, 64, 128, 256, 512))
    assert (arguments.tokens, arguments.seq_lens, arguments.overrides) == (131_072, (), ["model.hidden_size=64"])


@pytest.mark.parametrize("option", ["--rounds=0", "--lengths=512,0", "--threads=-1", "--seq-lens=64,x"])
def test_what_is_no_number_of_at_least_one_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.parse(["train", option])
    assert "give a whole number of at least 1" in capsys.readouterr().err


def test_a_file_that_can_not_be_written_is_refused_before_anything_is_timed(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "none/bench.json"):
        with pytest.raises(UserError, match=r"^--json .*: can't be written; name a file in a folder that exists$"):
            bench.parse(["attention", "--json", str(file)])


def test_the_device_is_a_gpu_only_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.parse(["aims"]).device is None
    assert bench.parse(["train", "--device", "cuda", "--peer", "transformers flex"]).device == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.py", "aims", "--device", "cuda"])
    with pytest.raises(UserError, match=r"^--device cuda: .*; leave it out, or give cpu or cuda$"):
        bench.main()
