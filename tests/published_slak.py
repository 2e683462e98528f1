"""The published modules of SLaK: their arguments as ours."""

from paddle import nn

from paddle_reparam.layers.slak import DecomposedLargeKernelConv2D
from paddle_reparam.models.slak import SLaK, SLaKBlock


def in_float64(layer: nn.Layer) -> nn.Layer:
    layer.to(dtype="float64")
    return layer


def make_large_kernel(channels, kernel_size, small_kernel) -> DecomposedLargeKernelConv2D:
    return in_float64(DecomposedLargeKernelConv2D(channels, kernel_size, small_kernel))


def make_block(dim, kernel_size, small_kernel, Decom=True, **options) -> SLaKBlock:
    return in_float64(SLaKBlock(dim, kernel_size, small_kernel, decomposed=Decom, **options))


def make_network(num_classes, depths, dims, kernel_size, width_factor=1.0, Decom=True, **options) -> SLaK:
    return in_float64(SLaK(depths, dims, num_classes, kernel_size, width_factor, decomposed=Decom, **options))


LAYERS = {"DecomposedLargeKernelConv2D": make_large_kernel, "SLaKBlock": make_block, "SLaK": make_network}
RENAME = {}
