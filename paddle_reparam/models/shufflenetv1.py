"""ShuffleNet: "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices" (arXiv 1707.01083).

Widths and entries are those of the authors' published weight files: `features.0.branch_main_1.3.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn

from ..registry import Published, register_model
from .builders import check_arguments, load_pretrained

_AUTHORS = "Megvii: published code and weights, validation set, one centre crop"
_BLOCKS = (4, 8, 4)


class _ShuffleBlock(nn.Layer):
    """1x1 grouped convolution, channel shuffle, 3x3 depthwise convolution, 1x1 grouped convolution, beside a shortcut.

    As published, the shuffle comes behind the depthwise convolution. With stride 2 the shortcut is average pooled, and
    its channels are put beside the block's.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        middle, made = out_channels // 4, out_channels - (in_channels if stride == 2 else 0)
        self.stride, self.groups = stride, groups
        self.branch_main_1 = nn.Sequential(
            nn.Conv2D(in_channels, middle, 1, groups=first_groups, bias_attr=False),
            nn.BatchNorm2D(middle),
            nn.ReLU(),
            nn.Conv2D(middle, middle, 3, stride, 1, groups=middle, bias_attr=False),
            nn.BatchNorm2D(middle),
        )
        self.branch_main_2 = nn.Sequential(
            nn.Conv2D(middle, made, 1, groups=groups, bias_attr=False), nn.BatchNorm2D(made)
        )
        if stride == 2:
            # The padding counts as zeros, as it does in PyTorch.
            self.branch_proj = nn.AvgPool2D(3, 2, 1, exclusive=False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = _shuffle_channels(self.branch_main_1(x), self.groups)
        y = self.branch_main_2(y)
        if self.stride == 1:
            return F.relu(x + y)
        return paddle.concat([self.branch_proj(x), F.relu(y)], axis=1)


class _ShuffleNetV1(nn.Layer):
    """The network: a stem of `stem` channels, then three stages of which the first puts out `width` channels."""

    def __init__(self, stem: int, width: int, groups: int, class_num: int) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(nn.Conv2D(3, stem, 3, 2, 1, bias_attr=False), nn.BatchNorm2D(stem), nn.ReLU())
        self.maxpool = nn.MaxPool2D(3, 2, 1)
        blocks = []
        channels = stem
        for stage, count in enumerate(_BLOCKS):
            for i in range(count):
                # The stem's channels are too few to be grouped.
                first_groups = groups if blocks else 1
                blocks.append(_ShuffleBlock(channels, width << stage, 2 if i == 0 else 1, groups, first_groups))
                channels = width << stage
        self.features = nn.Sequential(*blocks)
        self.globalpool = nn.AdaptiveAvgPool2D(1)
        self.classifier = nn.Sequential(nn.Linear(channels, class_num, bias_attr=False))
        self._draw_weights()

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.features(self.maxpool(self.first_conv(x)))
        return self.classifier(paddle.flatten(self.globalpool(x), 1))

    def _draw_weights(self) -> None:
        """Draw weights as the published code does: deviation 0.01 at both ends, 1 / (in_channels / groups) between."""
        for layer in self.features.sublayers():
            if isinstance(layer, nn.Conv2D):
                nn.initializer.Normal(0.0, 1.0 / layer.weight.shape[1])(layer.weight)
        for layer in (self.first_conv[0], self.classifier[0]):
            nn.initializer.Normal(0.0, 0.01)(layer.weight)
        for layer in self.sublayers():
            if isinstance(layer, nn.BatchNorm2D):
                nn.initializer.Constant(0.0001)(layer.bias)


def _shuffle_channels(x: paddle.Tensor, groups: int) -> paddle.Tensor:
    """Return the channels `[c0, c1, ...]` in the order `[c0, c_groups, ..., c1, c_(groups + 1), ...]`."""
    channels, height, width = x.shape[1], x.shape[2], x.shape[3]
    x = paddle.reshape(x, [0, channels // groups, groups, height, width])
    return paddle.reshape(paddle.transpose(x, [0, 2, 1, 3, 4]), [0, channels, height, width])


def _build(
    name: str,
    stem: int,
    width: int,
    groups: int,
    pretrained: bool | str,
    use_ssld: bool,
    class_num: int,
    unknown: Mapping[str, Any],
) -> nn.Layer:
    check_arguments(name, pretrained, use_ssld, unknown)
    return load_pretrained(_ShuffleNetV1(stem, width, groups, class_num), pretrained)


@register_model(published=[Published(_AUTHORS, 57.3)], rename=dict)
def ShuffleNetV1_x0_5_g3(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """ShuffleNet of half the width in 3 groups, `[N, 3, H, W]` to `[N, class_num]`.

    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    return _build("ShuffleNetV1_x0_5_g3", 12, 120, 3, pretrained, use_ssld, class_num, kwargs)


@register_model(published=[Published(_AUTHORS, 67.8)], rename=dict)
def ShuffleNetV1_x1_0_g3(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """ShuffleNet of width 1 in 3 groups; arguments as for `ShuffleNetV1_x0_5_g3`."""
    return _build("ShuffleNetV1_x1_0_g3", 24, 240, 3, pretrained, use_ssld, class_num, kwargs)


@register_model(published=[Published(_AUTHORS, 71.6)], rename=dict)
def ShuffleNetV1_x1_5_g3(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """ShuffleNet of width 1.5 in 3 groups; arguments as for `ShuffleNetV1_x0_5_g3`."""
    return _build("ShuffleNetV1_x1_5_g3", 24, 360, 3, pretrained, use_ssld, class_num, kwargs)


@register_model(published=[Published(_AUTHORS, 74.1)], rename=dict)
def ShuffleNetV1_x2_0_g3(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """ShuffleNet of width 2 in 3 groups; arguments as for `ShuffleNetV1_x0_5_g3`."""
    return _build("ShuffleNetV1_x2_0_g3", 48, 480, 3, pretrained, use_ssld, class_num, kwargs)


@register_model(published=[Published(_AUTHORS, 58.8)], rename=dict)
def ShuffleNetV1_x0_5_g8(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """ShuffleNet of half the width in 8 groups; arguments as for `ShuffleNetV1_x0_5_g3`."""
    return _build("ShuffleNetV1_x0_5_g8", 16, 192, 8, pretrained, use_ssld, class_num, kwargs)


@register_model(published=[Published(_AUTHORS, 68.0)], rename=dict)
def ShuffleNetV1_x1_0_g8(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """ShuffleNet of width 1 in 8 groups; arguments as for `ShuffleNetV1_x0_5_g3`."""
    return _build("ShuffleNetV1_x1_0_g8", 24, 384, 8, pretrained, use_ssld, class_num, kwargs)


@register_model(published=[Published(_AUTHORS, 71.0)], rename=dict)
def ShuffleNetV1_x1_5_g8(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """ShuffleNet of width 1.5 in 8 groups; arguments as for `ShuffleNetV1_x0_5_g3`."""
    return _build("ShuffleNetV1_x1_5_g8", 24, 576, 8, pretrained, use_ssld, class_num, kwargs)


@register_model(published=[Published(_AUTHORS, 72.9)], rename=dict)
def ShuffleNetV1_x2_0_g8(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """ShuffleNet of width 2 in 8 groups; arguments as for `ShuffleNetV1_x0_5_g3`."""
    return _build("ShuffleNetV1_x2_0_g8", 48, 768, 8, pretrained, use_ssld, class_num, kwargs)
