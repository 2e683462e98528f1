"""RepVGG2D: "RepVGG: Making VGG-style ConvNets Great Again" (CVPR 2021, arXiv 2101.03697)."""

from __future__ import annotations

from dataclasses import replace

from paddle import nn

from ..arithmetic.geometry import ConvGeometry
from ..errors import UnsupportedConv
from ..registry import register_layer
from .base import one_of
from .branches import INITS, MiddleTapLayer, bn_of, conv_bn_of, keeps_size, one_by_one_of


@register_layer
class RepVGG2D(MiddleTapLayer):
    """A convolution with a 1x1 one and, where it keeps the size of its input, the input itself beside it.

        out = BN1(rbr_dense.conv(x)) + BN2(rbr_1x1.conv(x)) + rbr_identity(x),  `[N, C, H, W]`

    rbr_identity is a BN; it is there where there are as many channels out as in, at stride 1. The paper's kernel is
    3x3 and padded by 1. Here it is any odd one with a middle tap, in groups, with any stride, dilation and padding, and
    the other branches see what the middle tap sees: the published layer leaves the dilation out of them.

    init: the 1x1 branch and the identity start as "random" (the published start), or as "zero", by the weights of their
    BNs, so that a layer made from a convolution computes what that did.

    Raises `UnsupportedConv` for a kernel of 1x1, an even one, and padding="SAME" with a stride.
    """

    options = {"init": one_of(*INITS)}  # noqa: RUF012
    holders = {"weight": "rbr_dense.conv.weight", "bias": "rbr_dense.bn.bias"}  # noqa: RUF012
    train_form_keys = ("rbr_dense.conv.weight", "rbr_dense.bn.weight", "rbr_1x1.conv.weight")

    def __init__(self, geometry: ConvGeometry, init: str = "random") -> None:
        super().__init__(geometry)
        self.check_options(init=init)
        if geometry.kernel_size == (1, 1):
            raise UnsupportedConv(f"RepVGG2D puts a 1x1 kernel beside a larger one, this one is 1x1 itself: {geometry}")
        self.rbr_dense = conv_bn_of(replace(geometry, bias=False))
        self.rbr_1x1 = conv_bn_of(one_by_one_of(geometry))
        if keeps_size(geometry):
            self.rbr_identity = bn_of(geometry)
        if init == "zero":
            self.silence()

    @classmethod
    def build(cls, geometry: ConvGeometry, init: str = "random") -> RepVGG2D:
        """Return a layer in the place of a convolution with an odd kernel; `options`: `init`."""
        return cls(geometry, init)

    def whole(self) -> list[nn.Sequential]:
        return [self.rbr_dense]

    def on_the_middle(self) -> list[nn.Layer]:
        return [self.rbr_1x1, *([self.rbr_identity] if "rbr_identity" in self._sub_layers else [])]
