"""Networks that make features of aligned faces: MobileFaceNet (arXiv 1804.07573), and FaceResNet with and without
RepMLP (arXiv 2105.01883).

`class_num` is the number of features, as of every network that PaddleClas' `RecModel` puts a neck and a head behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
from paddle import nn

from ..errors import ReparamError
from ..registry import Published, register_model
from .builders import check_arguments, load_pretrained
from .resnet_repmlp import RepMLPResNet, require_size

# Expansion, output channels, number of blocks and the first one's stride: the rows of the paper's table 1.
_BOTTLENECKS = [(2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1)]

# ---------------------------------------------------------------------------------------------------------------------
# MobileFaceNet


class _ConvBNPReLU(nn.Sequential):
    """A convolution with its BN and, where asked for, a PReLU with a slope for each channel."""

    def __init__(
        self, in_channels: int, out_channels: int, k: int, stride: int = 1, padding: int | None = None,
        groups: int = 1, prelu: bool = True,
    ) -> None:  # fmt: skip
        padding = k // 2 if padding is None else padding
        conv = nn.Conv2D(in_channels, out_channels, k, stride, padding, groups=groups, bias_attr=False)
        layers = [("conv", conv), ("bn", nn.BatchNorm2D(out_channels))]
        super().__init__(*layers, *([("prelu", nn.PReLU(out_channels))] if prelu else []))


class _Bottleneck(nn.Layer):
    """MobileNetV2's block with PReLUs: 1x1 to `expansion` times the channels, 3x3 depthwise, 1x1 without one."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = expansion * in_channels
        self.is_residual = stride == 1 and in_channels == out_channels
        self.expand = _ConvBNPReLU(in_channels, middle, 1)
        self.depthwise = _ConvBNPReLU(middle, middle, 3, stride, groups=middle)
        self.project = _ConvBNPReLU(middle, out_channels, 1, prelu=False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.is_residual else out


class _MobileFaceNet(nn.Layer):
    """`[N, 3, image_size, image_size]` to features `[N, class_num]`.

    Where others average, a depthwise convolution as large as the last map weighs each of its places (GDConv); `linear`
    with its BN makes the features of what it puts out.
    """

    def __init__(self, class_num: int, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.stem = nn.Sequential(_ConvBNPReLU(3, 64, 3, 2), _ConvBNPReLU(64, 64, 3, groups=64))
        blocks, channels = [], 64
        for expansion, width, count, stride in _BOTTLENECKS:
            for number in range(count):
                blocks.append(_Bottleneck(channels, width, stride if number == 0 else 1, expansion))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.last = _ConvBNPReLU(channels, 512, 1)
        self.gdconv = _ConvBNPReLU(512, 512, image_size // 16, padding=0, groups=512, prelu=False)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(512, class_num, bias_attr=False)
        self.linear_bn = nn.BatchNorm1D(class_num)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        require_size(x, self.image_size)
        x = self.gdconv(self.last(self.blocks(self.stem(x))))
        return self.linear_bn(self.linear(self.flatten(x)))


@register_model(
    published=[
        Published("arXiv 1804.07573, 96x96", None, {}, 96),
        Published("arXiv 1804.07573; 99.55 on LFW's pairs", None, {"image_size": 112}, 112),
    ]
)
def MobileFaceNet(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 128, image_size: int = 96, **kwargs: Any
) -> nn.Layer:
    """MobileFaceNet, `[N, 3, image_size, image_size]` to features `[N, class_num]`; 996,480 parameters at 96x96.

    `image_size` is a multiple of 16. `pretrained` is False or the path of a weight file. Raises `ReparamError` where
    that is True or does not fit.
    """
    check_arguments("MobileFaceNet", pretrained, use_ssld, kwargs, ["image_size"])
    if image_size % 16:
        raise ReparamError(f"MobileFaceNet halves its images four times; image_size={image_size} is no multiple of 16")
    return load_pretrained(_MobileFaceNet(class_num, image_size), pretrained)


# ---------------------------------------------------------------------------------------------------------------------
# FaceResNet


def _face_resnet(
    fc3_groups: Mapping[str, int], reduction: Mapping[str, int], fc1_fc2_reduction: float, image_size: int,
    class_num: int,
) -> RepMLPResNet:  # fmt: skip
    return RepMLPResNet(
        "bottleneck", fc3_groups, reduction, fc1_fc2_reduction, image_size, partition=image_size // 16,
        class_num=class_num, depths=(3, 2, 2, 2), expansion=2, squeeze=1, plain_first=True,
    )  # fmt: skip


@register_model(published=[Published("arXiv 2105.01883: its FaceResNet", None, {}, 96)])
def FaceResNet(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 512, **kwargs: Any) -> nn.Layer:
    """A ResNet of 3, 2, 2 and 2 bottlenecks that are 128, 256, 512 and 1024 wide all through; images of any size.

    `[N, 3, H, W]` to features `[N, class_num]`; 31,380,288 parameters. Arguments as for `MobileFaceNet`.
    """
    check_arguments("FaceResNet", pretrained, use_ssld, kwargs)
    return load_pretrained(_face_resnet({}, {}, 1, 96, class_num), pretrained)


@register_model(published=[Published("arXiv 2105.01883: 4.91 above its MobileFaceNet on MegaFace", None, {}, 96)])
def RepMLP_FaceRes(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 512,
    fc3_groups: int = 8,
    reduction: Mapping[str, int] | None = None,
    fc1_fc2_reduction: float = 1,
    image_size: int = 96,
    **kwargs: Any,
) -> nn.Layer:
    """FaceResNet with RepMLP bottlenecks in the place of all blocks of c2, c3 and c4 but the first of each.

    `[N, 3, image_size, image_size]` to features `[N, class_num]`; partitions have 1/16 of the side, 6x6 at 96.
    `fc3_groups` is the number of FC3's groups, `reduction` by how much RepMLP is narrower than its block,
    `{"c2": 2, "c3": 2, "c4": 4}` unless given. Both are those of `RepMLPResNet50` until the paper's own are known, and
    so are the 41,770,304 parameters. `fc1_fc2_reduction` is by how much FC1 reduces.
    """
    stages = {"c2": 2, "c3": 2, "c4": 4}
    options = ["fc3_groups", "reduction", "fc1_fc2_reduction", "image_size"]
    check_arguments("RepMLP_FaceRes", pretrained, use_ssld, kwargs, options)
    if reduction is not None and not (isinstance(reduction, Mapping) and set(reduction) <= set(stages)):
        raise ReparamError(
            f"RepMLP_FaceRes: reduction is a number for c2, c3 and c4, such as {stages}, not {reduction}"
        )
    if image_size % 32:
        raise ReparamError(f"RepMLP_FaceRes halves its images five times; image_size={image_size} is no multiple of 32")
    groups = dict.fromkeys(stages, fc3_groups)
    network = _face_resnet(groups, {**stages, **(reduction or {})}, fc1_fc2_reduction, image_size, class_num)
    return load_pretrained(network, pretrained)
