"""ReparamLargeKernelConv2D: "Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs" (CVPR 2022,
arXiv 2203.06717)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import ConvGeometry, as_pair
from ..arithmetic.initializers import uniform_fan_in
from ..arithmetic.tensors import assign
from ..errors import ReparamError, UnsupportedConv
from ..registry import register_layer
from .base import FLAG, WHOLE, ReparamLayer, one_of, or_none
from .branches import INITS, fold_conv_bn, start_as_identity
from .toeplitz import DepthwiseConv2D, forward_all


@register_layer
class ReparamLargeKernelConv2D(ReparamLayer):
    """A depthwise convolution with a large kernel and a parallel one with a small kernel, each with a BN, added.

        out = BN1(lkb_origin.conv(x)) + BN2(small_conv.conv(x)),  `[N, channels, H, W]` in

    Kernels are square and odd, `kernel_size` and `small_kernel` wide; both convolutions pad so that stride 1 keeps the
    size. There is no `small_conv` where `small_kernel` is None or not smaller than `kernel_size`.

    init: the small branch starts as "random" (the published one), or as "zero", by its BN's weight, so that a layer
    made from a convolution computes what that did.
    bn: without it there are the convolutions alone (an ablation).

    Raises `UnsupportedConv` for an even kernel, `ReparamError` for another init, or "zero" without BNs.
    """

    options = {"small_kernel": or_none(WHOLE), "init": one_of(*INITS), "bn": FLAG}  # noqa: RUF012
    holders = {"weight": "lkb_origin.conv.weight", "bias": "lkb_origin.bn.bias"}  # noqa: RUF012
    keeps_function_with = {"init": "zero"}  # noqa: RUF012
    train_form_keys = ("lkb_origin.conv.weight", "lkb_origin.bn.weight")

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None = 5,
        stride: int | tuple[int, int] = 1,
        dilation: int = 1,
        init: str = "random",
        bn: bool = True,
    ) -> None:
        super().__init__()
        self.check_options(init=init, bn=bn)
        if init == "zero" and not bn:
            raise ReparamError("ReparamLargeKernelConv2D starts as zero by its BNs; choose init='random' with bn=False")
        if small_kernel is not None and small_kernel >= kernel_size:
            small_kernel = None
        if any(k is not None and (k < 1 or k % 2 == 0) for k in (kernel_size, small_kernel)):
            raise UnsupportedConv(
                f"ReparamLargeKernelConv2D has odd kernels, whose middles lie on each other; kernel_size={kernel_size} "
                f"with small_kernel={small_kernel} is not that"
            )
        self.lkb_origin = conv_bn(channels, kernel_size, stride, dilation, bn)
        if small_kernel is not None:
            self.small_conv = conv_bn(channels, small_kernel, stride, dilation, bn)
            if init == "zero":
                assign(self.small_conv.bn.weight, np.zeros(channels))

    @classmethod
    def build(cls, geometry: ConvGeometry, **options: Any) -> ReparamLargeKernelConv2D:
        """Return a layer in the place of a depthwise convolution with an odd square kernel and "same" zero padding.

        `options`: `small_kernel`, which is 5 where that is smaller than the kernel and two less than the kernel else;
        `init`.
        """
        size, dilation = geometry.kernel_size[0], geometry.dilation[0]
        if not (geometry.is_depthwise and geometry.in_channels == geometry.out_channels):
            raise UnsupportedConv(
                f"ReparamLargeKernelConv2D stands in for depthwise convolutions only, this one is {geometry}"
            )
        if geometry.kernel_size != (size, size) or geometry.dilation != (dilation, dilation):
            raise UnsupportedConv(
                f"ReparamLargeKernelConv2D has one kernel size and one dilation for height and width, this one is "
                f"{geometry}"
            )
        if size % 2 == 0 or size == 1:
            raise UnsupportedConv(
                f"ReparamLargeKernelConv2D has an odd kernel with a smaller odd one in its middle; there is none in "
                f"{size}x{size}"
            )
        if geometry.padding != (size // 2 * dilation,) * 4 or geometry.padding_mode != "zeros":
            raise UnsupportedConv(
                f"ReparamLargeKernelConv2D pads by half its kernel ({size // 2 * dilation}) with zeros, this one has "
                f"padding {geometry.padding} in mode {geometry.padding_mode!r}"
            )
        if geometry.data_format != "NCHW":
            raise UnsupportedConv(f"ReparamLargeKernelConv2D takes NCHW, this one takes {geometry.data_format}")
        options.setdefault("small_kernel", min(5, size - 2))
        if options["small_kernel"] is not None and options["small_kernel"] >= size:
            raise UnsupportedConv(
                f"its kernel {size}x{size} is not larger than small_kernel={options['small_kernel']}; choose a smaller "
                "small_kernel"
            )
        layer = cls(geometry.out_channels, size, stride=geometry.stride, dilation=dilation, **options)
        layer.to(dtype=geometry.dtype)
        return layer

    def take_weights(self, conv: nn.Conv2D) -> None:
        """Take the convolution's weight and bias into the large branch, whose BN starts as the identity."""
        super().take_weights(conv)
        if "bn" in self.lkb_origin._sub_layers:
            start_as_identity(self.lkb_origin.bn)

    def extra_repr(self) -> str:
        return f"{ConvGeometry.of(self.lkb_origin.conv)}"

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        out = self.lkb_origin(x)
        return out + self.small_conv(x) if "small_conv" in self._sub_layers else out

    def fuse(self) -> nn.Conv2D:
        """Return the plain depthwise convolution: the small kernel in the middle of the large one, computed in
        float64."""
        branches = [self.lkb_origin] + ([self.small_conv] if "small_conv" in self._sub_layers else [])
        folded = [fold_conv_bn(branch) for branch in branches]
        kernel, bias = kernels.sum_kernels([k for k, _ in folded]), sum(b for _, b in folded)
        return ConvGeometry.of(self.lkb_origin.conv).make_conv(kernel, bias)


def conv_bn(
    channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int = 1,
    bn: bool = True,
) -> nn.Sequential:
    """Return a depthwise convolution without bias, `conv`, and `bn` behind it; its stride alone changes the size."""
    height, width = as_pair(kernel_size)
    conv = DepthwiseConv2D(
        channels, channels, [height, width], list(as_pair(stride)), [height // 2 * dilation, width // 2 * dilation],
        dilation, groups=channels, weight_attr=uniform_fan_in(height * width), bias_attr=False,
    )  # fmt: skip
    return nn.Sequential(("conv", conv), *([("bn", nn.BatchNorm2D(channels))] if bn else []))


def forward_together(branches: Sequence[nn.Sequential], x: paddle.Tensor) -> list[paddle.Tensor]:
    """Return what each of some `conv_bn` does with x, with what they need of x made once where it can be."""
    convolved = None if _is_hooked(branches) else forward_all([branch.conv for branch in branches], x)
    if convolved is None:
        return [branch(x) for branch in branches]
    return [_forward_bn(branch, y) for branch, y in zip(branches, convolved)]


def _is_hooked(branches: Sequence[nn.Sequential]) -> bool:
    layers = [layer for branch in branches for layer in (branch, branch.conv)]
    return any(layer._forward_pre_hooks or layer._forward_post_hooks for layer in layers)


def _forward_bn(branch: nn.Sequential, y: paddle.Tensor) -> paddle.Tensor:
    return branch.bn(y) if "bn" in branch._sub_layers else y
