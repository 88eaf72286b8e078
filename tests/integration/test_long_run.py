"""A few hundred steps of long_run.py, and that its checks can fail."""

import json
from dataclasses import replace
from pathlib import Path

from tests.integration.kill_test import start_fork
from tests.integration.long_run import LongRun
from tests.integration.template import ROOT


def test_a_run_of_several_starts_stays_flat_and_complete_and_the_checks_notice_what_is_not(tmp_path: Path) -> None:
    long = LongRun(ROOT / "configs/tiny.yaml", [], tmp_path / "run", start_fork, steps=300, starts=2)
    stopped_at, end = long.train()
    assert 150 <= stopped_at < end == 300
    assert long.problems == []

    metrics = tmp_path / "run/metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(line for line in lines if json.loads(line)["step"] != 77) + "\n" + lines[5] + "\n")
    long.check_metrics()
    last = max(sample.step for sample in long.samples)
    long.samples = [
        replace(sample, memory_kib=sample.memory_kib + 100 * sample.step, files=sample.files + sample.step)
        for sample in long.samples
    ]
    long.check_samples()
    (tmp_path / "run/checkpoints/step-000300/state.json").write_text("{}")
    long.check_checkpoints()
    for problem in ("train: steps repeat", "train: 1 steps are missing, the first is 77", "memory has grown by",
                    "files, before", "step-000300: state.json has another size"):  # fmt: skip
        assert any(problem in found for found in long.problems), (problem, long.problems, last)
