"""Rows that all launched processes share: seconds and memory of a forward pass, and of a step, at several lengths.

Each process holds the same number of tokens at every length: `training.tokens_per_step` over the processes.
"""

import resource
import time
from collections.abc import Sequence

import torch

from model.attention.parts import halo
from model.decoder import WindreachForCausalLM, build_model
from model.packing import Packing
from scripts.benchmarks.timing import ALONE, Row, Setup
from training.cross_entropy import cross_entropy
from training.processes.context import Layout
from training.processes.precision import DTYPES
from training.processes.ranks import join_ranks
from training.settings.build import model_config

LONGEST_STEP = 1 << 18  # tokens; of longer rows only the forward pass is timed
CALLS = 2  # the fastest counts. All processes make as many


def bench_context(setup: Setup, seq_lens: Sequence[int]) -> list[Row]:
    """One or two rows for each length. Bytes: the largest resident memory of this process so far."""
    settings, processes = setup.settings, join_ranks()
    layout = Layout.of(processes, processes.num_processes)
    config = model_config(settings, settings.model.vocab_size or settings.data.tokenizer.vocab_size)
    model, results = build_model(config, seed=settings.seed).to(setup.device).train(), []
    for tokens in seq_lens or [settings.data.seq_len]:
        rows = max(1, settings.training.tokens_per_step // tokens)
        sent = rows * bytes_sent(model, tokens, layout.parts, DTYPES[setup.precision].itemsize)
        for gradients in (False, True)[: 1 + (tokens <= LONGEST_STEP)]:
            with torch.set_grad_enabled(gradients):
                timed = [seconds_of_pass(model, rows, tokens, layout, setup) for _ in range(CALLS)]
            seconds, of_processor = map(min, zip(*timed))
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            case = f"{'forward and backward' if gradients else 'forward'}, {rows} x {tokens:,} tokens"
            note = f"{layout.parts} processes, {of_processor:.2f} s of processor; {sent:,} bytes to the next, forward"
            measured = seconds, None, None, None, memory, None
            results.append(Row("context", case, ALONE, *measured, setup.precision, torch.get_num_threads(), note))
    return results


def bytes_sent(model: WindreachForCausalLM, tokens: int, parts: int, item_bytes: int) -> int:
    """Bytes of keys and values that one row's part is sent from earlier parts in a forward pass: the last part."""
    row, config = Packing.of_whole_rows(tokens, torch.device("cpu")), model.config
    first = tokens * (parts - 1) // parts
    columns = sum(halo(spec, row, first).shape[1] for spec in config.specs)
    return 2 * columns * config.num_key_value_heads * config.head_dim * item_bytes


def seconds_of_pass(
    model: WindreachForCausalLM, rows: int, tokens: int, layout: Layout, setup: Setup
) -> tuple[float, float]:
    """Of next-token loss on random tokens, with its gradient where gradients are on: by the clock, and of processor."""
    ids = torch.randint(model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)[:, layout.own(tokens)].flatten().to(setup.device)
    packing = layout.packing(Packing.of_whole_rows(tokens, torch.device("cpu"))).to(setup.device)
    ids = ids[:, layout.own(tokens)].to(setup.device)
    if setup.on_gpu:
        torch.cuda.synchronize()
    began, worked = time.perf_counter(), time.process_time()
    with torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.precision == "bf16"):
        hidden = model.model(ids, packing=packing).last_hidden_state.flatten(0, 1)
        loss = cross_entropy(hidden, model.lm_head.weight, labels).loss
    if loss.requires_grad:
        loss.backward()
        model.zero_grad()
    if setup.on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - worked
