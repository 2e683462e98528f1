"""DecomposedLargeKernelConv2D: "More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity" (ICLR 2023,
arXiv 2207.03620)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import ConvGeometry, absorb_affine_into
from ..arithmetic.tensors import to_float64
from ..errors import ReparamError, UnsupportedConv
from ..registry import register_layer
from .base import FLAG, WHOLE, InferenceForm, ReparamLayer
from .branches import fold_conv_bn
from .replknet import conv_bn, forward_together


class DecomposedLargeKernelConv2DFused(InferenceForm):
    """A fused `DecomposedLargeKernelConv2D`: tall(x) + wide(x), `[N, C, H, W]` in and out.

    `tall` is a depthwise convolution with a kernel (M, N), which holds the small kernel and the bias, `wide` one with
    (N, M). `largest_map` is (height, width) where the kernels were cropped for maps of that size; a larger map, or one
    whose size is not known while tracing, then raises `ReparamError`.
    """

    def __init__(self, tall: nn.Conv2D, wide: nn.Conv2D, largest_map: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.tall = tall
        self.wide = wide
        self.largest_map = largest_map

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.largest_map is not None:
            _refuse_larger(x.shape[2:], self.largest_map)
        return self.tall(x) + self.wide(x)

    def absorb_affine(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Make this layer compute scale * out + shift per channel."""
        absorb_affine_into(self.tall, scale, shift)
        absorb_affine_into(self.wide, scale)

    def for_size(self, height: int, width: int, form: str | None = None) -> DecomposedLargeKernelConv2DFused | None:
        """Return the same layer with the kernels cropped to what maps of this size meet; None: nothing to crop.

        A side of K taps keeps min(K, 2 * size - 1), which is exact for this size and for smaller maps.
        """
        cropped = [kernels.crop_to_map(to_float64(conv.weight), height, width) for conv in (self.tall, self.wide)]
        if all(list(kernel.shape) == conv.weight.shape for kernel, conv in zip(cropped, (self.tall, self.wide))):
            return None
        tall, wide = cropped
        return type(self)(
            _same_conv(self.tall, tall, to_float64(self.tall.bias)), _same_conv(self.wide, wide, None), (height, width)
        )

    def extra_repr(self) -> str:
        return ", ".join("{}x{}".format(*conv._kernel_size) for conv in (self.tall, self.wide))

    def cross(self) -> nn.Conv2D:
        """Return one plain depthwise convolution with the MxM kernel, a cross of the two, for runtimes that want one.

        Of its M * M taps (2601 of 51x51) only the (2 * M - N) * N of the cross (485) are not zero.
        """
        kernel = kernels.sum_kernels([to_float64(self.tall.weight), to_float64(self.wide.weight)])
        return _same_conv(self.tall, kernel, to_float64(self.tall.bias))


@register_layer
class DecomposedLargeKernelConv2D(ReparamLayer):
    """A depthwise convolution with a kernel of MxM, as the sum of a tall, a wide and a small one, each with a BN.

        out = BN1(LoRA1.conv(x)) + BN2(LoRA2.conv(x)) + BN3(small_conv.conv(x)),  `[N, channels, H, W]` in and out

    The kernels are (M, N), (N, M) and (N, N); M = `kernel_size` and N = `small_kernel` are odd. All of them have stride
    1, pad half their own height and width with zeros and have no bias. There is no `small_conv` where N >= M.

    bn: without it there are the three convolutions alone (an ablation).

    Raises `UnsupportedConv` for an even M or N.
    """

    fused_type = DecomposedLargeKernelConv2DFused
    options = {"kernel_size": WHOLE, "small_kernel": WHOLE, "bn": FLAG}  # noqa: RUF012
    # A 7x7 kernel has corners, which the cross has not, and what the BNs of trained branches do to it is not known.
    keeps_function_with = None
    train_form_keys = ("LoRA1.conv.weight", "LoRA2.conv.weight")

    def __init__(self, channels: int, kernel_size: int, small_kernel: int = 5, bn: bool = True) -> None:
        super().__init__()
        if any(k < 1 or k % 2 == 0 for k in (kernel_size, small_kernel)):
            raise UnsupportedConv(
                f"DecomposedLargeKernelConv2D has odd kernels, which keep the size of a map; kernel_size={kernel_size} "
                f"with small_kernel={small_kernel} is not that"
            )
        self.LoRA1 = conv_bn(channels, (kernel_size, small_kernel), bn=bn)
        self.LoRA2 = conv_bn(channels, (small_kernel, kernel_size), bn=bn)
        if small_kernel < kernel_size:
            self.small_conv = conv_bn(channels, small_kernel, bn=bn)

    @classmethod
    def build(cls, geometry: ConvGeometry, **options: Any) -> DecomposedLargeKernelConv2D:
        """Return a layer in the place of a depthwise convolution with an odd square kernel and "same" zero padding.

        `options`: `kernel_size`, the convolution's own unless told, so that a 7x7 may become a 51x51; `small_kernel`,
        smaller than that; `bn`. Nothing of the convolution's weights is kept.
        """
        size = geometry.kernel_size[0]
        if not (geometry.is_depthwise and geometry.in_channels == geometry.out_channels):
            raise UnsupportedConv(
                f"DecomposedLargeKernelConv2D stands in for depthwise convolutions only, this one is {geometry}"
            )
        if geometry.stride != (1, 1) or geometry.dilation != (1, 1):
            raise UnsupportedConv(
                f"DecomposedLargeKernelConv2D has stride 1 and no dilation, this convolution is {geometry}"
            )
        if geometry.kernel_size != (size, size) or size % 2 == 0:
            raise UnsupportedConv(
                f"DecomposedLargeKernelConv2D stands in for odd square kernels only, this one is {geometry}"
            )
        if geometry.padding != (size // 2,) * 4 or geometry.padding_mode != "zeros":
            raise UnsupportedConv(
                f"DecomposedLargeKernelConv2D pads by half its kernel ({size // 2}) with zeros, this convolution has "
                f"padding {geometry.padding} in mode {geometry.padding_mode!r}"
            )
        if geometry.data_format != "NCHW":
            raise UnsupportedConv(f"DecomposedLargeKernelConv2D takes NCHW, this one takes {geometry.data_format}")
        options = {"kernel_size": size, "small_kernel": 5, **options}
        if options["small_kernel"] >= options["kernel_size"]:
            raise UnsupportedConv(
                f"a kernel of {options['kernel_size']}x{options['kernel_size']} is not larger than "
                f"small_kernel={options['small_kernel']}, so there is nothing to decompose; choose a larger "
                "kernel_size or a smaller small_kernel"
            )
        layer = cls(geometry.out_channels, **options)
        layer.to(dtype=geometry.dtype)
        return layer

    def extra_repr(self) -> str:
        tall = self.LoRA1.conv
        return f"{ConvGeometry.of(tall).in_channels} channels, {max(tall._kernel_size)}x{max(tall._kernel_size)}"

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        if "small_conv" not in self._sub_layers:
            tall, wide = forward_together([self.LoRA1, self.LoRA2], x)
            return tall + wide
        tall, wide, small = forward_together([self.LoRA1, self.LoRA2, self.small_conv], x)
        return tall + wide + small

    def fuse(self) -> DecomposedLargeKernelConv2DFused:
        """Return the two convolutions: the small kernel in the middle of the tall one, computed in float64."""
        tall, bias = fold_conv_bn(self.LoRA1)
        wide, more_bias = fold_conv_bn(self.LoRA2)
        bias = bias + more_bias
        if "small_conv" in self._sub_layers:
            small, more_bias = fold_conv_bn(self.small_conv)
            tall, bias = kernels.sum_kernels([tall, small]), bias + more_bias
        return DecomposedLargeKernelConv2DFused(
            ConvGeometry.of(self.LoRA1.conv).make_conv(tall, bias),
            ConvGeometry.of(self.LoRA2.conv).make_conv(wide, None),
        )


def _same_conv(conv: nn.Conv2D, kernel: np.ndarray, bias: np.ndarray | None) -> nn.Conv2D:
    """Return `conv` with another kernel, odd, that keeps the size of a map."""
    height, width = kernel.shape[2:]
    geometry = dataclasses.replace(
        ConvGeometry.of(conv),
        kernel_size=(height, width),
        padding=(height // 2, height // 2, width // 2, width // 2),
    )
    return geometry.make_conv(kernel, bias)


def _refuse_larger(size: Any, largest: tuple[int, int]) -> None:
    # While tracing, a side that is left open is a Tensor or -1.
    if not all(isinstance(side, int) and 0 < side <= most for side, most in zip(size, largest)):
        raise ReparamError(
            f"these kernels were cropped for maps of {largest[0]}x{largest[1]}, and this one is "
            f"{'x'.join(str(side) if isinstance(side, int) and side > 0 else '?' for side in size)}; "
            "fuse again without fixed_size, or for the size that you have"
        )
