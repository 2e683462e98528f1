"""Calibration: what the tensors of an ONNX graph hold on images, as ranges and a sample, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ReparamError
from .runtimes.onnx_runtime import OnnxModel, need

#: Images that are run at once; every tensor of so many is held, and no more.
_BATCH = 4
#: Numbers of each tensor that are kept.
_SAMPLE = 1 << 14
_LEVELS = 255
#: Of the smallest and the largest number, so much may be where a range ends.
_PARTS = [0.93**i for i in range(24)]
#: The prefix of what is added to a graph.
_ADDED = "measured."


@dataclass
class Activation:
    """What a tensor held: its smallest and largest number, and evenly drawn ones of all images."""

    lowest: float
    highest: float
    sample: np.ndarray

    def range_with(self, method: str) -> tuple[float, float]:
        """Return a range for eight bits that holds zero: of "minmax" all numbers lie in it, of "mse" so many that
        the mean square of what rounding and cutting off change is least.
        """
        low, high = min(self.lowest, 0.0), max(self.highest, 0.0)
        if method == "mse" and low < high:
            numbers = self.sample.astype(np.float64)
            high = min((high * part for part in _PARTS), key=lambda end: _mean_square_error(numbers, low, end))
            low = min((low * part for part in _PARTS), key=lambda end: _mean_square_error(numbers, end, high))
        return low, high


def _mean_square_error(numbers: np.ndarray, low: float, high: float) -> float:
    step = (high - low) / _LEVELS
    if not step:
        return np.inf
    rounded = np.clip(np.round(numbers / step), np.round(low / step), np.round(high / step)) * step
    return float(np.square(numbers - rounded).mean())


def float_tensors(model: Any) -> list[str]:
    """Return the inputs and everything that nodes put out in float32, by the shapes that are known in a model."""
    onnx = need("onnx")
    typed = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    of_float = {each.name for each in typed if each.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    constants = {each.name for each in model.graph.initializer}
    made = [each.name for each in model.graph.input] + [name for node in model.graph.node for name in node.output]
    return [name for name in made if name in of_float and name not in constants]


def measure(model: Any, images: np.ndarray, threads: int = 1) -> dict[str, Activation]:
    """Return tensor -> what it holds in a float32 model on images `[N, C, H, W]`; see `float_tensors`.

    Raises `ReparamError` where one holds numbers that are not finite.
    """
    model = copy_of(model)
    names = float_tensors(model)
    batches = -(-len(images) // _BATCH)
    outputs = [name for tensor in names for name in _add_statistics(model, tensor, -(-_SAMPLE // batches))]
    found: dict[str, list[tuple[float, float, np.ndarray]]] = {name: [] for name in names}
    for number, results in enumerate(_run(model, outputs, images, threads)):
        for i, name in enumerate(names):
            low, high, sample = results[3 * i : 3 * i + 3]
            if not np.isfinite([low, high]).all():
                first = number * _BATCH
                raise ReparamError(f"{name} holds numbers that are not finite, on images from number {first} on")
            found[name].append((float(low), float(high), sample))
    return {
        name: Activation(min(low for low, _, _ in parts), max(high for _, high, _ in parts),
                         np.concatenate([sample for _, _, sample in parts]))
        for name, parts in found.items()
    }  # fmt: skip


def largest_by_channel(
    model: Any, tensors: Sequence[str], images: np.ndarray, threads: int = 1
) -> dict[str, np.ndarray]:
    """Return tensor `[N, C, H, W]` -> the largest absolute value of each of its channels on images."""
    model, helper = copy_of(model), need("onnx").helper
    outputs = []
    for tensor in tensors:
        absolute, largest = f"{_ADDED}{tensor}.absolute", f"{_ADDED}{tensor}.largest"
        model.graph.node.append(helper.make_node("Abs", [tensor], [absolute]))
        model.graph.node.append(helper.make_node("ReduceMax", [absolute], [largest], axes=[0, 2, 3], keepdims=0))
        outputs.append(largest)
    if not outputs:
        return {}
    parts = list(_run(model, outputs, images, threads))
    return {tensor: np.max([part[i] for part in parts], axis=0) for i, tensor in enumerate(tensors)}


def copy_of(model: Any) -> Any:
    """Return another graph that says the same."""
    copied = need("onnx").ModelProto()
    copied.CopyFrom(model)
    return copied


def _add_statistics(model: Any, tensor: str, count: int) -> list[str]:
    """Let a model put out the smallest and the largest number of a tensor, and about `count` evenly drawn ones."""
    helper = need("onnx").helper
    graph, name = model.graph, f"{_ADDED}{tensor}"
    integers = {"all": -1, "zero": 0, "one": 1, "two": 2, "parts": 2 * count, "end": 2**31 - 1}
    if not any(each.name == f"{_ADDED}all" for each in graph.initializer):
        arrays = {f"{_ADDED}{key}": np.array([value], np.int64) for key, value in integers.items()}
        graph.initializer.extend(need("onnx").numpy_helper.from_array(array, key) for key, array in arrays.items())
    # Every n-th number, n odd: it falls on other columns in each row.
    steps = [
        ("ReduceMin", [tensor], ".lowest", {"keepdims": 0}),
        ("ReduceMax", [tensor], ".highest", {"keepdims": 0}),
        ("Reshape", [tensor, f"{_ADDED}all"], ".flat", {}),
        ("Shape", [f"{name}.flat"], ".size", {}),
        ("Div", [f"{name}.size", f"{_ADDED}parts"], ".half", {}),
        ("Mul", [f"{name}.half", f"{_ADDED}two"], ".even", {}),
        ("Add", [f"{name}.even", f"{_ADDED}one"], ".step", {}),
        ("Slice", [f"{name}.flat", *(_ADDED + key for key in ("zero", "end", "zero")), f"{name}.step"], ".sample", {}),
    ]
    for kind, inputs, suffix, attributes in steps:
        graph.node.append(helper.make_node(kind, inputs, [name + suffix], **attributes))
    return [f"{name}.lowest", f"{name}.highest", f"{name}.sample"]


def _run(model: Any, outputs: Sequence[str], images: np.ndarray, threads: int) -> Iterator[list[np.ndarray]]:
    """Yield what a model puts out under these names instead of its own, batch by batch."""
    onnx = need("onnx")
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    running = OnnxModel(model.SerializeToString(), threads)
    for start in range(0, len(images), _BATCH):
        yield running.run(images[start : start + _BATCH])
