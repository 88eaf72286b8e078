"""Which attention `auto` chooses, and every form that can run here against the oracle, forward and backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import BACKENDS, Device, plan_attention
from model.attention.reference import attend_dense
from model.packing import Packing, may_see
from model.windows import LayerSpec
from scripts.benchmarks.timing import reason
from scripts.checks import Section
from training.processes.precision import DTYPES, measure

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # a window that is off by one token gives about 0.1
CHOICES = {  # layer and head size
    "sliding, W 16": (LayerSpec("sliding", 16), 24),
    "sliding, W 4,096": (LayerSpec("sliding", 4096), 128),
    "sliding, W 4,096, sinks": (LayerSpec("sliding", 4096, sink=True), 128),
    "chunked, W 4,096": (LayerSpec("chunked", 4096), 128),
    "full": (LayerSpec("full"), 128),
}
CASES = {  # layer, and whether sequences are packed
    "W 127": (LayerSpec("sliding", 127), False),
    "W 128": (LayerSpec("sliding", 128), False),
    "W 129": (LayerSpec("sliding", 129), False),
    "W 128, packed": (LayerSpec("sliding", 128), True),
    "W 300": (LayerSpec("sliding", 300), False),
    "full": (LayerSpec("full"), False),
    "full, packed": (LayerSpec("full"), True),
    "chunked": (LayerSpec("chunked", 128), False),
    "dilated": (LayerSpec("dilated", 40, dilation=3), False),
    "global tokens": (LayerSpec("sliding", 128, global_tokens=4), False),
    "sinks, packed": (LayerSpec("sliding", 128, sink=True), True),
}
BATCH, HEADS, KV_HEADS, HEAD_SIZE, TOKENS = 2, 4, 2, 64, 700
DOCUMENTS = (250, 1, 329, 120)  # tokens of each document of a packed sequence


def training_dtype(device: torch.device) -> torch.dtype:
    return DTYPES[measure(device).choose("auto")]


def choices(device: torch.device) -> Section:
    """What `auto` takes in training."""
    section = Section("What model.attention_backend: auto chooses")
    for name, (spec, head_size) in CHOICES.items():
        plan = plan_attention(spec, head_size, "auto", device.type, training_dtype(device), True)
        section.rows.append({"layer": name, "head size": head_size, "backend": plan.backend, "reason": plan.reason})
    return section


def backends(device: torch.device) -> Section:
    """Which forms of attention can train here, and why the others can't."""
    facts = LayerSpec("sliding", 128), HEAD_SIZE, Device.here(device.type), training_dtype(device), True
    able = {name: backend.unable(*facts) or "yes" for name, backend in BACKENDS.items()}
    return Section("Attention backends", [{"backend": name, "can train here": here} for name, here in able.items()])


def forms(device: torch.device) -> Section:
    """The error of each form, forward and backward. One that can't compute a layer has none."""
    here, dtype = Device.here(device.type), training_dtype(device)
    limit = LIMITS[dtype]
    names = [n for n, b in BACKENDS.items() if n != "reference" and not b.unable(LayerSpec("full"), HEAD_SIZE, here)]
    section = Section(f"Relative error of attention, forward and backward; the limit is {limit}")
    for case, (spec, packed) in CASES.items():
        row: dict[str, str | None] = {"layer": case} | dict.fromkeys(names)
        section.rows.append(row)
        for name in [n for n in names if not BACKENDS[n].unable(spec, HEAD_SIZE, here, dtype)]:
            try:
                errors = relative_errors(name, spec, packed, device, dtype)
            except Exception as error:  # whatever a kernel raises; the other forms are still to be checked
                row[name], fault = "fails", reason(error)
            else:
                row[name] = " ".join(f"{e:.0e}".replace("e-0", "e-") for e in errors)
                fault = "" if max(errors) < limit else f"relative error {max(errors):.1e}, limit {limit}"
            if fault:
                section.wrong = True
                remedy = "set model.attention_backend to another one; report this with the versions above"
                section.problem(f"{name} is wrong for {case}: {fault}", remedy)
    return section


def relative_errors(
    backend: str, spec: LayerSpec, packed: bool, device: torch.device, dtype: torch.dtype
) -> list[float]:
    """|ours - oracle| / |oracle|, of the output and, where the form has a backward pass, the worst of all gradients."""
    generator, packing = torch.Generator().manual_seed(0), Packing.of_whole_rows(TOKENS, device)
    if packed:
        documents = torch.arange(len(DOCUMENTS)).repeat_interleave(torch.tensor(DOCUMENTS))
        positions = torch.cat([torch.arange(n) for n in DOCUMENTS])
        packing = Packing(positions.repeat(BATCH, 1).to(device), documents.repeat(BATCH, 1).to(device))
    shapes = [(BATCH, heads, TOKENS, HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    *qkv, upstream = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    inputs = [*qkv, torch.randn(HEADS, generator=generator).to(device)] if spec.sink else qkv
    exact = [x.clone().float().requires_grad_() for x in inputs]
    expected = attend_dense(exact[0], exact[1], exact[2], may_see(spec, packing, packing), *exact[3:])

    facts = spec, HEAD_SIZE, Device.here(device.type), dtype
    trains = not BACKENDS[backend].unable(*facts, gradients=True)  # flex on a CPU runs forward only
    leaves = [x.clone().requires_grad_(trains) for x in inputs]
    plan = plan_attention(spec, HEAD_SIZE, backend, device.type, dtype, trains)
    actual = plan.prepare(packing, BATCH)(leaves[0], leaves[1], leaves[2], leaves[3] if spec.sink else None)
    errors = [_error([actual], [expected])]
    if trains:
        gradients = torch.autograd.grad(actual, leaves, upstream.to(actual.dtype))
        errors.append(_error(gradients, torch.autograd.grad(expected, exact, upstream.float())))
    return errors


def _error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    errors = [((a.detach().float() - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]
    return max(e if e == e else float("inf") for e in errors)  # a nan is as wrong as can be
