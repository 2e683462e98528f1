"""The published modules of RepMLPNet (second paper): their arguments as ours."""

from paddle import nn

from paddle_reparam.layers.repmlpnet import RepMLPBlock, RepMLPNetUnit


def in_float64(layer: nn.Layer) -> nn.Layer:
    layer.to(dtype="float64")
    return layer


LAYERS = {
    "RepMLPBlock": lambda **config: in_float64(RepMLPBlock(**config)),
    "RepMLPNetUnit": lambda **config: in_float64(RepMLPNetUnit(**config)),
}
RENAME = {}
