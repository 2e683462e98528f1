"""Plain networks for images of 32x32 pixels, ResNet-20 (arXiv 1512.03385) and VGG-16 (arXiv 1409.1556).

They are what the layers of this library are put into for CIFAR-10, by `ReparamModel` in a config or by `replace`.
"""

from __future__ import annotations

from typing import Any, Callable

import paddle
from paddle import nn
from paddle.vision.models.resnet import BasicBlock

from ..arithmetic.initializers import init_fan_out_normal
from ..registry import Published, register_model
from .builders import check_arguments, load_pretrained, maps_of

# Output channels of VGG-16's 3x3 convolutions, stage by stage; each stage ends with a pooling that halves the map.
_STAGES = [[64, 64], [128, 128], [256, 256, 256], [512, 512, 512], [512, 512, 512]]


class ResNetForCifar(nn.Layer):
    """Three stages of basic blocks, 16, 32 and 64 channels wide, with 1x1 convolutions as shortcuts."""

    def __init__(self, blocks: int, class_num: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2D(3, 16, 3, padding=1, bias_attr=False)
        self.bn1 = nn.BatchNorm2D(16)
        self.relu = nn.ReLU()
        self.layer1 = _basic_stage(16, 16, 1, blocks)
        self.layer2 = _basic_stage(16, 32, 2, blocks)
        self.layer3 = _basic_stage(32, 64, 2, blocks)
        self.avgpool = nn.AdaptiveAvgPool2D(1)
        self.fc = nn.Linear(64, class_num)

    def stage_maps(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        """Return the maps of the stages, from the largest to the smallest."""
        return maps_of((self.layer1, self.layer2, self.layer3), self.relu(self.bn1(self.conv1(x))))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.fc(paddle.flatten(self.avgpool(self.stage_maps(x)[-1]), 1))


def _basic_stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
    shortcut = None
    if stride != 1:
        conv = nn.Conv2D(in_channels, out_channels, 1, stride, bias_attr=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2D(out_channels))
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    return nn.Sequential(first, *[BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)])


class VGG16ForCifar(nn.Layer):
    """VGG-16's 13 convolutions, each with a BN and a ReLU, in front of a classifier that takes 512 channels.

    `convolution` makes the one from so many channels to so many.
    """

    def __init__(self, convolution: Callable[[int, int], nn.Layer], classifier: nn.Layer) -> None:
        super().__init__()
        layers: list[nn.Layer] = []
        channels = 3
        for stage in _STAGES:
            for width in stage:
                layers += [convolution(channels, width), nn.BatchNorm2D(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2D(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2D(1)
        self.classifier = classifier

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.classifier(paddle.flatten(self.avgpool(self.features(x)), 1))


def _drawn(model: nn.Layer) -> nn.Layer:
    for layer in model.sublayers():
        if isinstance(layer, nn.Conv2D):
            init_fan_out_normal(layer)
    return model


@register_model(published=[Published("arXiv 2006.12085, the plain network", 92.0, {}, 32)])
def ResNet20(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 10, **kwargs: Any) -> nn.Layer:
    """ResNet-20 for 32x32 images, `[N, 3, H, W]` to `[N, class_num]`; 272,474 parameters for ten classes.

    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    check_arguments("ResNet20", pretrained, use_ssld, kwargs)
    return load_pretrained(_drawn(ResNetForCifar(blocks=3, class_num=class_num)), pretrained)


@register_model(published=[Published("after arXiv 1409.1556, for CIFAR-10", None, {}, 32)])
def VGG16_CIFAR(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 10, **kwargs: Any) -> nn.Layer:
    """VGG-16 for 32x32 images, with BNs and one fully connected layer; 14,724,042 parameters for ten classes.

    Its convolutions have no biases, which the BNs behind them would take away again. Arguments as for `ResNet20`.
    """
    check_arguments("VGG16_CIFAR", pretrained, use_ssld, kwargs)

    def convolution(in_channels: int, out_channels: int) -> nn.Layer:
        return nn.Conv2D(in_channels, out_channels, 3, padding=1, bias_attr=False)

    return load_pretrained(_drawn(VGG16ForCifar(convolution, nn.Linear(512, class_num))), pretrained)
