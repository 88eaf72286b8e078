"""How many answers stand so far behind their instruction, or the system prompt, that a window does not hold it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from data.token_store import Shard


@dataclass(frozen=True)
class FarAnswers:
    """Shares are by the name of a limit: W is the smallest window, R the exact reach of the stack."""

    answers: int
    without_instruction: int  # no user message stands before them
    instruction: dict[str, float]  # share of the answers whose instruction begins farther back
    with_system: int  # answers in conversations with a system prompt
    system: dict[str, float]  # share of those whose system prompt begins farther back


def far_answers(shards: Iterable[Shard], limits: Mapping[str, int]) -> FarAnswers:
    """Figures of the conversations in `shards`, for each of `limits` in tokens.

    The first token of an answer is predicted at the position before it. That position, i, sees the keys j with
    i - W < j, so a window of W tokens ends at distance W - 1. Information comes from at most R tokens back.
    """
    starts, _, *marks = np.concatenate([shard.answers[:] for shard in shards if shard.answers is not None]).T
    farthest = {name: tokens - 1 if name == "W" else tokens for name, tokens in limits.items()}
    distances = [(starts - 1 - mark)[mark >= 0] for mark in marks]
    instruction, system = (
        {name: float((distance > most).mean()) if len(distance) else 0.0 for name, most in farthest.items()}
        for distance in distances
    )
    without = len(starts) - len(distances[0])
    return FarAnswers(len(starts), without, instruction, len(distances[1]), system)


def sentences(far: FarAnswers, limits: Mapping[str, int]) -> list[str]:
    """What the shares mean for the model, where they are not 0."""
    if not limits:
        return ["No layer has a window, so every answer sees its whole conversation."]
    said = []
    if share := far.instruction.get("W"):
        said.append(
            f"{share:.1%} of the answers begin where one window of {limits['W']:,} tokens no longer holds the start of "
            "their instruction. The layers must pass it on."
        )
    if share := far.instruction.get("R"):
        said.append(
            f"For {share:.1%} of the answers it is farther back than R = {limits['R']:,} tokens: nothing of it can "
            "reach them. Use a larger window, full layers, or shorter conversations."
        )
    if share := far.system.get("R"):
        said.append(
            f"The start of the system prompt is farther back than R for {share:.1%} of the answers that have one."
        )
    return said or ["Every answer begins within one window of the start of its instruction."]
