"""Sweeps for real: two runs of seconds, interrupted and gone on with; and what their files may say."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from eval import sweep_results
from model.errors import UserError
from scripts.sweep import parse
from training.planning.formulas import work
from training.settings.consistency import last_distance
from training.settings.generate import ROOT
from training.sweeps.grid import Run, checked_settings, load_sweep, runs
from training.sweeps.jobs import note_finished, plan_table, slots, stages, stages_left, visible_devices

SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run_sweep(*arguments: str, expect: int = 0) -> str:
    process = start(*arguments)
    out, _ = process.communicate(timeout=900)
    assert process.returncode == expect, out
    return out


def sweep_file(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(f"name: t\nconfig: {ROOT / 'configs/tiny.yaml'}\n{text}")
    return path


def test_a_sweep_is_interrupted_goes_on_and_is_put_side_by_side(tmp_path: Path) -> None:
    """The first run is stopped in the middle; then it goes on, and the second one fails without ending the sweep."""
    asked = [str(sweep_file(tmp_path, SMALL)), "--out", str(tmp_path / "out"), f"data.cache_dir={tmp_path / 'cache'}"]
    eight, four = tmp_path / "out" / "window=8,seed=0", tmp_path / "out" / "window=4,seed=0"
    process = start(*asked)
    wait_for(lambda: '"kind": "train"' in text_of(eight / "metrics.jsonl"), process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 75, out
    assert "SIGINT: waiting for the runs at work to write a checkpoint" in out
    assert "window=8,seed=0: stopped in train, exit code 75" in out
    assert json.loads(text_of(eight / "metrics.jsonl").splitlines()[-1])["step"] < 60

    four.mkdir()
    (four / "settings.yaml").write_text(text_of(eight / "settings.yaml"))
    out = run_sweep(*asked, expect=1)
    assert "resumed" in text_of(eight / "train.log")
    assert "[1/2] window=8,seed=0: done" in out
    assert "window=4,seed=0 failed in train with exit code 2" in out
    assert "holds a run with other settings:\n  model.sliding_window: 8 there, 4 now\n" in out
    done, failed = json.loads(text_of(tmp_path / "out" / "sweep.json"))["runs"]
    assert (done["steps"], done["reach"], done["labels"]) == (60, 21, {"window": 8, "seed": 0})
    assert done["bits_per_byte"] > 0
    assert done["h90"] is not None
    assert (failed["state"], failed["h90"]) == ("failed", None)
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 1000
    assert "| 8 | 0 | 21 |" in text_of(tmp_path / "out" / "sweep.md")
    assert not stages_left(found(asked)[0], load_sweep(Path(asked[0])).evaluate)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_second_sweep_is_refused_and_the_trainings_of_a_killed_one_write_a_checkpoint_and_end(tmp_path: Path) -> None:
    out, cache = tmp_path / "out", f"data.cache_dir={tmp_path / 'cache'}"
    asked = [str(sweep_file(tmp_path, SMALL)), "--out", str(out), cache, "training.max_steps=5000"]
    process = start(*asked)
    run = out / "window=8,seed=0"
    wait_for(lambda: '"kind": "train"' in text_of(run / "metrics.jsonl"), process)
    assert f"{out}: process {process.pid} on {socket.gethostname()} is writing here" in run_sweep(*asked, expect=2)
    process.kill()
    process.communicate()
    wait_for(lambda: "stopped at step" in text_of(run / "train.log"))
    assert "SIGTERM: finishing this step, then a checkpoint" in text_of(run / "train.log")
    assert list((run / "checkpoints").glob("step-*"))


SMALL = """
set: {training.save_every_steps: 20, training.validate_every_steps: 60}
grid:
  - {axis: window, key: model.sliding_window, values: [8, 4]}
evaluate: {recall: {n: 4, distances: [1, 8]}, loss: {max_tokens: 500, rows: 2}}
"""


def found(asked: list[str]) -> list[Run]:
    path, _, out, cache = asked
    return runs(load_sweep(Path(path)), Path(path), Path(out), [cache])


def text_of(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 600
    while not happened():
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it has not happened after 600 s"
        time.sleep(0.02)


# -- what a file means ------------------------------------------------------------------------------------------------


def listed(folder: Path, text: str) -> list[Run]:
    path = sweep_file(folder, text)
    return runs(load_sweep(path), path, Path("out"))


def test_runs_are_all_combinations_each_once_a_seed(tmp_path: Path) -> None:
    text = """
grid:
  - {axis: layers, key: model.num_hidden_layers, values: [2, 4]}
  - axis: window
    points:
      - {label: narrow, set: {model.sliding_window: 4}}
      - {label: wide, set: {model.sliding_window: 8, data.seq_len: 128}}
seeds: [3, 5]
"""
    made = listed(tmp_path, text)
    assert [r.name for r in made] == [
        "layers=2,window=narrow,seed=3", "layers=2,window=narrow,seed=5", "layers=2,window=wide,seed=3",
        "layers=2,window=wide,seed=5", "layers=4,window=narrow,seed=3", "layers=4,window=narrow,seed=5",
        "layers=4,window=wide,seed=3", "layers=4,window=wide,seed=5",
    ]  # fmt: skip
    assert {"model.num_hidden_layers=4", "model.sliding_window=8", "data.seq_len=128", "seed=5"} <= set(
        made[7].overrides
    )
    settings = checked_settings(made)
    assert settings["layers=4,window=wide,seed=5"].model.num_hidden_layers == 4
    assert settings["layers=4,window=wide,seed=3"].name == "t-layers-4-window-wide-seed-3"


def test_values_of_any_type_arrive_and_null_takes_the_default_back(tmp_path: Path) -> None:
    text = """
set: {recall.seq_len: null, training.optimizer.lr: 3e-4, model.layers: [{kind: sliding, window: 4}, {kind: full}]}
grid: [{axis: compile, key: training.compile, values: [true, false]}]
"""
    settings = checked_settings(listed(tmp_path, text))["compile=true,seed=0"]
    assert settings.recall.seq_len is None
    assert settings.training.optimizer.lr == 3e-4
    assert [layer.kind for layer in settings.model.layers] == ["sliding", "full"]
    assert settings.training.compile is True


def test_a_setting_may_name_the_labels_of_its_run(tmp_path: Path) -> None:
    text = """
set: {model.init.grow_from: "runs/base-{window}-{seed}-{other}"}
grid: [{axis: window, key: model.sliding_window, values: [4, 8]}]
seeds: [3]
"""
    settings = checked_settings(listed(tmp_path, text))
    assert settings["window=4,seed=3"].model.init.grow_from == "runs/base-4-3-{other}"
    assert settings["window=8,seed=3"].model.init.grow_from == "runs/base-8-3-{other}"


def test_overrides_of_the_command_line_win(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, "set: {training.max_steps: 7}\nseeds: [1]\ngrid: [{axis: a, points: [{label: b}]}]")
    (run,) = runs(load_sweep(path), path, tmp_path, ["training.max_steps=9"])
    assert checked_settings([run])["a=b,seed=1"].training.max_steps == 9


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_run_of_a_shipped_sweep_could_start(path: Path) -> None:
    sweep = load_sweep(path)
    made = runs(sweep, path, Path("out"))
    settings = checked_settings(made)
    assert sweep.name == path.stem
    assert f"configs/sweeps/{path.name}" in path.read_text()
    assert plan_table(made[:1], settings).row_count == 1


def works_of(name: str) -> dict[str, dict[str, float]]:
    path = ROOT / "configs" / "sweeps" / f"{name}.yaml"
    settings = checked_settings(runs(load_sweep(path), path, Path("out")))
    return {run: {w.name: w.tokens for w in work(s, 1)} for run, s in settings.items()}


def test_the_law_compares_at_equal_tokens_and_up_to_the_reach_of_each() -> None:
    tokens = works_of("law")
    assert len(tokens) == 3 * 5 * 2
    assert len({tuple(w.items()) for w in tokens.values()}) == 1
    path = ROOT / "configs" / "sweeps" / "law.yaml"
    for s in checked_settings(runs(load_sweep(path), path, Path("out"))).values():
        assert last_distance(s) == s.model.num_hidden_layers * (s.model.sliding_window - 1)
        assert all(2560 % n == 0 for n in (*s.recall.curriculum.row_lengths, s.recall.seq_len))


def test_grown_stacks_are_asked_up_to_their_reach_at_nearly_equal_tokens_for_every_window() -> None:
    path = ROOT / "configs" / "sweeps" / "law-grown.yaml"
    for s in checked_settings(runs(load_sweep(path), path, Path("out"))).values():
        assert last_distance(s) == s.model.num_hidden_layers * (s.model.sliding_window - 1)
    by_depth: dict[str, list[float]] = {}
    for name, tokens in works_of("law-grown").items():
        by_depth.setdefault(name.split(",")[0], []).append(tokens["recall"])
    assert len(by_depth) == 8
    assert all(len(totals) == 3 and max(totals) / min(totals) < 1.1 for totals in by_depth.values())


def test_the_cost_is_compared_at_nearly_equal_tokens_in_the_shares_that_it_names() -> None:
    totals = []
    for name, tokens in works_of("cost").items():
        share = float(name.split("=")[1].split(",")[0])
        totals.append(sum(tokens.values()))
        assert tokens.get("recall", 0) / totals[-1] == pytest.approx(share, abs=0.01)
    assert max(totals) / min(totals) < 1.02


# -- what is refused --------------------------------------------------------------------------------------------------

AXIS = "{axis: a, points: [{label: 1}]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"grid  \(.*sweep.yaml\)\n    missing: the variables; every combination of their values is a run; add it"),
        ("grid: []", r"grid = \[\] .*:3\)\n    List should have at least 1 item"),
        ("gird: []", r"gird = \[\]  \(.*:3\)\n    unknown key; did you mean grid\?"),
        ("grid: [{axis: a, kye: b}]", r"grid.0.kye = 'b' .*\n    unknown key; did you mean grid.0.key\?"),
        ("grid: [{axis: a}]", "grid.0 = 'a' .*:3.*\n    an axis needs both key and values, or points; add what"),
        ("grid: [{axis: a, values: [1]}]", "an axis needs both key and values, or points"),
        ("grid: [{axis: a, key: seed, points: [{label: 1}]}]", "an axis needs both key and values, or points"),
        (f"grid: [{AXIS}, {AXIS}]", "grid.0.axis = 'a' .*\n    another axis has this name .*; use another name"),
        ("grid: [{axis: seed, key: seed, values: [1]}]", r"another axis has this name \(seeds are one\)"),
        (
            "grid: [{axis: a, points: [{label: 1}, {label: 1}]}]",
            r"grid.0 = \['1', '1'\] .*\n    one of them is listed twice",
        ),
        (
            f"grid: [{AXIS}]\nseeds: [1, 1]",
            r"seeds = \['1', '1'\] .*:4\)\n    one of them is listed twice; list each once",
        ),
        (f"grid: [{AXIS}]\nseeds: [-1]", "seeds.0 = -1 .*\n    expected at least 0"),
        (f"grid: [{AXIS}]\nevaluate: {{recall: {{m: 1}}}}", "evaluate.recall.m = 1"),
        ("grid: [", r"sweep.yaml:\d+: "),
    ],
)
def test_a_wrong_file_is_refused_with_line_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_sweep(sweep_file(tmp_path, text))


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="3 problems"):
        load_sweep(sweep_file(tmp_path, "gird: 1\nseeds: []\ngrid: [{points: []}]"))


def test_runs_without_a_config_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text(f"name: t\ngrid: [{AXIS}]")
    with pytest.raises(UserError, match=r"config  .*\n    missing: the YAML file that all runs start from, .*; add it"):
        load_sweep(tmp_path / "bare.yaml")


def test_settings_that_cannot_start_are_told_with_their_run(tmp_path: Path) -> None:
    made = listed(tmp_path, "grid: [{axis: lr, key: training.optimizer.ler, values: [1, 1e-3]}]\nseeds: [0, 1]")
    with pytest.raises(UserError, match="the run lr=1,seed=0 can't start") as refused:
        checked_settings(made)
    assert "did you mean training.optimizer.lr?" in str(refused.value)


def test_a_wrong_file_ends_with_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    out = run_sweep(str(sweep_file(tmp_path, "gird: 1")), expect=2)
    assert "did you mean grid?" in out
    assert "Traceback" not in out


def test_no_jobs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["x.yaml", "--jobs", "0"])
    assert "argument --jobs: '0': give a whole number of at least 1" in capsys.readouterr().err


# -- what is done already, and where ----------------------------------------------------------------------------------


def test_what_was_asked_otherwise_is_done_anew_with_all_that_follows_training(tmp_path: Path) -> None:
    path = sweep_file(tmp_path, SMALL)
    sweep = load_sweep(path)
    run = runs(sweep, path, tmp_path / "out")[0]
    run.folder.mkdir(parents=True)
    for stage, command in stages(run, sweep.evaluate).items():
        note_finished(run, stage, command)
    assert not stages_left(run, sweep.evaluate)
    more_items = sweep.evaluate.model_copy(update={"recall": sweep.evaluate.recall.model_copy(update={"n": 5})})
    assert list(stages_left(run, more_items)) == ["recall"]
    other = runs(sweep, path, tmp_path / "out", ["training.max_steps=9"])[0]
    assert list(stages_left(other, sweep.evaluate)) == ["train", "recall", "loss"]
    note_finished(other, "train", stages(other, sweep.evaluate)["train"])
    assert list(stages_left(other, sweep.evaluate)) == ["recall", "loss"]


def test_jobs_share_the_cores_out_and_take_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    assert [cores for cores, _ in slots(2, [])] == [[0, 1], [2, 3]]
    assert [environment["OMP_NUM_THREADS"] for _, environment in slots(2, [])] == ["2", "2"]
    assert all(cores for cores, _ in slots(7, []))
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment in slots(3, ["4", "6"])] == ["4", "6", "4"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert visible_devices() == ["4", "6"]


# -- side by side -----------------------------------------------------------------------------------------------------


def result(window: int, seed: int, h90: int | None) -> dict:
    none = dict.fromkeys(("h50", "u90", "bits_per_byte", "tokens_per_second", "reach", "tokens", "cache_bytes"))
    none |= {"further": {}}
    labels = {"window": window, "kind": "sliding", "seed": seed}
    return none | {"run": f"w{window}", "labels": labels, "state": "done", "h90": h90}


def test_picture_draws_the_mean_over_seeds_and_leaves_out_what_is_not_there() -> None:
    rows = [result(8, 0, 10), result(8, 1, 20), result(16, 0, 40), result(16, 1, None)]
    figure = sweep_results.figure(rows)
    assert figure is not None
    (ax,) = figure.axes
    assert ax.get_title(loc="left") == "H90, tokens"
    assert [list(x) for x in ax.lines[0].get_data()] == [[0, 1], [15.0, 40.0]]
    assert len(ax.collections[0].get_offsets()) == 3
    assert sweep_results.figure([result(8, 0, None)]) is None


def test_words_stand_side_by_side_on_one_axis_and_are_not_joined() -> None:
    rows = [result(8, 0, 10), result(8, 0, 20), result(8, 0, None)]
    for row, kind, rate in zip(rows, ("sliding", "full", "sinks"), (5.0, None, 7.0), strict=True):
        row["labels"] = row["labels"] | {"kind": kind}
        row["tokens_per_second"] = rate
    panels = sweep_results.figure(rows).axes
    assert len(panels) == 2
    assert [t.get_text() for t in panels[-1].get_xticklabels()] == ["sliding", "full", "sinks"]
    for ax in panels:
        assert [line.get_linestyle() for line in ax.lines] == ["None"]


def test_every_line_has_a_colour_of_its_own() -> None:
    rows = [result(window, 0, 10 * window) | {"labels": {"window": window, "lr": lr, "seed": 0}}
            for window in (8, 16) for lr in range(9)]  # fmt: skip
    panel = sweep_results.figure(rows).axes[0]
    assert len({to_hex(line.get_color()) for line in panel.lines}) == 9
    assert len(sweep_results.line_colors(6)) == 6


def test_markdown_has_a_line_a_run_and_the_command() -> None:
    page = sweep_results.markdown("t", [result(8, 0, 10), result(8, 1, None)], "python scripts/sweep.py t.yaml")
    assert "| 8 | sliding | 0 | – | 10 | – | – | – | – | – | – | done |" in page
    assert "| 8 | sliding | 1 | – | – |" in page
    assert "Made by `python scripts/sweep.py t.yaml`" in page


def test_further_tasks_have_a_column_each() -> None:
    rows = [result(8, 0, 10), result(16, 0, 40) | {"further": {"instruction": {"h90": 7, "h50": 9.4}}}]
    heads, _, first, second = sweep_results.markdown("t", rows, "c").splitlines()[4:8]
    assert "| U90 | H50 instruction | bits per byte |" in heads
    assert "| 10 | – | – | – |" in first
    assert "| 40 | – | – | 9 |" in second
