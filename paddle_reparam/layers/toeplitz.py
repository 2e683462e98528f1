"""Depthwise convolutions with large kernels as batched matrix products.

Along an axis of L numbers, a kernel of a taps is a Toeplitz matrix of LxL, T[q, p] = k[q - p + a // 2]. Where a is near
L or above, hardly one of its numbers is zero, and processors multiply matrices many times faster than Paddle's own
kernels convolve. The b taps of the other axis are b matrices, one below the other, and b shifted copies of the map:

    y = sum over (b, q) of T[(b, q), p] * shifted[(b, q), :]        for each image and channel

All convolutions here have stride 1, no dilation and odd kernels, and pad half of these with zeros, so that y is as
large as x.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.autograd import PyLayer

from ..errors import ReparamError
from ..geometry import ConvGeometry

#: What the shifted copies of a block of channels may take: no more than stays in a processor's cache.
BLOCK_BYTES = 4 << 20

#: Taps along the matrices from which on a product pays, the largest map for it in taps, and the multiply-adds of the
#: convolution below which calling the operators costs more than they do: see `product_pays`.
SMALLEST_KERNEL = 9
LARGEST_MAP = 4
SMALLEST_WORK = 1_000_000

FORMULATIONS = ("auto", "product", "native")
_formulation: ContextVar[str] = ContextVar("formulation", default="auto")


# ---------------------------------------------------------------------------------------------------------------------
# The rule


def product_pays(kernel_size: Sequence[int], shape: Sequence[int], device: str) -> bool:
    """Return whether a matrix product trains faster than Paddle's own convolution.

    kernel_size: (height, width), odd. shape: of the input, `[N, C, H, W]`. device: what `paddle.get_device()` says.

    On "cpu" it does where the matrices' axis has `SMALLEST_KERNEL` taps or more and is at most `LARGEST_MAP` times as
    long as these, and the convolution has `SMALLEST_WORK` multiply-adds or more. Measured forward and backward, in
    float32 on one thread of a shared machine, 8 images, as time of the native convolution / time of the product:

        kernel  7x7 map  14x14  28x28  56x56  112x112
        3x3         0.9    0.6    0.4    0.3    0.2
        5x5         1.3    1.1    0.9    0.7    0.5
        7x7         1.4    1.4    1.4    1.1    0.7
        9x9         2.2    1.5    1.5    1.2    0.8
        13x13       2.7    3.8    2.3    2.0    1.3
        31x31       4.7    4.0    4.2    4.8    4.1
        51x5        5.4    4.4    5.4    5.3    4.6
        5x51       10.9    8.5    7.4    7.6    4.7

    At 2 images 5x5 and 7x7 were slower than native on some maps. Elsewhere the answer is no: on a GPU the product is
    untested.
    """
    axis = 0 if _is_tall(kernel_size, shape[2:]) else 1
    taps, size = kernel_size[axis], shape[2 + axis]
    work = math.prod(kernel_size) * math.prod(shape)
    return device == "cpu" and taps >= SMALLEST_KERNEL and size <= LARGEST_MAP * taps and work >= SMALLEST_WORK


@contextlib.contextmanager
def formulation(name: str) -> Iterator[None]:
    """While the `with` block runs, let every `DepthwiseConv2D` be a "product" or "native", or by the rule: "auto".

    What cannot be a product stays native. Raises `ReparamError` for another name.
    """
    if name not in FORMULATIONS:
        raise ReparamError(f"there is no formulation {name!r}; choose one of {', '.join(map(repr, FORMULATIONS))}")
    token = _formulation.set(name)
    try:
        yield
    finally:
        _formulation.reset(token)


# ---------------------------------------------------------------------------------------------------------------------
# The layer


class DepthwiseConv2D(nn.Conv2D):
    """`nn.Conv2D` for large depthwise kernels, `[N, C, H, W]` in and out, computed in the faster way.

    That is a matrix product where `product_pays` says so. It is Paddle's own convolution with stride, dilation or
    another padding than half the kernel, in half precision, and in a graph that is traced, whose sizes may be open.
    Mixed precision is untested with a product, and the rule allows none where Paddle has it, on a GPU.
    """

    #: For `ConvGeometry.of`: the forward pass computes what that of `nn.Conv2D` does.
    computes_plain_convolution = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        geometry = ConvGeometry.of(self)
        height, width = geometry.kernel_size
        self._keeps_size = (
            geometry.is_depthwise
            and geometry.in_channels == geometry.out_channels
            and geometry.stride == geometry.dilation == (1, 1)
            and height % 2 == width % 2 == 1
            and geometry.padding == (height // 2, height // 2, width // 2, width // 2)
            and (geometry.padding_mode, geometry.data_format) == ("zeros", "NCHW")
        )

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if not self._is_product(x):
            # Not super().forward, which Paddle 2.6 cannot trace.
            return nn.Conv2D.forward(self, x)
        y = depthwise_conv2d(x, self.weight)
        return y if self.bias is None else y + self.bias.reshape([1, -1, 1, 1])

    def _is_product(self, x: paddle.Tensor) -> bool:
        wanted = _formulation.get()
        if wanted == "native" or not self._keeps_size or not paddle.in_dynamic_mode():
            return False
        if x.dtype != self.weight.dtype or x.dtype not in (paddle.float32, paddle.float64):
            return False
        return wanted == "product" or product_pays(self.weight.shape[2:], x.shape, paddle.get_device())


# ---------------------------------------------------------------------------------------------------------------------
# The convolution


def depthwise_conv2d(x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    """Return x, `[N, C, H, W]`, convolved with an odd kernel for each channel, `[C, 1, height, width]`.

    Both are float32 or both float64. There is a gradient, but no second one. Beside its result it needs a few times
    `BLOCK_BYTES`, or what one channel of all images needs where that is more.
    """
    y = _OfInput.apply(x, weight.detach())
    if weight.stop_gradient or not paddle.is_grad_enabled():
        return y
    return y + _OfWeight.apply(weight, x.detach())


# Written out, as what autograd would keep of a forward pass are all shifted copies of the map. And one for each of the
# two gradients: where `paddle.grad` asks for one of them only, Paddle refuses what a PyLayer returns for the other.


class _OfInput(PyLayer):
    """The convolution, with a gradient for its input."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
        ctx.save_for_backward(weight)
        tall = _is_tall(weight.shape[2:], x.shape[2:])
        return _convolve(x, _kernel_of(weight, tall), tall)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> tuple[paddle.Tensor, None]:
        [weight] = ctx.saved_tensor()
        tall = _is_tall(weight.shape[2:], gradient.shape[2:])
        # The gradient is convolved with the kernel turned round.
        return _convolve(gradient, _kernel_of(weight, tall).flip([1, 2]), tall), None


class _OfWeight(PyLayer):
    """Zeros, which have what the gradient of the convolution is for its weight."""

    @staticmethod
    def forward(ctx: Any, weight: paddle.Tensor, x: paddle.Tensor) -> paddle.Tensor:
        ctx.save_for_backward(x)
        ctx.kernel_size = weight.shape[2:]
        return paddle.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> tuple[paddle.Tensor, None]:
        [x] = ctx.saved_tensor()
        tall = _is_tall(ctx.kernel_size, x.shape[2:])
        kernel = _correlate(x, gradient, *(ctx.kernel_size[::-1] if tall else ctx.kernel_size), tall)
        return (kernel.transpose([0, 2, 1]) if tall else kernel).unsqueeze(1), None


def _convolve(x: paddle.Tensor, kernel: paddle.Tensor, tall: bool) -> paddle.Tensor:
    """Return x convolved with a kernel `[C, b, a]`."""
    copies, taps = kernel.shape[1:]
    places = places_of_taps(x.shape[2 if tall else 3], taps, x.dtype)
    sections = _sections(x, copies, tall)
    parts = []
    for k, block in zip(paddle.split(kernel, sections, 0), paddle.split(x, sections, 1)):
        matrices, shifted = toeplitz(k, places), shifts(block, copies, tall)
        parts.append(paddle.matmul(matrices, shifted, transpose_x=True) if tall else paddle.matmul(shifted, matrices))
    return paddle.concat(parts, 1)


def _correlate(x: paddle.Tensor, gradient: paddle.Tensor, copies: int, taps: int, tall: bool) -> paddle.Tensor:
    """Return the gradient of the kernel, `[C, copies, taps]`."""
    places = places_of_taps(x.shape[2 if tall else 3], taps, x.dtype)
    sections = _sections(x, copies, tall)
    parts = []
    for block, of_block in zip(paddle.split(x, sections, 1), paddle.split(gradient, sections, 1)):
        matrices = None
        for image, of_image in zip(shifts(block, copies, tall), of_block):
            product = paddle.matmul(image, of_image, transpose_x=not tall, transpose_y=tall)
            matrices = product if matrices is None else matrices + product
        parts.append(sum_places(matrices, places, copies))
    return paddle.concat(parts, 0)


def _is_tall(kernel_size: Sequence[int], map_size: Sequence[int]) -> bool:
    """Return whether the matrices are to lie along the height, because there is less to multiply."""
    return kernel_size[1] * map_size[0] <= kernel_size[0] * map_size[1]


def _kernel_of(weight: paddle.Tensor, tall: bool) -> paddle.Tensor:
    """Return a weight `[C, 1, height, width]` as `[C, b, a]`, the axis of the matrices last."""
    return weight.squeeze(1).transpose([0, 2, 1]) if tall else weight.squeeze(1)


def _sections(x: paddle.Tensor, copies: int, tall: bool) -> list[int]:
    """Return how many channels are computed at a time, as the lengths of all blocks."""
    images, channels, height, width = x.shape
    size = height if tall else width
    numbers = copies * max(images * height * width, size * size)
    count = max(1, BLOCK_BYTES // (numbers * x.element_size()))
    return [min(count, channels - start) for start in range(0, channels, count)]


# ---------------------------------------------------------------------------------------------------------------------
# Its parts


def shifts(x: paddle.Tensor, copies: int, tall: bool) -> paddle.Tensor:
    """Return `copies` shifted copies of `[N, C, H, W]`, zeros where there was nothing, the middle one as it is.

    tall: shifted along the width, `[N, C, copies * H, W]`; otherwise along the height, `[N, C, H, copies * W]`.
    """
    images, channels, height, width = x.shape
    if tall:
        columns = F.unfold(x.reshape([images * channels, 1, height, width]), [1, copies], paddings=[0, copies // 2])
        return columns.reshape([images, channels, copies * height, width])
    rows = x.reshape([images * channels, height, width])
    rows = paddle.concat([rows, paddle.zeros([images * channels, 1, width], x.dtype)], 1)
    rows = paddle.gather(rows, paddle.to_tensor(_shifted_rows(height, copies)), 1)
    return rows.reshape([images, channels, height, copies * width])


def toeplitz(kernel: paddle.Tensor, places: paddle.Tensor) -> paddle.Tensor:
    """Return the matrices of kernels, `[C, b, a]` to `[C, b * size, size]`, with `places_of_taps(size, a)`."""
    channels, copies, taps = kernel.shape
    size = math.isqrt(places.shape[1])
    # A product with zeros and ones is faster here than any way of copying.
    return paddle.matmul(kernel.reshape([channels * copies, taps]), places).reshape([channels, copies * size, size])


def sum_places(matrices: paddle.Tensor, places: paddle.Tensor, copies: int) -> paddle.Tensor:
    """Return the gradient of kernels, `[C, b, a]`, from that of the matrices that `toeplitz` makes of them."""
    channels, taps = matrices.shape[0], places.shape[0]
    sums = paddle.matmul(matrices.reshape([channels * copies, -1]), places, transpose_y=True)
    return sums.reshape([channels, copies, taps])


def places_of_taps(size: int, taps: int, dtype: Any = "float32") -> paddle.Tensor:
    """Return `[taps, size * size]`, which is 1 where the Toeplitz matrix holds the tap and 0 elsewhere."""
    return paddle.to_tensor(_places_of_taps(size, taps), dtype)


@lru_cache(maxsize=8)
def _places_of_taps(size: int, taps: int) -> np.ndarray:
    tap = np.arange(size)[:, None] - np.arange(size) + taps // 2
    return (tap.reshape(-1) == np.arange(taps)[:, None]).astype("float32")


@lru_cache(maxsize=64)
def _shifted_rows(height: int, copies: int) -> np.ndarray:
    """Return, for each row and copy, the row that it is; `height` stands for a row of zeros."""
    rows = np.arange(height)[:, None] + np.arange(copies) - copies // 2
    return np.where((rows >= 0) & (rows < height), rows, height).reshape(-1)
