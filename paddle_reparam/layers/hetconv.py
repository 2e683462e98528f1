"""HetConv2D: "HetConv: Heterogeneous Kernel-Based Convolutions for Deep CNNs" (CVPR 2019, arXiv 1903.04120)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import ConvGeometry
from ..arithmetic.initializers import init_uniform_fan_in
from ..arithmetic.tensors import to_float64
from ..errors import UnsupportedConv
from ..registry import register_layer
from .base import TWO_OR_MORE, ReparamLayer
from .branches import MiddleTap, one_by_one_of


@register_layer
class HetConv2D(ReparamLayer):
    """A convolution whose filters have kxk kernels for one of P parts of the input channels and 1x1 for the others.

        out = gwc(x) + pwc(x),  `[N, C, H, W]` in

    gwc is the kxk convolution in P groups, pwc a 1x1 one of all channels on its middle tap, without a bias. In the
    paper the P-th filters have the channels c with (c - filter) mod P = 0, which is the same up to the order of the
    channels: here they are in P blocks, as groups are. On the channels of its own block a filter has both kernels.

    parts: the paper's P. A convolution in groups becomes P parts of each of them.

    Weights start as those of the two convolutions by themselves, uniformly within 1 / sqrt(fan_in). Raises
    `UnsupportedConv` for a kernel of 1x1, an even one, padding="SAME" with a stride, and channels that P does not
    divide.
    """

    options = {"parts": TWO_OR_MORE}  # noqa: RUF012
    train_form_keys = ("gwc.weight", "pwc.weight")

    def __init__(self, geometry: ConvGeometry, parts: int = 4) -> None:
        super().__init__()
        self.check_options(parts=parts)
        if geometry.kernel_size == (1, 1):
            raise UnsupportedConv(f"HetConv2D has 1x1 kernels beside larger ones, this one is 1x1 itself: {geometry}")
        groups = parts * geometry.groups
        if geometry.in_channels % groups or geometry.out_channels % groups:
            raise UnsupportedConv(
                f"HetConv2D has its channels in parts={parts} for each group, in and out, and those of {geometry} are "
                "no such numbers; choose other parts, or leave this convolution as it is"
            )
        self.groups = geometry.groups
        self.middle = MiddleTap(geometry, type(self).__name__)
        self.gwc = replace(geometry, groups=groups).new_conv(bias_attr=None if geometry.bias else False)
        self.pwc = one_by_one_of(geometry).new_conv(bias_attr=False)
        for conv in (self.gwc, self.pwc):
            init_uniform_fan_in(conv)

    @classmethod
    def build(cls, geometry: ConvGeometry, **options: Any) -> HetConv2D:
        """Return a layer in the place of a convolution with an odd kernel; `options`: `parts`.

        Nothing of the convolution's weights can be kept.
        """
        return cls(geometry, **options)

    def extra_repr(self) -> str:
        parts = self.gwc._groups // self.groups
        return f"{replace(ConvGeometry.of(self.gwc), groups=self.groups)}, parts={parts}"

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.gwc(x) + self.pwc(self.middle(x))

    def fuse(self) -> nn.Conv2D:
        """Return the plain convolution, with zeros around the middle taps of other parts, computed in float64."""
        parts = self.gwc._groups // self.groups
        grouped = np.split(to_float64(self.gwc.weight), self.groups)
        spatial = np.concatenate([kernels.ungroup(kernel, parts) for kernel in grouped])
        kernel = kernels.sum_kernels([spatial, to_float64(self.pwc.weight)])
        return replace(ConvGeometry.of(self.gwc), groups=self.groups).make_conv(kernel, to_float64(self.gwc.bias))
