"""MobileNetV2 and ResNets with CondConv2D (arXiv 1904.04971) and with DYConv2D (arXiv 1912.03458).

CondConv takes the place of the convolutions of the last six inverted residual blocks, or of the last three residual
blocks without their shortcuts, and of the classifier; DY-Conv that of every convolution but the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import paddle
from paddle import nn
from paddle.vision.models import MobileNetV2
from paddle.vision.models.resnet import BasicBlock

from ..arithmetic.geometry import ConvGeometry
from ..arithmetic.initializers import init_fan_out_normal
from ..layers.condconv import CondConv2D
from ..layers.dyconv import DYConv2D
from ..layers.experts import RoutedConv2D
from ..registry import Published, register_model
from .builders import check_arguments, load_pretrained
from .resnet import ResNet


class _CondConvClassifier(nn.Layer):
    """`[N, C]` to `[N, class_num]`: a CondConv2D on maps of one pixel."""

    def __init__(self, in_features: int, class_num: int, experts: int) -> None:
        super().__init__()
        self.conv = CondConv2D(in_features, class_num, 1, experts=experts)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.conv(x.unsqueeze([2, 3])).flatten(1)


def _replace(model: nn.Layer, prefixes: tuple[str, ...], layer_class: type[RoutedConv2D], experts: int) -> None:
    """Put a new layer in the place of every convolution whose path begins with one of some texts."""
    for path, owner in list(model.named_sublayers()):
        for name, conv in list(owner._sub_layers.items()):
            if type(conv) is nn.Conv2D and f"{path}.{name}".startswith(prefixes):
                setattr(owner, name, layer_class.build(ConvGeometry.of(conv), experts=experts))


def _mobilenet(width: float, class_num: int, dropout: float, layer_class: type[RoutedConv2D], experts: int) -> nn.Layer:
    model = MobileNetV2(width, class_num)
    for layer in model.sublayers():
        if isinstance(layer, nn.Conv2D):
            init_fan_out_normal(layer)
    # After the stem come 17 inverted residual blocks, and a 1x1 convolution.
    blocks, classifier = range(1, 19), model.classifier[1]
    nn.initializer.Normal(0.0, 0.01)(classifier.weight)
    if layer_class is CondConv2D:
        blocks, classifier = range(12, 18), _CondConvClassifier(model.last_channel, class_num, experts)
    model.classifier = nn.Sequential(nn.Dropout(dropout), classifier)
    _replace(model, tuple(f"features.{i}." for i in blocks), layer_class, experts)
    return model


def _resnet(
    blocks: Sequence[int], class_num: int, dropout: float, layer_class: type[RoutedConv2D], experts: int
) -> nn.Layer:
    def make_classifier(features: int) -> nn.Layer:
        if layer_class is CondConv2D:
            return _CondConvClassifier(features, class_num, experts)
        return nn.Linear(features, class_num)

    model = ResNet(BasicBlock, blocks, dropout, make_classifier)
    prefixes = tuple(f"layer{i + 1}.{j}." for i, count in enumerate(blocks) for j in range(count))
    if layer_class is CondConv2D:
        prefixes = tuple(f"{prefix}conv" for prefix in prefixes[-3:])
    _replace(model, prefixes, layer_class, experts)
    return model


_TAKES = ["dropout", "experts"]


@register_model
def MobileNetV2_x0_5_CondConv(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    dropout: float = 0.0,
    experts: int = 8,
    **kwargs: Any,
) -> nn.Layer:
    """MobileNetV2 of width 0.5, `[N, 3, H, W]` to `[N, class_num]`, with so many `experts` a layer.

    `dropout` is the share dropped before the classifier. `pretrained` is False or the path of a weight file. Raises
    `ReparamError` where that is True or does not fit.
    """
    check_arguments("MobileNetV2_x0_5_CondConv", pretrained, use_ssld, kwargs, _TAKES)
    return load_pretrained(_mobilenet(0.5, class_num, dropout, CondConv2D, experts), pretrained)


@register_model(published=[Published("the paper, as a review of DCD quotes it", 74.6)])
def MobileNetV2_x1_0_CondConv(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    dropout: float = 0.0,
    experts: int = 8,
    **kwargs: Any,
) -> nn.Layer:
    """MobileNetV2; arguments as for `MobileNetV2_x0_5_CondConv`."""
    check_arguments("MobileNetV2_x1_0_CondConv", pretrained, use_ssld, kwargs, _TAKES)
    return load_pretrained(_mobilenet(1.0, class_num, dropout, CondConv2D, experts), pretrained)


@register_model
def ResNet10_CondConv(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    dropout: float = 0.0,
    experts: int = 8,
    **kwargs: Any,
) -> nn.Layer:
    """ResNet-10; arguments as for `MobileNetV2_x0_5_CondConv`."""
    check_arguments("ResNet10_CondConv", pretrained, use_ssld, kwargs, _TAKES)
    return load_pretrained(_resnet((1, 1, 1, 1), class_num, dropout, CondConv2D, experts), pretrained)


@register_model
def ResNet18_CondConv(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    dropout: float = 0.0,
    experts: int = 8,
    **kwargs: Any,
) -> nn.Layer:
    """ResNet-18; arguments as for `MobileNetV2_x0_5_CondConv`."""
    check_arguments("ResNet18_CondConv", pretrained, use_ssld, kwargs, _TAKES)
    return load_pretrained(_resnet((2, 2, 2, 2), class_num, dropout, CondConv2D, experts), pretrained)


@register_model
def MobileNetV2_x0_5_DYConv(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    dropout: float = 0.0,
    experts: int = 4,
    **kwargs: Any,
) -> nn.Layer:
    """MobileNetV2 of width 0.5, `[N, 3, H, W]` to `[N, class_num]`, with so many `experts` a layer.

    `dropout` is the share dropped before the classifier. `pretrained` is False or the path of a weight file. Raises
    `ReparamError` where that is True or does not fit.
    """
    check_arguments("MobileNetV2_x0_5_DYConv", pretrained, use_ssld, kwargs, _TAKES)
    return load_pretrained(_mobilenet(0.5, class_num, dropout, DYConv2D, experts), pretrained)


@register_model
def MobileNetV2_x1_0_DYConv(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    dropout: float = 0.0,
    experts: int = 4,
    **kwargs: Any,
) -> nn.Layer:
    """MobileNetV2; arguments as for `MobileNetV2_x0_5_DYConv`."""
    check_arguments("MobileNetV2_x1_0_DYConv", pretrained, use_ssld, kwargs, _TAKES)
    return load_pretrained(_mobilenet(1.0, class_num, dropout, DYConv2D, experts), pretrained)


@register_model
def ResNet10_DYConv(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    dropout: float = 0.0,
    experts: int = 4,
    **kwargs: Any,
) -> nn.Layer:
    """ResNet-10; arguments as for `MobileNetV2_x0_5_DYConv`."""
    check_arguments("ResNet10_DYConv", pretrained, use_ssld, kwargs, _TAKES)
    return load_pretrained(_resnet((1, 1, 1, 1), class_num, dropout, DYConv2D, experts), pretrained)


@register_model
def ResNet18_DYConv(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    dropout: float = 0.0,
    experts: int = 4,
    **kwargs: Any,
) -> nn.Layer:
    """ResNet-18; arguments as for `MobileNetV2_x0_5_DYConv`."""
    check_arguments("ResNet18_DYConv", pretrained, use_ssld, kwargs, _TAKES)
    return load_pretrained(_resnet((2, 2, 2, 2), class_num, dropout, DYConv2D, experts), pretrained)
