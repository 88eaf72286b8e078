"""Tasks for lm-evaluation-harness: the needle items of `eval.recall` as text, and recall at each distance as a metric.

    lm_eval --model hf --model_args pretrained=runs/quickstart/hf --include_path eval/harness --tasks windreach_recall

The harness hands text to a model, and tokens made from it again. A text that would come back as other tokens would have
another distance: such an item is left out and the next one taken, so that distances are exact. Items of all distances
alternate, so that `--limit` shortens each of them alike.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import AutoConfig, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the harness starts elsewhere

from data.tasks.layout import RecallItem, item
from data.tasks.vocabulary import RecallVocabulary, recall_vocabulary
from eval.architectures import specs_of
from eval.haystack import Haystack, read_haystack
from eval.models import HubTokenizer
from eval.recall.distances import protocol_distances
from model import windows
from model.errors import UserError

TRIES = 50  # items tried for one whose text comes back as the same tokens
MARGIN = 10  # tokens of an item beyond its farthest distance


def documents(
    pretrained: str | None = None,
    tokenizer: str | None = None,
    distances: Sequence[int] | None = None,
    n: int = 100,
    values: int = 32,
    seed: int = 0,
    text: str | None = None,
    max_distance: int = 4096,
    **_model_arguments: Any,
) -> dict[str, datasets.Dataset]:
    """Rows {context, choices, answer, distance}: `n` of each distance, alternating.

    The arguments are those of `--metadata`, to which the harness adds those of `--model_args`. `distances` are in
    tokens, by default the protocol's for the windows of the model; `text` names a file to be used as haystack.
    Raises UserError without a model, and where the model can't read so far.
    """
    if not pretrained:
        raise UserError("windreach_recall needs to know the model: give --model_args pretrained=FOLDER")
    config = AutoConfig.from_pretrained(pretrained, trust_remote_code=False)
    made = HubTokenizer(AutoTokenizer.from_pretrained(tokenizer or pretrained, trust_remote_code=False))
    wanted = sorted(distances or default_distances(config, max_distance))
    length = wanted[-1] + MARGIN
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if longest and length >= longest:
        raise UserError(
            f"distance {wanted[-1]}: items would be {length:,} tokens long; the harness cuts the front of what is "
            f"longer than {longest:,}, and the needle with it: give --metadata '{{\"max_distance\": {longest - 64}}}'"
        )
    vocabulary = recall_vocabulary(made, values)
    haystack = read_haystack(made, text)
    rows = [
        as_row(question, vocabulary, made)
        for number in range(n)
        for question in questions(made, vocabulary, haystack, wanted, length, seed, number)
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def default_distances(config: Any, max_distance: int) -> list[int]:
    """The protocol's distances; for a stack of unbounded reach those of its sliding twin, or of W = 64."""
    specs = specs_of(config)
    bounded = [spec.window for spec in specs if spec.window]
    window = min(bounded) if bounded else 64
    reach = windows.reach(specs)
    if reach is None:
        reach = len(specs) * (window - 1)
    return [d for d in protocol_distances(window, reach, len(specs) * window) if d <= max_distance]


def questions(
    tokenizer: HubTokenizer,
    vocabulary: RecallVocabulary,
    haystack: Haystack,
    distances: Sequence[int],
    length: int,
    seed: int,
    number: int,
) -> Iterator[RecallItem]:
    """Question `number` at every distance. Raises UserError where no text comes back as the same tokens."""
    for distance in distances:
        assert distance <= length - 1 - len(vocabulary.needle)
        for attempt in range(number * TRIES, (number + 1) * TRIES):
            filler = haystack.filler(attempt, length, seed)
            made = item(
                "needle", np.random.default_rng([seed, attempt, distance]), filler, vocabulary, length, distance
            )
            if comes_back(tokenizer, made):
                yield made
                break
        else:
            raise UserError(
                f"distance {distance}: of {TRIES} items none comes back from text as the same tokens; this tokenizer "
                "can't be asked through the harness, use `python -m eval.recall`"
            )


def comes_back(tokenizer: HubTokenizer, made: RecallItem) -> bool:
    """Whether the item's text with its answer is read as the item's tokens and the answer."""
    tokens = [*made.tokens, made.value]
    text, question = tokenizer.decode(tokens), tokenizer.decode(made.tokens)
    return tokenizer.encode(text) == tokens and tokenizer.encode(question) == tokens[:-1] and text.startswith(question)


def as_row(made: RecallItem, vocabulary: RecallVocabulary, tokenizer: HubTokenizer) -> dict[str, Any]:
    context = tokenizer.decode(made.tokens)
    choices = [tokenizer.decode([*made.tokens, value]).removeprefix(context) for value in vocabulary.values]
    return {
        "context": context,
        "choices": choices,
        "answer": vocabulary.values.index(made.value),
        "distance": made.distance,
    }


def score_choice(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """`results`: log-likelihood of each choice. As in `eval.recall`: the right value is the likeliest of the values."""
    chosen = max(range(len(results)), key=lambda i: results[i][0])
    return _metrics(doc, chosen == doc["answer"])


def score_generated(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return _metrics(doc, results[0].strip() == doc["choices"][doc["answer"]].strip())


def _metrics(doc: dict[str, Any], right: bool) -> dict[str, float]:
    """Of all distances, and of the item's own: the harness averages each over the items that have it."""
    return {"recall": float(right), f"recall@{doc['distance']}": float(right)}
