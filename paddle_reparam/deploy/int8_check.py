"""Is an int8 file what was made of its float32 file? Layer by layer, without trusting what it puts out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ReparamError, one_sentence
from ..files import Folder
from .calibration import Activation, measure
from .equalization import arrays_of, equalize
from .int8_onnx import EQUALIZED, WEIGHTED, prepared
from .runtimes.onnx_runtime import need

#: What is added to half a step where numbers of float32 were divided by it.
_ROUNDING = 1e-3
#: Of the numbers of a tensor, so many may lie outside of its range in the file.
_CUT_OFF = 0.02
#: Images that most files are told by; where these do not, all are asked.
_FEW = 32
#: A range may be so many times as wide as what is measured.
_WIDER = 4.0
_ROUNDED = ("QuantizeLinear", "DequantizeLinear")
#: How onnxruntime's quantiser calls what stands before and behind a pair of its nodes.
_INPUT_SUFFIX, _OUTPUT_SUFFIX = "_QuantizeLinear_Input", "_DequantizeLinear_Output"


def require_near(layer: str, integers: np.ndarray, scale: np.ndarray, weight: np.ndarray) -> None:
    """Raise `ReparamError` where weights in int8 are not those of float32, rounded.

    `scale` is one number, or has an axis for each of the weight's, broadcast: what one step of the integers is.
    """
    if integers.shape != weight.shape:
        raise ReparamError(f"{layer}: its weight is {list(integers.shape)} in int8, {list(weight.shape)} in float32")
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ReparamError(f"{layer}: a scale of its weight is {scale.min():g}, and it has to be finite and above zero")
    scale = np.broadcast_to(scale.astype(np.float64), weight.shape)
    steps = np.abs(integers * scale - weight) / scale
    if not (steps <= 0.5 + _ROUNDING).all():
        place = tuple(int(i) for i in np.unravel_index(np.argmax(steps), steps.shape))
        raise ReparamError(
            f"{layer}: its weight at {list(place)} is {integers[place] * scale[place]:.6g} in int8 and "
            f"{weight[place]:.6g} in float32, {steps[place]:.3g} steps apart"
        )


def check_int8(source: Folder, target: Folder, images: np.ndarray | None = None, threads: int = 1) -> None:
    """Compare an int8 file of `quantize_onnx` with the float32 file that it was made of, layer by layer.

    Every operator, its attributes and what it reads has to be the same, every constant the nearest in its steps, every
    scale finite and above zero, and a bias' scale the product of those of what it is added to. On `images`, at least
    98 % of what a tensor holds in float32 has to lie in its range, and the range may be four times as wide at most.
    Raises `ReparamError` with the first layer that is another one.
    """
    with one_sentence(f"{target}: it cannot be compared with {source}"):
        exact = prepared(source)
        model = need("onnx").load(str(target))
        facts = {each.key: each.value for each in model.metadata_props}
        equalize(exact, json.loads(facts.get(EQUALIZED, "{}")))
    with one_sentence(f"{target}: it is not what {source} is in int8"):
        quantized = _Quantized(model)
        _compare(exact, quantized)
        if images is not None:
            try:
                _compare_ranges(quantized.ranges, measure(exact, images[:_FEW], threads))
            except ReparamError:
                # The end of a range may be what one image of many reaches.
                _compare_ranges(quantized.ranges, measure(exact, images, threads))


@dataclass
class _Constant:
    """A constant in fewer bits: its integers without their zero, and what a step of each is, in a shape that fits."""

    integers: np.ndarray
    scale: np.ndarray


class _Quantized:
    """A quantised graph as if it were none: its constants, the ranges of its tensors, and what each node reads.

    Raises `ReparamError` for scales that cannot be, and where a tensor is rounded in one way and read in another.
    """

    def __init__(self, model: Any) -> None:
        self.arrays = arrays_of(model)
        self.constants: dict[str, _Constant] = {}
        #: What a step is, by the tensor that is read.
        self.scales: dict[str, np.ndarray] = {}
        self.ranges: dict[str, tuple[float, float]] = {}
        self.nodes = {node.name: node for node in model.graph.node if node.op_type not in _ROUNDED}
        self._plain: dict[str, str] = {}
        makers = {name: node for node in model.graph.node for name in node.output}
        for node in model.graph.node:
            if node.op_type in _ROUNDED:
                scale = self.arrays[node.input[1]]
                if not (np.isfinite(scale).all() and (scale > 0).all()):
                    stored = node.input[0] if node.op_type == "QuantizeLinear" else node.output[0]
                    name = stored.removesuffix(_OUTPUT_SUFFIX).removesuffix(_INPUT_SUFFIX)
                    raise ReparamError(f"{name}: its scale is {scale.min():g}; it has to be finite and above zero")
            if node.op_type == "DequantizeLinear":
                self._read(node, makers.get(node.input[0]))

    def name_of(self, tensor: str) -> str:
        """Return what the float32 graph calls a tensor."""
        return self._plain.get(tensor, tensor).removesuffix(_INPUT_SUFFIX)

    def _read(self, node: Any, maker: Any) -> None:
        scale, zero = (self.arrays[name] for name in node.input[1:3])
        output = node.output[0]
        self.scales[output] = scale
        if maker is None:
            integers = self.arrays[node.input[0]].astype(np.int64)
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            shape = [-1 if i == axis else 1 for i in range(integers.ndim)] if scale.size > 1 else [1] * integers.ndim
            self.constants[output] = _Constant(integers - zero.astype(np.int64).reshape(shape), scale.reshape(shape))
            return
        name = self._plain[output] = maker.input[0].removesuffix(_INPUT_SUFFIX)
        pairs = zip(maker.input[1:], node.input[1:])
        if not all(np.array_equal(self.arrays[written], self.arrays[read]) for written, read in pairs):
            raise ReparamError(f"{name}: it is rounded with one scale and read with another")
        limits = np.iinfo(zero.dtype)
        self.ranges[name] = tuple(float((end - float(zero)) * scale) for end in (limits.min, limits.max))


def _compare(exact: Any, quantized: _Quantized) -> None:
    constants, left = arrays_of(exact), dict(quantized.nodes)
    # What cuts off below zero, or at a bound, is done by the range of what it puts out: tensor -> what it cuts off.
    same: dict[str, str] = {}
    for node in exact.graph.node:
        if node.name not in left:
            if not _is_done_by(node, quantized.ranges.get(node.output[0]), constants):
                raise ReparamError(f"{node.name}: it has no such {node.op_type}")
            same[node.output[0]] = node.input[0]

    def origin(tensor: str) -> str:
        return same.get(tensor, tensor)

    for node in exact.graph.node:
        own = left.pop(node.name, None)
        if own is None:
            continue
        if own.op_type != node.op_type:
            raise ReparamError(f"{node.name}: it is a {own.op_type}, in float32 a {node.op_type}")
        given, wanted = (_attributes(each) for each in (own, node))
        for key in sorted({*given, *wanted}):
            if given.get(key) != wanted.get(key):
                raise ReparamError(f"{node.name}: its {key} is {given.get(key)}, in float32 {wanted.get(key)}")
        for position, (tensor, expected) in enumerate(zip(own.input, node.input)):
            if expected in constants:
                _compare_constant(own, position, constants[expected], quantized)
            elif origin(quantized.name_of(tensor)) != origin(expected):
                raise ReparamError(f"{node.name}: it reads {quantized.name_of(tensor)}, in float32 {expected}")
        written = [[origin(quantized.name_of(name)) for name in each.output] for each in (own, node)]
        if len(own.input) != len(node.input) or written[0] != written[1]:
            raise ReparamError(f"{node.name}: it has other inputs or outputs than in float32")
    for name in left:
        raise ReparamError(f"{name}: the float32 file has no such layer")


def _attributes(node: Any) -> dict[str, Any]:
    values = {each.name: need("onnx").helper.get_attribute_value(each) for each in node.attribute}
    return {key: value for key, value in values.items() if (node.op_type, key) != ("Gemm", "beta")}


def _compare_constant(node: Any, position: int, expected: np.ndarray, quantized: _Quantized) -> None:
    tensor = node.input[position]
    if tensor not in quantized.constants:
        if not np.array_equal(quantized.arrays.get(tensor), expected):
            raise ReparamError(f"{node.name}: its constant {tensor} is another one in float32")
        return
    found = quantized.constants[tensor]
    require_near(node.name, found.integers, found.scale, expected)
    if position == 2 and node.op_type in WEIGHTED:
        # Runtimes add the integers to the sums of the products, and never look at this scale.
        product = np.multiply(*(quantized.scales[name].astype(np.float64) for name in node.input[:2]))
        if not np.allclose(found.scale.reshape(-1), product, rtol=_ROUNDING, atol=0):
            raise ReparamError(f"{node.name}: the scale of its bias is not that of its input times that of its weight")


def _is_done_by(node: Any, ends: tuple[float, float] | None, constants: Mapping[str, np.ndarray]) -> bool:
    """Tell whether a node changes nothing of numbers that lie in a range, but for what rounding does."""
    if ends is None or node.op_type not in ("Relu", "Clip"):
        return False
    step = (ends[1] - ends[0]) / 255
    low, high = 0.0, np.inf
    if node.op_type == "Clip":
        bounds = [constants[name] if name else None for name in [*node.input[1:], "", ""][:2]]
        low, high = (other if bound is None else float(bound) for bound, other in zip(bounds, (-np.inf, np.inf)))
    return ends[0] >= low - step and ends[1] <= high + step


def _compare_ranges(ranges: Mapping[str, tuple[float, float]], held: Mapping[str, Activation]) -> None:
    for name, (low, high) in ranges.items():
        seen = held.get(name)
        if seen is None:
            raise ReparamError(f"{name}: the float32 file has no such tensor")
        step, span = (high - low) / 255, max(seen.highest, 0.0) - min(seen.lowest, 0.0)
        outside = float(((seen.sample < low - step) | (seen.sample > high + step)).mean())
        if outside > _CUT_OFF or (span and high - low > _WIDER * span):
            raise ReparamError(
                f"{name}: its range is {low:.4g} to {high:.4g}; on the images it holds {seen.lowest:.4g} to "
                f"{seen.highest:.4g}, {outside:.1%} of it outside: it was calibrated on something else"
            )
