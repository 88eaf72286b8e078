"""Pictures of what layers may see, of a config and without a model.

    python -m eval.reach.masks [CONFIG.yaml] [--out DIR]

`mask.png` shows the causal triangle beside the band of a sliding window, for a short sentence. `layers.png` shows one
mask for each kind of layer in the config's stack. `cone.png` shows what the last token sees, layer by layer.
`python -m eval.reach MODEL --plot` draws the same pictures for a model.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.models import out_folder
from model.errors import cli
from model.windows import LayerSpec
from training.settings.config_file import load_settings


def write(specs: Sequence[LayerSpec], out: Path) -> list[Path]:
    """Write mask.png, layers.png and cone.png into the folder `out` and return their paths."""
    from eval.plots import masks, save

    save(masks.sentence_figure(), out / "mask.png")
    save(masks.layers_figure(specs), out / "layers.png")
    save(masks.cone_figure(specs), out / "cone.png")
    return [out / "mask.png", out / "layers.png", out / "cone.png"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.reach.masks", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml", metavar="CONFIG.yaml")
    parser.add_argument("--out", metavar="DIR", default=".", help="folder for the pictures; default: this folder")
    args = parser.parse_args()
    settings = load_settings(args.config, [])

    from training.planning.dry_run import vocab_size
    from training.settings.build import model_config

    specs = model_config(settings, vocab_size(settings)).specs
    print(f"Written: {', '.join(map(str, write(specs, out_folder(args.out))))}")


if __name__ == "__main__":
    sys.exit(cli(main))
