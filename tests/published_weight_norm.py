"""A convolution under torch's weight norm: its arguments as ours, and its names without the layer's own."""

from paddle_reparam.arithmetic.geometry import ConvGeometry, as_pair
from paddle_reparam.layers.weight_norm import WeightNormConv2D


def make_weight_norm(in_channels, out_channels, kernel_size, stride=1, padding=0, groups=1, bias=True):
    vertical, horizontal = as_pair(padding)
    geometry = ConvGeometry(
        in_channels, out_channels, as_pair(kernel_size), as_pair(stride), (vertical, vertical, horizontal, horizontal),
        groups=groups, bias=bias, dtype="float64",
    )  # fmt: skip
    return WeightNormConv2D.build(geometry)


LAYERS = {"WeightNormConv2D": make_weight_norm}
RENAME = {"WeightNormConv2D": lambda key: key.removeprefix("conv.")}
