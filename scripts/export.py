"""Exports a trained model for other programs.

    python scripts/export.py runs/quickstart --format hf --out exported
    python scripts/export.py runs/adapted --adapter --out adapter

Writes config.json, generation_config.json, model.safetensors and the tokenizer's files. The model type is mistral,
ministral or qwen3: the first of these that can express the layers. `transformers` reads these types. If none can, the
type is windreach, which only this repository reads.

The model of a run with `training.lora` holds the sums of matrices and adapters. `--adapter` writes the adapters alone,
as PEFT does: adapter_config.json and adapter_model.safetensors.
"""

import argparse
import copy
import sys
from contextlib import suppress
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

    _check_empty(examined, out)
    model, tokenizer = examined.model.to(getattr(torch, dtype)), examined.tokenizer
    if isinstance(tokenizer, HubTokenizer) and tokenizer.bos_id is not None and not tokenizer.hf.chat_template:
        # As in training, a text begins with <s>. In a run folder a given tokenizer.json stays as it is, for its hash.
        # A chat template writes the markers itself.
        tokenizer.hf.add_bos_token, tokenizer.content = True, b""
    replace_folder(out, partial(hub.save_hf, model, tokenizer=tokenizer))
    return hub.exported_type(model.config)


def _check_empty(examined: Examined, out: Path) -> None:
    if any(examined.out_dir(str(out)).iterdir()):
        raise UserError(f"--out {out} is not empty; name a new folder, nothing is overwritten")


def export_adapter(examined: Examined, out: Path) -> str:
    """Write the adapters of a run for `peft.PeftModel.from_pretrained`; returns what they are for.

    Raises UserError if the run trained no adapters, or other parameters too.
    """
    from safetensors.torch import save_file

    from data.pretrained import checkpoint_folder, is_converted
    from training.adaptation import peft_config, peft_tensors
    from training.run.checkpoint import load_state, newest_valid, replace_folder

    _check_empty(examined, out)
    settings = examined.trained_with() if examined.run_dir else None
    if settings is None or (lora := settings.training.lora) is None:
        raise UserError(f"--adapter: {examined.name} was trained without training.lora; leave --adapter out")
    if settings.training.train_only:
        raise UserError("--adapter: training.train_only trained parameters that no adapter holds; leave --adapter out")
    assert examined.run_dir is not None
    assert examined.folder is not None
    of_run = examined.folder.parent.resolve() == examined.run_dir.resolve()
    checkpoint = newest_valid(examined.run_dir) if of_run else examined.folder.parent
    if checkpoint is None:
        raise UserError(f"--adapter: {examined.run_dir} has no checkpoints/, which hold the adapters")
    config, tensors = peft_config(lora), peft_tensors(load_state(checkpoint)[1])
    named = settings.model.init.from_pretrained
    config.base_model_name_or_path = str(checkpoint_folder(named)) if named and is_converted(named) else named

    def write(folder: Path) -> None:
        config.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    replace_folder(out, write)
    return f"{named or 'the model that this run began with'}{_changes(examined, named)}"


def _changes(examined: Examined, named: str | None) -> str:
    """A warning if the run changed windows or positions of the model `named`; empty if not, or if that is gone."""
    from training.settings.pretrained import pretrained_settings

    before, now = copy.copy(examined.model.config), examined.model.config
    with suppress(UserError):
        if named:
            theirs = pretrained_settings(named)
            scaling = theirs["rope_scaling"] or {"rope_type": "default"}
            before.layers, before.rope_parameters = theirs["layers"], scaling | {"rope_theta": theirs["rope_theta"]}
    changed = {"windows": before.specs != now.specs, "positions": before.rope_parameters != now.rope_parameters}
    what = " and ".join(name for name, differs in changed.items() if differs)
    return f"\n  The run gave that model other {what}; under its own the adapter computes something else." * bool(what)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="RUN", help="run folder or checkpoint")
    parser.add_argument("--format", choices=["hf", "gguf"], default="hf", help="default: hf; gguf is refused")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    parser.add_argument("--adapter", action="store_true", help="of a run with training.lora: only its adapters")
    arguments = parser.parse_args()
    if arguments.format == "gguf":
        raise UserError(
            "--format gguf can't be written: its runtimes apply no sliding window to this architecture, "
            "so the exported model would see farther than the one that was trained; use --format hf"
        )
    examined, out = load_model(arguments.model, "cpu", ours_only=True), arguments.out
    if arguments.adapter:
        print(f"{out}: an adapter of PEFT for {export_adapter(examined, out)}")
        return
    model_type = export(examined, out, arguments.dtype)
    print(f"{arguments.out}: a {model_type} checkpoint in {arguments.dtype}, with its tokenizer")


if __name__ == "__main__":
    sys.exit(cli(main))
