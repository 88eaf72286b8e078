"""Hand a trained model over to other programs.

    python scripts/export.py runs/quickstart --format hf --out exported

`hf`: config.json, model.safetensors and tokenizer files, read by `AutoModelForCausalLM.from_pretrained`. A stack of
equal sliding layers is written as a Mistral checkpoint; a stack that Mistral can't express keeps a type of its own.
Exit codes: 0 done, 2 the input is wrong.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from eval.models import Examined, HubTokenizer, load_model
from model import hub
from model.decoder import WindreachForCausalLM
from model.errors import UserError, cli

NO_GGUF = (
    "--format gguf is not written: that format has no sliding window for this architecture that its runtimes apply, "
    "so the exported model would see farther than the one that was trained; use --format hf"
)


def export(examined: Examined, out: Path, dtype: torch.dtype) -> str:
    """Write the model and its tokenizer into the new or empty folder `out`; returns the model type written."""
    if not isinstance(examined.model, WindreachForCausalLM):
        raise UserError(f"MODEL {examined.name!r} is already a Hugging Face {examined.model.config.model_type} model")
    _make_empty(out)
    hub.save_hf(examined.model.to(dtype), out)
    if isinstance(examined.tokenizer, HubTokenizer):
        examined.tokenizer.hf.save_pretrained(out)
    else:
        examined.tokenizer.save(out)
    return "mistral" if hub.is_mistral(examined.model.config) else "windreach"


def _make_empty(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        occupied = any(out.iterdir())
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; name a folder that can be written") from error
    if occupied:
        raise UserError(f"--out {out} is not empty; name a new folder, nothing is overwritten")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("--format", choices=["hf", "gguf"], default="hf")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    arguments = parser.parse_args()
    if arguments.format == "gguf":
        raise UserError(NO_GGUF)
    out = Path(arguments.out)
    kind = export(load_model(arguments.model, "cpu"), out, getattr(torch, arguments.dtype))
    print(f"{out}: a {kind} checkpoint in {arguments.dtype}, with its tokenizer")


if __name__ == "__main__":
    sys.exit(cli(main))
