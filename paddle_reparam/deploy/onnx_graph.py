"""What paddle2onnx 2.1 writes wrongly, written again as the program of Paddle says, and a graph made plain."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import ReparamError
from .program_reading import Operator
from .runtimes.onnx_runtime import OnnxModel, need


class Graph:
    """An ONNX graph in which nodes can be found by what they put out, and put in the place of others."""

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.makers = {name: node for node in self.graph.node for name in node.output}

    def nodes_of(self, operator: Operator) -> list[Any]:
        """Return the nodes that an operator was converted to; none where the graph has nothing of this name."""
        seen, names, nodes = set(operator.inputs), [operator.outputs[0]], []
        while names:
            name = names.pop()
            if name not in seen and name in self.makers:
                nodes.append(self.makers[name])
                names += nodes[-1].input
            seen.add(name)
        return nodes

    def constant(self, like: str, array: np.ndarray) -> str:
        """Add a constant and return its name."""
        name = f"{like}.constant.{len(self.graph.initializer)}"
        self.graph.initializer.append(need("onnx").numpy_helper.from_array(array, name))
        return name

    def reshaped(self, constant: str, shape: list[int]) -> str:
        """Return a constant of another shape."""
        helper = need("onnx").numpy_helper
        return self.constant(constant, helper.to_array(self.makers[constant].attribute[0].t).reshape(shape))

    def replace(self, operator: Operator, *steps: tuple[str, list[str | np.ndarray], dict[str, Any]]) -> None:
        """Put nodes in the place of an operator's.

        Each step is a kind, inputs (names and constants; "" is what the step before puts out, at first the operator's
        first input) and attributes.
        """
        helper, target, before = need("onnx").helper, operator.outputs[0], operator.inputs[0]
        last = self.makers[target]
        place = next(i for i, node in enumerate(self.graph.node) if node is last)
        self.graph.node.remove(last)
        for number, (kind, inputs, attributes) in enumerate(steps, 1):
            names = [each if isinstance(each, str) else self.constant(target, each) for each in inputs]
            out = target if number == len(steps) else f"{target}.step.{number}"
            node = helper.make_node(kind, [name or before for name in names], [out], name=f"{kind}.{out}", **attributes)
            self.graph.node.insert(place + number - 1, node)
            before = out


# ---------------------------------------------------------------------------------------------------------------------
# Operators whose attributes come out wrong, and how they are written


def _hard_tanh(graph: Graph, op: Operator) -> None:
    bounds = [np.float32(op.attributes[name]) for name in ("t_min", "t_max")]
    graph.replace(op, ("Clip", ["", *map(np.asarray, bounds)], {}))


def _gelu(graph: Graph, op: Operator) -> None:
    """Write the approximation by tanh, in the form that runtimes know as one operator."""
    if op.attributes["approximate"]:
        x, number = op.inputs[0], np.float32
        graph.replace(
            op,
            ("Pow", ["", np.asarray(number(3.0))], {}),
            ("Mul", ["", np.asarray(number(0.044715))], {}),
            ("Add", [x, ""], {}),
            ("Mul", ["", np.asarray(number(math.sqrt(2 / math.pi)))], {}),
            ("Tanh", [""], {}),
            ("Add", ["", np.asarray(number(1.0))], {}),
            ("Mul", [x, ""], {}),
            ("Mul", ["", np.asarray(number(0.5))], {}),
        )


def _circular_padding(graph: Graph, op: Operator) -> None:
    """Write padding by the other end as a choice of rows and columns: `Pad` knows it from opset 19 on alone."""
    if op.attributes["mode"] != "circular":
        return
    sizes, pads = op.shapes[op.inputs[0]][2:], op.values.get(op.inputs[1])
    if min(sizes) < 0 or pads is None or op.attributes["data_format"] != "NCDHW":
        raise ReparamError(f"{op.place}: circular padding is converted for images of one size alone")
    places = [np.arange(-before, size + after) % size for size, before, after in zip(sizes, pads[-2::-2], pads[::-2])]
    graph.replace(op, *(("Gather", ["", rows], {"axis": axis}) for axis, rows in enumerate(places, 2)))


def _layer_norm(graph: Graph, op: Operator) -> None:
    """Give scale and shift, which are flat, the axes that they are for."""
    axes = op.shapes[op.inputs[0]][op.attributes["begin_norm_axis"] :]
    for node in graph.nodes_of(op):
        if node.op_type == "LayerNormalization" and len(axes) > 1:
            for index in range(1, len(node.input)):
                node.input[index] = graph.reshaped(node.input[index], axes)


def _flatten(graph: Graph, op: Operator) -> None:
    """Write the axes that are known behind the samples, instead of four operators that find them out."""
    batch, *sizes = op.shapes[op.outputs[0]]
    if batch < 0 and sizes and min(sizes) >= 0 and op.attributes["start_axis"] > 0:
        graph.replace(op, ("Reshape", ["", np.array([0, *sizes])], {}))


def _expand_as(graph: Graph, op: Operator) -> None:
    graph.replace(op, ("Shape", [op.inputs[1]], {}), ("Expand", [op.inputs[0], ""], {}))


def _interpolation(graph: Graph, op: Operator) -> None:
    """Compute in float32 what is in float64 for oneDNN's sake: onnxruntime has no such operator of float64."""
    types = need("onnx").TensorProto
    cast = graph.makers.get(op.inputs[0])
    if cast is not None and cast.op_type == "Cast" and cast.attribute[0].i == types.DOUBLE:
        cast.attribute[0].i = types.FLOAT


def _adaptive_pooling(graph: Graph, op: Operator) -> None:
    """Write means of windows of different sizes as products with matrices, and maxima over repeated rows."""
    sizes, wanted = op.shapes[op.inputs[0]][2:], op.shapes[op.outputs[0]][2:]
    if not op.attributes["adaptive"] or min(sizes) < 0 or all(size % out == 0 for size, out in zip(sizes, wanted)):
        return
    if len(sizes) != 2:
        raise ReparamError(
            f"{op.place}: it pools {sizes} to {wanted}, which do not divide; that is converted in 2-D alone"
        )
    windows = [
        [range(i * size // out, -(-(i + 1) * size // out)) for i in range(out)] for size, out in zip(sizes, wanted)
    ]
    if op.attributes.get("pooling_type") == "avg":
        means = [np.zeros([out, size], np.float32) for size, out in zip(sizes, wanted)]
        for matrix, axis in zip(means, windows):
            for row, window in zip(matrix, axis):
                row[window] = 1 / len(window)
        graph.replace(op, ("MatMul", [means[0], ""], {}), ("MatMul", ["", means[1].T.copy()], {}))
        return
    # A row that is there twice changes no maximum, so every window can be as long as the longest.
    longest = [max(map(len, axis)) for axis in windows]
    rows = [
        np.array([min(window[0] + i, window[-1]) for window in axis for i in range(length)])
        for axis, length in zip(windows, longest)
    ]
    graph.replace(
        op,
        ("Gather", ["", rows[0]], {"axis": 2}),
        ("Gather", ["", rows[1]], {"axis": 3}),
        ("MaxPool", [""], {"kernel_shape": longest, "strides": longest}),
    )


#: Operator of Paddle -> what writes it again.
MENDS: dict[str, Callable[[Graph, Operator], None]] = {
    "hardtanh": _hard_tanh,
    "flatten": _flatten,
    "gelu": _gelu,
    "expand_as": _expand_as,
    "layer_norm": _layer_norm,
    "pad3d": _circular_padding,
    **{f"{mode}_interp": _interpolation for mode in ("linear", "nearest", "bilinear", "bicubic", "trilinear")},
    "pool2d": _adaptive_pooling,
    "pool3d": _adaptive_pooling,
    "max_pool2d_with_index": _adaptive_pooling,
    "max_pool3d_with_index": _adaptive_pooling,
}


def mend(model: Any, program: Iterable[Operator]) -> None:
    """Write again, in place, what is wrong in a model that was converted of a program.

    Raises `ReparamError` with the layer where that cannot be.
    """
    graph = Graph(model)
    for operator in program:
        if operator.kind in MENDS:
            MENDS[operator.kind](graph, operator)
    _drop_unread(model.graph)


def _drop_unread(graph: Any) -> None:
    read = Counter(name for node in graph.node for name in node.input) + Counter(value.name for value in graph.output)
    for node in reversed(list(graph.node)):
        if not any(read[name] for name in node.output):
            read.subtract(node.input)
            graph.node.remove(node)


# ---------------------------------------------------------------------------------------------------------------------
# The whole graph

#: Numbers of samples that are tried to see which axes they are, and sizes of images where every size is taken.
_BATCHES, _SIZES = [2, 3], (64, 224)


def simplify(path: Path) -> None:
    """Let onnxruntime fold, in place, what is constant in a file, its norms and its biases into convolutions.

    What it writes has its weights as initialisers, as quantisers want them, and no node that does nothing.
    """
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    target = path.with_suffix(".plain.onnx")
    options.optimized_model_filepath = str(target)
    runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    target.replace(path)


def join_hard_swish(model: Any) -> None:
    """Write, in place, x times a hard sigmoid of x as one operator, as which OpenVINO takes it into the convolution.

    onnxruntime, which has none of its own, writes it as two.
    """
    graph = Graph(model)
    readers = Counter(name for node in model.graph.node for name in node.input)
    for node in [node for node in model.graph.node if node.op_type == "Mul"]:
        for x, gate in (node.input, node.input[::-1]):
            maker = graph.makers.get(gate)
            if maker is None or maker.op_type != "HardSigmoid" or maker.input[0] != x or readers[gate] != 1:
                continue
            slope = {attribute.name: attribute.f for attribute in maker.attribute}
            if np.allclose([slope.get("alpha", 0.2), slope.get("beta", 0.5)], [1 / 6, 0.5], atol=1e-6):
                node.op_type, node.input[:] = "HardSwish", [x]
                model.graph.node.remove(maker)
                break


def finish(model: Any, running: OnnxModel, metadata: Mapping[str, str]) -> None:
    """Name a model's axes and outputs, in place; `running` is the same model, loaded. It says `metadata` of itself."""
    graph = model.graph
    used = {node.domain for node in graph.node}
    for entry in [entry for entry in model.opset_import if entry.domain not in used]:
        model.opset_import.remove(entry)
    for value in graph.input:
        prefix = f"{value.name}_" if len(graph.input) > 1 else ""
        names = ["batch", *(f"{prefix}{axis}" for axis in ("channels", "height", "width"))]
        for axis, dim in enumerate(_axes(value)):
            if not dim.HasField("dim_value"):
                dim.dim_param = names[axis] if axis < len(names) else f"{prefix}axis_{axis}"
    for value, batches in zip(graph.output, zip(*(_sizes_put_out(graph, running, batch) for batch in _BATCHES))):
        for dim, *sizes in zip(_axes(value), *batches):
            if not dim.HasField("dim_value") and sizes == _BATCHES:
                dim.dim_param = "batch"
    del graph.value_info[:]
    _name_outputs(graph)
    model.producer_name, model.producer_version = "paddle-reparam", __version__
    need("onnx").helper.set_model_props(model, dict(metadata))


def _axes(value: Any) -> Any:
    return value.type.tensor_type.shape.dim


def _sizes_put_out(graph: Any, running: OnnxModel, batch: int) -> list[tuple[int, ...]]:
    """Return the shape of each output for so many samples, which a name in a file may not contradict.

    Nothing where the network takes images of every size, but none of those that are tried. Raises `ReparamError` where
    it runs with none.
    """
    dtype_of = need("onnx").helper.tensor_dtype_to_np_dtype
    for size in _SIZES:
        arrays = [
            np.zeros(
                [dim.dim_value or (batch if axis == 0 else size) for axis, dim in enumerate(_axes(value))],
                dtype_of(value.type.tensor_type.elem_type),
            )
            for value in sorted(graph.input, key=lambda value: running.inputs.index(value.name))
        ]
        try:
            return [array.shape for array in running.run(*arrays)]
        except ReparamError:
            if all(dim.dim_value for value in graph.input for dim in _axes(value)[1:]):
                raise
    return [()] * len(graph.output)


def _name_outputs(graph: Any) -> None:
    """Call what a network puts out output, or output0, output1 and so on, where nothing else is called so."""
    number = len(graph.output)
    names = {value.name: "output" if number == 1 else f"output{i}" for i, value in enumerate(graph.output)}
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    if taken & set(names.values()):
        return
    for node in graph.node:
        for side in (node.input, node.output):
            side[:] = [names.get(name, name) for name in side]
    for value in graph.output:
        value.name = names[value.name]
