"""An ONNX file in int8 by onnxruntime's quantiser, with what is measured on images for every choice that it has."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable

import numpy as np

from ..errors import ReparamError, one_sentence
from ..files import Folder
from .calibration import Activation, copy_of, largest_by_channel, measure
from .equalization import arrays_of, equalize, exponents_of, links_of
from .outputs import error_beside_spread
from .runtimes.onnx_runtime import OnnxModel, need

#: What an int8 file says of the channels that were equalised in it.
EQUALIZED = "paddle_reparam.equalized"
#: Operators with weights, in the graphs that are quantised.
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: What onnxruntime's CPU kernels compute in eight bits, or pass on unseen; all the rest is computed in float32. So are
#: averages of windows: its quantiser would give them the range of what they average, which is several times as wide.
_QUANTIZED = (
    *WEIGHTED, "Add", "Mul", "Concat", "Relu", "Clip", "LeakyRelu", "MaxPool", "GlobalAveragePool", "Reshape",
    "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Resize", "Pad",
)  # fmt: skip
#: Those of them that round by themselves.
_ARITHMETIC = (*WEIGHTED, "Add", "Mul", "Concat")
_METHODS = ("minmax", "mse")
#: What activations are stored as -> onnxruntime's name of it.
_QUANT_TYPES = {"uint8": "QUInt8", "int8": "QInt8"}
#: Images on which outputs are compared, and those of them by which layers are.
_COMPARED, _COMPARED_BY_LAYER = 32, 8
#: Signed activations are taken where they are so many times as fast, and off by no more than so many times as much.
_FASTER, _AS_GOOD = 1.2, 1.1
_ROUNDS = 5
#: An input that says which tensors are rounded.
_SWITCHES = "switches"


def write_int8(
    source: Folder,
    target: Folder,
    images: np.ndarray,
    metadata: Mapping[str, str] | None,
    drop: Callable[[Path], float] | None,
    largest_drop: float,
    threads: int,
) -> dict[str, Any]:
    """Write an ONNX file in int8; everything is as `quantization.quantize_onnx` says, which checks it besides."""
    OnnxModel(source, threads).run(images[:1])  # so that images that do not fit are named before anything is built
    with one_sentence(f"{source}: onnxruntime cannot quantise it"):
        model = prepared(source)
        largest = largest_by_channel(model, [link.tensor for link in links_of(model)], images[:_COMPARED], threads)
        exponents = exponents_of(model, largest)
        equalize(model, exponents)
        network = QuantizedNetwork(model, measure(model, images, threads), images[:_COMPARED], threads)
        way, quantized, error = network.choose()
        weighted = network.weighted()
        facts = {**dict(metadata or {}), EQUALIZED: json.dumps(exponents)}
        kept: list[str] = []
        worst: list[str] = []
        while True:
            _save(quantized, target, facts)
            lost = None if drop is None else drop(Path(target))
            if lost is None or lost <= largest_drop:
                break
            count = 2 * len(kept) or 1
            if 2 * count > len(weighted):
                stayed = f" with {len(kept)} of {len(weighted)} layers in float32" if kept else ""
                raise ReparamError(
                    f"int8 loses {lost:.2f} points{stayed}, more than the {largest_drop:g} that are allowed"
                )
            worst = worst or network.worst_first(*way)
            kept = worst[:count]
            quantized = network.quantized(*way, kept)
            error = network.error_of(quantized)
    ranges, activations = way
    return {
        "activations": activations,
        "ranges": ranges,
        "error": error,
        "equalized": sorted(exponents),
        "int8": [name for name in weighted if name not in kept],
        "float32": kept,
        "drop": lost,
    }


def _save(model: Any, target: Folder, facts: Mapping[str, str]) -> None:
    onnx = need("onnx")
    onnx.helper.set_model_props(model, {**{each.key: each.value for each in model.metadata_props}, **facts})
    onnx.save(model, str(target))


def prepared(source: Folder) -> Any:
    """Return the graph of a float32 file with all that is constant as initialisers, which alone can be quantised."""
    onnx, runtime, tool = need("onnx"), need("onnxruntime"), need("onnxruntime.quantization")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prepared.onnx"
        runtime.set_default_logger_severity(3)  # errors; it would warn of each constant that nothing reads
        tool.quant_pre_process(str(source), str(file), skip_symbolic_shape=True)
        model = onnx.load(str(file))
    for number, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
    return model


class QuantizedNetwork:
    """A float32 graph, what its tensors hold, and what it puts out on images, beside which int8 is compared."""

    def __init__(self, model: Any, held: Mapping[str, Activation], images: np.ndarray, threads: int = 1) -> None:
        self.model, self.held, self.images, self.threads = model, held, images, threads
        self.expected = self._outputs(model)

    def weighted(self) -> list[str]:
        """Return the layers that can become int8."""
        constants = {each.name for each in self.model.graph.initializer}
        return [
            node.name for node in self.model.graph.node if node.op_type in WEIGHTED and set(node.input[:2]) & constants
        ]

    def quantized(self, method: str, activations: str, kept: Sequence[str] = (), switches: bool = False) -> Any:
        """Return the graph in int8, but for the nodes `kept`; with `switches` see `_with_switches`."""
        tool = need("onnxruntime.quantization")
        calibrate = need("onnxruntime.quantization.calibrate")
        ranges = {
            name: tuple(np.array(end, np.float32) for end in each.range_with(method))
            for name, each in self.held.items()
        }
        quantizer = need("onnxruntime.quantization.qdq_quantizer").QDQQuantizer(
            copy_of(self.model), True, False, tool.QuantType.QInt8, getattr(tool.QuantType, _QUANT_TYPES[activations]),
            calibrate.TensorsData(tool.CalibrationMethod.MinMax, ranges), [], list(kept), list(_QUANTIZED),
            {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"], "QDQKeepRemovableActivations": switches},
        )  # fmt: skip
        return quantizer.quantize_model()

    def _outputs(self, model: Any) -> np.ndarray:
        return OnnxModel(model.SerializeToString(), self.threads).run(self.images)[0]

    def error_of(self, model: Any) -> float:
        """Return how far a graph's first output is from that in float32, relative, as roots of mean squares."""
        return error_beside_spread(self._outputs(model), self.expected)

    def choose(self) -> tuple[tuple[str, str], Any, float]:
        """Return the ranges and the activations that are best here, the graph with them, and its error."""
        models = {(method, "uint8"): self.quantized(method, "uint8") for method in _METHODS}
        errors = {way: self.error_of(model) for way, model in models.items()}
        best = min(errors, key=lambda way: errors[way])
        signed = (best[0], "int8")
        models[signed] = self.quantized(*signed)
        try:
            errors[signed] = self.error_of(models[signed])
        except ReparamError:  # some graphs with signed activations cannot be loaded by onnxruntime 1.32
            return best, models[best], errors[best]
        if errors[signed] <= _AS_GOOD * errors[best]:
            times = self._times({way: models[way] for way in (best, signed)})
            best = signed if _FASTER * times[signed] < times[best] else best
        return best, models[best], errors[best]

    def _times(self, models: Mapping[tuple[str, str], Any]) -> dict[tuple[str, str], float]:
        running = {way: OnnxModel(model.SerializeToString(), self.threads) for way, model in models.items()}
        times: dict[tuple[str, str], list[float]] = {way: [] for way in running}
        for _ in range(_ROUNDS):
            for way, network in running.items():
                start = time.perf_counter()
                network.run(self.images[:1])
                times[way].append(time.perf_counter() - start)
        return {way: min(each) for way, each in times.items()}

    def worst_first(self, method: str, activations: str) -> list[str]:
        """Return the nodes that compute in eight bits, by what the output changes where one alone does, most first."""
        model = self.quantized(method, activations, switches=True)
        tensors = _add_switches(model, arrays_of(self.model))
        images = self.images[:_COMPARED_BY_LAYER]
        running = OnnxModel(model.SerializeToString(), self.threads)
        changes = {}
        for node in self.model.graph.node:
            if node.op_type in _ARITHMETIC:
                touched = {*node.input, *node.output}
                on = np.array([tensor in touched for tensor in tensors])
                if on.any():
                    output = running.outputs_of({self.model.graph.input[0].name: images, _SWITCHES: on})[0]
                    changes[node.name] = error_beside_spread(output, self.expected[:_COMPARED_BY_LAYER])
        return sorted(changes, key=lambda name: -changes[name])


def _add_switches(model: Any, arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Let a quantised graph take, as an input more, whether each tensor in eight bits is rounded; return their names.

    `arrays` has the weights in float32.
    """
    onnx = need("onnx")
    helper, graph = onnx.helper, model.graph
    quantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    suffix = "_DequantizeLinear_Output"
    nodes, tensors = [], []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "DequantizeLinear":
            continue
        output, name = node.output[0], quantized.get(node.input[0])
        if name is None:
            name = output.removesuffix(suffix)
            if arrays[name].ndim < 2:  # a bias, in 32 bits
                continue
            graph.initializer.append(onnx.numpy_helper.from_array(arrays[name], f"{name}.exact"))
        exact = name if name in quantized.values() else f"{name}.exact"
        number = f"{_SWITCHES}.{len(tensors)}"
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(len(tensors)), number))
        node.output[0] = f"{output}.rounded"
        nodes.append(helper.make_node("Gather", [_SWITCHES, number], [f"{number}.on"]))
        nodes.append(helper.make_node("Where", [f"{number}.on", f"{output}.rounded", exact], [output]))
        tensors.append(name)
    del graph.node[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(_SWITCHES, onnx.TensorProto.BOOL, [len(tensors)]))
    return tensors
