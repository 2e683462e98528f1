"""ResNets with DBB2D (arXiv 2103.13425) or ACB2D (arXiv 1908.03930) in the place of each 3x3 convolution and its BN.

Of a basic block these are both convolutions, of a bottleneck the one in the middle, which has the stride. The stem of
7x7, the 1x1 convolutions and the shortcuts are plain. Entries are named as in the authors' code, which trains both
kinds: `stage1.0.conv1.dbb_origin.conv.weight`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic.geometry import ConvGeometry
from ..arithmetic.initializers import uniform_fan_in
from ..layers.acb import ACB2D
from ..layers.base import ReparamLayer
from ..layers.branches import conv_bn_of
from ..layers.dbb import DBB2D
from ..registry import Published, register_model
from .builders import bn_that_adds, check_arguments, load_pretrained, maps_of

_DEPTHS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class ResidualBlock(nn.Layer):
    """out = ReLU(convolutions(x) + shortcut(x)); all convolutions but the last have a ReLU behind them.

    Their kernels are `kernels` wide, and they put out so many of `channels`. Those of 3x3 are a `layer`, the first of
    which has the stride. The shortcut is x itself where it can be and `identity` says so, or a 1x1 convolution.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        kernels: Sequence[int],
        stride: int,
        layer: type[ReparamLayer],
        identity: bool = True,
    ) -> None:
        super().__init__()
        plain = identity and stride == 1 and in_channels == channels[-1]
        self.shortcut = nn.Identity() if plain else conv_bn_of(_geometry(in_channels, channels[-1], 1, stride))
        self.count = len(kernels)
        for number, (size, after) in enumerate(zip(kernels, channels)):
            geometry = _geometry(in_channels, after, size, stride if number == kernels.index(3) else 1)
            setattr(self, f"conv{number + 1}", layer(geometry) if size == 3 else conv_bn_of(geometry))
            in_channels = after

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = x
        for number in range(1, self.count):
            y = F.relu(getattr(self, f"conv{number}")(y))
        return F.relu(getattr(self, f"conv{self.count}")(y) + self.shortcut(x))


class BranchedResNet(nn.Layer):
    """A ResNet whose 3x3 convolutions are a `layer`, `[N, 3, H, W]` to `[N, class_num]`.

    `depths` is how many blocks each stage has: of two 3x3 convolutions, or of 1x1, 3x3 and 1x1 for `bottleneck`. The
    stem has `width` channels. With `first_shortcut` the first block has a 1x1 convolution as its shortcut in any case.
    """

    def __init__(
        self,
        layer: type[ReparamLayer],
        depths: Sequence[int],
        bottleneck: bool,
        class_num: int,
        first_shortcut: bool = False,
        width: int = 64,
    ) -> None:
        super().__init__()
        stem = conv_bn_of(_geometry(3, width, 7, 2))
        self.stage0 = nn.Sequential(("conv1", stem), ("maxpool", nn.MaxPool2D(3, 2, 1)))
        before = width
        for stage, depth in enumerate(depths, 1):
            after = width * 2 ** (stage - 1)
            channels, kernels = ((after, after, 4 * after), (1, 3, 1)) if bottleneck else ((after, after), (3, 3))
            blocks = []
            for block in range(depth):
                stride = 2 if block == 0 and stage > 1 else 1
                identity = not (first_shortcut and stage == 1 and block == 0)
                blocks.append(ResidualBlock(before, channels, kernels, stride, layer, identity))
                before = channels[-1]
            setattr(self, f"stage{stage}", nn.Sequential(*blocks))
        self.gap = nn.AdaptiveAvgPool2D(1)
        start = uniform_fan_in(before)
        self.linear = nn.Linear(before, class_num, weight_attr=start, bias_attr=start)

    def stage_maps(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        """Return the maps of the stages, from the largest to the smallest."""
        x = self.stage0.maxpool(F.relu(self.stage0.conv1(x)))
        return maps_of((self.stage1, self.stage2, self.stage3, self.stage4), x)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.linear(paddle.flatten(self.gap(self.stage_maps(x)[-1]), 1))


def _geometry(in_channels: int, out_channels: int, size: int, stride: int) -> ConvGeometry:
    return ConvGeometry(in_channels, out_channels, (size, size), (stride, stride), (size // 2,) * 4, bias=False)


# ---------------------------------------------------------------------------------------------------------------------
# Published weights


def _rename(state: Mapping[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """Return a state dict of the authors or of PaddleClas, in train or in deploy form, as that of the train form."""
    arrays = {_our_key(key, _DEPTHS[depth]): np.asarray(value) for key, value in state.items()}
    for path in [
        key[: -len(".weight")] for key in arrays if key.endswith((".dbb_reparam.weight", ".fused_conv.weight"))
    ]:
        kernel, bias = arrays.pop(f"{path}.weight"), arrays.pop(f"{path}.bias")
        block, _, merged = path.rpartition(".")
        arrays.update(
            _branches_of_dbb(block, kernel, bias) if merged == "dbb_reparam" else _of_acb(block, kernel, bias)
        )
    for key in [key for key in arrays if key.endswith(".conv.bias")]:
        bn = key[: -len("conv.bias")] + "bn"
        if f"{bn}.weight" not in arrays:
            arrays.update(bn_that_adds(bn, arrays.pop(key)))
    return arrays


def _our_key(key: str, depths: Sequence[int]) -> str:
    """Return a key of PaddleClas' ResNet, which counts blocks through all stages and convolutions from 0, as ours."""
    found = re.match(r"blocks\.(\d+)\.(conv\d|short)\.", key)
    if not found:
        return re.sub(r"^stem\.0\.", "stage0.conv1.", re.sub(r"^fc\.", "linear.", key))
    block, part, stage = int(found[1]), found[2], 0
    while stage < len(depths) - 1 and block >= depths[stage]:
        block, stage = block - depths[stage], stage + 1
    part = "shortcut" if part == "short" else f"conv{int(part[-1]) + 1}"
    return f"stage{stage + 1}.{block}.{part}.{key[found.end() :]}"


def _branches_of_dbb(block: str, kernel: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    """Return the entries of a DBB2D that computes a convolution: all branches but the first begin as zeros."""
    outputs, inputs = kernel.shape[:2]
    none, pointwise = np.zeros_like(bias), np.zeros((outputs, inputs, 1, 1), kernel.dtype)
    return {
        f"{block}.dbb_origin.conv.weight": kernel, **bn_that_adds(f"{block}.dbb_origin.bn", bias),
        f"{block}.dbb_1x1.conv.weight": pointwise, **bn_that_adds(f"{block}.dbb_1x1.bn", none),
        f"{block}.dbb_avg.conv.weight": pointwise, **bn_that_adds(f"{block}.dbb_avg.bn.bn", none),
        **bn_that_adds(f"{block}.dbb_avg.avgbn", none),
        f"{block}.dbb_1x1_kxk.idconv1.weight": np.zeros((inputs, inputs, 1, 1), kernel.dtype),
        **bn_that_adds(f"{block}.dbb_1x1_kxk.bn1.bn", np.zeros(inputs, kernel.dtype)),
        f"{block}.dbb_1x1_kxk.conv2.weight": np.zeros_like(kernel), **bn_that_adds(f"{block}.dbb_1x1_kxk.bn2", none),
    }  # fmt: skip


def _of_acb(block: str, kernel: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
    """Return the entries of an ACB2D that computes a convolution: its row and column begin as zeros."""
    none, middle = np.zeros_like(bias), kernel.shape[2] // 2
    return {
        f"{block}.square_conv.weight": kernel, **bn_that_adds(f"{block}.square_bn", bias),
        f"{block}.ver_conv.weight": np.zeros_like(kernel[..., middle, None]), **bn_that_adds(f"{block}.ver_bn", none),
        f"{block}.hor_conv.weight": np.zeros_like(kernel[:, :, middle, None]), **bn_that_adds(f"{block}.hor_bn", none),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Builders


def _build(
    name: str,
    layer: type[ReparamLayer],
    pretrained: bool | str,
    use_ssld: bool,
    class_num: int,
    unknown: Mapping[str, Any],
    **options: Any,
) -> nn.Layer:
    check_arguments(name, pretrained, use_ssld, unknown, list(options))
    depth = int(name[len("ResNet") : -len("_DBB")])
    return load_pretrained(BranchedResNet(layer, _DEPTHS[depth], depth >= 50, class_num, **options), pretrained)


_OF_18, _OF_50 = partial(_rename, depth=18), partial(_rename, depth=50)


@register_model(published=[Published("the authors' repository, by the name of its file", 71.01)], rename=_OF_18)
def ResNet18_DBB(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    first_shortcut: bool = False,
    **kwargs: Any,
) -> nn.Layer:
    """ResNet-18 with DBB2D, `[N, 3, H, W]` to `[N, class_num]`, for images of any size.

    `first_shortcut`: the first block has a 1x1 convolution as its shortcut, as PaddleClas' ResNet-18 does unless its
    config has `use_first_short_conv: False`. `pretrained` is False or the path of a weight file. Raises `ReparamError`
    where that is True or does not fit.
    """
    return _build("ResNet18_DBB", DBB2D, pretrained, use_ssld, class_num, kwargs, first_shortcut=first_shortcut)


@register_model(published=[Published("the authors' repository")], rename=_OF_50)
def ResNet50_DBB(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """ResNet-50 with DBB2D; arguments as for `ResNet18_DBB`, without `first_shortcut`."""
    return _build("ResNet50_DBB", DBB2D, pretrained, use_ssld, class_num, kwargs)


@register_model(published=[Published("the authors' repository", 71.2)], rename=_OF_18)
def ResNet18_ACB(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """ResNet-18 with ACB2D; arguments as for `ResNet50_DBB`."""
    return _build("ResNet18_ACB", ACB2D, pretrained, use_ssld, class_num, kwargs)


@register_model(rename=_OF_50)
def ResNet50_ACB(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """ResNet-50 with ACB2D; arguments as for `ResNet50_DBB`."""
    return _build("ResNet50_ACB", ACB2D, pretrained, use_ssld, class_num, kwargs)
