"""VGG-16 for CIFAR-10 with SPConv2D (arXiv 2006.12085)."""

from __future__ import annotations

from typing import Any

from paddle import nn

from ..arithmetic.initializers import init_fan_out_normal
from ..layers.spconv import SPConv2D
from ..registry import register_model
from .builders import check_arguments, load_pretrained
from .cifar import VGG16ForCifar
from .resnet_spconv import published_at


def _network(ratio: float, class_num: int) -> nn.Layer:
    """Return VGG-16 with SPConv2D in the place of all convolutions but the first, and a hidden layer of 512."""

    def convolution(in_channels: int, out_channels: int) -> nn.Layer:
        if in_channels > 3:
            return SPConv2D(in_channels, out_channels, ratio=ratio)
        conv = nn.Conv2D(in_channels, out_channels, 3, padding=1)
        init_fan_out_normal(conv)
        return conv

    return VGG16ForCifar(convolution, nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, class_num)))


@register_model(published=published_at(32, {1 / 2: 94.40, 1 / 4: 93.94, 1 / 8: 93.77, 1 / 16: 93.43}))
def VGG16_SPConv(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 10, ratio: float = 0.5, **kwargs: Any
) -> nn.Layer:
    """VGG-16 for 32x32 images, `[N, 3, H, W]` to `[N, class_num]`; `ratio` is the share of representative channels.

    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    check_arguments("VGG16_SPConv", pretrained, use_ssld, kwargs, ["ratio"])
    return load_pretrained(_network(ratio, class_num), pretrained)
