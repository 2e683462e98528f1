"""ResNets of Paddle's own blocks, of any depth and with any classifier, for layers that take the place of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import paddle
from paddle import nn

from ..arithmetic.initializers import init_fan_out_normal
from .builders import maps_of


class ResNet(nn.Layer):
    """Four stages of `blocks[i]` blocks; behind a dropout, what `make_classifier` makes of the number of features."""

    def __init__(
        self, block: type, blocks: Sequence[int], dropout: float, make_classifier: Callable[[int], nn.Layer]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2D(3, 64, 7, stride=2, padding=3, bias_attr=False)
        init_fan_out_normal(self.conv1)
        self.bn1 = nn.BatchNorm2D(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2D(3, 2, 1)
        channels = 64
        for i, count in enumerate(blocks):
            width, stride = 64 * 2**i, 1 if i == 0 else 2
            setattr(self, f"layer{i + 1}", _stage(block, channels, width, stride, count))
            channels = width * block.expansion
        self.avgpool = nn.AdaptiveAvgPool2D(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), make_classifier(channels))

    def stage_maps(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        """Return the maps of the stages, from the largest to the smallest."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return maps_of((self.layer1, self.layer2, self.layer3, self.layer4), x)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.classifier(paddle.flatten(self.avgpool(self.stage_maps(x)[-1]), 1))


def _stage(block: type, in_channels: int, width: int, stride: int, count: int) -> nn.Sequential:
    out_channels = width * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        conv = nn.Conv2D(in_channels, out_channels, 1, stride, bias_attr=False)
        init_fan_out_normal(conv)
        downsample = nn.Sequential(conv, nn.BatchNorm2D(out_channels))
    blocks = [block(in_channels, width, stride, downsample)]
    return nn.Sequential(*blocks, *[block(out_channels, width) for _ in range(count - 1)])
