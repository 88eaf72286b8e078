"""Measures which outputs differ in any bit when one position of an input is changed.

**One layer.** The input of each decoder layer is replaced by its input in the reference, a plain forward pass over the
text. Then one position of it is changed, and the outputs of the layer's attention are compared with `!=`. The influence
passes only one softmax. Scores are divided by 64 for it, because a weight below e^-17 would be lost in rounding. All
layers are measured in the same pass.

**The stack.** One token is changed, and the logits are compared.

Both passes have a batch of the same shape, and each row is compared with the same row, so both round alike. Both draw
the same random numbers, for example where experts are drawn in training.

Legend: B rows, S columns, E hidden size, T tokens of the text.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eval.conformance.modes import Batch, Way, forward, one_document
from eval.conformance.wrapped import Layer, layers_of


@dataclass(frozen=True)
class Reference:
    """Of a plain forward pass over the text: input and output (1, T, E) of each layer, and logits (1, T, V).

    A model with several residual streams has a dimension more for them, before (1, T) or after. axis: that of the 1.
    """

    inputs: list[Tensor]
    axis: int
    outputs: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Measured:
    """Of one way to feed a model.

    layers: for each layer, whether the output at a column changes with the changed column of the row, bool (B, S').
    stack: the same for the logits, bool (B, n): the last n of the columns that were fed.
    errors: for each layer, the relative error (B, S') of its output against the reference, which has the same input.
    logits_error: the largest relative error of the logits against the reference; None if they are random in training.
    dead_sinks: layers with attention sinks on which some output does not depend.
    """

    layers: list[Tensor]
    stack: Tensor
    errors: list[Tensor]
    logits_error: float | None
    dead_sinks: list[int]


def reference_of(model: Any, text: Tensor) -> Reference:
    batch = one_document(text)
    first = Batch(text, batch.documents[:1], batch.columns[:1])
    with _state_of(model, training=False), _Listener(layers_of(model)) as heard:
        logits = forward(model, first, first.input_ids)
    inputs, outputs = ([calls[0] for calls in listed] for listed in (heard.inputs, heard.outputs))
    axis = 0 if inputs[0].shape[:2] == (1, len(text)) else inputs[0].ndim - 3
    return Reference(inputs, axis, outputs, logits)


def measure(model: Any, way: Way, reference: Reference) -> Measured:
    """Passes with the layers' inputs unchanged, one position of them changed, and other sinks; the tokens likewise."""
    layers, batch = layers_of(model), way.batch
    with _state_of(model, way.training):
        run = partial(_outputs, model, layers, way, reference)
        plain = run()
        with _flattened(layers):
            influence = [(x != y).any(-1) for x, y in zip(run(), run(changed=batch.columns))]
        sinks = {n: s for n, layer in enumerate(layers) if (s := _sinks_of(layer.attention))}
        dead = []
        if sinks:
            with _raised(parameter for listed in sinks.values() for parameter in listed):
                same = [(x == y).all(-1) & (batch.documents[:, : x.shape[1]] >= 0) for x, y in zip(plain, run())]
            dead = [n for n in sinks if same[n].any()]
        logits = _fed(model, way, batch.input_ids)
        stack = (logits != _fed(model, way, batch.changed_ids())).any(-1)
        random = way.training and not logits.equal(_fed(model, way, batch.input_ids, seed=1))
    errors = [_error(x, y[0][batch.positions[:, : x.shape[1]]]) for x, y in zip(plain, reference.outputs)]
    at = batch.positions[:, _columns_of_logits(plain, logits)]
    real = batch.documents[:, _columns_of_logits(plain, logits)] >= 0
    logits_error = None if random else float(_error(logits, reference.logits[0][at])[real].max())
    return Measured(influence, stack, errors, logits_error, dead)


def _fed(model: Any, way: Way, ids: Tensor, seed: int = 0) -> Tensor:
    """The logits of one pass. seed: of the random numbers that a model draws in training besides dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return way.feed(model, way.batch, ids).detach()


def _columns_of_logits(outputs: Sequence[Tensor], logits: Tensor) -> slice:
    fed = outputs[0].shape[1]
    return slice(fed - logits.shape[1], fed)


def _error(outputs: Tensor, expected: Tensor) -> Tensor:
    """The largest difference at each column, relative to the largest output: (B, S)."""
    return (outputs - expected).abs().amax(-1) / expected.abs().amax().clamp_min(1e-30)


def _outputs(
    model: Any, layers: list[Layer], way: Way, reference: Reference, changed: Tensor | None = None
) -> list[Tensor]:
    """The output of each layer (B, S', E) on the reference's input, in which the columns `changed` (B,) are changed."""
    batch, axis, generator = way.batch, reference.axis, torch.Generator().manual_seed(0)
    inputs = []
    for stream in reference.inputs:
        by_token = stream.movedim((axis, axis + 1), (0, 1))[0, batch.positions]
        if changed is not None:
            rows = torch.arange(len(changed))
            noise = torch.randn(by_token[rows, changed].shape, generator=generator, device="cpu")
            by_token[rows, changed] += noise.to(stream) * stream.std()
        inputs.append(by_token.movedim((0, 1), (axis, axis + 1)))
    with _Listener(layers, inputs, axis) as heard:
        _fed(model, way, batch.input_ids)
    return [torch.cat(outputs, 1) for outputs in heard.outputs]


class _Listener:
    """Hears the input of each decoder layer and the output of its attention, call by call; may set the inputs."""

    def __init__(self, layers: Sequence[Layer], inputs: Sequence[Tensor] | None = None, axis: int = 0) -> None:
        self.layers, self.given, self.axis = layers, inputs, axis
        self.inputs: list[list[Tensor]] = [[] for _ in layers]
        self.outputs: list[list[Tensor]] = [[] for _ in layers]
        self.fed = [0] * len(layers)

    def __enter__(self) -> "_Listener":
        self.hooks = [
            hook
            for n, (layer, attention) in enumerate(self.layers)
            for hook in (
                layer.register_forward_pre_hook(partial(self._before, n), with_kwargs=True),
                attention.register_forward_hook(partial(self._after, n)),
            )
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, n: int, _layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        stream = args[0] if args else kwargs["hidden_states"]
        if self.given is None:
            self.inputs[n].append(stream.detach())
            return args, kwargs
        first, tokens = self.fed[n], stream.shape[self.axis + 1]
        self.fed[n] += tokens
        given = self.given[n].narrow(self.axis + 1, first, tokens).to(stream)
        return ((given, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": given})

    def _after(self, n: int, _module: nn.Module, _args: tuple, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        self.outputs[n].append(stream.detach().clone())


@contextmanager
def _flattened(layers: Sequence[Layer]) -> Iterator[None]:
    """With scores 64 times as small, where the attention has its factor as `scaling`, as those of transformers do."""
    modules = {module for layer in layers for module in layer.attention.modules()}
    factors = {module: x for module in modules if isinstance(x := getattr(module, "scaling", None), float)}
    for module, factor in factors.items():
        module.scaling = factor / 64  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, factor in factors.items():
            module.scaling = factor  # type: ignore[assignment]


def _sinks_of(attention: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in attention.named_parameters() if "sink" in name]


@contextmanager
def _raised(parameters: Iterator[nn.Parameter]) -> Iterator[None]:
    """With the logits of attention sinks raised far above all scores' usual size."""
    listed = list(parameters)
    before = [parameter.data for parameter in listed]
    for parameter in listed:
        parameter.data = parameter.data.clamp_min(0.0) + 8.0
    try:
        yield
    finally:
        for parameter, data in zip(listed, before):
            parameter.data = data


@contextmanager
def _state_of(model: Any, training: bool) -> Iterator[None]:
    """In training mode with gradients, or in evaluation mode without; either way without dropout."""
    modules = {module: module.training for module in model.modules()}
    rates = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, float) and ("dropout" in name or (name == "p" and isinstance(module, nn.Dropout)))
    ]
    gradients: Callable[[], Any] = nullcontext if training else torch.no_grad
    model.train(training)
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        with gradients():
            yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)
        for module, before in modules.items():
            module.training = before
