"""VGG-16 for CIFAR-10 with SPConv2D (arXiv 2006.12085)."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from ..arithmetic.initializers import init_fan_out_normal
from ..layers.spconv import SPConv2D
from ..registry import register_model
from .builders import check_arguments, load_pretrained
from .resnet_spconv import published_at

# Output channels of the 3x3 convolutions, stage by stage; each stage ends with a pooling that halves the map.
_STAGES = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]


class _VGG16ForCifar(nn.Layer):
    """VGG-16 with BNs, all 3x3 convolutions but the first as SPConv2D, and one hidden fully connected layer of 512."""

    def __init__(self, ratio: float, class_num: int) -> None:
        super().__init__()
        layers: list[nn.Layer] = []
        channels = 3
        for stage in _STAGES:
            for width in stage:
                if layers:
                    conv = SPConv2D(channels, width, ratio=ratio)
                else:
                    conv = nn.Conv2D(channels, width, 3, padding=1)
                    init_fan_out_normal(conv)
                layers += [conv, nn.BatchNorm2D(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2D(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2D(1)
        self.classifier = nn.Sequential(nn.Linear(channels, 512), nn.ReLU(), nn.Linear(512, class_num))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.classifier(paddle.flatten(self.avgpool(self.features(x)), 1))


@register_model(published=published_at(32, {1 / 2: 94.40, 1 / 4: 93.94, 1 / 8: 93.77, 1 / 16: 93.43}))
def VGG16_SPConv(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 10, ratio: float = 0.5, **kwargs: Any
) -> nn.Layer:
    """VGG-16 for 32x32 images, `[N, 3, H, W]` to `[N, class_num]`; `ratio` is the share of representative channels.

    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    check_arguments("VGG16_SPConv", pretrained, use_ssld, kwargs, ["ratio"])
    return load_pretrained(_VGG16ForCifar(ratio, class_num), pretrained)
