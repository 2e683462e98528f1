"""Are these two the same function? Relative error, top-1 agreement, and the first layer where they part."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
import paddle
from paddle import nn

from ..arithmetic.geometry import BATCH_NORMS, FOLDABLE
from ..errors import NothingProven, ReparamError
from ..layers.base import FUSING_METHODS, InferenceForm, ReparamLayer
from ..report import Report, format_table
from .tracing import (
    InputSpec,
    first_not_finite,
    flatten_outputs,
    map_tensors,
    not_finite,
    require_eval,
    run,
    sample_inputs,
    trace_flow,
    unchanged,
    visit_outputs,
    walk,
)

Array = np.ndarray

#: Largest relative error of a float32 network against its fused form.
NETWORK_TOLERANCE = 1e-4


@dataclass
class VerifyReport(Report):
    """How far two functions are apart.

    `relative_error` is max|a - b| / max|a|, the worst over outputs and batches; `tolerance` what was allowed, which is
    more than what was asked for where the network makes rounding grow; `top1_agreement` the share of samples
    with the same largest logit (None where the output is not `[batch, classes]`); `layers` how many layers' outputs
    were compared as well; `input_scale` the standard deviation of the inputs; `first_difference` the path of the first
    layer that differs by more than the tolerance.
    """

    passed: bool
    relative_error: float
    tolerance: float
    top1_agreement: float | None
    samples: int
    layers: int
    input_scale: float = 1.0
    first_difference: str | None = None

    def __str__(self) -> str:
        agreement = "-" if self.top1_agreement is None else f"{self.top1_agreement:.1%} of {self.samples}"
        table = format_table(
            ["same function", "relative error", "tolerance", "top-1 agreement", "layers compared"],
            [
                [
                    "yes" if self.passed else "NO",
                    f"{self.relative_error:.1e}",
                    f"{self.tolerance:.0e}",
                    agreement,
                    self.layers,
                ]
            ],
        )
        where = self.first_difference
        return table if self.passed else f"{table}\nthey part first at: {where or 'no single layer that both have'}"

    def raise_if_failed(self, what: str) -> None:
        """Raise `ReparamError` with the first layer that differs, unless the check passed."""
        if not self.passed:
            first = self.first_difference
            where = "" if first is None else f"; they part first at {f'layer {first!r}' if first else 'the output'}"
            raise ReparamError(
                f"{what} is not the same function: relative error {self.relative_error:.1e} "
                f"(tolerance {self.tolerance:.0e}, top-1 agreement {self.top1_agreement}){where}"
            )


def relative_error(expected: Array, actual: Array) -> float:
    """Return max|expected - actual| / max|expected|; infinite for another shape or anything that is not finite."""
    if expected.shape != actual.shape or not (np.isfinite(expected).all() and np.isfinite(actual).all()):
        return float("inf")
    expected, actual = (array.astype(np.result_type(array, np.float64)) for array in (expected, actual))
    difference = np.abs(expected - actual).max(initial=0.0)
    scale = np.abs(expected).max(initial=0.0)
    return 0.0 if difference == 0 else float("inf") if scale == 0 else float(difference / scale)


def _same_top1(expected: Array, actual: Array, tolerance: float) -> Array:
    # Two logits closer than the tolerance are a tie: which of them is largest is then decided by rounding.
    rows = np.arange(len(expected))
    slack = tolerance * np.abs(expected).max()
    return expected.max(axis=1) - expected[rows, actual.argmax(axis=1)] <= slack


def compare_outputs(expected: Sequence[Array], actual: Sequence[Array], tolerance: float) -> tuple[float, Array | None]:
    """Return (worst relative error, per-sample top-1 agreement of the first `[batch, classes]` output or None).

    The error of whole numbers, which are the numbers of classes, is the share of those that differ. It is infinite for
    another number of outputs, and for outputs without numbers, which prove nothing.
    """
    if len(expected) != len(actual) or not any(output.size for output in expected):
        return float("inf"), None
    error = max(_difference(e, a) for e, a in zip(expected, actual))
    logits = [(e, a) for e, a in zip(expected, actual) if e.ndim == 2 and e.shape[1] > 1 and e.shape == a.shape]
    return error, _same_top1(*logits[0], tolerance) if logits else None


def _difference(expected: Array, actual: Array) -> float:
    if expected.dtype.kind in "iu" and actual.dtype.kind in "iu" and expected.shape == actual.shape:
        return float(np.mean(expected != actual)) if expected.size else 0.0
    return relative_error(expected, actual)


def _rounded(inputs: Sequence[Any]) -> list[Any]:
    """Return the inputs with a change of the size of rounding."""
    return map_tensors(lambda x: x + 8 * float(paddle.finfo(x.dtype).eps) * x.abs(), inputs)


@contextlib.contextmanager
def _rounding(model: nn.Layer) -> Iterator[None]:
    """While the `with` block runs, change what each layer without sublayers puts out by as much as rounding does."""
    handles = []
    for number, layer in enumerate({id(layer): layer for _, layer in walk(model)}.values()):
        if any(layer.children()):
            continue

        def change(_layer: nn.Layer, _inputs: Any, output: Any, number: int = number) -> Any:
            if not isinstance(output, paddle.Tensor) or not output.is_floating_point() or output.ndim == 0:
                return None
            noise = np.random.default_rng(number).uniform(-2.0, 2.0, output.shape[-1])
            return output * (1.0 + float(paddle.finfo(output.dtype).eps) * paddle.to_tensor(noise, output.dtype))

        handles.append(layer.register_forward_post_hook(change))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _allowed(tolerance: float, growth: float) -> float:
    """Return the tolerance where changes of the input and of each layer's output by rounding have grown to `growth`.

    Two forms of a network round differently in every layer. Most networks keep that small; for those that do not, an
    error of this size is rounding, up to a hundred times the tolerance. A growth to what is not finite allows nothing.
    """
    return min(max(tolerance, 10.0 * growth), 100.0 * tolerance) if np.isfinite(growth) else tolerance


def _array(tensor: paddle.Tensor) -> Array:
    # Of bfloat16, numpy() gives the bits as integers.
    return (tensor.astype("float32") if tensor.dtype == paddle.bfloat16 else tensor).numpy()


def _run(function: Callable[..., Any], inputs: Sequence[Any]) -> list[Array]:
    with paddle.no_grad():
        return [_array(tensor) for tensor in flatten_outputs(run(function, inputs))]


def _depends_on_input(batches: list[list[Array]], tolerance: float) -> bool:
    """Tell whether some output changes between samples by clearly more than an error that would pass."""
    for outputs in zip(*batches):
        samples = np.concatenate(outputs) if outputs[0].ndim else np.stack(outputs)
        samples = samples.astype(np.float64)
        if np.isfinite(samples).all() and np.abs(samples - samples[:1]).max(initial=0.0) > 10 * tolerance * np.abs(
            samples
        ).max(initial=0.0):
            return True
    return False


#: Standard deviations of the inputs to try, the usual one first.
_SCALES = (1.0, 1e-1, 1e1, 1e-2, 1e2, 1e-3, 1e3, 1e-5, 1e5, 1e-8, 1e8, 1e-13, 1e13)


def _draw(a: nn.Layer, input_spec: InputSpec, batch_size: int, seed: int, scale: float) -> list[Any]:
    return map_tensors(lambda x: x * scale, sample_inputs(input_spec, batch_size, seed, like=a))


def _telling_scale(a: nn.Layer, input_spec: InputSpec, batch_size: int, tolerance: float) -> float:
    """Return the first scale of the inputs at which the network's output depends on them.

    The probabilities of an untrained network may be 0 and 1 whatever comes in, or all alike.
    """
    for scale in _SCALES:
        draws = [_draw(a, input_spec, batch_size, seed, scale) for seed in (0, 1)]
        batches = [_run(a, inputs) for inputs in draws]
        if scale == _SCALES[0]:
            # At an odd scale numbers may overflow; at the usual one that is a fault, which no other is to hide.
            _require_finite("first", a, draws[0], batches[0])
        if _depends_on_input(batches, tolerance):
            return scale
    raise NothingProven(
        "the network's output hardly depends on its input, so that comparing outputs would prove nothing; "
        "use trained weights"
    )


def verify(
    a: nn.Layer,
    b: nn.Layer | Callable[..., Any],
    input_spec: InputSpec,
    batches: int = 3,
    batch_size: int = 2,
    tolerance: float = NETWORK_TOLERANCE,
    must_depend: bool = True,
) -> VerifyReport:
    """Compare a network with another network, or with any function of the same inputs, on seeded random batches.

    `input_spec` is a list of input shapes with None for the batch; a dict of them by name for a network that takes one
    dict of tensors. Two networks are compared layer by layer as well: a fault in an early layer need not show at the
    output of a network that hardly depends on its input, as untrained ones do. Against another function the inputs are
    scaled until the output depends on them, where it does not for inputs of variance 1. Both networks are afterwards
    as they were. Raises `ReparamError` for a network in training mode, for another number of outputs, and for weights
    and outputs that are not finite, with where that starts; and `NothingProven` for a comparison of nothing, and for an
    output that depends on inputs of no scale, unless `must_depend` is False.
    """
    for name, model in (("first", a), ("second", b)):
        if isinstance(model, nn.Layer):
            require_eval(model, f"the {name} network", "comparing")
    if batches < 1 or batch_size < 1 or not 0 < tolerance < math.inf:
        raise NothingProven(
            f"{batches} batches of {batch_size} samples and a tolerance of {tolerance} compare nothing; "
            "give numbers above zero"
        )
    with unchanged(a, b):
        return _verify(a, b, input_spec, batches, batch_size, tolerance, must_depend)


def _verify(
    a: nn.Layer,
    b: nn.Layer | Callable[..., Any],
    input_spec: InputSpec,
    batches: int,
    batch_size: int,
    tolerance: float,
    must_depend: bool,
) -> VerifyReport:
    for name, model in (("first", a), ("second", b)):
        wrong = not_finite(model.state_dict()) if isinstance(model, nn.Layer) else None
        if wrong:
            raise ReparamError(f"the {name} network cannot be compared: {wrong}")
    by_output = must_depend and not isinstance(b, nn.Layer)
    scale = _telling_scale(a, input_spec, batch_size, tolerance) if by_output else 1.0
    error, allowed, agreed, failed = 0.0, tolerance, [], False
    for seed in range(batches):
        inputs = _draw(a, input_spec, batch_size, seed, scale)
        expected, actual = _run(a, inputs), _run(b, inputs)
        for name, function, outputs in (("first", a, expected), ("second", b, actual)):
            _require_finite(name, function, inputs, outputs)
        if len(expected) != len(actual):
            raise ReparamError(f"the first network puts out {len(expected)} tensors, the second {len(actual)}")
        if not any(output.size for output in expected):
            raise NothingProven("the first network puts out no numbers, so there is nothing to compare")
        batch_error, same = compare_outputs(expected, actual, tolerance)
        if not batch_error <= tolerance or (same is not None and not same.all()):
            with _rounding(a):
                growth, _ = compare_outputs(expected, _run(a, _rounded(inputs)), tolerance)
            here = _allowed(tolerance, growth)
            _, same = compare_outputs(expected, actual, here)
            allowed, failed = max(allowed, here), failed or not batch_error <= here
        error = max(error, batch_error)
        agreed += [] if same is None else same.tolist()
        failed = failed or not all(agreed)
    difference, compared = None, 0
    if isinstance(b, nn.Layer):
        difference, compared = first_difference(a, b, _draw(a, input_spec, 1, 0, scale), tolerance)
    return VerifyReport(
        passed=not failed and difference is None,
        relative_error=error,
        tolerance=allowed,
        top1_agreement=float(np.mean(agreed)) if agreed else None,
        samples=batches * batch_size,
        layers=compared,
        input_scale=scale,
        first_difference=difference,
    )


def _require_finite(name: str, function: Any, inputs: Sequence[Any], outputs: Sequence[Array]) -> None:
    """Raise `ReparamError` for outputs that are not finite, with the layer where it starts, if a layer is to blame."""
    if all(np.isfinite(output).all() for output in outputs):
        return
    path = first_not_finite(function, inputs) if isinstance(function, nn.Layer) else None
    where = "" if path is None else f": it starts at {f'layer {path!r}' if path else 'the network itself'}"
    raise ReparamError(f"the {name} network's output is not finite for finite inputs{where}")


def _places(model: nn.Layer) -> dict[str, nn.Layer]:
    """Return path -> layer without the insides of what fusing rewrites (this library's and PaddleClas' blocks)."""
    places: dict[str, nn.Layer] = {}
    opaque: list[str] = []
    for path, layer in walk(model):
        if any(path.startswith(f"{outer}.") for outer in opaque):
            continue
        places[path] = layer
        if isinstance(layer, InferenceForm) or any(callable(getattr(layer, m, None)) for m in FUSING_METHODS):
            opaque.append(path)
    return places


def first_difference(
    a: nn.Layer, b: nn.Layer, inputs: Sequence[paddle.Tensor], tolerance: float
) -> tuple[str | None, int]:
    """Return the path of the first layer whose outputs differ in two networks, and how many layers were compared.

    "First" is in the order in which the layers finish. Compared are the layers that both networks run, but not a layer
    whose following BN was folded into it, nor a norm whose affine moved into its reader: there the two are to agree
    after the BN's place, or after the reader. Where a change of the input by the size of rounding grows, the tolerance
    grows with it.
    """
    places_a, places_b = _places(a), _places(b)
    norms = [layer for layer in places_a.values() if isinstance(layer, BATCH_NORMS)]
    producers = [layer for layer in places_a.values() if isinstance(layer, (*FOLDABLE, ReparamLayer, InferenceForm))]
    followed_by = trace_flow(a, producers, norms, inputs).followed_by
    changed = {id(layer) for path, layer in places_a.items() if not isinstance(places_b.get(path), type(layer))}

    # Layers that hand on one and the same tensor share one and the same array, unless it was changed in between.
    arrays: dict[int, tuple[weakref.ref[paddle.Tensor], int, Array]] = {}
    outputs: dict[str, Array] = {}

    def store(path: str, output: paddle.Tensor) -> None:
        if path in places_a:
            known, version, array = arrays.get(id(output), (None, None, None))
            if known is None or known() is not output or version != output.inplace_version:
                array = _array(output)
                arrays[id(output)] = weakref.ref(output), output.inplace_version, array
            outputs[path] = array

    visit_outputs(a, inputs, store)
    moved = {path for path, layer in places_b.items() if getattr(layer, "affine_moved_on", False)}
    folded = [
        outputs[path]
        for path, layer in places_a.items()
        if path in outputs and (path in moved or followed_by.get(id(layer)) in changed)
    ]

    def errors_of(network: nn.Layer, inputs: Sequence[paddle.Tensor], places: Container[str]) -> dict[str, float]:
        errors: dict[str, float] = {}

        def compare(path: str, output: paddle.Tensor) -> None:
            if path in outputs and path in places:
                errors[path] = relative_error(outputs[path], _array(output))

        visit_outputs(network, inputs, compare)
        return errors

    errors = errors_of(b, inputs, places_b)
    with _rounding(a):
        growth = errors_of(a, _rounded(inputs), places_a)
    compared = [p for p, output in outputs.items() if p in errors and not any(output is f for f in folded)]
    for path in compared:
        if not errors[path] <= _allowed(tolerance, growth[path]):
            return path, len(compared)
    return None, len(compared)


# ---------------------------------------------------------------------------------------------------------------------
# Untrained networks


def settle_batch_norms(model: nn.Layer, input_spec: InputSpec, batch: int = 8) -> None:
    """Give every BN the statistics of one batch of noise, and leave the model in eval mode.

    With those that an untrained network starts with, the features of a deep one may vanish, or grow beyond all numbers
    (those of a dynamic convolution are squares of its input).
    """
    norms = [layer for _, layer in walk(model) if isinstance(layer, BATCH_NORMS)]
    momenta = [norm._momentum for norm in norms]
    try:
        for norm in norms:
            norm._momentum = 0.0
        model.train()
        with unchanged(model), paddle.no_grad():
            run(model, sample_inputs(input_spec, batch, seed=3, like=model))
    finally:
        for norm, momentum in zip(norms, momenta):
            norm._momentum = momentum
        model.eval()
