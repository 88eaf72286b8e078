"""Faults by injection: the n-th call of one kind in a run folder fails, writes half, or is the last of the process.

    python tests/integration/faults.py --every 1 --json results/faults/faults.json

It tries commands that write a run folder: a fresh training, one that goes on, an evaluation. After each fault

- the command has ended with a sentence and exit code 2, by its kill, or as if nothing had happened;
- every checkpoint that is there is valid, and every JSON or YAML file is whole;
- the same command, started again, ends with code 0, and the run's figures and weights are those of an undisturbed run.

Faults are counted per kind of call until the command makes no further one. That takes long, so test_faults.py tries a
few. `faults.c` is the library that is preloaded; it needs a C compiler and Linux.
"""

import argparse
import errno
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml

from model.errors import cli
from tests.integration.template import ROOT, Forked
from tests.integration.tiny_run import losses, write_config
from training.run.checkpoint import checkpoints, file_sha256, problem_with, write_json

KILL, SHORT = 0, -1
FAULTS = {
    "open": (errno.ENOSPC, errno.EACCES, KILL),
    "read": (errno.EIO,),
    "write": (errno.ENOSPC, errno.EIO, SHORT, KILL),
    "rename": (errno.EACCES, KILL),
    "fsync": (errno.EIO, KILL),
    "mkdir": (errno.ENOSPC, KILL),
    "unlink": (errno.EACCES, KILL),
}
COMMANDS = ("fresh", "resumed", "loss")
CAN_COMPILE = sys.platform == "linux" and shutil.which("cc") is not None


@dataclass(frozen=True)
class Fault:
    """The `nth` call of a kind (from 1) ends in `what`: an errno, KILL or SHORT."""

    call: str
    nth: int
    what: int

    def __str__(self) -> str:
        names = {KILL: "kill", SHORT: "short"}
        return f"{self.call} {self.nth} {names.get(self.what) or errno.errorcode[self.what]}"


class Trials:
    """An undisturbed run in `folder`, and runs that meet faults."""

    def __init__(self, folder: Path):
        self.folder, self.run = folder, folder / "run"
        self.library = str(folder / "faults.so")
        source = Path(__file__).with_name("faults.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", self.library, str(source), "-ldl"], check=True)
        self.config = write_config(folder, max_steps=2, save_every_steps=1, validate_every_steps=2)
        code, said = self.start("fresh")
        assert code == 0, said
        self.expected = self.state()
        shutil.copytree(self.run, folder / "loss")
        shutil.copytree(self.run, folder / "resumed")
        for path in ("checkpoints/step-000002", "hf"):
            shutil.rmtree(folder / "resumed" / path)

    def start(self, command: str, **environment: str) -> tuple[int, str]:
        """The exit code and both streams of a command."""
        arguments = ["train.py", str(self.config)]
        if command == "loss":
            arguments = ["eval.loss", str(self.run), "--max-tokens", "200", "--rows", "2"]
        process = Forked(arguments, environment=environment, preload=self.library)
        said = "".join(process.communicate(timeout=300))
        assert process.returncode is not None
        return process.returncode, said

    def state(self) -> tuple[object, str]:
        return losses(self.folder), file_sha256(self.run / "hf/model.safetensors")

    def meet(self, command: str, fault: Fault) -> list[str] | None:
        """What went wrong beyond the fault; None if the command makes no such call."""
        shutil.rmtree(self.run, ignore_errors=True)
        if command != "fresh":
            shutil.copytree(self.folder / command, self.run)
        done = self.folder / "done"
        done.unlink(missing_ok=True)
        described = f"{fault.call} {fault.nth} {fault.what} {self.run}"
        code, said = self.start(command, FAULT=described, FAULT_DONE=str(done))
        if not done.exists():
            return None
        problems = [f"exit code {code}: {said[-1500:]}"] if code not in (0, 2, -9) or "Traceback" in said else []
        problems += [f"{path.name}: {text}" for path in checkpoints(self.run) if (text := problem_with(path))]
        problems += [f"{path.name} is cut short" for path in self.run.glob("[!.]*") if not whole(path)]
        code, said = self.start(command)
        if code != 0:
            problems.append(f"started again: exit code {code}: {said[-1500:]}")
        elif self.state() != self.expected:
            problems.append("started again: other figures or weights")
        return problems


def whole(path: Path) -> bool:
    """Whether a JSON or YAML file can be read. The log of metrics may end in half a line."""
    read = {".json": json.loads, ".yaml": yaml.safe_load}.get(path.suffix)
    try:
        return read is None or isinstance(read(path.read_text()), dict)
    except (ValueError, yaml.YAMLError):
        return False


def every_fault(trials: Trials, commands: Sequence[str], every: int) -> Iterator[tuple[str, Fault, list[str]]]:
    """Each `every`-th call of each kind, until a command makes no more."""
    for command, (call, kinds) in itertools.product(commands, FAULTS.items()):
        for what in kinds:
            for nth in itertools.count(1, every):
                fault = Fault(call, nth, what)
                problems = trials.meet(command, fault)
                if problems is None:
                    break
                yield command, fault, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs="*", default=COMMANDS, metavar="COMMAND", help=f"of {', '.join(COMMANDS)}")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try each N-th call only")
    parser.add_argument("--json", type=Path, help="write the counts here")
    arguments = parser.parse_args()
    tried, lost = Counter[str](), {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for command, fault, problems in every_fault(Trials(Path(folder)), arguments.commands, arguments.every):
            tried[f"{command} {fault.call}"] += 1
            print(f"{command}: {fault}", *problems, sep="\n  ", flush=True)
            if problems:
                lost[f"{command}: {fault}"] = problems
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT)
    summary = {"commit": commit.stdout.strip(), "every": arguments.every, "tried": dict(tried), "lost": lost}
    print(f"{tried.total()} faults, {len(lost)} lost something")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, summary)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(cli(main))
