"""What the evaluations measure: a run, one of its checkpoints, or any Hugging Face causal language model.

`load_model` turns the MODEL of a command line into an `Examined`: the weights, the tokenizer, and what each layer may
see. Torch and transformers are imported only after the path has been checked, so that a wrong path is answered at once.
"""

import hashlib
import math
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.pretrained import checkpoint_folder, is_converted
from model import windows
from model.errors import UserError, printable
from model.windows import LayerSpec

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from training.processes.context import Layout
    from training.settings.schema import Settings

STARTED = time.monotonic()  # of an evaluation, which imports this module first
MOST_PER_SAVED = 16  # parameters in memory for each number in the files, which may be packed


def specs_of(config: Any) -> tuple[LayerSpec, ...]:
    """One `LayerSpec` per layer, bottom layer first, from the config of our decoder or of a Hugging Face model.

    W counts the current token in all of them: query i sees key j iff i - W < j <= i. A layer that is neither sliding
    nor chunked (full attention, recurrence, convolution) is described as `full`, because no window limits it.

    >>> from transformers import MistralConfig
    >>> specs_of(MistralConfig(num_hidden_layers=1, sliding_window=4096))[0].window
    4096
    """
    if hasattr(config, "specs"):
        return tuple(config.specs)
    config = config.get_text_config()
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    if getattr(config, "attention_layers", None):  # gpt_neo
        layer_types, window = config.attention_layers, config.window_size
    elif getattr(config, "layer_types", None) and config.model_type != "mistral":  # whose code ignores layer_types
        layer_types = config.layer_types
    else:
        uses_window = getattr(config, "use_sliding_window", True) is not False and config.model_type != "llama"
        layer_types = ["sliding_attention" if uses_window else "full_attention"] * config.num_hidden_layers
    sliding = LayerSpec("sliding", window) if window else LayerSpec("full")
    chunked = LayerSpec("chunked", chunk) if chunk else LayerSpec("full")
    known = {"sliding_attention": sliding, "local": sliding, "chunked_attention": chunked}
    return tuple(known.get(layer_type, LayerSpec("full")) for layer_type in layer_types)


def smallest_window(specs: Sequence[LayerSpec]) -> int | None:
    """The smallest window of the stack in tokens; None if all layers are full."""
    return min((spec.window for spec in specs if spec.window and spec.kind != "full"), default=None)


def nominal_reach(specs: Sequence[LayerSpec], window: int) -> int:
    """The reach in tokens by which distances are chosen: R, or layers x (W - 1) where full layers make R infinite.

    >>> nominal_reach([LayerSpec("sliding", 16), LayerSpec("full")], window=16)
    30
    """
    reach = windows.reach(specs)
    return len(specs) * (window - 1) if reach is None else reach


def out_folder(path: str | Path) -> Path:
    """The folder for results that `--out` names, created if missing."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {str(path)!r} can't be created ({error.strerror}); choose another folder") from error
    return Path(path)


@dataclass
class Examined:
    """A loaded model and what the evaluations need to know about it."""

    name: str
    model: Any  # WindreachForCausalLM, or any causal language model of transformers
    tokenizer: "Tokenizer"
    specs: tuple[LayerSpec, ...]
    folder: Path | None  # holds config.json and the weights
    run_dir: Path | None
    settings: dict[str, Any] = field(default_factory=dict)  # of the run; empty for other models
    facts: dict[str, Any] = field(default_factory=dict)  # run.json, as training wrote it; with its precision
    sha256: str = ""
    layout: "Layout | None" = None  # of the processes that share each row; None: this one has whole rows

    @property
    def ours(self) -> bool:
        """Whether our own decoder runs the model."""
        from model.decoder import WindreachForCausalLM

        return isinstance(self.model, WindreachForCausalLM)

    @property
    def device(self) -> Any:
        """The torch.device of the weights."""
        return next(self.model.parameters()).device

    @property
    def window(self) -> int | None:
        """The smallest window of the stack in tokens; if no layer has one, the window that the config names."""
        named: int | None = smallest_window(self.specs) or self.settings.get("model", {}).get("sliding_window")
        return named or getattr(self.model.config.get_text_config(), "sliding_window", None)

    @property
    def recall(self) -> dict[str, Any]:
        """The recall settings of the run; empty for other models."""
        return dict(self.settings.get("recall", {}))

    def trained_with(self) -> "Settings":
        """The settings of the run. Raises UserError if this version does not know one of them."""
        from training.settings.config_file import load_settings

        assert self.run_dir is not None
        return load_settings(self.run_dir / "settings.yaml")

    @property
    def layers(self) -> int:
        return len(self.specs)

    @property
    def reach(self) -> int | None:
        """R: the greatest distance, in tokens, at which a token can influence another; None if unbounded."""
        return windows.reach(self.specs)

    @property
    def max_tokens(self) -> int | None:
        """The longest sequence that a learned position table allows; None for rotary models."""
        config = self.model.config.get_text_config()
        learned = config.model_type in {"opt", "gpt_neo", "gpt_bigcode"}
        return getattr(config, "n_positions", None) or (config.max_position_embeddings if learned else None)

    def out_dir(self, chosen: str | None) -> Path:
        """The folder for results, created if missing: `chosen`, else the run folder, else the current folder."""
        return out_folder(chosen or self.run_dir or ".")

    def header(self) -> dict[str, Any]:
        """The fields that every result file begins with."""
        import torch
        import transformers

        on_gpu = self.device.type == "cuda"
        libraries = {module.__name__: module.__version__ for module in (torch, transformers)}
        return {
            "model": self.name,
            "checkpoint_sha256": self.sha256,
            "settings": self.settings,
            "machine": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "seconds": round(time.monotonic() - STARTED),
            "versions": {"python": platform.python_version()} | libraries,
            "window": self.window,
            "layers": self.layers,
            "reach": self.reach,
            "window_times_layers": None if self.reach is None else windows.window_times_layers(self.specs),
            "parameters": self.model.num_parameters(),
        }


def load_model(name: str, device: str | None = None, backend: str = "auto", ours_only: bool = False) -> Examined:
    """Load MODEL in float32 and evaluation mode; UserError if it is missing or damaged or has a wrong tokenizer.

    If training deletes the checkpoint meanwhile, the next one is loaded.
    `ours_only`: also for a model that our decoder can't run, before its weights are read.
    """
    run_dir, folder = locate(Path(name))
    try:
        return _loaded(name, run_dir, folder, device, backend, ours_only)
    except (OSError, UserError):
        if folder is None or folder.exists():
            raise
        return load_model(name, device, backend, ours_only)


def _loaded(
    name: str, run_dir: Path | None, folder: Path | None, device: str | None, backend: str, ours_only: bool
) -> Examined:
    if folder:
        from training.run.checkpoint import refuse_damaged

        for file in folder.iterdir():
            if not file.is_file() and not file.is_dir():  # a pipe would be waited for, a device never ends
                raise UserError(f"MODEL {name!r}: {file} is no regular file; copy the model again")
        refuse_damaged(folder)
    import torch

    from training.run.folder import read_facts
    from training.settings.config_file import parse_file

    facts = read_facts(run_dir) if run_dir else {}
    model = load_weights(folder, name, backend, ours_only)
    embeddings = int(model.config.get_text_config().vocab_size)
    tokenizer = _load_tokenizer(folder, name, run_dir, embeddings, facts.get("tokenizer_sha256") or "")
    model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings, digest = run_dir and run_dir / "settings.yaml", hashlib.sha256()
    if folder:
        for file in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin")):
            digest.update(np.memmap(file, mode="r").data)
    return Examined(
        name=printable(run_dir.name if run_dir and Path(name).resolve() == run_dir.resolve() else name.rstrip("/")),
        model=model,
        tokenizer=tokenizer,
        specs=specs_of(model.config),
        folder=folder,
        run_dir=run_dir,
        settings=parse_file(settings)[0] if settings and settings.exists() else {},
        facts=facts,
        sha256=digest.hexdigest() if folder else "",
    )


def locate(path: Path) -> tuple[Path | None, Path | None]:
    """(run folder, folder with config.json and weights); (None, None) if the path may be a name on the hub."""
    if is_converted(str(path)):
        try:
            return None, checkpoint_folder(str(path))
        except UserError as error:
            raise UserError(f"MODEL {str(path)!r}: {error}") from error
    if not path.exists():
        if path.is_absolute() or len(path.parts) != 2 or path.parts[0] in {".", "..", "runs"}:
            raise UserError(f"MODEL {str(path)!r}: no such folder; give a run folder, a checkpoint or a hub name")
        return None, None
    run_dir = next((above for above in (path, *path.resolve().parents) if (above / "settings.yaml").exists()), None)
    if folder := next((below for below in (path, path / "hf") if (below / "config.json").exists()), None):
        return run_dir, folder
    from training.run.checkpoint import newest_valid

    if (path / "checkpoints").exists() and (checkpoint := newest_valid(path)):
        return path, checkpoint / "hf"
    raise UserError(
        f"MODEL {str(path)!r}: holds neither config.json nor hf/ nor a checkpoint under checkpoints/; "
        "train a model first, or give the folder of a Hugging Face model"
    )


def load_weights(folder: Path | None, name: str, backend: str = "auto", ours_only: bool = False) -> Any:
    """Our decoder if it can run the checkpoint, else the model of transformers. Code beside the weights never runs."""
    from model.decoder import WindreachForCausalLM

    if folder and (ours_only or not _left_to_the_library(folder)):
        model: Any = WindreachForCausalLM.from_pretrained(folder, backend=backend)
    elif ours_only:
        raise UserError(f"MODEL {name!r}: no such folder; give a run folder or a checkpoint")
    else:
        model = load_hugging_face(folder, name)
    if broken := next((n for n, weight in model.named_parameters() if not bool(weight.isfinite().all())), None):
        raise UserError(f"MODEL {name!r}: {broken} holds a number that is not finite; take an older checkpoint")
    return model


def _left_to_the_library(folder: Path) -> bool:
    """Whether a checkpoint is of another family, has a feature that our decoder lacks, or other files of weights."""
    from model import hub

    if hub.read_config(folder).get("model_type") == "windreach":
        return False
    try:
        hub.load_config(folder)
    except UserError:  # such as scaled RoPE
        return True
    return not any(folder.glob("model*.safetensors"))


def load_hugging_face(folder: Path | None, name: str, **settings: Any) -> Any:
    """The model of transformers in float32. settings: of its config, where they differ from those of the folder."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    from model import hub

    source = str(folder or name)
    try:  # without trust_remote_code=False transformers would ask on standard input, where a pipe may answer yes
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if folder and any(folder.glob("model*.safetensors")):
            with torch.device("meta"):
                described = AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
            saved = sum(math.prod(shape) for shape in hub.weight_shapes(folder).values())
            if described > MOST_PER_SAVED * saved:
                raise UserError(f"config.json describes {described:,} parameters, the files hold {saved:,}")
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False, **settings)
    except SafetensorError as error:
        raise UserError(f"MODEL {name!r}: its weights are damaged ({error}); copy them again") from error
    except Exception as error:  # for a wrong config.json `transformers` raises whatever it stumbles over
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"MODEL {name!r}: {reason}") from error


def _load_tokenizer(
    folder: Path | None, name: str, run_dir: Path | None, embeddings: int, trained_with: str
) -> "Tokenizer":
    """The tokenizer of a run, else the tokenizer beside the weights; UserError if it does not fit."""
    from transformers import AutoTokenizer

    from data.tokenizer import FILE, JSON_FILE, HubTokenizer, load_tokenizer

    places = (folder, run_dir / "tokenizer") if folder and run_dir else ()
    tokenizer: Tokenizer
    if place := next((place for place in places if any((place / file).exists() for file in (FILE, JSON_FILE))), None):
        tokenizer = load_tokenizer(place)
        if trained_with not in ("", tokenizer.sha256):
            raise UserError(
                f"MODEL {name!r}: its tokenizer has the sha256 {tokenizer.sha256[:12]}…, but the run was trained with "
                f"{trained_with[:12]}…; put back the files of the run's own tokenizer/"
            )
    else:
        try:
            tokenizer = HubTokenizer(AutoTokenizer.from_pretrained(str(folder or name), trust_remote_code=False))
        except Exception as error:  # `tokenizers` raises no narrower class
            why = str(error).partition("\n")[0]
            raise UserError(f"MODEL {name!r}: no tokenizer beside the weights ({why}); copy its files there") from error
    if tokenizer.vocab_size > embeddings:
        raise UserError(
            f"MODEL {name!r}: the tokenizer has {tokenizer.vocab_size:,} tokens and the checkpoint {embeddings:,} "
            "embeddings; they do not belong together"
        )
    return tokenizer
