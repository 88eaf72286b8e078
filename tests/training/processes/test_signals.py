import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.template import ROOT
from training.processes.signals import ECHO_SECONDS

DEADLINE = 120  # seconds; on a busy machine a process may take long to end

PROGRAM = """
import sys, time
from training.processes.signals import STOPPED, StopRequest
stop = StopRequest()
stop.training = sys.argv[1] != "early"
print("ready", flush=True)
while not (stop and sys.argv[1] in ("polite", "slow")):
    time.sleep(0.01)
if sys.argv[1] == "slow":
    time.sleep(0.5)
print("stopping", flush=True)
sys.exit(STOPPED)
"""


def start(kind: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, kind]
    process = subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=os.environ | environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def signal_and_wait(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal, and wait until the process says that it has got it: two at once arrive in any order."""
    process.send_signal(number)
    assert process.stderr is not None
    assert process.stderr.readline() == "\n"
    assert process.stderr.readline().startswith(f"{number.name}: finishing this step")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_first_signal_ends_the_loop_with_code_75(number: signal.Signals) -> None:
    process = start("polite")
    process.send_signal(number)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75
    assert f"{number.name}: finishing this step" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_before_the_first_step_a_signal_leaves_at_once_with_code_75(number: signal.Signals) -> None:
    process = start("early")
    process.send_signal(number)
    out, errors = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (75, "")
    assert errors == f"\n{number.name}: stopped before the first step; run the same command again to go on\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_process_whose_parent_is_killed_gets_a_sigterm() -> None:
    child = f"from training.processes.signals import end_with_parent\nend_with_parent(){PROGRAM}"
    parent = f"""
import subprocess, sys, threading, time
for _ in range(8):
    threading.Thread(target=time.sleep, args=(60,)).start()
run = threading.Thread(target=subprocess.run, args=([sys.executable, "-c", {child!r}, "slow"],))
run.start()
run.join()
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    out, errors = process.communicate(timeout=DEADLINE)  # until the child, which has the same streams, has ended
    assert out == "stopping\n"
    assert "SIGTERM: finishing this step" in errors


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has ended")
def test_a_rank_whose_launcher_has_ended_before_it_asked_for_a_signal_ends_at_once(tmp_path: Path) -> None:
    if b"python" in Path("/proc/1/cmdline").read_bytes():
        pytest.skip("the first process of this machine runs Python, so it could be the launcher")
    launcher = f"""
import os, time
if os.fork() == 0:
    while os.getppid() != 1:
        time.sleep(0.01)
    rank = [{sys.executable!r}, {str(ROOT / "train.py")!r}, {str(tmp_path / "absent.yaml")!r}]
    os.execve(rank[0], rank, os.environ | {{"TORCHELASTIC_RUN_ID": "some"}})
"""
    done = subprocess.run([sys.executable, "-c", launcher], capture_output=True, text=True, timeout=60)
    assert done.stderr == "stopped: the launcher of this process has ended; run the same command again\n"


def test_a_run_whose_terminal_closes_can_still_print_and_stop() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, "polite"], stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert os.read(ours, 5) == b"ready"
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=DEADLINE) == 75


def test_a_run_under_nohup_goes_on_when_its_terminal_closes() -> None:
    process = subprocess.Popen(
        ["nohup", sys.executable, "-c", PROGRAM, "polite"], stdin=-3, stdout=-1, stderr=-1, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 75


def test_second_signal_leaves_at_once() -> None:
    process = start("deaf")
    signal_and_wait(process, signal.SIGTERM)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + signal.SIGINT


@pytest.mark.parametrize(
    ("number", "environment"),
    [(signal.SIGINT, {"TORCHELASTIC_RUN_ID": "some"}), (signal.SIGTERM, {})],
    ids=["a launcher passes it on", "a parent of several threads was killed"],
)
def test_an_echo_of_the_first_signal_is_no_second_one(number: signal.Signals, environment: dict[str, str]) -> None:
    process = start("deaf", **environment)
    signal_and_wait(process, number)
    process.send_signal(number)
    time.sleep(ECHO_SECONDS)
    assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + number
