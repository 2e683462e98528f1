"""HBONet: "HBONet: Harmonious Bottleneck on Two Orthogonal Dimensions" (ICCV 2019, arXiv 1908.03888).

Entries are named as in the published weight files: `features.3.conv.0.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import paddle
from paddle import nn

from ..errors import ReparamError
from ..registry import Published, register_model
from .builders import check_arguments, load_pretrained, nearest_multiple

_AUTHORS = "Li, Zhou, Yao: published code and weights, validation set, one centre crop"
# Widths of a network of width 1: the bottlenecks that shrink the map, as (channels, blocks, stride of the first).
_BOTTLENECKS = [(36, 1, 1), (72, 3, 2), (96, 4, 2), (192, 4, 2), (288, 1, 1)]
_STEM, _FIRST, _SQUEEZED, _LAST, _HEAD = 32, 20, 144, [(200, 2, 2), (400, 1, 1)], 1600


class _InvertedResidual(nn.Layer):
    """MobileNetV2's block: 1x1 convolution to `expansion` times the channels, 3x3 depthwise, 1x1 without activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.identity = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *(_conv_bn(in_channels, hidden) if expansion > 1 else []),
            *_conv_bn(hidden, hidden, 3, stride, groups=hidden),
            *_conv_bn(hidden, out_channels, activation=False),
        )

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = self.conv(x)
        return x + y if self.identity else y


class _HarmoniousBottleneck(nn.Layer):
    """Twice the channels on a map `rate` times smaller, then back to the size that `stride` asks for.

    What is computed makes one half of the output; the other half are channels of the input. Maps whose sides `rate`
    does not divide are treated as if they went on: enlarged maps are cut, means are taken over what is there.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, rate: int) -> None:
        super().__init__()
        hidden, half = 2 * in_channels, out_channels // 2
        layers: list[nn.Layer] = []
        channels = in_channels
        for _ in range(rate.bit_length() - 1):
            layers += _conv_bn(channels, channels, 5, 2, groups=channels, activation=False)
            layers += _conv_bn(channels, hidden)
            channels = hidden
        layers += _conv_bn(hidden, hidden, 3, groups=hidden, activation=rate == 2)
        layers += _conv_bn(hidden, half, activation=False)
        self.conv = nn.Sequential(*layers)
        self.half, self.kept, self.scale = half, out_channels - half, rate // stride
        self.avgpool = nn.AvgPool2D(2, 2, ceil_mode=True) if stride == 2 else nn.Identity()
        if self.scale > 1:
            self.upconv = nn.Sequential(*_conv_bn(half, half, 5, groups=half, activation=False))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = self.conv(x)
        x = self.avgpool(x)
        if self.scale > 1:
            y = _enlarged(y, self.scale)[:, :, : x.shape[2], : x.shape[3]]
            y = self.upconv(x[:, : self.half] + y)
        return paddle.concat([x[:, -self.kept :], y], axis=1)


class _HBONet(nn.Layer):
    """The network: all widths but the head's are multiples of `divisor`."""

    def __init__(self, width: float, divisor: int, rate: int, class_num: int) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return nearest_multiple(channels * width, divisor)

        channels = scaled(_FIRST)
        features = [
            nn.Sequential(*_conv_bn(3, scaled(_STEM), 3, 2)),
            _InvertedResidual(scaled(_STEM), channels, stride=1, expansion=1),
        ]
        # Only the first three stages, whose maps are large, go further down than by 2; the third by 4 at most.
        rates = [rate, rate, min(rate, 4), 2, 2]
        for (out_channels, blocks, stride), stage_rate in zip(_BOTTLENECKS, rates):
            for i in range(blocks):
                features.append(
                    _HarmoniousBottleneck(channels, scaled(out_channels), stride if i == 0 else 1, stage_rate)
                )
                channels = scaled(out_channels)
        features.append(nn.Sequential(*_conv_bn(channels, scaled(_SQUEEZED), activation=False)))
        channels = scaled(_SQUEEZED)
        for out_channels, blocks, stride in _LAST:
            for i in range(blocks):
                features.append(_InvertedResidual(channels, scaled(out_channels), stride if i == 0 else 1, expansion=6))
                channels = scaled(out_channels)
        self.features = nn.Sequential(*features)
        self.conv = nn.Sequential(*_conv_bn(channels, _HEAD))
        self.avgpool = nn.AdaptiveAvgPool2D(1)
        self.classifier = nn.Linear(_HEAD, class_num)
        _draw_weights(self)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.avgpool(self.conv(self.features(x)))
        return self.classifier(paddle.flatten(x, 1))


def _conv_bn(
    in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1, activation: bool = True
) -> list[nn.Layer]:
    conv = nn.Conv2D(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias_attr=False
    )  # fmt: skip
    return [conv, nn.BatchNorm2D(out_channels), *([nn.ReLU6()] if activation else [])]


def _enlarged(x: paddle.Tensor, factor: int) -> paddle.Tensor:
    """Return the map with every pixel repeated `factor` times in both directions.

    Not by `interpolate` with a scale factor, which Paddle Inference 3.3 cannot run with oneDNN.
    """
    x = paddle.tile(paddle.unsqueeze(x, [3, 5]), [1, 1, 1, factor, 1, factor])
    return paddle.flatten(paddle.flatten(x, 2, 3), 3, 4)


def _draw_weights(model: nn.Layer) -> None:
    for layer in model.sublayers():
        if isinstance(layer, nn.Conv2D):
            out_channels, _, height, width = layer.weight.shape
            nn.initializer.KaimingNormal(fan_in=out_channels * height * width)(layer.weight)
        elif isinstance(layer, nn.Linear):
            nn.initializer.Normal(0.0, 0.01)(layer.weight)


def _build(
    name: str,
    width: float,
    pretrained: bool | str,
    use_ssld: bool,
    class_num: int,
    unknown: Mapping[str, Any],
    options: Sequence[str] = (),
    divisor: int = 8,
    rate: int = 2,
) -> nn.Layer:
    check_arguments(name, pretrained, use_ssld, unknown, options)
    for option, value in (("divisor", divisor), ("rate", rate)):
        if value not in (2, 4, 8):
            raise ReparamError(f"{name} has no {option}={value!r}; choose one of 2, 4, 8")
    return load_pretrained(_HBONet(width, divisor, rate, class_num), pretrained)


def _at_sizes(*top1: float) -> list[Published]:
    """Return what was published of one width at 224, 192, 160, 128 and 96 pixels."""
    return [Published(_AUTHORS, accuracy, input_size=size) for accuracy, size in zip(top1, (224, 192, 160, 128, 96))]


@register_model(published=_at_sizes(73.1), rename=dict)
def HBONet_x1_0(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """HBONet of width 1, `[N, 3, H, W]` to `[N, class_num]`.

    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    return _build("HBONet_x1_0", 1.0, pretrained, use_ssld, class_num, kwargs)


@register_model(published=_at_sizes(71.3, 70.0, 68.3, 65.5, 61.4), rename=dict)
def HBONet_x0_8(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """HBONet of width 0.8; arguments as for `HBONet_x1_0`."""
    return _build("HBONet_x0_8", 0.8, pretrained, use_ssld, class_num, kwargs)


@register_model(published=[Published(_AUTHORS, 67.3, input_size=192)], rename=dict)
def HBONet_x0_6(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """HBONet of width 0.6; arguments as for `HBONet_x1_0`."""
    return _build("HBONet_x0_6", 0.6, pretrained, use_ssld, class_num, kwargs)


@register_model(published=[Published(_AUTHORS, 67.0), Published(_AUTHORS, 67.7, {"divisor": 8})], rename=dict)
def HBONet_x0_5(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, divisor: int = 2, **kwargs: Any
) -> nn.Layer:
    """HBONet of width 0.5, its widths multiples of `divisor` (2 or 8); other arguments as for `HBONet_x1_0`."""
    return _build("HBONet_x0_5", 0.5, pretrained, use_ssld, class_num, kwargs, ["divisor"], divisor)


@register_model(published=_at_sizes(62.4, 60.9, 58.6, 55.2, 50.3), rename=dict)
def HBONet_x0_35(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """HBONet of width 0.35; arguments as for `HBONet_x1_0`."""
    return _build("HBONet_x0_35", 0.35, pretrained, use_ssld, class_num, kwargs)


@register_model(
    published=[
        Published(_AUTHORS, 57.3),
        Published(_AUTHORS, 58.3, {"divisor": 8}),
        Published(_AUTHORS, 59.3, {"divisor": 8, "rate": 4}),
        Published(_AUTHORS, 58.2, {"divisor": 8, "rate": 8}),
    ],
    rename=dict,
)
def HBONet_x0_25(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    divisor: int = 2,
    rate: int = 2,
    **kwargs: Any,
) -> nn.Layer:
    """HBONet of width 0.25, its widths multiples of `divisor` (2 or 8); other arguments as for `HBONet_x1_0`.

    `rate`: how many times smaller the bottlenecks of the first stages make their maps: 2, 4 or 8.
    """
    return _build("HBONet_x0_25", 0.25, pretrained, use_ssld, class_num, kwargs, ["divisor", "rate"], divisor, rate)


@register_model(published=[Published(_AUTHORS, 41.5)], rename=dict)
def HBONet_x0_1(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """HBONet of width 0.1; arguments as for `HBONet_x1_0`."""
    return _build("HBONet_x0_1", 0.1, pretrained, use_ssld, class_num, kwargs, divisor=4)
