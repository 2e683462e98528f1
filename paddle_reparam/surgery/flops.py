"""How large a network is and how much it computes: parameters, and multiply-adds counted where they happen."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import paddle
from paddle import _C_ops, nn

from ..arithmetic.geometry import BATCH_NORMS
from ..errors import ReparamError
from ..layers.toeplitz import formulation
from ..report import Report
from .tracing import InputSpec, require_eval, run, sample_inputs, unchanged, walk


@dataclass
class ModelSize(Report):
    """What a network holds and what a forward pass in eval mode multiplies.

    `nonzero_parameters` counts what is not exactly zero, among trainable and frozen ones: not the masked weights, nor
    biases that start at zero. `macs_per_image` and `macs_per_pass` (what does not depend on the batch, such as a
    transform of weights) are multiply-adds of convolutions and matrix products; `uncounted` the paths of the layers
    with a matrix or kernel of their own in which no such product was seen; `layers` counts the layers without
    sublayers, but no Identity.
    """

    trainable_parameters: int
    frozen_parameters: int
    nonzero_parameters: int
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

    Convolutions and matrix products are counted as Paddle runs them, so a functional one counts like a layer. They are
    not computed: zeros of their shape stand for them, which is fast for networks of any size.
    Raises `ReparamError` for a network in training mode.
    """
    require_eval(model, "the model", "counting")
    one, uncounted = _count_macs(model, input_spec, 1)
    two, _ = _count_macs(model, input_spec, 2)
    leaves = {id(layer): layer for _, layer in walk(model) if not any(layer.children())}
    trainable, frozen, nonzero = _count_parameters(model)
    return ModelSize(
        trainable_parameters=trainable,
        frozen_parameters=frozen,
        nonzero_parameters=nonzero,
        macs_per_image=two - one,
        macs_per_pass=2 * one - two,
        layers=sum(not isinstance(leaf, nn.Identity) for leaf in leaves.values()),
        uncounted=uncounted,
    )


def _count_parameters(model: nn.Layer) -> tuple[int, int, int]:
    """Return (trainable, frozen, not zero of either); a persistent buffer counts as frozen."""
    counts, nonzero = {True: 0, False: 0}, 0
    seen: set[int] = set()
    for _, layer in walk(model):
        statistics = [layer._mean, layer._variance] if isinstance(layer, BATCH_NORMS) else []
        seen.update(id(t) for t in statistics)
        buffers = [b for name, b in layer._buffers.items() if name not in layer._non_persistable_buffer_names_set]
        for tensor in [*layer._parameters.values(), *buffers]:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                counts[not tensor.stop_gradient] += math.prod(tensor.shape)
                nonzero += int(paddle.count_nonzero(tensor))
    return counts[True], counts[False], nonzero


# ---------------------------------------------------------------------------------------------------------------------
# Counting


Shape = list[int]


def _convolution(x: Shape, weight: Shape, strides: Shape, paddings: Shape, algorithm: str, *rest: Any) -> tuple:
    """Return (shape of the output, multiply-adds). `rest`: dilations and groups in either order, and the format."""
    [dilations] = [value for value in rest if isinstance(value, (list, tuple))]
    [groups] = [value for value in rest if isinstance(value, int)]
    axes = range(1, len(x) - 1) if "NHWC" in rest or "NDHWC" in rest else range(2, len(x))
    paddings = [p for p in paddings for _ in range(2)] if len(paddings) == len(strides) else list(paddings)
    output, channel = list(x), 1 if axes[0] == 2 else -1
    if x[channel] != weight[1] * groups:
        raise ReparamError(f"a kernel of shape {weight} in {groups} groups got an input of shape {x}")
    output[channel] = weight[0]
    for i, axis in enumerate(axes):
        reach = dilations[i] * (weight[2 + i] - 1) + 1
        padding = 0 if algorithm == "VALID" else paddings[2 * i] + paddings[2 * i + 1]
        same = -(-x[axis] // strides[i])
        output[axis] = same if algorithm == "SAME" else (x[axis] + padding - reach) // strides[i] + 1
    return output, math.prod(output) * math.prod(weight[1:])


def _convolution_with_bias(x: Shape, weight: Shape, _bias: Shape, *rest: Any) -> tuple:
    return _convolution(x, weight, *rest)


def _transposed_convolution(
    x: Shape, weight: Shape, strides: Shape, paddings: Shape, output_padding: Shape, output_size: Shape, algorithm: str,
    groups: int, dilations: Shape, data_format: str,
) -> tuple:  # fmt: skip
    """Return (shape of the output, multiply-adds): each number of the input meets the whole kernel."""
    axes = range(1, len(x) - 1) if data_format in ("NHWC", "NDHWC") else range(2, len(x))
    paddings = [p for p in paddings for _ in range(2)] if len(paddings) == len(strides) else list(paddings)
    output, channel = list(x), 1 if axes[0] == 2 else -1
    if x[channel] != weight[0]:
        raise ReparamError(f"a transposed kernel of shape {weight} got an input of shape {x}")
    output[channel] = weight[1] * groups
    for i, axis in enumerate(axes):
        reach = dilations[i] * (weight[2 + i] - 1) + 1
        padding = 0 if algorithm == "VALID" else paddings[2 * i] + paddings[2 * i + 1]
        if algorithm == "SAME":
            # Paddle pads as a convolution of the same size would be padded, and drops the dilation.
            reach = weight[2 + i]
            padding = max((-(-x[axis] // strides[i]) - 1) * strides[i] + reach - x[axis], 0)
        size = (x[axis] - 1) * strides[i] + reach - padding
        output[axis] = output_size[i] if output_size else size + (output_padding[i] if output_padding else 0)
    return output, math.prod(x) * math.prod(weight[1:])


def _matmul(x: Shape, y: Shape, transpose_x: bool = False, transpose_y: bool = False, **_: Any) -> tuple:
    """Return (shape of the output, multiply-adds) of a matrix product with NumPy's broadcasting."""
    rows = [] if len(x) == 1 else [x[-1 if transpose_x else -2]]
    columns = [] if len(y) == 1 else [y[-2 if transpose_y else -1]]
    inner = x[-2 if transpose_x and len(x) > 1 else -1]
    if inner != y[-2 if not transpose_y and len(y) > 1 else -1]:
        raise ReparamError(f"matrices of shapes {x} and {y} have no product")
    output = [*np.broadcast_shapes(tuple(x[:-2]), tuple(y[:-2])), *rows, *columns]
    return output, math.prod(output) * inner


def _linear(x: Shape, weight: Shape, *_: Any) -> tuple:
    return _matmul(x, weight)


# paddle.matmul takes PyTorch's names as well, and hands them on.
_ALIASES = {"input": "x", "other": "y"}
# Every way from Python to the kernels goes through these, whether a layer or a function of paddle.nn.functional calls.
_COUNTED: list[tuple[Any, str, Callable[..., tuple]]] = [
    *[(_C_ops, name, _convolution) for name in ("conv2d", "depthwise_conv2d", "conv3d")],
    (_C_ops, "depthwise_conv2d_bias", _convolution_with_bias),
    *[
        (_C_ops, name, _transposed_convolution)
        for name in ("conv2d_transpose", "depthwise_conv2d_transpose", "conv3d_transpose")
    ],
    *[(_C_ops, name, _linear) for name in ("linear", "linear_v2")],
    *[(_C_ops, name, _matmul) for name in ("bmm", "matmul")],
    (paddle.Tensor, "__matmul__", _matmul),
]


@contextlib.contextmanager
def in_place_of_products(stand_in: Callable[[Callable[..., Any], Callable[..., tuple]], Any]) -> Iterator[None]:
    """While the `with` block runs, let `stand_in(operation, rule)` run instead of each convolution and matrix product.

    `rule` returns the shape of the result and the multiply-adds for the arguments' shapes.
    """
    originals = [(owner, name, getattr(owner, name), rule) for owner, name, rule in _COUNTED if hasattr(owner, name)]
    try:
        for owner, name, operation, rule in originals:
            setattr(owner, name, stand_in(operation, rule))
        yield
    finally:
        for owner, name, operation, _ in originals:
            setattr(owner, name, operation)


def _watch(on_macs: Callable[[int], None]) -> contextlib.AbstractContextManager[None]:
    """While the `with` block runs, call `on_macs` with the multiply-adds of each convolution and matrix product, and
    hand out zeros in the place of their results."""

    def watched(_operation: Callable[..., Any], rule: Callable[..., tuple]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            def shape(value: Any) -> Any:
                return list(value.shape) if isinstance(value, paddle.Tensor) else value

            dtype = next(v.dtype for v in (*args, *kwargs.values()) if isinstance(v, paddle.Tensor))
            output, macs = rule(*map(shape, args), **{_ALIASES.get(k, k): shape(v) for k, v in kwargs.items()})
            on_macs(macs)
            return paddle.zeros(output, dtype)

        return run

    return in_place_of_products(watched)


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
        with unchanged(model), formulation("native"), _watch(on_macs), paddle.no_grad():
            run(model, sample_inputs(input_spec, batch, seed=0, like=model))
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
