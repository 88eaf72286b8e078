"""Prints the run folder of a config, or the main results in it; `scripts/quickstart.sh` calls it.

python scripts/run_facts.py CONFIG.yaml [key=value ...] [--headline]

The pretrained model that the run starts from stands on a second line.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.errors import cli
from training.run.folder import check_settings, run_dir
from training.settings.config_file import load_settings


def headline(run: Path) -> str:
    """Recall by task, bits per byte and reach, from the JSON files of the run folder, or what its receipt says."""
    if (run / "receipt.json").exists():
        from eval.receipt.findings import finding

        return (
            f"{finding(json.loads((run / 'receipt.json').read_text()))}\nreceipt                {run / 'receipt.html'}"
        )
    recall, loss = (json.loads((run / name).read_text()) for name in ("recall.json", "loss.json"))
    facts = {}
    for name, task in recall["tasks"].items():
        share = f" = {task['h90'] / recall['window']:.1f} W, U90 = {task['u90']:.2f} of R" if task["u90"] else ""
        horizon = f"{task['h90']} tokens{share}" if task["h90"] else "0: below 90 % at the shortest distance"
        facts[f"recall ({name})"] = f"H90 = {horizon}"
    facts["held-out text"] = f"{loss['bits_per_byte']:.3f} bits per byte"
    reach, nominal = recall["reach"], recall["window_times_layers"]
    facts["exact reach"] = f"R = {reach:,} tokens, headline W·k = {nominal:,} tokens" if reach else "unbounded"
    facts["report"] = str(run / "report.html")
    return "\n".join(f"{label:<22} {text}" for label, text in facts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--headline", action="store_true", help="print the results in the run folder")
    arguments = parser.parse_intermixed_args()
    settings = load_settings(arguments.config, arguments.overrides)
    run = run_dir(settings)
    check_settings(run, settings)
    if arguments.headline:
        print(headline(run))
    else:
        print(*filter(None, (run, settings.model.init.from_pretrained)), sep="\n")


if __name__ == "__main__":
    sys.exit(cli(main))
