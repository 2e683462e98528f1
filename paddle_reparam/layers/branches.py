"""Branches that lie on each other's middle taps, each with a BN: what RepVGG and MobileOne share, and their kin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import BATCH_NORMS, ConvGeometry, fold_into, read_bn_affine
from ..arithmetic.initializers import uniform_fan_in
from ..arithmetic.tensors import assign, to_float64, type_name
from ..errors import UnsupportedConv
from .base import ReparamLayer

#: How the branches start that a trained convolution has nothing for: as published, or computing zeros.
INITS = ("random", "zero")


def conv_bn_of(geometry: ConvGeometry) -> nn.Sequential:
    """Return a convolution of this geometry without bias, `conv`, and `bn` behind it."""
    inputs = math.prod(geometry.weight_shape[1:])
    conv = geometry.new_conv(weight_attr=uniform_fan_in(inputs), bias_attr=False)
    return nn.Sequential(("conv", conv), ("bn", bn_of(geometry)))


def bn_of(geometry: ConvGeometry) -> nn.BatchNorm2D:
    """Return a BN of what a convolution of this geometry puts out."""
    bn = nn.BatchNorm2D(geometry.out_channels, data_format=geometry.data_format)
    if geometry.dtype != type_name(bn.weight):
        bn.to(dtype=geometry.dtype)
    return bn


def one_by_one_of(geometry: ConvGeometry) -> ConvGeometry:
    """Return the 1x1 convolution beside a kernel, of what `MiddleTap` gives it."""
    return replace(
        geometry, kernel_size=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), padding_mode="zeros", bias=False
    )


def fold_conv_bn(branch: nn.Sequential) -> tuple[np.ndarray, np.ndarray]:
    """Return (kernel, bias) in float64 of `conv` and, where there is one, `bn` behind it."""
    kernel = to_float64(branch.conv.weight)
    if "bn" not in branch._sub_layers:
        return kernel, np.zeros(len(kernel))
    return fold_into(branch.conv, *read_bn_affine(branch.bn))


def start_as_identity(bn: nn.BatchNorm2D) -> None:
    """Give a fresh BN the weight by which, in eval mode, it adds its bias and does nothing else."""
    # What the BN divides by is sqrt(1 + epsilon), with epsilon as float32.
    assign(bn.weight, np.full(bn.weight.shape, math.sqrt(1.0 + float(np.float32(bn._epsilon)))))


class MiddleTap:
    """What the middle tap of a convolution's kernel meets, as maps that a 1x1 convolution of its stride reads.

    That is the input itself where the convolution pads by half its kernel. Where it pads more, the middle tap meets
    padding too; where it pads less, it leaves the edges out. Raises `UnsupportedConv` where there is no such tap, or
    its place depends on the size of the images; `owner` is the layer that says so.
    """

    def __init__(self, geometry: ConvGeometry, owner: str) -> None:
        if any(size % 2 == 0 for size in geometry.kernel_size):
            raise UnsupportedConv(f"{owner} has branches on the middle tap, and an even kernel has none: {geometry}")
        if geometry.padding == "SAME":
            raise UnsupportedConv(
                f"{owner} has branches on the middle tap, which padding='SAME' with a stride puts elsewhere on images "
                "of odd and even sizes; give the padding in pixels"
            )
        reach = [d * (k // 2) for k, d in zip(geometry.kernel_size, geometry.dilation)]
        margins = np.array(geometry.padding).reshape(2, 2) - np.array(reach)[:, None]
        #: Pixels to put around the maps, and to leave out: (top, bottom, left, right).
        self.more = [int(m) for m in np.maximum(margins, 0).reshape(-1)]
        self.less = [int(m) for m in np.maximum(-margins, 0).reshape(-1)]
        self.mode = {"zeros": "constant"}.get(geometry.padding_mode, geometry.padding_mode)
        self.data_format = geometry.data_format

    def __call__(self, x: paddle.Tensor) -> paddle.Tensor:
        top, bottom, left, right = self.more
        if any(self.more):
            x = F.pad(x, [left, right, top, bottom], mode=self.mode, data_format=self.data_format)
        top, bottom, left, right = self.less
        if any(self.less):
            rows, columns = slice(top, -bottom or None), slice(left, -right or None)
            x = x[:, rows, columns] if self.data_format == "NHWC" else x[:, :, rows, columns]
        return x


class MiddleTapLayer(ReparamLayer):
    """A sum of branches: kernels of the convolution's size, and 1x1 kernels and a BN alone on their middle tap.

    A layer gives `whole` and `on_the_middle`; the first of `whole` takes a trained convolution's weights.
    """

    keeps_function_with = {"init": "zero"}  # noqa: RUF012

    def __init__(self, geometry: ConvGeometry) -> None:
        super().__init__()
        self.middle = MiddleTap(geometry, type(self).__name__)

    def whole(self) -> list[nn.Sequential]:
        """Return the branches of the convolution's kernel size."""
        raise NotImplementedError

    def on_the_middle(self) -> list[nn.Layer]:
        """Return the branches of a 1x1 kernel, and the BN that takes the input as it is."""
        raise NotImplementedError

    def silence(self) -> None:
        """Let all branches but the first start by computing zeros, by the weights of their BNs."""
        for branch in [*self.whole()[1:], *self.on_the_middle()]:
            bn = branch if isinstance(branch, BATCH_NORMS) else branch.bn
            assign(bn.weight, np.zeros(bn.weight.shape))

    def take_weights(self, conv: nn.Conv2D) -> None:
        """Take the convolution's weight and bias into the first branch, whose BN starts as the identity."""
        super().take_weights(conv)
        start_as_identity(self.whole()[0].bn)

    def extra_repr(self) -> str:
        return f"{ConvGeometry.of(self.whole()[0].conv)}"

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        maps = [branch(x) for branch in self.whole()]
        on_the_middle = self.on_the_middle()
        if on_the_middle:
            middle = self.middle(x)
            maps += [branch(middle) for branch in on_the_middle]
        return sum(maps[1:], maps[0])

    def fuse(self) -> nn.Layer:
        """Return the plain convolution: all kernels on each other's middle taps, computed in float64."""
        return fuse_branches([*self.whole(), *self.on_the_middle()])


def fuse_branches(branches: Sequence[nn.Layer]) -> nn.Conv2D:
    """Return the convolution that branches on one middle tap are together, with the geometry of the first one.

    A branch has `conv` and, where there is one, `bn` behind it, or is itself the BN of a layer that keeps its size.
    """
    geometry = ConvGeometry.of(branches[0].conv)
    folded = []
    for branch in branches:
        if isinstance(branch, BATCH_NORMS):
            # Each channel as it is: an average over one pixel.
            identity = kernels.average_pool_kernel(geometry.out_channels, (1, 1), geometry.groups)
            folded.append(kernels.fold_affine(identity, None, *read_bn_affine(branch)))
        else:
            folded.append(fold_conv_bn(branch))
    return geometry.make_conv(kernels.sum_kernels([k for k, _ in folded]), sum(b for _, b in folded))


def keeps_size(geometry: ConvGeometry) -> bool:
    """Tell whether a BN alone can stand beside a convolution: as many channels out as in, at stride 1."""
    return geometry.in_channels == geometry.out_channels and geometry.stride == (1, 1)
