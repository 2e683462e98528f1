"""The published modules of RepMLP (first paper): their arguments as ours."""

from paddle_reparam.layers.repmlp import RepMLP


def make_repmlp(
    in_channels, out_channels, H, W, h, w, reparam_conv_k=None, fc1_fc2_reduction=1, fc3_groups=1
) -> RepMLP:
    layer = RepMLP(in_channels, out_channels, H, W, h, w, reparam_conv_k or (), fc1_fc2_reduction, fc3_groups)
    layer.to(dtype="float64")
    return layer


LAYERS = {"RepMLP": make_repmlp}
RENAME = {}
