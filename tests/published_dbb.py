"""The published modules of ACNet and DBB: their arguments as ours, and their names, which are ours as well."""

from __future__ import annotations

from paddle_reparam.arithmetic.geometry import ConvGeometry
from paddle_reparam.layers.acb import ACB2D
from paddle_reparam.layers.dbb import DBB2D


def geometry_of(in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1) -> ConvGeometry:
    pairs = {"kernel_size": (kernel_size,) * 2, "stride": (stride,) * 2, "dilation": (dilation,) * 2}
    return ConvGeometry(
        in_channels, out_channels, padding=(padding,) * 4, groups=groups, bias=False, dtype="float64", **pairs
    )


def make_acb(reduce_gamma=False, gamma_init=None, **geometry) -> ACB2D:
    assert gamma_init is None
    return ACB2D(geometry_of(**geometry), "reduced" if reduce_gamma else "random")


def make_dbb(internal_channels_1x1_3x3=None, single_init=False, **geometry) -> DBB2D:
    return DBB2D(geometry_of(**geometry), "zero" if single_init else "random", internal_channels_1x1_3x3)


LAYERS = {"ACBlock": make_acb, "DiverseBranchBlock": make_dbb}
RENAME = {}
