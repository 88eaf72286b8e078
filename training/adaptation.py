"""Which parameters are trained: all of them, those that patterns name, or adapters beside frozen matrices (PEFT).

An adapter adds `alpha / rank * B @ A` to a matrix; B starts as zeros. With DoRA each row of the sum also gets a trained
length. Exports and the `hf` of a checkpoint hold the sums, so every reader of a model can use them. To go on exactly, a
checkpoint also keeps the adapters, and the frozen matrices in a file that it shares with the checkpoint before.
"""

import math
import os
import re
from contextlib import suppress
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from model.config import WindreachConfig
from model.decoder import WindreachForCausalLM
from model.errors import UserError
from model.projections import FUSED, split_name
from training.optimizer import orthogonalised
from training.processes.parallel import Tensors, load_whole, whole_tensor
from training.run.checkpoint import checkpoints, problem_with
from training.settings.schema import LoraSettings, TrainingSettings

if TYPE_CHECKING:
    from peft import LoraConfig

FROZEN = "frozen"  # folder in a checkpoint of a run with adapters
A, B, LENGTHS = (f".lora_{part}.default.weight" for part in ("A", "B", "magnitude_vector"))  # PEFT's names


def adapt(decoder: WindreachForCausalLM, s: TrainingSettings) -> None:
    """Add the adapters that `s.lora` describes, and freeze what is not to be trained.

    The decoder may be on the meta device. Raises UserError where `s.train_only` names nothing.
    """
    if s.lora is None and not s.train_only:
        return
    trained = _matching(decoder, s.train_only)
    decoder.requires_grad_(False)
    if s.lora is not None:
        from peft import inject_adapter_in_model  # imported late: it takes a second

        inject_adapter_in_model(peft_config(s.lora), decoder)
    for parameter in trained:
        parameter.requires_grad_(True)


@torch.no_grad()
def start_adapters(decoder: nn.Module, seed: int) -> None:
    """Give adapters their first values, as PEFT does, once the weights are there: at first they change nothing.

    Weights may be sharded: every rank calls this, and draws the same. B is zeros already.
    """
    draw, weights = torch.Generator().manual_seed(seed), decoder.state_dict()
    for name, parameter in decoder.named_parameters():
        if name.endswith(A):
            full = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=draw)
        elif name.endswith(LENGTHS):
            stem = name.removesuffix(LENGTHS)
            own = f"{stem}.base_layer.weight"
            full = whole_tensor(weights[own if own in weights else f"{stem}.weight"]).norm(dim=1)
        else:
            continue
        load_whole({name: parameter}, {name: full})


class Counts(NamedTuple):
    """Numbers of parameters: of the model with its adapters, those that are trained, and those that Muon updates."""

    every: int
    trained: int
    by_muon: int


def count_trained(config: WindreachConfig, s: TrainingSettings) -> Counts:
    """The counts of a model that would be trained with `s`. Nothing is allocated. Raises UserError as `adapt` does."""
    with torch.device("meta"):
        decoder = WindreachForCausalLM(config)
        adapt(decoder, s)
    named = list(decoder.named_parameters())
    muon = [p.numel() for n, p in named if s.optimizer.kind == "muon" and p.requires_grad and orthogonalised(n, p)]
    return Counts(
        sum(p.numel() for _, p in named), sum(p.numel() for _, p in named if p.requires_grad), sum(muon)
    )  # fmt: skip


def spared_flops(decoder: WindreachForCausalLM) -> tuple[float, float]:
    """FLOPs by which frozen matrices make a step cheaper, less those of adapters: per token, and per scored position.

    A frozen matrix has no gradient of its own. The output matrix runs at scored positions only.
    """
    matrices = [(name, p) for name, p in decoder.model.layers.named_parameters() if p.ndim == 2]
    frozen = sum(p.numel() for _, p in matrices if not p.requires_grad)
    adapters = sum(p.numel() for name, p in matrices if ".lora_" in name)
    head = decoder.lm_head.weight
    return 2 * frozen - 6 * adapters, 2 * head.numel() * (not head.requires_grad)


def peft_config(lora: LoraSettings) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=[*lora.targets], lora_dropout=lora.dropout,
        use_dora=lora.dora, task_type="CAUSAL_LM",
    )  # fmt: skip


def _matching(decoder: WindreachForCausalLM, patterns: list[str]) -> list[nn.Parameter]:
    """The parameters that `patterns` name. UserError for a pattern without any, and for a part of a joined matrix."""
    in_files = {name: _names_in_files(decoder, name) for name, _ in decoder.named_parameters()}
    every = [name for names in in_files.values() for name in names]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in every):
            general = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in every)
            near = ", ".join(get_close_matches(pattern, general, n=3, cutoff=0.0))
            raise UserError(
                f"training.train_only: {pattern!r} matches no parameter of this model\n  near it are {near}"
            )
    matching = []
    for name, parameter in decoder.named_parameters():
        wanted = {n: any(fnmatchcase(n, pattern) for pattern in patterns) for n in in_files[name]}
        if name.endswith(tuple(FUSED)) and len(set(wanted.values())) > 1:
            named, others = (", ".join(n for n, is_ in wanted.items() if is_ is yes) for yes in (True, False))
            raise UserError(
                f"training.train_only names {named}, but not {others}\n"
                "  they are one matrix in memory, so they are trained together: name all of them or none"
            )
        if any(wanted.values()):
            matching.append(parameter)
    return matching


def _names_in_files(decoder: WindreachForCausalLM, name: str) -> list[str]:
    """What the parameter `name` is called in model.safetensors. A joined matrix has several names there."""
    tied = decoder.config.tie_word_embeddings and "embed_tokens" in name
    return split_name(name) + ["lm_head.weight"] * tied


# ------------------------------------------------------------------------------------------------ weights with adapters


def plain_names(weights: Tensors) -> Tensors:
    """The state dict without adapters, under the names of a model that has none."""
    return {name.replace(".base_layer", ""): w for name, w in weights.items() if ".lora_" not in name}


def merged(weights: Tensors, lora: LoraSettings | None) -> Tensors:
    """The state dict of the plain model: each adapted matrix is the sum of itself and its adapter."""
    plain = plain_names(weights)
    for name in plain:
        stem = name.removesuffix(".weight")
        if lora and stem + A in weights:
            plain[name] = plain[name] + lora.alpha / lora.rank * (weights[stem + B] @ weights[stem + A])
        if stem + LENGTHS in weights:
            plain[name] = plain[name] * (weights[stem + LENGTHS] / plain[name].norm(dim=1))[:, None]
    return plain


def trained_beside(module: nn.Module) -> Tensors:
    """The trained parameters of a module with adapters: no file of plain weights holds them. Empty without adapters."""
    parameters = dict(module.named_parameters())
    return {n: p for n, p in parameters.items() if p.requires_grad} if any(A in n for n in parameters) else {}


def peft_tensors(checkpoint: Tensors) -> Tensors:
    """The adapters among a checkpoint's tensors, named as in PEFT's adapter_model.safetensors."""
    short = {n: n.replace(LENGTHS, ".lora_magnitude_vector").replace(".default", "") for n in checkpoint}
    return {f"base_model.model.{short[n]}": t for n, t in checkpoint.items() if ".lora_" in n and "/" not in n}


def write_frozen(checkpoint: Path, weights: Tensors, decoder: nn.Module) -> None:
    """Write the frozen ones of the whole `weights` into the folder `checkpoint`.

    The file is a hard link to that of the run's newest checkpoint, if that is sound and the disk can make links.
    """
    from safetensors.torch import save_file

    file = checkpoint / FROZEN / "model.safetensors"
    file.parent.mkdir()
    for before in checkpoints(checkpoint.parents[1])[:1]:
        if problem_with(before, FROZEN) is None:
            with suppress(OSError):
                return os.link(before / file.relative_to(checkpoint), file)
    frozen = [name for name, p in decoder.named_parameters() if not p.requires_grad]
    tensors = {name: weights[name].detach().cpu().contiguous() for joined in frozen for name in split_name(joined)}
    save_file(plain_names(tensors), file)
