"""MobileOne2D: "MobileOne: An Improved One Millisecond Mobile Backbone" (CVPR 2023, arXiv 2206.04040)."""

from __future__ import annotations

from dataclasses import replace

from paddle import nn

from ..arithmetic.geometry import ConvGeometry
from ..registry import register_layer
from .base import WHOLE, one_of
from .branches import INITS, MiddleTapLayer, bn_of, conv_bn_of, keeps_size, one_by_one_of


@register_layer
class MobileOne2D(MiddleTapLayer):
    """A convolution several times over, a 1x1 one and, where it keeps the size of its input, the input itself.

        out = sum_i BN_i(conv_kxk.i.conv(x)) + BN(conv_scale.conv(x)) + identity(x),  `[N, C, H, W]`

    conv_scale is the 1x1 convolution, for kernels larger than that; identity is a BN, where there are as many channels
    out as in, at stride 1. The kernel is any odd one, in groups, with any stride, dilation and padding; conv_scale and
    identity see what its middle tap sees.

    num_conv_branches: how many copies of the convolution there are (the paper's S0 has 4, the larger networks 1).
    init: all but the first copy start as "random" (the published start), or as "zero", by the weights of their BNs, so
    that a layer made from a convolution computes what that did.

    Raises `UnsupportedConv` for an even kernel, and for padding="SAME" with a stride.
    """

    options = {"num_conv_branches": WHOLE, "init": one_of(*INITS)}  # noqa: RUF012
    holders = {"weight": "conv_kxk.0.conv.weight", "bias": "conv_kxk.0.bn.bias"}  # noqa: RUF012
    train_form_keys = ("conv_kxk.0.conv.weight", "conv_kxk.0.bn.weight")

    def __init__(self, geometry: ConvGeometry, num_conv_branches: int = 4, init: str = "random") -> None:
        super().__init__(geometry)
        self.check_options(num_conv_branches=num_conv_branches, init=init)
        copy = replace(geometry, bias=False)
        self.conv_kxk = nn.LayerList([conv_bn_of(copy) for _ in range(num_conv_branches)])
        if geometry.kernel_size != (1, 1):
            self.conv_scale = conv_bn_of(one_by_one_of(geometry))
        if keeps_size(geometry):
            self.identity = bn_of(geometry)
        if init == "zero":
            self.silence()

    @classmethod
    def build(cls, geometry: ConvGeometry, num_conv_branches: int = 4, init: str = "random") -> MobileOne2D:
        """Return a layer in the place of a convolution with an odd kernel; `options`: `num_conv_branches`, `init`."""
        return cls(geometry, num_conv_branches, init)

    def whole(self) -> list[nn.Sequential]:
        return list(self.conv_kxk)

    def on_the_middle(self) -> list[nn.Layer]:
        return [getattr(self, name) for name in ("conv_scale", "identity") if name in self._sub_layers]
