"""Depthwise convolutions with large kernels as batched matrix products.

Along an axis of L numbers, a kernel of a taps is a Toeplitz matrix of LxL, T[q, p] = k[q - p + a // 2]. Where a is near
L or above, hardly one of its numbers is zero, and processors multiply matrices many times faster than Paddle's own
kernels convolve. The b taps of the other axis are b matrices, one below the other, and b shifted copies of the map:

    y = sum over (b, q) of shifted[:, (b, q)] * T[(b, q), p]        for each channel, the rows of all images at once

Kernels with the same b can share the copies, which take about as long to make as the products do.

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
from paddle import nn
from paddle.autograd import PyLayer

from ..arithmetic.geometry import ConvGeometry
from ..errors import ReparamError

#: What the shifted copies of a block of channels may take: no more than stays in a processor's cache.
BLOCK_BYTES = 4 << 20

#: Taps along the matrices from which on a product pays, the largest map for it in taps, and the multiply-adds of the
#: convolution below which calling the operators costs more than they do: see `product_pays`.
SMALLEST_KERNEL = 7
LARGEST_MAP = 16
SMALLEST_WORK = 1_000_000

FORMULATIONS = ("auto", "product", "native")
_formulation: ContextVar[str] = ContextVar("formulation", default="auto")


# ---------------------------------------------------------------------------------------------------------------------
# The rule


def product_pays(kernel_size: Sequence[int], shape: Sequence[int], device: str) -> bool:
    """Return whether a matrix product trains faster than Paddle's own convolution.

    kernel_size: (height, width), odd. shape: of the input, `[N, C, H, W]`. device: what `paddle.get_device()` says.

    On "cpu" it does where the matrices' axis has `SMALLEST_KERNEL` taps or more and is at most `LARGEST_MAP` times as
    long as these, and the convolution has `SMALLEST_WORK` multiply-adds or more: see the table in `docs/slak.md`, which
    `tools/benchmark.py step --kernels` measures. Elsewhere the answer is no: on a GPU the product is untested.
    """
    axis = 0 if _is_tall(kernel_size, shape[2:]) else 1
    taps, size = kernel_size[axis], shape[2 + axis]
    work = math.prod(kernel_size) * math.prod(shape)
    return device == "cpu" and taps >= SMALLEST_KERNEL and size <= LARGEST_MAP * taps and work >= SMALLEST_WORK


@contextlib.contextmanager
def formulation(name: str) -> Iterator[None]:
    """While the `with` block runs, let every `DepthwiseConv2D` be a "product" or "native", or by the rule: "auto".

    What cannot be a product stays native. A `DBB2D` that is "native" trains each branch on its own. Raises
    `ReparamError` for another name.
    """
    if name not in FORMULATIONS:
        raise ReparamError(f"there is no formulation {name!r}; choose one of {', '.join(map(repr, FORMULATIONS))}")
    token = _formulation.set(name)
    try:
        yield
    finally:
        _formulation.reset(token)


def is_native() -> bool:
    """Tell whether Paddle's own convolutions are asked for."""
    return _formulation.get() == "native"


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
        [y] = depthwise_conv2d(x, [self.weight])
        return self._with_bias(y)

    def forward_with(self, other: DepthwiseConv2D, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor] | None:
        """Return self(x) and other(x) from the same shifted copies of x, or None: call them one by one.

        That is where this layer is a product and the other, however small its kernel, can be one from these copies.
        Hooks of the two layers are not called.
        """
        if not (other._may_be_product(x) and self._is_product(x)):
            return None
        axis = 3 if _is_tall(self.weight.shape[2:], x.shape[2:]) else 2
        if other.weight.shape[axis] != self.weight.shape[axis]:
            return None
        y, of_other = depthwise_conv2d(x, [self.weight, other.weight])
        return self._with_bias(y), other._with_bias(of_other)

    def _is_product(self, x: paddle.Tensor) -> bool:
        if not self._may_be_product(x):
            return False
        return _formulation.get() == "product" or product_pays(self.weight.shape[2:], x.shape, paddle.get_device())

    def _may_be_product(self, x: paddle.Tensor) -> bool:
        if is_native() or not self._keeps_size or not paddle.in_dynamic_mode():
            return False
        return x.dtype == self.weight.dtype and x.dtype in (paddle.float32, paddle.float64)

    def _with_bias(self, y: paddle.Tensor) -> paddle.Tensor:
        return y if self.bias is None else y + self.bias.reshape([1, -1, 1, 1])


# ---------------------------------------------------------------------------------------------------------------------
# The convolution


def depthwise_conv2d(x: paddle.Tensor, weights: Sequence[paddle.Tensor]) -> list[paddle.Tensor]:
    """Return x, `[N, C, H, W]`, convolved with each weight: an odd kernel for each channel, `[C, 1, height, width]`.

    All are float32, or all float64. All matrices lie along one axis, chosen for the first weight; along the other axis
    all weights have as many taps. There is a gradient, but no second one. Beside its results it needs a few maps as
    large as x, and a few times `BLOCK_BYTES`, or what one channel of all images needs where that is more.
    """
    tall = _is_tall(weights[0].shape[2:], x.shape[2:])
    kernels = [_kernel_of(weight, tall) for weight in weights]
    taps = [kernel.shape[2] for kernel in kernels]
    kernel = paddle.concat(kernels, 2)
    outputs = _OfInput.apply(x, kernel.detach(), taps, tall)
    if kernel.stop_gradient or not paddle.is_grad_enabled():
        return list(outputs)
    return [y + zeros for y, zeros in zip(outputs, _OfWeight.apply(kernel, x.detach(), taps, tall))]


# Written out, as what autograd would keep of a forward pass are all shifted copies of the map. And one for each of the
# two gradients, all kernels in one: where `paddle.grad` asks for some only, Paddle refuses what a PyLayer returns for
# the others.


class _OfInput(PyLayer):
    """The convolutions with kernels `[C, b, a]`, one behind the other, `taps` long, with a gradient for their input."""

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor, kernel: paddle.Tensor, taps: list[int], tall: bool) -> tuple[paddle.Tensor]:
        ctx.save_for_backward(kernel)
        ctx.given = taps, tall
        return tuple(_convolve(x, paddle.split(kernel, taps, 2), tall))

    @staticmethod
    def backward(ctx: Any, *gradients: paddle.Tensor) -> tuple[paddle.Tensor, None]:
        [kernel] = ctx.saved_tensor()
        taps, tall = ctx.given
        # A gradient is convolved with the kernel turned round.
        turned = [each.flip([1, 2]) for each in paddle.split(kernel, taps, 2)]
        parts = [_convolve(gradient, [each], tall)[0] for gradient, each in zip(gradients, turned)]
        return sum(parts[1:], parts[0]), None


class _OfWeight(PyLayer):
    """Zeros, which have what the gradient of the convolutions is for their kernels."""

    @staticmethod
    def forward(ctx: Any, kernel: paddle.Tensor, x: paddle.Tensor, taps: list[int], tall: bool) -> tuple[paddle.Tensor]:
        ctx.save_for_backward(x)
        ctx.given = kernel.shape[1], taps, tall
        return tuple(paddle.zeros_like(x) for _ in taps)

    @staticmethod
    def backward(ctx: Any, *gradients: paddle.Tensor) -> tuple[paddle.Tensor, None]:
        [x] = ctx.saved_tensor()
        return _correlate(x, gradients, *ctx.given), None


def _convolve(x: paddle.Tensor, kernels: Sequence[paddle.Tensor], tall: bool) -> list[paddle.Tensor]:
    """Return x convolved with each of the kernels `[C, b, a]`."""
    maps, copies = _channels_first(x, tall), kernels[0].shape[1]
    places = [places_of_taps(maps.shape[3], kernel.shape[2], x.dtype) for kernel in kernels]
    parts: list[list[paddle.Tensor]] = [[] for _ in kernels]
    for block in _blocks(maps, copies):
        shifted = shifts(maps[block], copies)
        for kernel, where, part in zip(kernels, places, parts):
            part.append(paddle.matmul(shifted, toeplitz(kernel[block], where)))
    return [_channels_first(paddle.concat(part, 0).reshape(maps.shape), tall) for part in parts]


def _correlate(
    x: paddle.Tensor, gradients: Sequence[paddle.Tensor], copies: int, taps: Sequence[int], tall: bool
) -> paddle.Tensor:
    """Return the gradient of the kernels, `[C, copies, sum of taps]`."""
    maps, gradients = _channels_first(x, tall), [_channels_first(each, tall) for each in gradients]
    size = maps.shape[3]
    places = [places_of_taps(size, each, x.dtype) for each in taps]
    parts = []
    for block in _blocks(maps, copies):
        shifted = shifts(maps[block], copies)
        sums = []
        for gradient, where in zip(gradients, places):
            of_block = gradient[block]
            matrices = paddle.matmul(shifted, of_block.reshape([len(of_block), -1, size]), transpose_x=True)
            sums.append(sum_places(matrices, where, copies))
        parts.append(paddle.concat(sums, 2))
    return paddle.concat(parts, 0)


def _channels_first(x: paddle.Tensor, tall: bool) -> paddle.Tensor:
    """Return `[N, C, H, W]` as `[C, N, H, W]`, or `[C, N, W, H]` where the matrices are tall; and back."""
    # One by one: Paddle takes eight times as long for both at once.
    x = x.transpose([1, 0, 2, 3]).contiguous()
    return x.transpose([0, 1, 3, 2]).contiguous() if tall else x


def _blocks(maps: paddle.Tensor, copies: int) -> list[slice]:
    """Return which channels of `[C, N, B, A]` are computed at a time."""
    channels, images, other, size = maps.shape
    count = max(1, BLOCK_BYTES // (copies * max(images * other, size) * size * maps.element_size()))
    return [slice(start, min(start + count, channels)) for start in range(0, channels, count)]


def _is_tall(kernel_size: Sequence[int], map_size: Sequence[int]) -> bool:
    """Return whether the matrices are to lie along the height, because there is less to multiply."""
    return kernel_size[1] * map_size[0] <= kernel_size[0] * map_size[1]


def _kernel_of(weight: paddle.Tensor, tall: bool) -> paddle.Tensor:
    """Return a weight `[C, 1, height, width]` as `[C, b, a]`, the axis of the matrices last."""
    return weight.squeeze(1).transpose([0, 2, 1]) if tall else weight.squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# Its parts


def shifts(maps: paddle.Tensor, copies: int) -> paddle.Tensor:
    """Return shifted copies of `[C, N, B, A]` side by side, `[C, N * B, copies * A]`.

    They are shifted along B, with zeros where there was nothing; the middle one is as it was.
    """
    channels, images, length, size = maps.shape
    rows = maps.reshape([channels * images, length, size])
    rows = paddle.concat([rows, paddle.zeros([channels * images, 1, size], maps.dtype)], 1)
    rows = paddle.gather(rows, _shifted_rows(length, copies, paddle.get_device()), 1)
    return rows.reshape([channels, images * length, copies * size])


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


def places_of_taps(size: int, taps: int, dtype: Any = paddle.float32) -> paddle.Tensor:
    """Return `[taps, size * size]`, which is 1 where the Toeplitz matrix holds the tap and 0 elsewhere."""
    return _places_of_taps(size, taps, dtype, paddle.get_device())


@lru_cache(maxsize=32)
def _places_of_taps(size: int, taps: int, dtype: Any, device: str) -> paddle.Tensor:
    tap = np.arange(size)[:, None] - np.arange(size) + taps // 2
    return paddle.to_tensor(tap.reshape(-1) == np.arange(taps)[:, None]).astype(dtype)


@lru_cache(maxsize=32)
def _shifted_rows(length: int, copies: int, device: str) -> paddle.Tensor:
    """Return, for each row and copy, the row that it is; `length` stands for a row of zeros."""
    rows = np.arange(length)[:, None] + np.arange(copies) - copies // 2
    return paddle.to_tensor(np.where((rows >= 0) & (rows < length), rows, length).reshape(-1))
