"""The published modules of cheap convolutions, as GhostNet's and octave ones: their arguments as ours."""

from __future__ import annotations

from paddle import nn

from paddle_reparam.arithmetic.geometry import ConvGeometry
from paddle_reparam.layers.ghost import GhostConv2D
from paddle_reparam.layers.octconv import OctConv2D


def geometry_of(in_channels, out_channels, kernel_size, stride=1) -> ConvGeometry:
    conv = nn.Conv2D(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias_attr=False)
    conv.to(dtype="float64")
    return ConvGeometry.of(conv)


def make_ghost(in_chs, out_chs, kernel_size=1, ratio=2, dw_size=3, stride=1) -> GhostConv2D:
    return GhostConv2D(geometry_of(in_chs, out_chs, kernel_size, stride), ratio, dw_size)


class OctaveStack(nn.Layer):
    """Three octave convolutions that hand pairs on."""

    def __init__(self, channels, alpha, kernel_size, stride) -> None:
        super().__init__()
        self.first = OctConv2D(geometry_of(3, channels, kernel_size), 0.0, alpha)
        self.middle = OctConv2D(geometry_of(channels, channels, kernel_size, stride), alpha, alpha)
        self.last = OctConv2D(geometry_of(channels, channels, kernel_size), alpha, 0.0)

    def forward(self, x):
        return self.last(self.middle(self.first((x, None))))[0]


LAYERS = {"GhostConv2D": make_ghost, "OctConv2D": OctaveStack}
RENAME = {}
