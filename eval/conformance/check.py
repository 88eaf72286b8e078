"""Checks a model in all modes and attention implementations: `check(model)` returns the content of conformance.json.

    report = check(model, attention=["sdpa"], modes=["train", "packed"])
    assert not report["faults"]

The model may be wrapped by PEFT or `accelerate`. It need not be a class of transformers: it needs a `config`, a list of
decoder layers, and `forward(input_ids, attention_mask, position_ids, past_key_values, use_cache)`.
"""

import platform
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import transformers
from torch import Tensor

from eval.conformance.influence import Reference, measure, reference_of
from eval.conformance.modes import MODES, Way, text_length, ways
from eval.conformance.verdict import Asked, Fault, asked_of, summary
from eval.conformance.wrapped import layers_of, unwrapped
from model.errors import UserError
from model.windows import LayerSpec

REFUSALS = (UserError, ValueError, NotImplementedError)  # a model that says that it can't do this is not at fault
OWN = "its own"  # name of the attention of a model that has no choice of implementations


def check(
    model: Any,
    attention: Sequence[str] = (),
    modes: Sequence[str] = MODES,
    windows: Sequence[LayerSpec] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a model in all `modes`, under each implementation of `attention`; default: the one that is set.

    The first implementation that runs is the reference for the values of all others. windows: what each layer may see;
    default: what the model's config says.
    """
    asked = [Asked(spec) for spec in windows] or asked_of(unwrapped(model).config)
    if len(asked) != len(layers_of(model)):
        raise UserError(f"{len(asked)} windows are given, but the model has {len(layers_of(model))} layers")
    sizes = sorted({layer.spec.ring_slots for layer in asked if layer.spec.ring_slots}) or [8]
    text = _text(model, text_length(sizes[-1]), seed)
    with text.device, _uncompiled_on_cpu(text.device):
        rows = _rows(model, attention or [_implementation(model)], modes, asked, text, (sizes[0], sizes[-1]))
    libraries = {library.__name__: library.__version__ for library in (torch, transformers)}
    return {
        "model": type(unwrapped(model)).__name__,
        "versions": {"python": platform.python_version()} | libraries,
        "seed": seed,
        "tokens": len(text),
        "asked": [layer.name for layer in asked],
        "rows": rows,
    }


def _rows(
    model: Any,
    attention: Sequence[str],
    modes: Sequence[str],
    asked: list[Asked],
    text: Tensor,
    sizes: tuple[int, int],
) -> list[dict[str, Any]]:
    """One row for each attention implementation and mode. The model has its own implementation again afterwards."""
    plan, rows, before = list(ways(modes, text, sizes)), [], _implementation(model)
    reference, trusted = None, True
    for name in attention:
        try:
            _choose(model, name)
            if reference is None:
                reference = reference_of(model, text)
                plain = next(ways(["eval"], text, sizes))
                trusted = not summary(asked, plain, measure(model, plain, reference), trusted)["faults"]
        except REFUSALS as error:
            rows.append({"attention": name, "mode": "all", "refused": _first_line(error), "faults": []})
            continue
        for mode in modes:
            in_mode = [way for way in plan if way.mode == mode]
            rows.append({"attention": name, "mode": mode} | _row(model, in_mode, asked, reference, trusted))
    _choose(model, before)
    return rows


@contextmanager
def _uncompiled_on_cpu(device: torch.device) -> Iterator[None]:
    """On a CPU, FlexAttention runs uncompiled: its masks are the same, and torch compiles it for a minute or fails."""
    stance = "force_eager" if device.type == "cpu" else "default"
    with torch.compiler.set_stance(stance), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        warnings.filterwarnings("ignore", "_compile flag on create_block_mask", DeprecationWarning)  # of transformers
        yield


def _row(model: Any, plan: list[Way], asked: list[Asked], reference: Reference, trusted: bool) -> dict[str, Any]:
    """One mode: the measurements of all ways to feed the model in it, and every fault once."""
    measured, refusals = [], []
    for way in plan:
        try:
            measured.append(summary(asked, way, measure(model, way, reference), trusted))
        except REFUSALS as error:
            refusals.append(_first_line(error))
        except Exception as error:  # of any model: what does not run is reported as a fault
            sentence = f"it does not run: {type(error).__name__}: {_first_line(error)}"
            return {"ways": [], "faults": [asdict(Fault("does not run", sentence, label=way.label))]}
    if not measured:
        return {"refused": refusals[0], "faults": []}
    faults = {fault["sentence"]: fault for way in reversed(measured) for fault in way["faults"]}
    return {"ways": measured, "refusals": refusals, "faults": list(faults.values())}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _text(model: Any, length: int, seed: int) -> Tensor:
    """Token ids (T,), none equal to its neighbour and none of them special."""
    config = unwrapped(model).config
    config = getattr(config, "get_text_config", lambda: config)()
    named = (getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    special = {i for ids in named for i in (ids if isinstance(ids, list) else [ids])}
    usable = torch.tensor([i for i in range(min(config.vocab_size, 4096)) if i not in special])
    steps = torch.randint(1, len(usable), (length,), generator=torch.Generator().manual_seed(seed))
    return usable[steps.cumsum(0) % len(usable)].to(next(model.parameters()).device)


def _implementation(model: Any) -> str:
    return getattr(unwrapped(model).config, "_attn_implementation", None) or OWN


def _choose(model: Any, name: str) -> None:
    """Set the attention implementation of a model; ValueError if the model or this machine does not have it."""
    if name == _implementation(model):
        return
    if not hasattr(unwrapped(model), "set_attn_implementation"):
        raise UserError(f"{type(unwrapped(model)).__name__} has only one attention implementation, {OWN}")
    unwrapped(model).set_attn_implementation(name)
    if _implementation(model) != name:
        raise UserError(f"{type(unwrapped(model)).__name__} does not take attention implementation {name!r}")
