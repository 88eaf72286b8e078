"""What is to be measured: one of our runs, one of its checkpoints, or any Hugging Face causal language model.

`load_model` finds the weights and the tokenizer, refuses what is broken with a sentence (`UserError`, exit 2),
and works out what each layer may see, so that theory, cliff test and distances adapt to the model.
"""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.architectures import specs_of
from eval.weights import check_weights, weights_sha256
from model import hub, windows
from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.flops import cache_bytes
from model.windows import LayerSpec
from training.settings.config_file import load_settings
from training.settings.schema import Settings

OUR_TYPES = {"mistral", "ministral", "qwen3", WindreachConfig.model_type}


class TextTokenizer(Protocol):
    """What the evaluations ask of a tokenizer; ours and the wrapped Hugging Face ones offer it."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class HubTokenizer:
    """A Hugging Face tokenizer behind the small protocol of ours: no special tokens are added."""

    def __init__(self, tokenizer: Any) -> None:
        self.hf = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        self.unk_id: int | None = tokenizer.unk_token_id

    @property
    def vocab_size(self) -> int:
        return len(self.hf)

    def encode(self, text: str) -> list[int]:
        return list(self.hf.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.hf.decode(list(ids), clean_up_tokenization_spaces=False))

    def get_vocab(self) -> dict[str, int]:
        return dict(self.hf.get_vocab())


@dataclass
class Examined:
    """A loaded model with everything the evaluations need to know about it."""

    name: str
    model: Any  # WindreachForCausalLM or any causal LM of transformers
    tokenizer: Any
    specs: tuple[LayerSpec, ...]
    folder: Path | None
    run_dir: Path | None
    settings: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    nominal_window: int | None = None

    @property
    def ours(self) -> bool:
        return isinstance(self.model, WindreachForCausalLM)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def window(self) -> int | None:
        """The smallest window of the stack in tokens; for a stack without one, the window its config names."""
        bounded = [spec.window for spec in self.specs if spec.window and spec.kind != "full"]
        return min(bounded) if bounded else self.nominal_window

    @property
    def precision(self) -> str:
        """What the run was trained in, and what its answers are therefore read in; float32 for other models."""
        facts = self.run_dir / "run.json" if self.run_dir else None
        return str(json.loads(facts.read_text()).get("precision", "fp32")) if facts and facts.exists() else "fp32"

    def trained_with(self) -> Settings:
        """The settings of the run. UserError where this version doesn't know one of them."""
        assert self.run_dir is not None
        return load_settings(self.run_dir / "settings.yaml")

    @property
    def layers(self) -> int:
        return len(self.specs)

    @property
    def reach(self) -> int | None:
        """Tokens back that the last position can be influenced from; None when unbounded."""
        return windows.reach(self.specs)

    @property
    def window_times_layers(self) -> int | None:
        return None if self.reach is None else windows.window_times_layers(self.specs)

    @property
    def max_tokens(self) -> int | None:
        """Longest sequence a learned position table allows; None for rotary models."""
        config = self.model.config.get_text_config()
        learned = getattr(config, "n_positions", None) or (
            config.max_position_embeddings if config.model_type in {"opt", "gpt_neo", "gpt_bigcode"} else None
        )
        return int(learned) if learned else None

    def cache_bytes(self, tokens: int) -> int | None:
        """Bytes of bf16 keys and values behind a row of so many tokens; None for models that are not ours."""
        return cache_bytes(self.model.config, length=tokens) if self.ours else None

    def out_dir(self, chosen: str | None) -> Path:
        """Where results go: --out, else the run folder, else the present folder."""
        out = Path(chosen) if chosen else self.run_dir or Path(".")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out {str(out)!r} can't be made ({error.strerror}); name a folder you may write"
            ) from error
        return out

    def header(self) -> dict[str, Any]:
        """The fields every result file begins with."""
        return {
            "model": self.name,
            "checkpoint_sha256": self.sha256,
            "settings": self.settings,
            "versions": versions(),
            "window": self.window,
            "layers": self.layers,
            "reach": self.reach,
            "window_times_layers": self.window_times_layers,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def load_model(name: str, device: str | None = None, backend: str = "auto") -> Examined:
    """MODEL of the command lines -> a model ready to be measured, in float32 and eval mode.

    Raises UserError for a missing path, a checkpoint that is cut short, and a tokenizer that does not match.
    """
    path = Path(name)
    run_dir, folder = _locate(path)
    source = str(folder) if folder else name
    if folder:
        check_weights(folder)
    if folder and _is_for_our_decoder(folder):
        model: Any = hub.load(str(folder), backend=backend)
    else:
        model = _load_from_hub(source, name)
    tokenizer = _load_tokenizer(source, run_dir, name)
    _check_tokenizer(tokenizer, model, source, run_dir)
    model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = _run_settings(run_dir)
    specs = tuple(model.config.specs) if isinstance(model, WindreachForCausalLM) else specs_of(model.config)
    text = model.config.get_text_config()
    nominal = settings.get("model", {}).get("sliding_window") or getattr(text, "sliding_window", None)
    return Examined(
        name=_display_name(path, run_dir, name),
        model=model,
        tokenizer=tokenizer,
        specs=specs,
        folder=folder,
        run_dir=run_dir,
        settings=settings,
        sha256=weights_sha256(folder) if folder else "",
        nominal_window=nominal,
    )


def _display_name(path: Path, run_dir: Path | None, name: str) -> str:
    return run_dir.name if run_dir and path.resolve() == run_dir.resolve() else name.rstrip("/")


def _locate(path: Path) -> tuple[Path | None, Path | None]:
    """(run folder, folder with config.json and weights) of a path; (None, None) when it may be a hub name."""
    if not path.exists():
        if path.is_absolute() or len(path.parts) != 2 or path.parts[0] in {".", "..", "runs"}:
            raise UserError(f"MODEL {str(path)!r}: no such folder; give a run folder, a checkpoint or a hub name")
        return None, None
    if path.is_file():
        raise UserError(f"MODEL {str(path)!r} is a file; give the folder that holds it")
    if (path / "config.json").exists():
        return _run_above(path), path
    if (path / "hf" / "config.json").exists():
        return (path if (path / "settings.yaml").exists() else _run_above(path)), path / "hf"
    newest = _newest_checkpoint(path)
    if newest is None:
        raise UserError(
            f"MODEL {str(path)!r}: holds neither config.json nor hf/ nor a checkpoint under checkpoints/; "
            "train a model first, or give the folder of a Hugging Face model"
        )
    return path, newest


def _run_above(path: Path) -> Path | None:
    return next((parent for parent in path.resolve().parents if (parent / "settings.yaml").exists()), None)


def _newest_checkpoint(run_dir: Path) -> Path | None:
    """hf/ of the newest checkpoint whose weights are whole; a broken newest one is passed over only for an older."""
    failure: UserError | None = None
    for folder in sorted((run_dir / "checkpoints").glob("step-*/hf"), reverse=True):
        try:
            check_weights(folder)
            return folder
        except UserError as error:
            failure = failure or error
    if failure:
        raise failure
    return None


def _is_for_our_decoder(folder: Path) -> bool:
    """Our decoder reads Mistral's family; what it lacks (scaled RoPE, say) is left to the library's own code."""
    if _model_type(folder) == WindreachConfig.model_type:
        return True
    if _model_type(folder) not in OUR_TYPES or not list(folder.glob("model*.safetensors")):
        return False
    try:
        hub.load_config(folder)
    except UserError:
        return False
    return True


def _model_type(folder: Path) -> str | None:
    try:
        return dict(json.loads((folder / "config.json").read_text())).get("model_type")
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON ({error}); copy the checkpoint again") from error


def _load_from_hub(source: str, name: str) -> Any:
    """A model that `transformers` knows, with the attention that it prefers for it. Code beside the weights never runs.

    Without `trust_remote_code=False` the library asks on standard input, where a pipe may answer yes.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"MODEL {name!r}: {_first_line(error)}") from error


def _load_tokenizer(source: str, run_dir: Path | None, name: str) -> Any:
    """Our own tokenizer when a sentencepiece model of ours lies there, else the Hugging Face one."""
    from data.tokenizer import load_tokenizer

    for folder in [Path(source), *([run_dir / "tokenizer"] if run_dir else [])]:
        if run_dir and (folder / "tokenizer.model").exists():
            return load_tokenizer(str(folder))
    try:
        return HubTokenizer(AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"MODEL {name!r}: no tokenizer beside the weights ({_first_line(error)}); copy the tokenizer files there"
        ) from error


def _check_tokenizer(tokenizer: Any, model: Any, source: str, run_dir: Path | None) -> None:
    rows = int(model.config.get_text_config().vocab_size)
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size:,} tokens and the checkpoint {rows:,} embeddings; "
            "they do not belong together"
        )
    facts = run_dir / "run.json" if run_dir else None
    trained_with = json.loads(facts.read_text()).get("tokenizer_sha256") if facts and facts.exists() else None
    found: str = getattr(tokenizer, "sha256", trained_with) or ""
    if trained_with and found != trained_with:
        raise UserError(
            f"{source}: its tokenizer has the sha256 {found[:12]}…, but the run was trained with {trained_with[:12]}…; "
            "put back the run's own tokenizer/tokenizer.model"
        )


def _run_settings(run_dir: Path | None) -> dict[str, Any]:
    file = run_dir / "settings.yaml" if run_dir else None
    return dict(yaml.safe_load(file.read_text()) or {}) if file and file.exists() else {}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
