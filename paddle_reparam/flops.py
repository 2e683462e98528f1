"""How large a network is and how much it computes: parameters, and multiply-adds counted where they happen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Callable

import paddle
from paddle import _C_ops, nn

from .errors import ReparamError
from .geometry import BATCH_NORMS
from .report import Report
from .tracing import InputSpec, sample_inputs, walk


@dataclass
class ModelSize(Report):
    """What a network holds and what a forward pass in eval mode multiplies.

    `macs_per_image` and `macs_per_pass` (what does not depend on the batch, such as a transform of weights) are
    multiply-adds of convolutions and matrix products; `uncounted` the paths of the layers with a matrix or kernel of
    their own in which no such product was seen; `layers` counts the layers without sublayers, but no Identity.
    """

    trainable_parameters: int
    frozen_parameters: int
    macs_per_image: int
    macs_per_pass: int
    layers: int
    uncounted: list[str]

    @property
    def parameters(self) -> int:
        """Trainable and frozen ones; the running statistics of BNs are no parameters."""
        return self.trainable_parameters + self.frozen_parameters


def measure(model: nn.Layer, input_spec: InputSpec) -> ModelSize:
    """Return the size of a network in eval mode; `input_spec` is a list of input shapes with None for the batch.

    Convolutions and matrix products are counted as Paddle runs them, so a functional one counts like a layer.
    Raises `ReparamError` for a network in training mode.
    """
    if model.training:
        raise ReparamError("the model is in training mode; call model.eval() before counting")
    one, uncounted = _count_macs(model, input_spec, 1)
    two, _ = _count_macs(model, input_spec, 2)
    leaves = {id(layer): layer for _, layer in walk(model) if not any(layer.children())}
    trainable, frozen = _count_parameters(model)
    return ModelSize(
        trainable_parameters=trainable,
        frozen_parameters=frozen,
        macs_per_image=two - one,
        macs_per_pass=2 * one - two,
        layers=sum(not isinstance(leaf, nn.Identity) for leaf in leaves.values()),
        uncounted=uncounted,
    )


def _count_parameters(model: nn.Layer) -> tuple[int, int]:
    """Return (trainable, frozen); a persistent buffer counts as frozen."""
    counts = {True: 0, False: 0}
    seen: set[int] = set()
    for _, layer in walk(model):
        statistics = [layer._mean, layer._variance] if isinstance(layer, BATCH_NORMS) else []
        seen.update(id(t) for t in statistics)
        buffers = [b for name, b in layer._buffers.items() if name not in layer._non_persistable_buffer_names_set]
        for tensor in [*layer._parameters.values(), *buffers]:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                counts[not tensor.stop_gradient] += math.prod(tensor.shape)
    return counts[True], counts[False]


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def _convolution(output: paddle.Tensor, _x: paddle.Tensor, weight: paddle.Tensor, *_: Any, **__: Any) -> int:
    return math.prod(output.shape) * math.prod(weight.shape[1:])


def _product(output: paddle.Tensor, x: paddle.Tensor, *_: Any, **__: Any) -> int:
    return math.prod(output.shape) * x.shape[-1]


def _matmul(output: paddle.Tensor, *args: Any, **kwargs: Any) -> int:
    given = {**dict(zip(("x", "y", "transpose_x"), args)), **kwargs}
    x = given.get("x", given.get("input"))
    return math.prod(output.shape) * x.shape[-2 if given.get("transpose_x") and len(x.shape) > 1 else -1]


# Every way from Python to the kernels goes through these, whether a layer or a function of paddle.nn.functional calls.
_COUNTED: list[tuple[Any, str, Callable[..., int]]] = [
    *[(_C_ops, name, _convolution) for name in ("conv2d", "depthwise_conv2d", "depthwise_conv2d_bias", "conv3d")],
    *[(_C_ops, name, _product) for name in ("bmm", "linear", "linear_v2")],
    (_C_ops, "matmul", _matmul),
    (paddle.Tensor, "__matmul__", _product),
]


@contextlib.contextmanager
def _watch(on_macs: Callable[[int], None]) -> Iterator[None]:
    """Call `on_macs` with the multiply-adds of each convolution and matrix product while the `with` block runs."""

    def watched(operation: Callable[..., Any], macs: Callable[..., int]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = operation(*args, **kwargs)
            on_macs(macs(output, *args, **kwargs))
            return output

        return run

    originals = [(owner, name, getattr(owner, name), macs) for owner, name, macs in _COUNTED if hasattr(owner, name)]
    try:
        for owner, name, operation, macs in originals:
            setattr(owner, name, watched(operation, macs))
        yield
    finally:
        for owner, name, operation, _ in originals:
            setattr(owner, name, operation)


def _count_macs(model: nn.Layer, input_spec: InputSpec, batch: int) -> tuple[int, list[str]]:
    """Return the multiply-adds of one forward pass, and the paths of the layers that were not counted."""
    total = 0
    running: list[nn.Layer] = []
    called: set[int] = set()
    counted: set[int] = set()

    def on_macs(macs: int) -> None:
        nonlocal total
        total += macs
        if running:
            counted.add(id(running[-1]))

    def enter(layer: nn.Layer, _inputs: Any) -> None:
        running.append(layer)
        called.add(id(layer))

    def leave(_layer: nn.Layer, _inputs: Any, _output: Any) -> None:
        running.pop()

    layers = {id(layer): (path, layer) for path, layer in reversed(list(walk(model)))}
    handles = []
    try:
        for _, layer in layers.values():
            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_post_hook(leave)]
        with _watch(on_macs), paddle.no_grad():
            model(*sample_inputs(input_spec, batch, seed=0, like=model))
    finally:
        for handle in handles:
            handle.remove()
    # A sublayer that is not called may keep a weight for its owner, which was then counted there.
    owners = [layer for _, layer in layers.values() if id(layer) in counted]
    counted |= {id(child) for owner in owners for child in owner.children()} - called
    uncounted = [
        path or type(layer).__name__
        for path, layer in reversed(layers.values())
        if id(layer) not in counted and any(p is not None and len(p.shape) > 1 for p in layer._parameters.values())
    ]
    return total, uncounted
