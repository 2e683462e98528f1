"""This library's networks among PaddleDetection's backbones: `backbone: SLaK_tiny` in a config."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import paddle
from paddle import nn
from ppdet.core.workspace import global_config, serializable
from ppdet.core.workspace import register as register_class
from ppdet.modeling.shape_spec import ShapeSpec

from .. import models  # noqa: F401  (importing the models registers them)
from ..errors import ReparamError
from ..models.stages import as_backbone, load_backbone
from ..registry import create_model, list_models


def register() -> None:
    """Put every network of this library where PaddleDetection looks a backbone up."""
    for name in list_models():
        if name in global_config:
            raise ReparamError(f"PaddleDetection has a {name!r} of its own; rename the registered one")
        # It finds a class by its name in the module that it is of.
        cls = type(name, (_Backbone,), {"__module__": __name__, "__doc__": f"{name}, as a backbone."})
        setattr(sys.modules[__name__], name, register_class(serializable(cls)))


class _Backbone:
    """What is called as PaddleDetection's backbones are, and gives the network of its own name."""

    def __new__(
        cls, return_idx: Sequence[int] | None = None, pretrained: str | None = None, **options: Any
    ) -> nn.Layer:
        network = as_backbone(create_model(cls.__name__, **options), return_idx)
        if pretrained:
            load_backbone(network, pretrained)
        network.__class__ = _of_inputs(type(network))
        return network

    def __init__(self, return_idx: Sequence[int] | None = None, pretrained: str | None = None, **options: Any) -> None:
        """Say what there is to set; what `__new__` gives is no `_Backbone`, and this never runs."""


@functools.cache
def _of_inputs(cls: type) -> type:
    """Return the class of a backbone that takes PaddleDetection's inputs, and says what it puts out."""

    def forward(self: Any, inputs: Mapping[str, paddle.Tensor]) -> list[paddle.Tensor]:
        return super(made, self).forward(inputs["image"])

    def out_shape(self: Any) -> list[ShapeSpec]:
        pairs = zip(self.feat_channels, self.feat_strides)
        return [ShapeSpec(channels=channels, stride=stride) for channels, stride in pairs]

    made = type(cls.__name__, (cls,), {
        "__module__": cls.__module__, "forward": forward, "out_shape": property(out_shape),
    })  # fmt: skip
    return made
