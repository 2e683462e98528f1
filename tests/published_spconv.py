"""The published SPConv module: its arguments as ours."""

from paddle_reparam.layers.spconv import SPConv2D


def make_spconv(inplanes, outplanes, stride=1, ratio=0.5) -> SPConv2D:
    layer = SPConv2D(inplanes, outplanes, stride, ratio)
    layer.to(dtype="float64")
    return layer


LAYERS = {"SPConv2D": make_spconv}
RENAME = {}
