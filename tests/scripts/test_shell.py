"""What the shell scripts refuse, and how the quickstart starts training. A stub stands in for `.venv/bin/python`."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"scripts/{script}", *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A clone without a .venv: what bootstrap reads."""
    (tmp_path / "scripts").mkdir()
    for name in ("requirements.txt", "requirements-dev.txt", "scripts/bootstrap.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_no_python_of_the_right_age_is_said(bare: Path) -> None:
    done = run(bare, "bootstrap.sh", PYTHON="no-such-python")
    assert done.returncode == 2
    assert "no Python 3.11 or newer found (looked for: no-such-python)" in done.stderr
    assert "PYTHON=/path/to/python3.12 bash scripts/bootstrap.sh" in done.stderr


def test_no_package_index_is_said(bare: Path) -> None:
    done = run(bare, "bootstrap.sh", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert done.returncode == 2
    assert "a package index must be reachable" in done.stderr
    assert not list((bare / ".venv").glob("installed-*"))


def test_unknown_argument_is_refused(bare: Path) -> None:
    (bare / ".venv/bin").mkdir(parents=True)
    (bare / ".venv/bin/python").symlink_to(shutil.which("true") or "/bin/true")
    done = run(bare, "bootstrap.sh", "--devel")
    assert (done.returncode, done.stderr) == (2, "error: unknown argument '--devel'; the only one is --dev\n")


def test_every_package_is_pinned() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith(("#", "-r ")):
                assert re.fullmatch(r"[A-Za-z0-9_-]+==[0-9a-z.]+", line), f"{name}: {line}"


STUB = """#!/bin/bash
# Notes the command; answers with a run folder, or with the number of GPUs.
echo "${0##*/} $*" >>commands
[ "$1" != scripts/run_facts.py ] || printf 'runs/x\n%s' "$BEFORE"
[ "$1" != -c ] || echo "$GPUS"
[[ "$*" != *"$FAIL"* ]] || exit "$CODE"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone whose packages are installed, with stubs as its programs."""
    for folder in ("scripts", ".venv/bin", "configs", "model", "data", "training"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copytree(ROOT / "configs/accelerate", tmp_path / "configs/accelerate")
    shutil.copy(ROOT / "scripts/quickstart.sh", tmp_path / "scripts")
    (tmp_path / "scripts/bootstrap.sh").write_text("")
    for program in ("python", "accelerate"):
        (tmp_path / ".venv/bin" / program).write_text(STUB)
        (tmp_path / ".venv/bin" / program).chmod(0o755)
    return tmp_path


def quickstart(
    clone: Path, *arguments: str, gpus: int = 0, fail: str = "nothing", code: int = 1, before: str = ""
) -> tuple[int, list[str]]:
    """The exit code, and the commands that were run."""
    (clone / "commands").unlink(missing_ok=True)
    stub = {"GPUS": str(gpus), "FAIL": fail, "CODE": str(code), "BEFORE": before}
    done = run(clone, "quickstart.sh", *arguments, **stub, LAUNCH="", CONFIG="")
    return done.returncode, (clone / "commands").read_text().splitlines()


def launched(command: str) -> Namespace:
    """What `accelerate launch` understands of a command, by its own parser."""
    program, subcommand, *arguments = shlex.split(command)
    assert (program, subcommand) == ("accelerate", "launch")
    return _validate_launch_command(launch_command_parser().parse_args(arguments))[0]


def test_the_quickstart_passes_overrides_to_every_step_that_reads_the_config(clone: Path) -> None:
    code, commands = quickstart(clone, "configs/x.yaml", "name=y", "data.train_files=[a b.txt]")
    assert code == 0
    assert [command for command in commands if "configs/x.yaml" in command] == [
        "python scripts/run_facts.py configs/x.yaml name=y data.train_files=[a b.txt]",
        "python scripts/prepare_data.py configs/x.yaml name=y data.train_files=[a b.txt]",
        next(command for command in commands if "train.py configs/x.yaml name=y data.train_files=[a b.txt]" in command),
        "python scripts/run_facts.py configs/x.yaml name=y data.train_files=[a b.txt] --headline",
    ]
    evaluations = ["reach", "recall", "loss", "relay", "heat", "report"]
    assert [command.split()[2] for command in commands if " -m " in command] == [f"eval.{name}" for name in evaluations]


def test_the_evaluation_of_a_pretrained_model_is_a_receipt(clone: Path) -> None:
    code, commands = quickstart(clone, "configs/x.yaml", before="a model.gguf")
    assert code == 0
    evaluations = [command for command in commands if " -m " in command]
    assert evaluations == ["python -m eval.receipt a model.gguf runs/x", "python -m eval.report runs/x"]


@pytest.mark.parametrize("gpus", [0, 3])
def test_the_quickstart_launches_two_processes_on_a_cpu_and_one_for_each_of_several_gpus(
    clone: Path, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, commands = quickstart(clone, "configs/x.yaml", gpus=gpus)
    monkeypatch.chdir(clone)
    arguments = launched(next(command for command in commands if "train.py" in command))
    assert (arguments.multi_gpu, arguments.use_cpu, arguments.num_processes) == (True, gpus == 0, gpus or 2)
    assert (arguments.training_script, arguments.training_script_args) == ("train.py", ["configs/x.yaml"])


def test_the_quickstart_uses_one_process_on_one_gpu(clone: Path) -> None:
    _, commands = quickstart(clone, "configs/x.yaml", gpus=1)
    assert "python train.py configs/x.yaml" in commands


def test_the_quickstart_skips_finished_steps(clone: Path) -> None:
    (clone / "configs/x.yaml").write_text("")
    (clone / "train.py").write_text("")
    (clone / "runs/x/hf").mkdir(parents=True)
    outputs = ["hf/config.json", *(f"{name}.json" for name in ("reach", "recall", "loss", "relay", "heat"))]
    for name in [*outputs, *(f"{name}.png" for name in ("reach", "recall", "loss", "relay", "heat")), "report.html"]:
        (clone / "runs/x" / name).write_text("")
    code, commands = quickstart(clone, "configs/x.yaml")
    assert (code, [command.split()[1] for command in commands]) == (
        0, ["scripts/run_facts.py", "scripts/prepare_data.py", "scripts/run_facts.py"],
    )  # fmt: skip
    (clone / "runs/x/loss.png").unlink()
    assert "python -m eval.loss runs/x" in quickstart(clone, "configs/x.yaml")[1]


@pytest.mark.parametrize(("fail", "code", "steps"), [("run_facts", 2, 1), ("prepare_data", 2, 2), ("train.py", 1, 4)])
def test_the_quickstart_ends_with_the_exit_code_of_the_step_that_failed(
    clone: Path, fail: str, code: int, steps: int
) -> None:
    ended, commands = quickstart(clone, "configs/x.yaml", fail=fail, code=code)
    assert (ended, len(commands)) == (code, steps)


def start_quickstart(clone: Path, training: str) -> tuple[subprocess.Popen[bytes], int]:
    """A quickstart that has come to its training, the shell commands `training`, and the leader of their group."""
    (clone / ".venv/bin/accelerate").write_text(f"#!/bin/bash\necho $$ >pid\n{training}\n")
    command = ["bash", "scripts/quickstart.sh", "configs/x.yaml"]
    environment = os.environ | {"GPUS": "0", "FAIL": "nothing", "LAUNCH": ""}
    process = subprocess.Popen(command, cwd=clone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not (clone / "pid").exists() or not (clone / "pid").read_text():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    return process, int((clone / "pid").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_the_quickstart_and_the_step_that_runs(clone: Path, number: signal.Signals) -> None:
    process, leader = start_quickstart(clone, "sleep 600 &\nwait")
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    assert b"stopped; run the same command again to go on" in output
    with pytest.raises(ProcessLookupError):
        os.killpg(leader, 0)


@pytest.mark.skipif(not shutil.which("setpriv"), reason="without setpriv a step is not told that its script was killed")
def test_when_the_quickstart_is_killed_its_training_gets_a_sigterm(clone: Path) -> None:
    process, _ = start_quickstart(clone, "trap 'echo asked to stop; exit' TERM\nwhile :; do sleep 0.1; done")
    process.kill()
    output, _ = process.communicate(timeout=300)  # until the training, which has the same stream, has ended
    assert output.endswith(b"asked to stop\n")
