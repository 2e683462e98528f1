"""The published blocks that are put behind layers: their arguments as ours."""

from paddle import nn

from paddle_reparam.layers.global_context import GlobalContext2D
from paddle_reparam.layers.non_local import NonLocal2D


def make(block: type, channels: int, rd_ratio: float) -> nn.Layer:
    layer = block(channels, int(channels * rd_ratio))
    layer.to(dtype="float64")
    return layer


LAYERS = {
    block.__name__: lambda block=block, **config: make(block, **config) for block in (GlobalContext2D, NonLocal2D)
}
RENAME = {}
