"""Write one page that shows what was measured: a self-contained report.html, readable offline and on a phone.

    python -m eval.report RUN [RUN ...] [--out FILE] [--wandb [offline|online]]

A RUN is a folder with recall.json, reach.json, loss.json, relay.json or heat.json, metrics.jsonl and settings.yaml. The
page leaves out what has not been measured, and names the command that measures it. One run gets its report, written
into its folder. Several runs get a comparison, written into the current folder: the first run is the main one.
"""

import argparse
import io
import sys
import warnings
from pathlib import Path
from typing import Literal

from eval.report.runs import Run, read_run, tell_apart
from model.errors import UserError, cli


def log_to_wandb(runs: list[Run], mode: Literal["offline", "online"], folder: Path) -> str:
    """Log the tables and pictures of the report to wandb and return wandb's folder.

    One run is logged to its own wandb run, whose id is in run.json; several runs to a new one. Files go to `folder`.
    Raises UserError where wandb can't start.
    """
    import wandb
    from PIL import Image

    from eval.plots import save
    from eval.report.page import of_one, shared, title
    from training.run.folder import read_facts

    first, alone = runs[0], len(runs) == 1
    own = read_facts(first.folder).get("wandb_id") if alone else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # wandb warns of its own deprecations
        try:
            run = wandb.init(
                project=first.header["settings"].get("tracking", {}).get("wandb_project", "windreach"),
                name=title(runs), id=own, resume="allow" if own and mode == "online" else None, job_type="report",
                mode=mode, dir=folder, settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except (wandb.errors.Error, OSError) as error:
            raise UserError(f"--wandb {mode}: {error}; try --wandb offline") from error
        with run:
            parts = [("", shared(runs)), *(("" if alone else f"{one.name}/", of_one(one)) for one in runs)]
            for prefix, (tables, pictures) in parts:
                for name, table in tables.items():
                    logged = wandb.Table(list(table.columns), table.rows, allow_mixed_types=True)
                    run.log({f"report/{prefix}{name}": logged})
                for name, draw in pictures.items():
                    save(draw(False), png := io.BytesIO())
                    run.log({f"report/{prefix}{name}": wandb.Image(Image.open(png))})
            return str(Path(run.dir).parent)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders that hold recall.json, reach.json, loss.json")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/report.html; of several runs: comparison.html here")
    parser.add_argument(
        "--wandb", nargs="?", const="offline", choices=("offline", "online"),
        help="also log the tables and pictures to wandb, into the run's own page; default mode: offline",
    )  # fmt: skip
    args = parser.parse_args()
    runs = tell_apart([read_run(name) for name in dict.fromkeys(args.runs)])

    from data.folders import write_text
    from eval.report.page import page  # imports matplotlib

    out = Path(args.out or (runs[0].folder / "report.html" if len(runs) == 1 else "comparison.html"))
    try:
        write_text(out, page(runs))
    except OSError as error:
        raise UserError(f"--out {str(out)!r} can't be written: {error.strerror}; name another file") from error
    print(f"Written: {out}")
    if args.wandb:
        print(f"Logged to wandb ({args.wandb}): {log_to_wandb(runs, args.wandb, out.parent)}")


if __name__ == "__main__":
    sys.exit(cli(main))
