"""The published modules of DCD: their arguments as ours."""

from paddle_reparam.layers.dcd import DCDConv2D, DCDLinear


def make_conv(variant, **config) -> DCDConv2D:
    if variant == "mobilenet":
        layer = DCDConv2D(config["inp"], config["oup"], 1, variant=variant, fc_squeeze=config.get("fc_squeeze", 8))
    else:
        kernel_size = config.get("kernel_size", 3)
        # The published bottleneck takes its padding as an argument; this one always keeps the size.
        assert config.get("padding", kernel_size // 2) == kernel_size // 2
        layer = DCDConv2D(config["inplanes"], config["planes"], kernel_size, config["stride"], variant=variant)
    layer.to(dtype="float64")
    return layer


def make_classifier(inp, oup) -> DCDLinear:
    layer = DCDLinear(inp, oup)
    layer.to(dtype="float64")
    return layer


LAYERS = {"DCDConv2D": make_conv, "DCDLinear": make_classifier}
#: The MobileNet's q and p have names of their own.
RENAME = {"DCDConv2D": lambda key: key.replace("conv_q.", "q.").replace("conv_p.", "p.")}
