"""Fewer than 32 bits: how far a right conversion may be off, and what it costs on images.

What is correct in 16 or 8 bits cannot be told by a fixed number: a network of a hundred layers makes more of a rounding
than one of ten. So the network itself says what its roundings become: it is run in float64, once as it is and then with
its numbers rounded as a runtime of that precision rounds them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import paddle
from paddle import nn

from ..errors import NothingProven, ReparamError, UsageError
from ..report import Report
from ..surgery.flops import in_place_of_products
from ..surgery.places import copy_model
from ..surgery.tracing import Hooks, map_tensors, walk
from ..surgery.verify import compare_outputs
from .outputs import AS_THE_NETWORK, THRESHOLD, Normalization, OutputSpec, comparable
from .released import probe_output

#: Those whose error is bounded by what rounding does; float32 has a tolerance of its own.
ROUNDED = ("bfloat16", "int8")

#: What a conversion may be off by, in roundings as they were measured. On images of CIFAR-10, right conversions of a
#: ResNet, SLaK, SPConv, DCD and MobileNetV3, trained a little or not at all, were off by 0.4 to 1.3 of them (Paddle's
#: oneDNN and OpenVINO, bfloat16) and by 0.9 to 1.6 (onnxruntime, int8, each range the largest seen). With ranges of
#: images a fifth as bright it was 3.5 to 34, and what NNCF made of two networks that it cannot hold was off by 6 to 7.
FACTOR = 3.0
#: Where rounding does more than this, as in deep networks that are hardly trained, no conversion is called right: one
#: that puts out zeros is off by 1.
LARGEST_BOUND = 0.5
#: Runs with rounded numbers: one to the nearest, the others shifted.
_DRAWS = 3
#: Weights of more numbers are not held in float64 all the time.
_LARGE = 2**18
_LEVELS = 127
#: Images without which nothing is said where no answer at all may be lost.
FEWEST_IMAGES = 100

# ---------------------------------------------------------------------------------------------------------------------
# What rounding does


def rounding_bound(
    network: nn.Layer,
    inputs: Sequence[np.ndarray],
    precision: str,
    names: Sequence[str] | None = None,
    output: OutputSpec = AS_THE_NETWORK,
    normalization: Normalization | None = None,
) -> float:
    """Return how far, relative, a right conversion to a precision may be from a fused network, on these inputs.

    The network, in eval mode and in the form that is exported, is run in float64, as it is and several times with the
    operands of all convolutions and matrix products, and what layers put out, rounded as the precision does: "bfloat16"
    to 8 significant bits, "int8" to a scale for each channel of a weight and one for each other operand, and all the
    rest to bfloat16. The largest difference, as `compare_outputs` measures it, times `FACTOR` is the bound, up to
    `LARGEST_BOUND`. It belongs to these inputs, `output` and `normalization`; `names` are those of the inputs for a
    network that takes one dict. Large weights are turned to float64 one at a time, where they are multiplied. Raises
    `UsageError` for another precision, and `NothingProven` where what is put out is not finite.
    """
    if precision not in ROUNDED:
        raise UsageError(f"there is no bound for {precision!r}; choose one of {', '.join(ROUNDED)}")
    multiplied: set[int] = set()
    with in_place_of_products(lambda operation, _rule: _noting(operation, multiplied)):
        probe_output(network, inputs, names, output, normalization)
    exact = _in_float64(network, multiplied)
    with Hooks() as hooks:
        hooks.before(exact, lambda _layer, taken: tuple(map_tensors(_to_float64, taken)))

        def outputs(precision: str | None = None, seed: int = 0) -> list[np.ndarray]:
            with _computing(exact, precision, seed):
                return comparable(probe_output(exact, inputs, names, output, normalization), output)

        expected = outputs()
        errors = [compare_outputs(expected, outputs(precision, seed), tolerance=1.0)[0] for seed in range(_DRAWS)]
    if not math.isfinite(max(errors)):
        raise NothingProven(f"what the network puts out is not finite when it is rounded to {precision}")
    return min(FACTOR * max(errors), LARGEST_BOUND)


def _noting(operation: Callable[..., Any], multiplied: set[int]) -> Callable[..., Any]:
    """Return a product that notes which tensors it multiplies: its first two."""

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, paddle.Tensor)]
        multiplied.update(id(each) for each in tensors[:2] if each.persistable)
        return operation(*args, **kwargs)

    return run


def _in_float64(network: nn.Layer, multiplied: set[int]) -> nn.Layer:
    """Return a copy of a network in float64, which shares the large weights among those that products multiply."""
    copied = copy_model(network, share_tensors=True)
    for _, layer in walk(copied):
        for tensors in (layer._parameters, layer._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not (id(tensor) in multiplied and tensor.size > _LARGE):
                    tensors[name] = _to_float64(tensor)
                    tensors[name].persistable = tensor.persistable
    return copied


def _to_float64(tensor: paddle.Tensor) -> paddle.Tensor:
    return tensor.astype("float64") if tensor.is_floating_point() else tensor


@contextlib.contextmanager
def _computing(network: nn.Layer, precision: str | None, seed: int) -> Iterator[None]:
    """While the `with` block runs, let a network compute in float64; with a precision, with rounded numbers.

    For seed 0 they are rounded to the nearest.
    """
    generator = np.random.default_rng(seed) if seed else None

    def rounded(x: paddle.Tensor, step: paddle.Tensor | None = None) -> paddle.Tensor:
        """Return numbers in float64; with a precision rounded, to multiples of a step or to bfloat16."""
        x = x.astype("float64")
        if precision is None:
            return x
        shift = None if generator is None else _uniform(generator, x)
        if step is not None:
            return paddle.round(x / step if shift is None else x / step + 0.5 * shift) * step
        # Up to half of a step away, so that what is rounded already stays as it is.
        shifted = x if shift is None else x * (1.0 + 2.0**-8 * shift)
        # To the nearest number of 8 significant bits, by Veltkamp's splitting; Paddle 2 casts in another way.
        high = shifted * (2.0**45 + 1.0)
        return high - (high - shifted)

    def operand(x: paddle.Tensor, channel: int | None) -> paddle.Tensor:
        step = _step(x, channel) if precision == "int8" else None
        if x.size <= _LARGE:
            return rounded(x, step)
        # Part by part: what is made on the way is several times as large as the weights.
        result = paddle.empty(x.shape, "float64")
        rows = max(1, _LARGE * x.shape[0] // x.size)
        for begin in range(0, x.shape[0], rows):
            part = slice(begin, begin + rows)
            result[part] = rounded(x[part], step[part] if step is not None and step.shape[0] > 1 else step)
        return result

    def computing(operation: Callable[..., Any], _rule: Callable[..., tuple]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            operands = [key for key, value in given.items() if isinstance(value, paddle.Tensor)][:2]
            for position, key in enumerate(operands):
                x = given[key]
                given[key] = operand(x, _channel_axis(operation.__name__, position, given) if x.persistable else None)
            args = tuple(given.pop(key) for key in range(len(args)))
            return rounded(operation(*args, **given))

        return run

    def of_layer(_layer: nn.Layer, _inputs: Any, output: Any) -> Any:
        return map_tensors(lambda x: rounded(x) if x.is_floating_point() else x, output)

    with Hooks() as hooks, in_place_of_products(computing):
        for layer in {id(layer): layer for _, layer in walk(network)}.values():
            hooks.after(layer, of_layer)
        yield


def _step(x: paddle.Tensor, channel: int | None) -> paddle.Tensor:
    """Return what a step of int8 is, in a shape that broadcasts: for a weight's channels, or of all that x holds."""
    axes = [axis for axis in range(x.ndim) if channel is None or axis != channel % x.ndim]
    low, high = (each(axes, keepdim=True).astype("float64") for each in (x.amin, x.amax))
    zero = paddle.zeros_like(high)
    if channel is None:
        step = (paddle.maximum(high, zero) - paddle.minimum(low, zero)) / (2 * _LEVELS + 1)
    else:
        step = paddle.maximum(high, -low) / _LEVELS
    return paddle.where(step > 0, step, paddle.ones_like(step))


def _uniform(generator: np.random.Generator, like: paddle.Tensor) -> paddle.Tensor:
    """Return numbers between -0.5 and 0.5 in the shape of a tensor."""
    return paddle.to_tensor(generator.random(like.shape, np.float32)).astype("float64") - 0.5


def _channel_axis(operation: str, position: int, given: dict[Any, Any]) -> int:
    """Return the axis of a weight, the first or second operand of an operation, that its outputs lie along."""
    if "conv" in operation:
        return 1 if "transpose" in operation else 0
    transposed = given.get(2 + position, given.get(f"transpose_{'xy'[position]}", False)) is True
    return -1 if (position == 1) != transposed else -2


# ---------------------------------------------------------------------------------------------------------------------
# What it costs on images


@dataclass
class Agreement(Report):
    """What a network in another precision gives up on images, beside what it is compared with, the reference.

    `measure` is "top-1", for several labels an image "label accuracy" (the share of all known labels that are on the
    right side of 0.5), and None for features, of which nothing can be right: then only `relative_error` says something,
    and both accuracies are None. `agreement` is the share of answers that are the same, `largest_drop` what may be lost
    in percentage points.
    """

    measure: str | None
    images: int
    relative_error: float
    largest_drop: float
    agreement: float | None = None
    reference_accuracy: float | None = None
    accuracy: float | None = None

    @property
    def drop(self) -> float:
        """Accuracy that is lost, in percentage points; 0 where it is right as often or more often, or has none."""
        return max(0.0, -self.change)

    @property
    def change(self) -> float:
        """Accuracy that is gained, in percentage points; below 0 where it is lost."""
        return 0.0 if self.accuracy is None else round(100 * (self.accuracy - self.reference_accuracy), 6)

    @property
    def passed(self) -> bool:
        """Tell whether no more is lost than may be."""
        return self.drop <= self.largest_drop

    def __str__(self) -> str:
        if self.measure is None:
            return (
                f"features of {self.images} images, off by {self.relative_error:.1e}; "
                "what that costs is for what is retrieved with them to say"
            )
        return (
            f"{self.measure} {self.reference_accuracy:.2%} -> {self.accuracy:.2%} ({self.change:+.2f} points) on "
            f"{self.images} images, the same answer for {self.agreement:.2%}, off by {self.relative_error:.1e}"
        )


def agreement(reference: np.ndarray, outputs: np.ndarray, labels: np.ndarray | None, largest_drop: float) -> Agreement:
    """Return what outputs `[N, classes]` lose beside those of the reference, on the same images.

    `labels` are `[N]`, by which top-1 is measured, or `[N, classes]` of 0 and 1 (and -1 for what is not known) beside
    probabilities; None for features. Raises `NothingProven` for fewer images than could show such a drop, one answer in
    so many, `ReparamError` for outputs of another form, and `UsageError` for a `largest_drop` that is not 0 or more.
    """
    images = len(reference)
    if outputs.shape != reference.shape:
        raise ReparamError(f"the outputs have the shape {list(outputs.shape)}, the reference {list(reference.shape)}")
    error, _ = compare_outputs([reference], [outputs], tolerance=1.0)
    if labels is None:
        require_drop(largest_drop)
        return Agreement(None, images, error, largest_drop)
    require_images(images, largest_drop)
    known = labels >= 0
    if not known.any():
        raise NothingProven(f"no label of the {images} images is known; there is nothing to measure")
    expected, given = (_answers(scores, labels)[known] for scores in (reference, outputs))
    return Agreement(
        "top-1" if labels.ndim == 1 else "label accuracy",
        images,
        error,
        largest_drop,
        agreement=float((expected == given).mean()),
        reference_accuracy=float((expected == labels[known]).mean()),
        accuracy=float((given == labels[known]).mean()),
    )


def require_drop(largest_drop: float) -> None:
    """Raise `UsageError` for a largest drop that is none."""
    if not largest_drop >= 0:
        raise UsageError(f"what may be lost is {largest_drop:g} percentage points; give 0 or more")


def images_needed(largest_drop: float) -> int:
    """Return how many images can show a drop of so many percentage points, an answer in so many."""
    require_drop(largest_drop)
    return math.ceil(100 / largest_drop) if largest_drop else FEWEST_IMAGES


def require_images(images: int, largest_drop: float) -> None:
    """Raise `NothingProven` for fewer images than can show a drop of so many percentage points."""
    needed = images_needed(largest_drop)
    if images < needed:
        raise NothingProven(
            f"{images} images cannot show a drop of {largest_drop:g} points: give {needed} images or more"
            + (f", or allow {math.ceil(1e4 / images) / 100:g} points" if images else "")
        )


def _answers(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return what scores `[N, classes]` say, in the form of the labels: a class an image, or 0 or 1 for each label."""
    if scores.shape[0] != len(labels) or scores.ndim != 2 or labels.shape[1:] not in ((), scores.shape[1:]):
        raise ReparamError(f"the network puts out {list(scores.shape)} for labels {list(labels.shape)}")
    return (scores >= THRESHOLD) if labels.ndim > 1 else scores.argmax(1)
