"""The published modules of CondConv and DY-Conv: their arguments as ours."""

from paddle_reparam.layers.condconv import CondConv2D
from paddle_reparam.layers.dyconv import DYConv2D


def make_condconv(in_channels, out_channels, kernel_size, num_experts, bias=False, **config) -> CondConv2D:
    layer = CondConv2D(
        in_channels, out_channels, kernel_size, bias_attr=None if bias else False, experts=num_experts, **config
    )
    layer.to(dtype="float64")
    return layer


def make_dyconv(in_planes, out_planes, kernel_size, K, bias=True, **config) -> DYConv2D:
    layer = DYConv2D(in_planes, out_planes, kernel_size, bias_attr=None if bias else False, experts=K, **config)
    layer.to(dtype="float64")
    # The published module keeps its temperature outside its state.
    layer.attention._non_persistable_buffer_names_set.add("temperature")
    return layer


LAYERS = {"CondConv2D": make_condconv, "DYConv2D": make_dyconv}
RENAME = {}
