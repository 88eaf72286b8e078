"""One page that says what was measured: a self-contained report.html, read offline and on a phone.

    python -m eval.report RUN [RUN ...] [--out FILE] [--wandb offline|online]

A RUN is a folder with recall.json, reach.json, loss.json, relay.json and heat.json (what is missing is left out and
said), metrics.jsonl and settings.yaml. One run: its report, written into it. Several: a comparison, written into the
present folder, in which the first run is the one in question and the others stand beside it.
"""

import argparse
import sys
from pathlib import Path

from eval.report.page import page
from eval.report.runs import read_run, tell_apart
from eval.report.tracker import log_to_wandb
from model.errors import UserError, cli


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that hold recall.json, reach.json, loss.json")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/report.html; for several runs comparison.html here")
    parser.add_argument(
        "--wandb", nargs="?", const="offline", choices=("offline", "online"),
        help="log the same tables and pictures to wandb: to the run's own page; default: offline",
    )  # fmt: skip
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    runs = tell_apart([read_run(name) for name in args.runs])
    default = runs[0].folder / "report.html" if len(runs) == 1 else Path("comparison.html")
    out = Path(args.out) if args.out else default
    try:
        with out.open("w", encoding="utf-8") as file:
            file.write(page(runs))
    except OSError as error:
        raise UserError(f"--out {str(out)!r} can't be written: {error.strerror}; name another file") from error
    print(f"Written: {out}")
    if args.wandb:
        print(f"Logged to wandb ({args.wandb}): {log_to_wandb(runs, args.wandb, out.parent)}")


if __name__ == "__main__":
    sys.exit(cli(main))
