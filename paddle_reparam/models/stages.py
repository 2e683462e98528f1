"""A network without its classifier, as what segmenters and detectors stand on: the maps of its stages."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import paddle
from paddle import nn

from ..errors import ReparamError, UsageError
from ..weights import checkpoints
from .convnext import LayerNorm2D

#: The side of the image with which a network of every size is tried.
_SIDE = 64


def as_backbone(network: nn.Layer, out_indices: Sequence[int] | None = None) -> nn.Layer:
    """Return a network whose output is the list of its stages' maps, from the largest to the smallest, in place.

    `out_indices` are the stages, counted from 0, whose maps are put out; all unless told. What stands behind the stages
    is dropped, all other entries keep their names. A network with a norm before its classifier has one for each map,
    `norm0` and so on, as in published segmenters: the maps of its blocks are sums that nothing else normalises. It gets
    the attributes `feat_channels` and `feat_strides`, of the maps that are put out. Raises `ReparamError` for a network
    without stages, and `UsageError` for stages that it does not have.
    """
    name = type(network).__name__
    if not hasattr(network, "stage_maps"):
        raise ReparamError(f"{name} has no stages whose maps could be handed on; take another backbone")
    side = getattr(network, "image_size", None) or _SIDE
    called: set[int] = set()
    handles = [layer.register_forward_post_hook(lambda each, *_: called.add(id(each))) for layer in network.sublayers()]
    network.eval()
    with paddle.no_grad():
        maps = network.stage_maps(paddle.zeros([1, 3, side, side]))
    network.train()
    for handle in handles:
        handle.remove()
    chosen = list(range(len(maps)) if out_indices is None else out_indices)
    if not chosen or sorted(set(chosen)) != chosen or not set(chosen) <= set(range(len(maps))):
        raise UsageError(f"{name}: out_indices is {chosen}; it has the stages 0 to {len(maps) - 1}, in this order")
    norm = next((each for key in ("norm", "head_norm") if (each := getattr(network, key, None)) is not None), None)
    for key, child in list(network._sub_layers.items()):
        if id(child) not in called and not any(id(layer) in called for layer in child.sublayers()):
            del network._sub_layers[key]
    network.__class__ = _backbone_class(type(network))
    network.out_indices = chosen
    network.feat_channels = [maps[index].shape[1] for index in chosen]
    network.feat_strides = [side // maps[index].shape[2] for index in chosen]
    for index, channels in zip(chosen, network.feat_channels):
        if isinstance(norm, nn.LayerNorm):
            setattr(network, f"norm{index}", LayerNorm2D(channels, norm._epsilon))
        elif isinstance(norm, nn.BatchNorm2D):
            setattr(network, f"norm{index}", nn.BatchNorm2D(channels))
    return network


def load_backbone(network: nn.Layer, path: str | os.PathLike[str]) -> None:
    """Load the weights of a backbone, or of the whole classifier: without what was dropped, and with its own norms.

    Raises `CheckpointError` where another entry is missing, left over or of another shape.
    """
    file = checkpoints.weight_file(path)
    arrays, own = checkpoints.load(file), network.state_dict()
    kept = {name: array for name, array in arrays.items() if name in own or not name.startswith(_BEHIND)}
    norms = {name: tensor for name, tensor in own.items() if name.startswith("norm")}
    try:
        checkpoints.load_into(network, {**norms, **kept})
    except ReparamError as error:
        raise error.at(file) from error


#: How the entries begin that stand behind the stages of this library's networks.
_BEHIND = ("norm.", "head_norm.", "head.", "linear.", "fc.", "classifier.")


def _maps(self: nn.Layer, x: paddle.Tensor) -> list[paddle.Tensor]:
    maps = self.stage_maps(x)
    put_out = []
    for index in self.out_indices:
        norm = getattr(self, f"norm{index}", None)
        put_out.append(maps[index] if norm is None else norm(maps[index]))
    return put_out


@functools.cache
def _backbone_class(cls: type) -> type:
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "forward": _maps})
