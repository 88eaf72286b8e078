"""Estimates which share of the measured gain each pattern of layers would see, and computes what the pattern costs.

Measured: the share of the gain by context, with one model on the given texts.
Computed: reach, cache bytes and FLOPs of a dense decoder, with the shape of the measured model or of a run's config.
Assumed: another model would gain from the same distances. Keys and values take 2 bytes a number.

How much of its reach a stack uses is not known before it is trained. So each pattern gets three shares of the gain:
within the window of the sliding layers, within the farthest hop of any layer, and within the reach of the stack.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from eval.models import Examined
from model import windows
from model.errors import UserError
from model.windows import LayerSpec

FULL_EVERY = (0, 6, 4, 2)  # one full layer in so many, as in released models; 0: none
SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip
BENEFITS, COSTS = ("in_window", "in_one_hop", "in_reach"), ("cache_bytes", "flops_per_token")


def shape_of(examined: Examined, config: str | None) -> Any:
    """The `WindreachConfig` that is priced: of a run's YAML file, else one with the shape of the measured model."""
    from model.config import WindreachConfig

    if config:
        from training.settings.build import model_config
        from training.settings.config_file import load_settings

        return model_config(load_settings(config), examined.tokenizer.vocab_size)
    measured = examined.model.config.get_text_config()
    shape = {name: value for name in SHAPE if (value := getattr(measured, name, None)) is not None}
    if missing := {"intermediate_size", "hidden_size", "num_hidden_layers", "num_attention_heads"} - shape.keys():
        raise UserError(
            f"--model {examined.name!r}: its config names no {', '.join(sorted(missing))}, so its cost can't be "
            "computed; name the config of a run with --plan configs/X.yaml"
        )
    return WindreachConfig(**{"num_key_value_heads": shape["num_attention_heads"]} | shape, sliding_window=None)


def patterns(layers: int, sizes: Sequence[int]) -> Iterator[tuple[int | None, int, list[LayerSpec]]]:
    """(W, one full layer in so many, the layers): every window with every ratio, and the stack of full layers.

    >>> [spec.kind for spec in list(patterns(3, [16]))[-2][2]]
    ['sliding', 'full', 'sliding']
    """
    for window in sizes:
        for every in FULL_EVERY:
            if every <= layers:
                is_full = [every > 0 and i % every == every - 1 for i in range(layers)]
                yield window, every, [LayerSpec("full") if full else LayerSpec("sliding", window) for full in is_full]
    yield None, 1, [LayerSpec("full")] * layers


def priced(shape: Any, specs: Sequence[LayerSpec], length: int) -> dict[str, Any]:
    """Reach in tokens, bytes of the cache after `length` tokens, and FLOPs a token of a document of `length` tokens."""
    from model.config import WindreachConfig
    from model.flops import cache_bytes, flops_per_token

    fields = {name: getattr(shape, name) for name in SHAPE}
    config = WindreachConfig(**fields, layers=[vars(spec) for spec in specs])
    costs = cache_bytes(config, length=length), flops_per_token(config, length, training=False)
    return {"reach": windows.reach(specs)} | dict(zip(COSTS, costs, strict=True))


def share_within(context: int | None, rows: Sequence[dict[str, Any]]) -> float:
    """Share of the gain with `context` tokens; None is all. Linear in log2 between the measured contexts.

    >>> rows = [{"context": 16, "share": [0.0]}, {"context": 64, "share": [0.75]}, {"context": 256, "share": [1.0]}]
    >>> share_within(32, rows), share_within(None, rows)
    (0.375, 1.0)
    """
    measured = [np.log2(row["context"]) for row in rows]
    return float(np.interp(np.log2(context or np.inf), measured, [row["share"][0] for row in rows]))


def advice(shape: Any, rows: Sequence[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    """One row for each pattern, from the contexts of `measure.summary`; empty if there is no gain to share.

    The windows are the measured contexts. A token that is predicted from a reach R has R + 1 tokens of context.
    """
    if rows[0]["share"] is None:
        return []
    table = []
    for window, every, specs in patterns(shape.num_hidden_layers, [row["context"] for row in rows]):
        row = priced(shape, specs, length) | {"window": window, "full_every": every}
        row["full_layers"] = sum(spec.kind == "full" for spec in specs)
        row["in_window"] = share_within(window, rows)
        row["in_one_hop"] = share_within(None if every else window, rows)
        row["in_reach"] = share_within(None if row["reach"] is None else row["reach"] + 1, rows)
        table.append(row)
    return [row | {"pareto": not any(dominates(other, row) for other in table)} for row in table]


def dominates(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `one` costs no more, sees no less, and is better in something."""
    pairs = [(one[key], other[key]) for key in BENEFITS] + [(other[key], one[key]) for key in COSTS]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
