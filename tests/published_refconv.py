"""The published RefConv module: its arguments as ours."""

from paddle_reparam.arithmetic.geometry import ConvGeometry, as_pair
from paddle_reparam.layers.refconv import RefConv2D


def make_refconv(in_channels, out_channels, kernel_size, stride=1, padding=None, groups=1, map_k=3) -> RefConv2D:
    vertical, horizontal = [k // 2 for k in as_pair(kernel_size)] if padding is None else as_pair(padding)
    geometry = ConvGeometry(
        in_channels, out_channels, as_pair(kernel_size), as_pair(stride), (vertical, vertical, horizontal, horizontal),
        groups=groups, bias=False, dtype="float64",
    )  # fmt: skip
    return RefConv2D.build(geometry, map_k=map_k)


LAYERS = {"RefConv2D": make_refconv}
RENAME = {}
