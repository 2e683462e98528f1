"""RepLKNet: "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs" (CVPR 2022, arXiv 2203.06717).

Entries are named as in the published weight files: `stages.0.blocks.0.large_kernel.lkb_origin.conv.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ..arithmetic.initializers import uniform_fan_in
from ..layers.replknet import ReparamLargeKernelConv2D
from ..registry import Published, register_model
from .builders import bn_that_adds, check_arguments, load_pretrained

_BLOCKS = (2, 2, 18, 2)
_SMALL_KERNEL = 5


def _conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, relu: bool = False
) -> nn.Sequential:
    conv = nn.Conv2D(
        in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups,
        weight_attr=uniform_fan_in(in_channels // groups * kernel_size * kernel_size), bias_attr=False,
    )  # fmt: skip
    parts = [("conv", conv), ("bn", nn.BatchNorm2D(out_channels))]
    return nn.Sequential(*parts, *([("nonlinear", nn.ReLU())] if relu else []))


class _LargeKernelBlock(nn.Layer):
    """x + pw2(ReLU(large_kernel(pw1(BN(x))))), `[N, channels, H, W]`; the large kernel has `inner` channels."""

    def __init__(self, channels: int, inner: int, kernel_size: int, small_kernel: int | None, drop_path: float) -> None:
        super().__init__()
        self.prelkb_bn = nn.BatchNorm2D(channels)
        self.pw1 = _conv_bn(channels, inner, 1, relu=True)
        self.large_kernel = ReparamLargeKernelConv2D(inner, kernel_size, small_kernel)
        self.lk_nonlinear = nn.ReLU()
        self.pw2 = _conv_bn(inner, channels, 1)
        # A dropout whose mask lies along the batch: whole samples lose the block.
        self.drop_path = nn.Dropout(drop_path, axis=0)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        out = self.lk_nonlinear(self.large_kernel(self.pw1(self.prelkb_bn(x))))
        return x + self.drop_path(self.pw2(out))


class _FeedForwardBlock(nn.Layer):
    """x + pw2(GELU(pw1(BN(x)))), `[N, channels, H, W]`; four times as many channels inside."""

    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        self.preffn_bn = nn.BatchNorm2D(channels)
        self.pw1 = _conv_bn(channels, 4 * channels, 1)
        self.nonlinear = nn.GELU()
        self.pw2 = _conv_bn(4 * channels, channels, 1)
        self.drop_path = nn.Dropout(drop_path, axis=0)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x + self.drop_path(self.pw2(self.nonlinear(self.pw1(self.preffn_bn(x)))))


class _Stage(nn.Layer):
    """Large-kernel and feed-forward blocks by turns."""

    def __init__(
        self, channels: int, inner: int, kernel_size: int, small_kernel: int | None, drop_paths: Sequence[float]
    ) -> None:
        super().__init__()
        self.blocks = nn.LayerList()
        for drop_path in drop_paths:
            self.blocks.append(_LargeKernelBlock(channels, inner, kernel_size, small_kernel, drop_path))
            self.blocks.append(_FeedForwardBlock(channels, drop_path))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _RepLKNet(nn.Layer):
    """Four stages at 1/4, 1/8, 1/16 and 1/32 of the image's size."""

    def __init__(
        self,
        kernel_sizes: Sequence[int],
        channels: Sequence[int],
        small_kernel: int | None,
        inner_ratio: float,
        drop_path_rate: float,
        class_num: int,
    ) -> None:
        super().__init__()
        width = channels[0]
        self.stem = nn.LayerList(
            [
                _conv_bn(3, width, 3, stride=2, relu=True),
                _conv_bn(width, width, 3, groups=width, relu=True),
                _conv_bn(width, width, 1, relu=True),
                _conv_bn(width, width, 3, stride=2, groups=width, relu=True),
            ]
        )
        rates = [drop_path_rate * i / (sum(_BLOCKS) - 1) for i in range(sum(_BLOCKS))]
        starts = [sum(_BLOCKS[:i]) for i in range(len(_BLOCKS))]
        self.stages = nn.LayerList(
            [
                _Stage(width, int(width * inner_ratio), kernel_size, small_kernel, rates[start : start + blocks])
                for width, kernel_size, start, blocks in zip(channels, kernel_sizes, starts, _BLOCKS)
            ]
        )
        self.transitions = nn.LayerList(
            [
                nn.Sequential(
                    _conv_bn(before, after, 1, relu=True),
                    _conv_bn(after, after, 3, stride=2, groups=after, relu=True),
                )
                for before, after in zip(channels, channels[1:])
            ]
        )
        self.norm = nn.BatchNorm2D(channels[-1])
        self.avgpool = nn.AdaptiveAvgPool2D(1)
        start = uniform_fan_in(channels[-1])
        self.head = nn.Linear(channels[-1], class_num, weight_attr=start, bias_attr=start)

    def stage_maps(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        """Return the maps of the stages, from the largest to the smallest."""
        for layer in self.stem:
            x = layer(x)
        maps = [self.stages[0](x)]
        for transition, stage in zip(self.transitions, self.stages[1:]):
            maps.append(stage(transition(maps[-1])))
        return maps

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.head(paddle.flatten(self.avgpool(self.norm(self.stage_maps(x)[-1])), 1))


# ---------------------------------------------------------------------------------------------------------------------
# Published weights


def _rename(state: Mapping[str, np.ndarray], small_kernel: int | None) -> dict[str, np.ndarray]:
    """Return a published state dict, merged or not, as that of the train form.

    Of a merged large kernel the small branch takes the middle, and the large one the rest and the bias, so that both
    can be trained on. Where a BN has been folded into its convolution, the BN becomes one that adds the bias alone.
    """
    arrays = dict(state)
    merged = ".lkb_reparam.weight"
    for path in [key[: -len(merged)] for key in state if key.endswith(merged)]:
        kernel = np.array(arrays.pop(path + merged))
        if f"{path}.lkb_reparam.bias" in arrays:
            arrays[f"{path}.lkb_origin.conv.bias"] = arrays.pop(f"{path}.lkb_reparam.bias")
        if small_kernel is not None:
            edge = (kernel.shape[-1] - small_kernel) // 2
            middle = (..., slice(edge, edge + small_kernel), slice(edge, edge + small_kernel))
            arrays[f"{path}.small_conv.conv.weight"] = kernel[middle].copy()
            arrays[f"{path}.small_conv.conv.bias"] = np.zeros(len(kernel), kernel.dtype)
            kernel[middle] = 0.0
        arrays[f"{path}.lkb_origin.conv.weight"] = kernel
    for key in [key for key in arrays if key.endswith(".conv.bias")]:
        bn = key[: -len("conv.bias")] + "bn"
        if f"{bn}.weight" not in arrays:
            arrays.update(bn_that_adds(bn, arrays.pop(key)))
    return arrays


# ---------------------------------------------------------------------------------------------------------------------
# The networks


def _build(
    name: str,
    pretrained: bool | str,
    use_ssld: bool,
    unknown: Mapping[str, Any],
    **options: Any,
) -> nn.Layer:
    check_arguments(name, pretrained, use_ssld, unknown, ["drop_path_rate"])
    return load_pretrained(_RepLKNet(**options), pretrained)


_REPOSITORY = "the authors' repository"


@register_model(
    published=[
        Published(f"{_REPOSITORY}, ImageNet-1K", 83.5),
        Published(f"{_REPOSITORY}, ImageNet-1K", 84.8, input_size=384),
        Published(f"{_REPOSITORY}, ImageNet-22K first", 85.2),
        Published(f"{_REPOSITORY}, ImageNet-22K first", 86.0, input_size=384),
    ],
    rename=partial(_rename, small_kernel=_SMALL_KERNEL),
)
def RepLKNet_31B(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    drop_path_rate: float = 0.3,
    **kwargs: Any,
) -> nn.Layer:
    """RepLKNet-31B, `[N, 3, H, W]` to `[N, class_num]`, for images of any size.

    `drop_path_rate` is the share of samples that the last block is left out for in training; it grows from 0 in the
    first block. `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does
    not fit.
    """
    return _build(
        "RepLKNet_31B", pretrained, use_ssld, kwargs, kernel_sizes=(31, 29, 27, 13), channels=(128, 256, 512, 1024),
        small_kernel=_SMALL_KERNEL, inner_ratio=1.0, drop_path_rate=drop_path_rate, class_num=class_num,
    )  # fmt: skip


@register_model(
    published=[Published(f"{_REPOSITORY}, ImageNet-22K first", 86.6, input_size=384)],
    rename=partial(_rename, small_kernel=_SMALL_KERNEL),
)
def RepLKNet_31L(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    drop_path_rate: float = 0.3,
    **kwargs: Any,
) -> nn.Layer:
    """RepLKNet-31L; arguments as for `RepLKNet_31B`."""
    return _build(
        "RepLKNet_31L", pretrained, use_ssld, kwargs, kernel_sizes=(31, 29, 27, 13), channels=(192, 384, 768, 1536),
        small_kernel=_SMALL_KERNEL, inner_ratio=1.0, drop_path_rate=drop_path_rate, class_num=class_num,
    )  # fmt: skip


@register_model(
    published=[Published(f"{_REPOSITORY}, MegData-73M first", 87.8, input_size=320)],
    rename=partial(_rename, small_kernel=None),
)
def RepLKNet_XL(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    drop_path_rate: float = 0.3,
    **kwargs: Any,
) -> nn.Layer:
    """RepLKNet-XL, without small kernels and 1.5 times as wide in front of the large ones; arguments as for
    `RepLKNet_31B`. It was trained on images normalised with means and standard deviations of 0.5."""
    return _build(
        "RepLKNet_XL", pretrained, use_ssld, kwargs, kernel_sizes=(27, 27, 27, 13), channels=(256, 512, 1024, 2048),
        small_kernel=None, inner_ratio=1.5, drop_path_rate=drop_path_rate, class_num=class_num,
    )  # fmt: skip
