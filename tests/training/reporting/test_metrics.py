import json
import sys
from pathlib import Path

import pytest

from training.reporting.metrics import Metrics, TrainingProgress, truncate
from training.settings.schema import Settings


def settings(mode: str) -> Settings:
    return Settings.model_validate(
        {
            "name": "tiny",
            "model": {
                "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1,
                "sliding_window": 8,
            },
            "training": {"max_steps": 1},
            "tracking": {"wandb_mode": mode},
        }
    )  # fmt: skip


def rows(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_resume_cuts_off_lines_beyond_the_checkpoint_and_a_half_written_one(tmp_path: Path) -> None:
    lines = [json.dumps({"step": s, "kind": "train"}) for s in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "ki')
    with Metrics(tmp_path, settings("disabled"), {"wandb_id": "id"}, step=2) as metrics:
        metrics.write("train", 3, loss=0.5)
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("damaged", [b"{", b'{"kind": "train"}', b"\xff\xfe", b"3", b'{"step": null}'])
def test_a_damaged_line_is_left_out_with_a_message_and_later_lines_stay(
    tmp_path: Path, damaged: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 2}\n{"step": 3}\n')
    truncate(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert capsys.readouterr().out == f"{path}: 1 damaged lines are left out: 2\n"


def test_truncating_a_file_that_is_not_there_is_nothing(tmp_path: Path) -> None:
    truncate(tmp_path / "metrics.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_nan_is_written_as_null(tmp_path: Path) -> None:
    with Metrics(tmp_path, settings("disabled"), {"wandb_id": "id"}, step=0) as metrics:
        metrics.write("train", 1, loss=float("nan"))
    assert rows(tmp_path) == [{"step": 1, "kind": "train", "loss": None}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Metrics(tmp_path, settings("disabled"), {"wandb_id": "id"}, step=0, write=False) as metrics:
        metrics.write("train", 1, loss=1.0)
    assert not list(tmp_path.iterdir())


def test_training_goes_on_without_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Metrics(tmp_path, settings("offline"), {"wandb_id": "id"}, step=0) as metrics:
        metrics.write("train", 1, loss=1.0)
    assert "wandb is not available" in capsys.readouterr().out
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("show", [True, False])
def test_without_a_terminal_figures_are_plain_lines_and_other_ranks_print_none(
    capsys: pytest.CaptureFixture[str], show: bool
) -> None:
    long = "loss [bold]3.14[/bold] " * 9
    with TrainingProgress(10, 2, show) as progress:
        progress.figures(3, "compiled")
        progress.figures(4, long)
    expected = ["step 3/10  compiled  left -:--:--", f"step 4/10  {long}  left 0:00:"] if show else []
    lines = capsys.readouterr().out.splitlines()
    assert [line[: len(start)] for line, start in zip(lines, expected, strict=True)] == expected
