"""ResNets with DCDConv2D (arXiv 2103.08756), as the authors released them.

They are Paddle's own blocks with all their convolutions replaced; the stem and the 1x1 convolutions of the shortcuts
stay. Entries are named as in the released files: `layer1.0.conv2.fc_phi.weight`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from paddle import nn
from paddle.vision.models.resnet import BasicBlock, BottleneckBlock

from ..arithmetic.geometry import ConvGeometry
from ..layers.dcd import DCDConv2D, DCDLinear
from ..registry import Published, register_model
from .builders import check_arguments, load_pretrained
from .resnet import ResNet

_REPOSITORY = "the authors' repository"
# Block -> (names of its convolutions, the rule for the sizes of their dynamic parts).
_CONVS = {
    BasicBlock: (("conv1", "conv2"), "resnet_basic"),
    BottleneckBlock: (("conv1", "conv2", "conv3"), "resnet_bottleneck"),
}


def _build(
    name: str,
    block: type,
    blocks: Sequence[int],
    pretrained: bool | str,
    use_ssld: bool,
    class_num: int,
    dropout: float,
    unknown: Mapping[str, Any],
) -> nn.Layer:
    check_arguments(name, pretrained, use_ssld, unknown, ["dropout"])
    model = ResNet(block, blocks, dropout, functools.partial(DCDLinear, class_num=class_num))
    names, variant = _CONVS[block]
    for layer in model.sublayers():
        for conv in names if isinstance(layer, block) else ():
            setattr(layer, conv, DCDConv2D.build(ConvGeometry.of(getattr(layer, conv)), variant=variant))
    return load_pretrained(model, pretrained)


def _rename(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Released networks without dropout have their classifier one place earlier."""
    without = "classifier.0."
    return {f"classifier.1.{k[len(without) :]}" if k.startswith(without) else k: v for k, v in state.items()}


@register_model(published=[Published(f"{_REPOSITORY} (code alone)")], rename=_rename)
def ResNet10_DCD(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, dropout: float = 0.0, **kwargs: Any
) -> nn.Layer:
    """ResNet-10, `[N, 3, H, W]` to `[N, class_num]`; `dropout` is the share dropped before the classifier.

    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    return _build("ResNet10_DCD", BasicBlock, (1, 1, 1, 1), pretrained, use_ssld, class_num, dropout, kwargs)


@register_model(published=[Published(f"{_REPOSITORY} (code alone)")], rename=_rename)
def ResNet18_DCD(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, dropout: float = 0.0, **kwargs: Any
) -> nn.Layer:
    """ResNet-18; arguments as for `ResNet10_DCD`."""
    return _build("ResNet18_DCD", BasicBlock, (2, 2, 2, 2), pretrained, use_ssld, class_num, dropout, kwargs)


@register_model(published=[Published(f"{_REPOSITORY} (code alone)")], rename=_rename)
def ResNet34_DCD(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, dropout: float = 0.0, **kwargs: Any
) -> nn.Layer:
    """ResNet-34; arguments as for `ResNet10_DCD`."""
    return _build("ResNet34_DCD", BasicBlock, (3, 4, 6, 3), pretrained, use_ssld, class_num, dropout, kwargs)


@register_model(published=[Published(f"{_REPOSITORY} (weights; no accuracy in its text)")], rename=_rename)
def ResNet50_DCD(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, dropout: float = 0.0, **kwargs: Any
) -> nn.Layer:
    """ResNet-50; arguments as for `ResNet10_DCD`. Published weights were trained with a dropout of 0.1."""
    return _build("ResNet50_DCD", BottleneckBlock, (3, 4, 6, 3), pretrained, use_ssld, class_num, dropout, kwargs)


@register_model(published=[Published(f"{_REPOSITORY} (code alone)")], rename=_rename)
def ResNet101_DCD(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, dropout: float = 0.0, **kwargs: Any
) -> nn.Layer:
    """ResNet-101; arguments as for `ResNet10_DCD`."""
    return _build("ResNet101_DCD", BottleneckBlock, (3, 4, 23, 3), pretrained, use_ssld, class_num, dropout, kwargs)
