"""A run so small that it trains in seconds: `train.py` in a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.integration.template import ROOT, Forked

SENTENCE = "the sea was calm and a ship came slowly over the long grey water while birds cried above its masts"
WORDS = SENTENCE.split()


def write_text(folder: Path) -> None:
    """Sentences of a few words: enough for a tokenizer, never the same twice."""
    for split, offset, count in (("train", 0, 3000), ("heldout", 7, 600)):
        words = [WORDS[(i * i * 31 + i * (7 + offset) + i // 17) % len(WORDS)] for i in range(count * 8)]
        lines = [" ".join(words[i : i + 8]).capitalize() + "." for i in range(0, len(words), 8)]
        (folder / f"{split}.txt").write_text("\n".join(lines))


def settings(folder: Path, **training: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "run_dir": str(folder / "run"),
        "model": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
            "num_key_value_heads": 1, "sliding_window": 8, "init": {"copy_first_layer": True},
        },
        "data": {
            "source": "files", "cache_dir": str(folder / "cache"), "seq_len": 64, "tokenizer": {"vocab_size": 400},
            "train_files": [str(folder / "train.txt")], "heldout_files": [str(folder / "heldout.txt")],
        },
        "recall": {
            "relay_loss_weight": 0.5, "seq_len": 64, "values": 8,
            "curriculum": {"accuracy": 0.2, "smoothing": 0.0},
        },
        "training": {
            "max_steps": 12, "tokens_per_step": 512, "compile": False, "precision": "fp32", "num_threads": 1,
            "log_every_steps": 1, "validate_every_steps": 6, "validation_tokens": 512, "probe_items": 4,
            "save_every_steps": 3, "optimizer": {"lr": 0.003}, "schedule": {"warmup_steps": 1},
        } | training,
        "tracking": {"wandb_mode": "disabled"},
    }  # fmt: skip


def write_config(folder: Path, **training: Any) -> Path:
    if not (folder / "train.txt").exists():
        write_text(folder)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **training)))
    return path


def write_mixture(folder: Path, **training: Any) -> Path:
    """A run on two sources of text, the weights of which change halfway."""
    path = write_config(folder, **training)
    described = yaml.safe_load(path.read_text())
    data = described["data"]
    web = {name: data.pop(name) for name in ("source", "train_files", "heldout_files")} | {"name": "web"}
    (folder / "books.txt").write_text((folder / "train.txt").read_text()[:9000].swapcase())
    books = web | {"name": "books", "train_files": [str(folder / "books.txt")], "weight": [[0, 0.2], [0.5, 0.6]]}
    data["sources"] = [web | {"weight": 0.8}, books]
    path.write_text(json.dumps(described))  # JSON is YAML without aliases
    return path


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ':\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def write_chat(folder: Path, **training: Any) -> Path:
    """A run on conversations: a few words, and the same in the other order."""
    described = yaml.safe_load(write_config(folder, **training).read_text())
    for split, n in (("train", 40), ("heldout", 12)):
        words = [[WORDS[(i * i * 7 + 3 * j + i) % len(WORDS)] for j in range(1 + i % 4)] for i in range(n)]
        told = [{"user": " ".join(some), "assistant": " ".join(some[::-1])} for some in words]
        rows = [{"messages": [{"role": role, "content": text} for role, text in both.items()]} for both in told]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "chat.jinja").write_text(CHAT_TEMPLATE)
    files = {f"{split}_files": [str(folder / f"{split}.jsonl")] for split in ("train", "heldout")}
    chat = {"messages_column": "messages", "chat_template": str(folder / "chat.jinja"), "packing": "best_fit"}
    described["data"] |= files | chat | {"tokenizer": {"vocab_size": 320}}
    described["recall"] = {"enabled": False}
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(described))
    return path


def command(config: Path, *arguments: str, processes: int = 1) -> list[str]:
    program = [str(ROOT / "train.py"), str(config), *arguments]
    if processes == 1:
        return [sys.executable, *program]
    launch = ["accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/ddp-cpu-2.yaml")]
    return [sys.executable, "-m", *launch, "--num_processes", str(processes), *program]


def start(config: Path, *arguments: str, **options: Any) -> Forked:
    return Forked(["train.py", str(config), *arguments], **options)


def start_as_a_user(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    """`python train.py`, or `accelerate launch` with `processes=2`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*arguments, **options),
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def start_ranks(
    config: Path, *arguments: str, processes: int, environment: dict[str, str] | None = None
) -> list[Forked]:  # fmt: skip
    return launch(["train.py", str(config), *arguments], processes, environment)


def launch(argv: list[str], processes: int, environment: dict[str, str] | None = None) -> list[Forked]:
    """What a launcher does: one process a rank, with the same address in their environment."""
    worlds = rank_environments(processes)
    return [Forked(argv, environment=of_rank | (environment or {})) for of_rank in worlds]


def rank_environments(processes: int) -> list[dict[str, str]]:
    """What a launcher tells each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world = address | {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run(*arguments: Any, expect: int = 0, processes: int = 1, **options: Any) -> str:
    """Both streams of a finished run, of all its processes one after another; the exit code of each is checked."""
    started = (
        [start(*arguments, **options)] if processes == 1 else start_ranks(*arguments, processes=processes, **options)
    )
    texts = []
    for process in started:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == expect, f"exit code {process.returncode}, not {expect}\n{out}\n{errors}"
        texts.append(out + errors)
    return "".join(texts)


def wait_for_step(folder: Path, step: int, processes: Sequence[Forked | subprocess.Popen[str]]) -> None:
    """Until `step` is logged, or a process has ended."""
    log = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while all(process.poll() is None for process in processes):
        if log.exists() and f'"step": {step}, "kind": "train"' in log.read_text():
            return
        assert time.monotonic() < deadline, f"step {step} is not logged after 300 s"
        time.sleep(0.005)


def kill_after_step(folder: Path, config: Path, step: int, number: signal.Signals) -> int:
    """Start a run, send it `number` once `step` is logged; returns its exit code."""
    process = start(config)
    wait_for_step(folder, step, [process])
    process.send_signal(number)
    process.communicate(timeout=300)
    assert process.returncode is not None
    return process.returncode


def metrics(folder: Path, kind: str = "train") -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if row["kind"] == kind}


CLOCK = ("tokens_per_second", "mfu")


def losses(folder: Path) -> dict[int, dict[str, Any]]:
    """All logged figures of each step but those that depend on the clock."""
    return {step: {k: v for k, v in row.items() if k not in CLOCK} for step, row in metrics(folder).items()}
