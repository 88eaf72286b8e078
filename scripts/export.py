"""Exports a trained model for other programs.

    python scripts/export.py runs/quickstart --format hf --out exported

Writes config.json, generation_config.json, model.safetensors and the tokenizer's files. `transformers` reads them where
the type is mistral, ministral or qwen3, the first of which that can express the layers; only this repository reads the
type windreach.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.models import Examined, load_model
from model.errors import UserError, cli


def export(examined: Examined, out: Path, dtype: str) -> str:
    """Write the model and its tokenizer into the folder `out`, all or nothing; returns the model type written."""
    import torch

    from data.tokenizer import HubTokenizer
    from model import hub
    from training.run.checkpoint import replace_folder

    if any(examined.out_dir(str(out)).iterdir()):
        raise UserError(f"--out {out} is not empty; name a new folder, nothing is overwritten")
    model, tokenizer = examined.model.to(getattr(torch, dtype)), examined.tokenizer
    if isinstance(tokenizer, HubTokenizer) and tokenizer.bos_id is not None and not tokenizer.hf.chat_template:
        # As in training, a text begins with <s>. In a run folder a given tokenizer.json stays as it is, for its hash.
        # A chat template writes the markers itself.
        tokenizer.hf.add_bos_token, tokenizer.content = True, b""
    replace_folder(out, partial(hub.save_hf, model, tokenizer=tokenizer))
    return hub.exported_type(model.config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("--format", choices=["hf", "gguf"], default="hf", help="default: hf; gguf is refused")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    arguments = parser.parse_args()
    if arguments.format == "gguf":
        raise UserError(
            "--format gguf can't be written: its runtimes apply no sliding window to this architecture, "
            "so the exported model would see farther than the one that was trained; use --format hf"
        )
    model_type = export(load_model(arguments.model, "cpu", ours_only=True), arguments.out, arguments.dtype)
    print(f"{arguments.out}: a {model_type} checkpoint in {arguments.dtype}, with its tokenizer")


if __name__ == "__main__":
    sys.exit(cli(main))
