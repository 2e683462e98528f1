"""This library's networks among PaddleSeg's backbones: `type: SLaK_tiny` in a config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paddle import nn
from paddleseg.cvlibs import manager

from .. import models  # noqa: F401  (importing the models registers them)
from ..errors import ReparamError, UsageError
from ..models.stages import as_backbone, load_backbone
from ..registry import create_model, list_models


def register() -> None:
    """Put every network of this library that has stages where PaddleSeg looks the `type` of a backbone up."""
    for name in list_models():
        if name in manager.BACKBONES.components_dict or name in manager.MODELS.components_dict:
            raise ReparamError(f"PaddleSeg has a {name!r} of its own; rename the registered one")
        manager.BACKBONES.add_component(_builder(name))


def _builder(name: str) -> Callable[..., nn.Layer]:
    def build(
        in_channels: int = 3,
        out_indices: Sequence[int] | None = None,
        pretrained: str | None = None,
        **options: Any,
    ) -> nn.Layer:
        if in_channels != 3:
            raise UsageError(f"{name} takes images of 3 channels, not of {in_channels}")
        network = as_backbone(create_model(name, **options), out_indices)
        if pretrained:
            load_backbone(network, pretrained)
        return network

    build.__name__ = name
    return build
