"""Faults by injection: the n-th call of one kind in a folder fails, writes half, or is the last of the process.

    python tests/integration/faults.py --every 1 --json results/faults/faults.json
    python tests/integration/faults.py report export prepare --every 1

It tries commands that write: trainings, one of them with two processes, evaluations, the report, an export, the
preparation of text, and the tables of a finished sweep. After each fault

- the command has ended with a sentence and exit code 2, by its kill, or as if nothing had happened;
- every checkpoint that is there is valid, and every JSON or YAML file is whole;
- the same command, started again, ends with code 0, and all is there as after an undisturbed command: figures of
  training, weights, encoded text, and the names of all other files.

Of two processes the one that writes meets the fault; the other ends too. Faults are counted per kind of call until the
command makes no further one. That takes long, so test_injected_faults.py tries a few. `faults.c` is the library that is
preloaded; it needs a C compiler and Linux.
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
from tests.integration.tiny_run import losses, rank_environments, write_config
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
TRAIN, RUN = ("train.py", "{0}/tiny.yaml"), "{0}/run"
COMMANDS = {  # what is started; {0} is the folder of the trials
    "fresh": TRAIN,
    "resumed": TRAIN,
    "rank-0": TRAIN,  # of two, which meets the fault; the other one writes nothing
    "loss": ("eval.loss", RUN, "--max-tokens", "200", "--rows", "2"),
    "recall": ("eval.recall.__main__", RUN, "--n", "2", "--distances", "W"),
    "reach": ("eval.reach.__main__", RUN, "--texts", "1", "--max-tokens", "48"),
    "relay": ("eval.relay", RUN, "--n", "4", "--max-offset", "16"),
    "heat": ("eval.heat", RUN, "--n", "1", "--depths", "2", "--lengths", "32"),
    "report": ("eval.report.__main__", RUN),
    "export": ("scripts.export.py", RUN, "--out", "{0}/export"),
    "prepare": ("scripts.prepare_data.py", "{0}/tiny.yaml", "data.cache_dir={0}/prepare"),
    "sweep": ("scripts.sweep.py", "{0}/grid.yaml", "--out", "{0}/sweep"),
}
NEW = ("fresh", "rank-0")  # in an empty folder
TRAININGS = (*NEW, "resumed")
ELSEWHERE = ("export", "prepare", "sweep")  # write a folder with the name of the command, not the run folder
GRID = "name: faults\nconfig: tiny.yaml\ngrid: [{axis: window, key: model.sliding_window, values: [8]}]\n"
State = tuple[object, dict[str, str]]
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
    """An undisturbed run in `folder`, and commands that meet faults."""

    def __init__(self, folder: Path):
        self.folder, self.run = folder, folder / "run"
        self.library = str(folder / "faults.so")
        source = Path(__file__).with_name("faults.c")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", self.library, str(source), "-ldl"], check=True)
        write_config(folder, max_steps=2, save_every_steps=1, validate_every_steps=2)
        (folder / "grid.yaml").write_text(GRID)
        self.expected: dict[str, State] = {}
        self.undisturbed("fresh")
        shutil.copytree(self.run, folder / "before/finished")

    def undisturbed(self, command: str) -> State:
        """What the command leaves if nothing goes wrong. The first call runs it, and keeps what was there before."""
        if command not in self.expected:
            self.restore(command)
            if command == "report":
                self.start("loss")
            if command == "resumed":
                for path in ("checkpoints/step-000002", "hf"):
                    shutil.rmtree(self.run / path)
            if command == "sweep":
                self.start(command)  # with its training; then only tables are left to write
            if (written := self.written(command)).exists():
                shutil.copytree(written, self.folder / "before" / command)
            codes, said = self.start(command)
            assert set(codes) == {0}, said
            self.expected[command] = self.state(command)
        return self.expected[command]

    def written(self, command: str) -> Path:
        """The folder that a command writes."""
        return self.folder / command if command in ELSEWHERE else self.run

    def restore(self, command: str) -> None:
        """Leave what is there before the command: nothing for a new run, else a finished run and what it has kept."""
        kept, written = self.folder / "before" / command, self.written(command)
        for folder in {self.run, written}:
            shutil.rmtree(folder, ignore_errors=True)
        if command not in NEW and (written != self.run or not kept.exists()):
            shutil.copytree(self.folder / "before/finished", self.run)
        if kept.exists():
            shutil.copytree(kept, written)

    def start(self, command: str, **environment: str) -> tuple[list[int], str]:
        """The exit codes of a command's processes, first of the one that meets the fault, and all that they said."""
        arguments = [part.format(self.folder) for part in COMMANDS[command]]
        others: list[dict[str, str]] = []
        if command == "rank-0":
            first, *others = rank_environments(2)
            environment |= first
        processes = [Forked(arguments, environment=own, preload=self.library) for own in (environment, *others)]
        said = "".join(text for process in processes for text in process.communicate(timeout=300))
        return [process.returncode or 0 for process in processes], said

    def state(self, command: str) -> State:
        """The figures of a training, and by name the hashes of weights and encoded text; other files just are there."""
        folder = self.written(command)
        if command in TRAININGS:
            return losses(self.folder), {"weights": file_sha256(self.run / "hf/model.safetensors")}
        files = [path for path in folder.rglob("*") if path.is_file()]
        hashed = (".safetensors", ".bin")
        return None, {str(p.relative_to(folder)): file_sha256(p) if p.suffix in hashed else "" for p in files}

    def meet(self, command: str, fault: Fault) -> list[str] | None:
        """What went wrong beyond the fault; None if the command makes no such call."""
        figures, files = self.undisturbed(command)
        self.restore(command)
        done = self.folder / "done"
        done.unlink(missing_ok=True)
        described = f"{fault.call} {fault.nth} {fault.what} {self.written(command)}"
        (code, *others), said = self.start(command, FAULT=described, FAULT_DONE=str(done))
        if not done.exists():
            return None
        allowed = code in (0, 2, -9) and {*others} <= {0, 1, 2} and "Traceback" not in said
        problems = [] if allowed else [f"exit codes {[code, *others]}: {said[-1500:]}"]
        problems += [f"{path.name}: {text}" for path in checkpoints(self.run) if (text := problem_with(path))]
        problems += [f"{path.name} is cut short" for path in self.written(command).glob("[!.]*") if not whole(path)]
        if code or command != "export":  # which refuses a folder that is full
            codes, said = self.start(command)
            if any(codes):
                return [*problems, f"started again: exit codes {codes}: {said[-1500:]}"]
        now = self.state(command)
        if now[0] != figures or not files.items() <= now[1].items():
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
    parser.add_argument("commands", nargs="*", default=[*COMMANDS], metavar="COMMAND", help=f"of {', '.join(COMMANDS)}")
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
