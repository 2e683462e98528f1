"""MobileNetV2 with DCDConv2D (arXiv 2103.08756), as the authors released it.

Dynamic are the 1x1 convolutions of the blocks that expand by 6, and the classifier. Entries are named as in the
released files, but q and p are called so in every network here: `features.2.conv.0.q.weight` for `conv_q`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ..arithmetic.initializers import init_fan_out_normal
from ..layers.dcd import DCDConv2D, DCDLinear
from ..registry import Published, register_model
from .builders import check_arguments, load_pretrained, nearest_multiple

_REPOSITORY = "the authors' repository"
# Expansion, output channels at width 1, blocks, stride of the first.
_STAGES = [
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
]  # fmt: skip
_LAST_CHANNELS = 1280


class _InvertedResidual(nn.Layer):
    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, fc_squeeze: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        options = {"variant": "mobilenet", "fc_squeeze": fc_squeeze}
        depthwise = nn.Conv2D(hidden, hidden, 3, stride, 1, groups=hidden, bias_attr=False)
        layers = [depthwise, nn.BatchNorm2D(hidden), nn.ReLU6()]
        if expansion == 1:
            project = nn.Conv2D(hidden, out_channels, 1, bias_attr=False)
        else:
            layers = [DCDConv2D(in_channels, hidden, 1, **options), nn.BatchNorm2D(hidden), nn.ReLU6(), *layers]
            project = DCDConv2D(hidden, out_channels, 1, **options)
        self.conv = nn.Sequential(*layers, project, nn.BatchNorm2D(out_channels))
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class _MobileNetV2DCD(nn.Layer):
    def __init__(self, width: float, class_num: int, dropout: float, fc_squeeze: int) -> None:
        super().__init__()
        channels = nearest_multiple(32 * width)
        layers: list[nn.Layer] = [_conv_bn(3, channels, 3, 2)]
        for expansion, full_width, count, stride in _STAGES:
            for i in range(count):
                out_channels = nearest_multiple(full_width * width)
                first_stride = stride if i == 0 else 1
                layers.append(_InvertedResidual(channels, out_channels, first_stride, expansion, fc_squeeze))
                channels = out_channels
        self.features = nn.Sequential(*layers)
        self.conv = _conv_bn(channels, _LAST_CHANNELS, 1, 1)
        self.avgpool = nn.AdaptiveAvgPool2D(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), DCDLinear(_LAST_CHANNELS, class_num))
        for layer in self.sublayers():
            if isinstance(layer, nn.Conv2D):
                init_fan_out_normal(layer)
            elif isinstance(layer, nn.Linear):
                nn.initializer.Normal(0.0, 0.01)(layer.weight)
                if layer.bias is not None:
                    nn.initializer.Constant(0.0)(layer.bias)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.classifier(paddle.flatten(self.avgpool(self.conv(self.features(x))), 1))


def _conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2D(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias_attr=False)
    return nn.Sequential(conv, nn.BatchNorm2D(out_channels), nn.ReLU6())


def _build(
    name: str,
    width: float,
    pretrained: bool | str,
    use_ssld: bool,
    class_num: int,
    dropout: float,
    fc_squeeze: int,
    unknown: Mapping[str, Any],
) -> nn.Layer:
    check_arguments(name, pretrained, use_ssld, unknown, ["dropout", "fc_squeeze"])
    return load_pretrained(_MobileNetV2DCD(width, class_num, dropout, fc_squeeze), pretrained)


def _rename(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Released networks call q and p conv_q and conv_p; without dropout their classifier is one place earlier."""
    return {
        re.sub(r"^classifier\.0\.", "classifier.1.", re.sub(r"\.conv_([qp])\.", r".\1.", key)): value
        for key, value in state.items()
    }


_CODE_ALONE = [
    Published(f"{_REPOSITORY} (code alone)"),
    Published(f"{_REPOSITORY} (code alone)", options={"fc_squeeze": 8}),
]


@register_model(published=_CODE_ALONE, rename=_rename)
def MobileNetV2_x0_35_DCD(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    dropout: float = 0.0,
    fc_squeeze: int = 16,
    **kwargs: Any,
) -> nn.Layer:
    """MobileNetV2 of width 0.35; arguments as for `MobileNetV2_x1_0_DCD`."""
    return _build("MobileNetV2_x0_35_DCD", 0.35, pretrained, use_ssld, class_num, dropout, fc_squeeze, kwargs)


@register_model(published=_CODE_ALONE, rename=_rename)
def MobileNetV2_x0_5_DCD(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    dropout: float = 0.0,
    fc_squeeze: int = 16,
    **kwargs: Any,
) -> nn.Layer:
    """MobileNetV2 of width 0.5; arguments as for `MobileNetV2_x1_0_DCD`."""
    return _build("MobileNetV2_x0_5_DCD", 0.5, pretrained, use_ssld, class_num, dropout, fc_squeeze, kwargs)


@register_model(published=_CODE_ALONE, rename=_rename)
def MobileNetV2_x0_75_DCD(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    dropout: float = 0.0,
    fc_squeeze: int = 16,
    **kwargs: Any,
) -> nn.Layer:
    """MobileNetV2 of width 0.75; arguments as for `MobileNetV2_x1_0_DCD`."""
    return _build("MobileNetV2_x0_75_DCD", 0.75, pretrained, use_ssld, class_num, dropout, fc_squeeze, kwargs)


@register_model(
    published=[
        Published(f"the paper, as a review quotes it; weights in {_REPOSITORY}", 75.2),
        Published(f"{_REPOSITORY} (code alone)", options={"fc_squeeze": 8}),
    ],
    rename=_rename,
)
def MobileNetV2_x1_0_DCD(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    dropout: float = 0.0,
    fc_squeeze: int = 16,
    **kwargs: Any,
) -> nn.Layer:
    """MobileNetV2, `[N, 3, H, W]` to `[N, class_num]`; `dropout` is the share dropped before the classifier.

    `fc_squeeze` is by how much the dynamic branches are narrower than what they read. `pretrained` is False or the path
    of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    return _build("MobileNetV2_x1_0_DCD", 1.0, pretrained, use_ssld, class_num, dropout, fc_squeeze, kwargs)
