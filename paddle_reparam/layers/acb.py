"""ACB2D: "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks" (ICCV 2019,
arXiv 1908.03930)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import ConvGeometry, fold_into, read_bn_affine
from ..arithmetic.initializers import uniform_fan_in
from ..arithmetic.tensors import assign
from ..errors import UnsupportedConv
from ..registry import register_layer
from .base import ReparamLayer, one_of
from .branches import MiddleTap, bn_of, start_as_identity

INITS = ("random", "reduced", "zero")


@register_layer
class ACB2D(ReparamLayer):
    """A convolution with a column and a row beside it that lie on the middle of its kernel, each with a BN, added.

        out = square_bn(square_conv(x)) + ver_bn(ver_conv(x)) + hor_bn(hor_conv(x)),  `[N, C, H, W]` in

    For a kernel of (h, w), ver_conv has (h, 1) and hor_conv (1, w), with the stride, the dilation and the groups of the
    convolution, whose kernel is odd and larger than 1 both ways. Where that pads by less than half its kernel, the row
    and the column leave out the edges of the input that its middle does not meet; where it pads by more, they pad more.
    The published layer fails with a dilation.

    init: the weights of the BNs start as 1 ("random", published), as 1/3 ("reduced", also published: as large an output
    as of one branch), or as 0 in those of the row and the column ("zero"), so that a layer made from a convolution
    computes what that did.

    Raises `UnsupportedConv` for another kernel, and for padding="SAME" with a stride.
    """

    options = {"init": one_of(*INITS)}  # noqa: RUF012
    holders = {"weight": "square_conv.weight", "bias": "square_bn.bias"}  # noqa: RUF012
    keeps_function_with = {"init": "zero"}  # noqa: RUF012
    train_form_keys = ("square_conv.weight", "ver_conv.weight", "hor_conv.weight")

    def __init__(self, geometry: ConvGeometry, init: str = "random") -> None:
        super().__init__()
        self.check_options(init=init)
        if 1 in geometry.kernel_size:
            raise UnsupportedConv(f"ACB2D puts a row and a column into a kernel that has both, this one is {geometry}")
        # Paddle pads all four sides alike in other modes than zeros, so this layer pads for the row and the column.
        self.own_padding = None if geometry.padding_mode == "zeros" else geometry.padding
        self.padding_mode, self.data_format = geometry.padding_mode, geometry.data_format
        branch = replace(geometry, bias=False)
        if self.own_padding is not None:
            branch = replace(branch, padding=(0, 0, 0, 0), padding_mode="zeros")
        MiddleTap(branch, "ACB2D")  # refuses what has no middle
        (height, width), (top, bottom, left, right) = geometry.kernel_size, branch.padding
        column = replace(branch, kernel_size=(height, 1), padding=(top, bottom, 0, 0))
        row = replace(branch, kernel_size=(1, width), padding=(0, 0, left, right))
        # A column pads above and below as the convolution does, and meets what the middle of a row meets; and so on.
        self.of_column, self.of_row = MiddleTap(row, "ACB2D"), MiddleTap(column, "ACB2D")
        self.init = init
        for name, part in (("square", replace(geometry, bias=False)), ("ver", column), ("hor", row)):
            start = uniform_fan_in(math.prod(part.weight_shape[1:]))
            setattr(self, f"{name}_conv", part.new_conv(weight_attr=start, bias_attr=False))
            bn = bn_of(part)
            if init == "reduced" or (init == "zero" and name != "square"):
                assign(bn.weight, np.full(part.out_channels, 1 / 3 if init == "reduced" else 0.0))
            setattr(self, f"{name}_bn", bn)

    @classmethod
    def build(cls, geometry: ConvGeometry, init: str = "random") -> ACB2D:
        """Return a layer in the place of a convolution with an odd kernel; `options`: `init`."""
        return cls(geometry, init)

    def take_weights(self, conv: nn.Conv2D) -> None:
        """Take the convolution's weight and bias into the square branch, whose BN starts as the identity or as 1/3."""
        super().take_weights(conv)
        if self.init != "reduced":
            start_as_identity(self.square_bn)

    def extra_repr(self) -> str:
        return f"{ConvGeometry.of(self.square_conv)}"

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        out = self.square_bn(self.square_conv(x))
        if self.own_padding is not None:
            top, bottom, left, right = self.own_padding
            x = F.pad(x, [left, right, top, bottom], mode=self.padding_mode, data_format=self.data_format)
        out = out + self.ver_bn(self.ver_conv(self.of_column(x)))
        return out + self.hor_bn(self.hor_conv(self.of_row(x)))

    def fuse(self) -> nn.Conv2D:
        """Return the plain convolution: row and column in the middle of the kernel, computed in float64."""
        parts = [(self.square_conv, self.square_bn), (self.ver_conv, self.ver_bn), (self.hor_conv, self.hor_bn)]
        folded = [fold_into(conv, *read_bn_affine(bn)) for conv, bn in parts]
        kernel, bias = kernels.sum_kernels([k for k, _ in folded]), sum(b for _, b in folded)
        return ConvGeometry.of(self.square_conv).make_conv(kernel, bias)
