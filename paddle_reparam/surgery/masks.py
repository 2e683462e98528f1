"""Masks of dynamic sparse training, as they lie in a network and in its weight files.

A mask is a buffer beside its parameter (`weight` and `weight_mask`), so checkpoints carry it, and fusing takes it away.
How masks move while a network trains is told in `training/sparsity.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn

from .tracing import walk

Array = np.ndarray
#: A parameter's mask is a buffer of its layer under the parameter's name with this suffix.
SUFFIX = "_mask"
#: Buffer of the root layer: how many optimizer steps the masks have seen.
STEP = "sparsity_step"
#: Bytes of a number -> the whole numbers that have as many.
_BITS = {2: "int16", 4: "int32", 8: "int64"}


def draw_mask(shape: Sequence[int], count: int, generator: np.random.Generator) -> Array:
    """Return a mask with exactly `count` ones at random places."""
    mask = np.zeros(math.prod(shape), bool)
    mask[generator.choice(mask.size, count, replace=False)] = True
    return mask.reshape(shape)


@dataclass(frozen=True)
class Place:
    """A parameter that may get a mask: its path in the model, its layer and its name there."""

    path: str
    layer: nn.Layer
    name: str

    @property
    def parameter(self) -> paddle.Tensor:
        return self.layer._parameters[self.name]

    @property
    def mask(self) -> paddle.Tensor | None:
        """The mask, as a buffer of any type; None: this parameter is dense."""
        return self.layer._buffers.get(self.name + SUFFIX)

    def read_mask(self) -> Array:
        return self.mask.astype("bool").numpy()


def masked_places(model: nn.Layer) -> list[Place]:
    """Return the parameters that have masks, in the order of the model."""
    names = [(path, layer, name) for path, layer in walk(model) for name in layer._parameters]
    places = [Place(f"{path}.{name}" if path else name, layer, name) for path, layer, name in names]
    return list({id(p.parameter): p for p in places if p.mask is not None}.values())


def adopt_masks(model: nn.Layer, state: Mapping[str, Any]) -> list[str]:
    """Register a mask for every parameter that has one in `state`, as yet empty; return the names of the new buffers.

    A state dict with masks then fits the model.
    """
    new = []
    for path, layer in walk(model):
        for name in list(layer._parameters):
            key = f"{path}.{name}{SUFFIX}" if path else name + SUFFIX
            if key in state and name + SUFFIX not in layer._buffers:
                layer.register_buffer(name + SUFFIX, paddle.ones(layer._parameters[name].shape, "bool"))
                new.append(key)
    if new and STEP not in model._buffers:
        model.register_buffer(STEP, paddle.zeros([1], "int64"))
        new.append(STEP)
    return new


def draw_anew(model: nn.Layer, shares: Mapping[str, float]) -> None:
    """Give parameters, by path, masks in which a share stays, at random places, and clear the weights they hide.

    For parameters that were drawn anew in a network whose other masks came from a file. A parameter that has a mask
    keeps it. All processes draw the same.
    """
    names = [(path, layer, name) for path, layer in walk(model) for name in layer._parameters]
    for i, (prefix, layer, name) in enumerate(names):
        place = Place(f"{prefix}.{name}" if prefix else name, layer, name)
        if place.path not in shares or place.mask is not None:
            continue
        size = math.prod(place.parameter.shape)
        count = max(1, round(shares[place.path] * size))
        if count < size:
            mask = draw_mask(place.parameter.shape, count, np.random.default_rng([0, i]))
            layer.register_buffer(name + SUFFIX, paddle.to_tensor(mask))
            keep_only(place.parameter, mask)


def remove_masks(model: nn.Layer) -> None:
    """Take the masks and the step counter away; the weights stay as they are, zeros included."""
    names = [place.path + SUFFIX for place in masked_places(model)]
    drop_buffers(model, [*names, STEP] if STEP in model._buffers else names)


def drop_buffers(model: nn.Layer, names: Sequence[str]) -> None:
    """Take buffers away by their names in the state dict."""
    for name in names:
        path, _, last = name.rpartition(".")
        layer = model
        for part in filter(None, path.split(".")):
            layer = layer._sub_layers[part]
        del layer._buffers[last]


def masked(tensor: paddle.Tensor, mask: paddle.Tensor) -> paddle.Tensor:
    masked = tensor.clone()
    mask_in_place(masked, mask)
    return masked


def mask_in_place(tensor: paddle.Tensor, mask: paddle.Tensor) -> None:
    # A product of bits: one of numbers would let a NaN or infinity of a hidden position through, and `where` takes
    # four times as long on a CPU.
    bits = _BITS[tensor.element_size()]
    whole, keep = tensor.view(bits), mask.astype(bits)
    # A CPU multiplies no whole numbers of 16 bits.
    whole.bitwise_and_(-keep) if bits == "int16" else whole.multiply_(keep)


def keep_only(tensor: paddle.Tensor, mask: Array) -> None:
    tensor.set_value(masked(tensor.detach(), paddle.to_tensor(mask)))
