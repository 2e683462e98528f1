"""The published large-kernel module of RepLKNet: its arguments as ours."""

from paddle_reparam.layers.replknet import ReparamLargeKernelConv2D


def make_large_kernel(channels, kernel_size, small_kernel, stride=1) -> ReparamLargeKernelConv2D:
    layer = ReparamLargeKernelConv2D(channels, kernel_size, small_kernel, stride)
    layer.to(dtype="float64")
    return layer


LAYERS = {"ReparamLargeKernelConv2D": make_large_kernel}
RENAME = {}
