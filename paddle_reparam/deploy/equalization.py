"""Cross-layer equalisation: channels of a map made alike in size, so that one scale of eight bits holds them all.

Where a layer's outputs go through nothing but a function with f(s x) = s f(x), such as ReLU, into one other layer, an
output channel can be multiplied by a factor whose inverse goes into the weights that read it. The factors are powers of
two: numbers of float32 are multiplied by them without rounding, so the equalised graph is the same function.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .runtimes.onnx_runtime import need

#: Operators that a positive factor may be taken through.
_HOMOGENEOUS = ("Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool")
#: Factors are not above 2 to this power, nor below its inverse.
_LARGEST_EXPONENT = 12


@dataclass(frozen=True)
class Link:
    """A convolution whose output channels one other convolution reads, the tensor that this reads, and its groups."""

    maker: str
    reader: str
    tensor: str
    groups: int


def arrays_of(model: Any) -> dict[str, np.ndarray]:
    """Return the constants of a graph by name."""
    to_array = need("onnx").numpy_helper.to_array
    return {each.name: to_array(each) for each in model.graph.initializer}


def links_of(model: Any) -> list[Link]:
    """Return every pair of convolutions of a graph that could be equalised, in the order of the graph."""
    constants = {each.name: each for each in model.graph.initializer}
    readers, makers = defaultdict(list), {}
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
        makers.update(dict.fromkeys(node.output, node))
    outputs = {each.name for each in model.graph.output}

    def alone(name: str) -> bool:
        return len(readers[name]) == 1 and name not in outputs

    links = []
    for reader in model.graph.node:
        if not _is_convolution(reader, constants, readers):
            continue
        name = reader.input[0]
        while alone(name) and name in makers and makers[name].op_type in _HOMOGENEOUS:
            name = makers[name].input[0]
        maker = makers.get(name)
        if maker is None or not alone(name) or not _is_convolution(maker, constants, readers):
            continue
        groups = next((attribute.i for attribute in reader.attribute if attribute.name == "group"), 1)
        links.append(Link(maker.name, reader.name, reader.input[0], groups))
    return links


def _is_convolution(node: Any, constants: Mapping[str, Any], readers: Mapping[str, list[Any]]) -> bool:
    """Tell whether a node is a convolution with constants that no other node reads."""
    return (
        node.op_type == "Conv"
        and all(name in constants and len(readers[name]) == 1 for name in node.input[1:])
        and len(constants[node.input[1]].dims) == 4
    )


def exponents_of(model: Any, largest: Mapping[str, np.ndarray]) -> dict[str, list[int]]:
    """Return, for links whose channels differ enough, their tensor -> a power of two for each channel.

    `largest` has the largest absolute value of every channel of each link's tensor. A kernel has a scale for each of
    its outputs, so the convolution that makes the map is indifferent to its factors, and so is a depthwise one that
    reads it: the channels become as large as the largest. A dense one that reads it has weights that grow as the
    channels shrink, and the factors stand in the middle.
    """
    arrays, nodes = arrays_of(model), {node.name: node for node in model.graph.node}
    found = {}
    for link in links_of(model):
        channels = largest[link.tensor].astype(np.float64)
        kernel = np.abs(arrays[nodes[link.reader].input[1]].astype(np.float64))
        outputs = kernel.max(axis=(1, 2, 3))
        per_group = kernel.reshape(link.groups, -1, *kernel.shape[1:])
        relative = per_group / np.where(outputs > 0, outputs, 1.0).reshape(link.groups, -1, 1, 1, 1)
        weights = relative.max(axis=(1, 3, 4)).reshape(-1)
        depthwise = kernel.shape[1] == 1
        used = (channels > 0) & (weights > 0)
        if not used.any():
            continue
        wanted = np.zeros(len(channels))
        if depthwise:
            wanted[used] = np.log2(channels[used].max() / channels[used])
        else:
            wanted[used] = np.log2(weights[used] / channels[used]) / 2
            wanted[used] -= np.median(wanted[used])
        exponents = np.clip(np.floor(wanted + 0.5), -_LARGEST_EXPONENT, _LARGEST_EXPONENT).astype(int)
        if exponents.any():
            found[link.tensor] = exponents.tolist()
    return found


def equalize(model: Any, exponents: Mapping[str, list[int]]) -> None:
    """Multiply, in place, the channels of tensors by two to these powers, and divide the weights that read them."""
    arrays, nodes = arrays_of(model), {node.name: node for node in model.graph.node}
    for link in links_of(model):
        if link.tensor not in exponents:
            continue
        factors = np.exp2(np.array(exponents[link.tensor])).astype(np.float32)
        for name in nodes[link.maker].input[1:]:
            arrays[name] = arrays[name] * factors.reshape(-1, *[1] * (arrays[name].ndim - 1))
        weight = nodes[link.reader].input[1]
        kernel = arrays[weight]
        per_group = kernel.reshape(link.groups, -1, *kernel.shape[1:])
        inverse = (1 / factors).reshape(link.groups, 1, kernel.shape[1], 1, 1)
        arrays[weight] = (per_group * inverse).reshape(kernel.shape)
    from_array = need("onnx").numpy_helper.from_array
    for tensor in model.graph.initializer:
        tensor.CopyFrom(from_array(arrays[tensor.name], tensor.name))
