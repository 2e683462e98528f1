"""ResNets with SPConv2D (arXiv 2006.12085): for ImageNet, and the ResNet-20 for CIFAR-10.

They are Paddle's own blocks with their 3x3 convolutions replaced: conv2 of a bottleneck, both of a basic block. The
stem stays, and so do the BNs that follow. Entries are named as in Paddle's and torchvision's ResNet:
`layer1.0.conv2.gwc.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
from paddle import nn
from paddle.vision.models import ResNet
from paddle.vision.models.resnet import BasicBlock, BottleneckBlock

from ..arithmetic.initializers import init_fan_out_normal
from ..layers.spconv import SPConv2D
from ..registry import Published, register_model
from .builders import check_arguments, load_pretrained, maps_of
from .cifar import ResNetForCifar


class _ResNet(ResNet):
    def stage_maps(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        """Return the maps of the stages, from the largest to the smallest."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return maps_of((self.layer1, self.layer2, self.layer3, self.layer4), x)


def _with_spconv(model: nn.Layer, ratio: float) -> nn.Layer:
    """Replace the 3x3 convolutions of all blocks, and draw the weights of all that stay."""
    for layer in model.sublayers():
        names = {BottleneckBlock: ["conv2"], BasicBlock: ["conv1", "conv2"]}.get(type(layer), [])
        for name in names:
            setattr(layer, name, SPConv2D.from_conv(getattr(layer, name), ratio=ratio))
    for layer in model.sublayers():
        if isinstance(layer, nn.Conv2D):
            init_fan_out_normal(layer)
    return model


def published_at(input_size: int, top1: Mapping[float, float]) -> list[Published]:
    """Return what the authors published: ratio -> accuracy in percent."""
    return [
        Published("the authors' repository", accuracy, {"ratio": ratio}, input_size) for ratio, accuracy in top1.items()
    ]


def _build(
    depth: int,
    block: type,
    pretrained: bool | str,
    use_ssld: bool,
    class_num: int,
    ratio: float,
    unknown: Mapping[str, Any],
) -> nn.Layer:
    check_arguments(f"ResNet{depth}_SPConv", pretrained, use_ssld, unknown, ["ratio"])
    model = _with_spconv(_ResNet(block, depth, num_classes=class_num), ratio)
    return load_pretrained(model, pretrained)


@register_model(rename=dict)
def ResNet18_SPConv(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, ratio: float = 0.5, **kwargs: Any
) -> nn.Layer:
    """ResNet-18, `[N, 3, H, W]` to `[N, class_num]`; `ratio` is the share of representative channels (1/2, 1/4, 1/8).

    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    return _build(18, BasicBlock, pretrained, use_ssld, class_num, ratio, kwargs)


@register_model(rename=dict)
def ResNet34_SPConv(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, ratio: float = 0.5, **kwargs: Any
) -> nn.Layer:
    """ResNet-34; arguments as for `ResNet18_SPConv`."""
    return _build(34, BasicBlock, pretrained, use_ssld, class_num, ratio, kwargs)


@register_model(published=published_at(224, {1 / 2: 76.26, 1 / 4: 75.95, 1 / 8: 75.40}), rename=dict)
def ResNet50_SPConv(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, ratio: float = 0.5, **kwargs: Any
) -> nn.Layer:
    """ResNet-50; arguments as for `ResNet18_SPConv`."""
    return _build(50, BottleneckBlock, pretrained, use_ssld, class_num, ratio, kwargs)


@register_model(rename=dict)
def ResNet101_SPConv(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, ratio: float = 0.5, **kwargs: Any
) -> nn.Layer:
    """ResNet-101; arguments as for `ResNet18_SPConv`."""
    return _build(101, BottleneckBlock, pretrained, use_ssld, class_num, ratio, kwargs)


@register_model(published=published_at(32, {1 / 2: 92.23, 1 / 4: 91.15}))
def ResNet20_SPConv(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 10, ratio: float = 0.5, **kwargs: Any
) -> nn.Layer:
    """ResNet-20 for 32x32 images; arguments as for `ResNet18_SPConv`."""
    check_arguments("ResNet20_SPConv", pretrained, use_ssld, kwargs, ["ratio"])
    model = _with_spconv(ResNetForCifar(blocks=3, class_num=class_num), ratio)
    return load_pretrained(model, pretrained)
