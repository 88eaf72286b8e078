"""Prints the run folder of a config, or the main results in it; `scripts/quickstart.sh` calls it.

python scripts/run_facts.py CONFIG.yaml [key=value ...] [--headline]
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.errors import cli


def headline(run: Path) -> str:
    """Recall by task, bits per byte and reach, from the JSON files of the run folder."""
    recall, loss = (json.loads((run / name).read_text()) for name in ("recall.json", "loss.json"))
    lines = []
    for name, task in recall["tasks"].items():
        text = "H90 = 0: below 90 % at the shortest distance"
        if h90 := task["h90"]:
            share = "" if task["u90"] is None else f" = {h90 / recall['window']:.1f} W, U90 = {task['u90']:.2f} of R"
            text = f"H90 = {h90} tokens{share}"
        lines.append((f"recall ({name})", text))
    reach, nominal = (
        "unbounded" if count is None else f"{count:,} tokens"
        for count in (recall["reach"], recall["window_times_layers"])
    )
    lines += [
        ("held-out text", f"{loss['bits_per_byte']:.3f} bits per byte"),
        ("exact reach", f"R = {reach}, headline W·k = {nominal}"),
        ("report", str(run / "report.html")),
    ]
    return "\n".join(f"{label:<22} {text}" for label, text in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--headline", action="store_true", help="print the results in the run folder")
    arguments = parser.parse_intermixed_args()
    from training.settings.config_file import load_settings

    settings = load_settings(arguments.config, arguments.overrides)
    from training.run.folder import check_settings, run_dir

    run = run_dir(settings)
    check_settings(run, settings)
    print(headline(run) if arguments.headline else run)


if __name__ == "__main__":
    sys.exit(cli(main))
