"""What scripts/quickstart.sh asks of a run.

python scripts/run_facts.py folder CONFIG.yaml    the folder that this config's run lives in
python scripts/run_facts.py headline RUN          the three figures that matter, and where the report is
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.errors import UserError, cli


def folder(config: str) -> str:
    from training.run.folder import run_dir
    from training.settings.config_file import load_settings

    return str(run_dir(load_settings(config, [])))


def headline(run: Path) -> str:
    recall, loss = _result(run / "recall.json"), _result(run / "loss.json")
    window, reach = recall["window"], recall["reach"]
    lines = [_recall_line(name, task, window, reach) for name, task in recall["tasks"].items()]
    lines += [
        f"held-out text          {loss['bits_per_byte']:.3f} bits per byte",
        f"exact reach            R = {_tokens(reach)}, headline W·k = {_tokens(recall['window_times_layers'])}",
        f"report                 {run / 'report.html'}",
    ]
    return "\n".join(lines)


def _recall_line(name: str, task: dict[str, Any], window: int, reach: int | None) -> str:
    h90, u90 = task["h90"], task["u90"]
    if not h90:
        return f"recall ({name})".ljust(23) + "H90 = 0: below 90 % at the shortest distance"
    share = "" if u90 is None else f" = {h90 / window:.1f} W, U90 = {u90:.2f} of R"
    return f"recall ({name})".ljust(23) + f"H90 = {h90} tokens{share}"


def _tokens(count: int | None) -> str:
    return "unbounded" if count is None else f"{count:,} tokens"


def _result(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such result; run `python -m eval.{file.stem} {file.parent}` first") from error
    except ValueError as error:
        raise UserError(f"{file} is not whole JSON ({error}); run the evaluation again") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=["folder", "headline"])
    parser.add_argument("path")
    arguments = parser.parse_args()
    print(folder(arguments.path) if arguments.question == "folder" else headline(Path(arguments.path)))


if __name__ == "__main__":
    sys.exit(cli(main))
