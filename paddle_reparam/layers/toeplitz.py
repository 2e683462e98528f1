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
import ctypes
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import paddle
from numpy.lib.stride_tricks import as_strided
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

    def _is_product(self, x: paddle.Tensor) -> bool:
        if not self._may_be_product(x):
            return False
        return _formulation.get() == "product" or product_pays(self.weight.shape[2:], x.shape, paddle.get_device())

    def _may_be_product(self, x: paddle.Tensor) -> bool:
        if is_native() or not self._keeps_size or not paddle.in_dynamic_mode():
            return False
        if not (x.place.is_cpu_place() and self.weight.place.is_cpu_place()):
            return False
        return x.dtype == self.weight.dtype and x.dtype in (paddle.float32, paddle.float64)

    def _with_bias(self, y: paddle.Tensor) -> paddle.Tensor:
        return y if self.bias is None else y + self.bias.reshape([1, -1, 1, 1])


def forward_all(layers: Sequence[DepthwiseConv2D], x: paddle.Tensor) -> list[paddle.Tensor] | None:
    """Return what each layer does with x, or None where none of them is a product: call them one by one.

    The products are computed at once, and with them whatever kernel can share the shifted copies of x that one of them
    needs, however small it is. Hooks of the layers are not called.
    """
    groups = [_group_of(layer.weight.shape[2:], x.shape[2:]) for layer in layers if layer._is_product(x)]
    if not groups:
        return None
    products = [
        layer
        for layer in layers
        if layer._may_be_product(x) and _group_of(layer.weight.shape[2:], x.shape[2:]) in groups
    ]
    outputs = dict(zip(products, depthwise_conv2d(x, [layer.weight for layer in products])))
    return [layer._with_bias(outputs[layer]) if layer in outputs else nn.Conv2D.forward(layer, x) for layer in layers]


# ---------------------------------------------------------------------------------------------------------------------
# The convolution


def depthwise_conv2d(x: paddle.Tensor, weights: Sequence[paddle.Tensor]) -> list[paddle.Tensor]:
    """Return x, `[N, C, H, W]`, convolved with each weight: an odd kernel for each channel, `[C, 1, height, width]`.

    All are on a CPU, and float32, or float64. There is a gradient, but no second one. Beside its results it needs a few
    maps as large as x, and a few times `BLOCK_BYTES`, or what one channel of all images needs where that is more.
    """
    wanted = [paddle.is_grad_enabled() and not tensor.stop_gradient for tensor in (x, *weights)]
    # One tensor has the gradients of all. Where `paddle.grad` asks for some only, Paddle refuses what a PyLayer returns
    # for the others; of a `concat` it takes what it needs.
    parts = [tensor.flatten() for tensor, is_wanted in zip((x, *weights), wanted) if is_wanted]
    source = paddle.concat(parts) if parts else x.detach()
    return list(_Convolutions.apply(source, x.detach(), [weight.detach() for weight in weights], wanted))


class _Convolutions(PyLayer):
    """The convolutions, with a gradient for `source`: all tensors that want one, flat, one behind the other."""

    # Written out, as what autograd would keep of a forward pass are all shifted copies of the map.

    @staticmethod
    def forward(
        ctx: Any, source: paddle.Tensor, x: paddle.Tensor, weights: list[paddle.Tensor], wanted: list[bool]
    ) -> tuple[paddle.Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.wanted = wanted
        outputs = [paddle.empty(x.shape, x.dtype) for _ in weights]
        maps = _array_of(x)
        kernels = [_array_of(weight) for weight in weights]
        for (tall, copies), members in _groups(weights, x.shape[2:]).items():
            shifts = Shifts(maps, copies, tall)
            targets = [(_kernel_of(kernels[member], tall), _array_of(outputs[member])) for member in members]
            for block in shifts.blocks():
                shifted = shifts(maps[:, block])
                for kernel, y in targets:
                    shifts.put(y[:, block], shifts.product(shifted, toeplitz(kernel[block], shifts.size)))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: paddle.Tensor) -> paddle.Tensor:
        x, *weights = ctx.saved_tensor()
        sizes = [wanted * math.prod(tensor.shape) for wanted, tensor in zip(ctx.wanted, (x, *weights))]
        result = paddle.empty([sum(sizes)], x.dtype)
        of_x, *of_weights = np.split(_array_of(result), np.cumsum(sizes)[:-1])
        of_x = of_x.reshape(x.shape) if ctx.wanted[0] else None
        maps, is_first = _array_of(x), True
        for (tall, copies), members in _groups(weights, x.shape[2:]).items():
            shifts = Shifts(maps, copies, tall)
            for member in members:
                gradient = _array_of(gradients[member])
                # A gradient is convolved with the kernel turned round.
                turned = _kernel_of(_array_of(weights[member]), tall)[:, ::-1, ::-1]
                of_turned = np.empty(turned.shape, turned.dtype)
                for block in shifts.blocks():
                    shifted = shifts(gradient[:, block])
                    if of_x is not None:
                        product = shifts.product(shifted, toeplitz(turned[block], shifts.size))
                        shifts.put(of_x[:, block], product, add=not is_first)
                    if ctx.wanted[1 + member]:
                        matrices = shifts.gradient(shifted, maps[:, block])
                        of_turned[block] = sum_diagonals(matrices, copies, turned.shape[2])
                is_first = False
                if ctx.wanted[1 + member]:
                    weight = of_weights[member].reshape(weights[member].shape)
                    _kernel_of(weight, tall)[...] = of_turned[:, ::-1, ::-1]
        return result


def _groups(weights: Sequence[paddle.Tensor], map_size: Sequence[int]) -> dict[tuple[bool, int], list[int]]:
    """Return the numbers of the weights that can share shifted copies: (are the matrices tall?, copies) -> numbers."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for number, weight in enumerate(weights):
        groups.setdefault(_group_of(weight.shape[2:], map_size), []).append(number)
    return groups


def _group_of(kernel_size: Sequence[int], map_size: Sequence[int]) -> tuple[bool, int]:
    """Return whether the matrices are tall, and the number of shifted copies."""
    tall = _is_tall(kernel_size, map_size)
    return tall, kernel_size[1 if tall else 0]


def _is_tall(kernel_size: Sequence[int], map_size: Sequence[int]) -> bool:
    """Return whether the matrices are to lie along the height, because there is less to multiply."""
    return kernel_size[1] * map_size[0] <= kernel_size[0] * map_size[1]


def _kernel_of(weight: np.ndarray, tall: bool) -> np.ndarray:
    """Return a weight `[C, 1, height, width]` as a view `[C, b, a]`, the axis of the matrices last."""
    return weight[:, 0].transpose(0, 2, 1) if tall else weight[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Its parts. numpy copies whole rows, into memory that is there already, several times faster than Paddle's operators
# do, which write to new memory each time; the products are Paddle's.


class Shifts:
    """Shifted copies of `[N, C, H, W]` side by side, of a block of channels at a time, and what is computed from them.

    They are shifted along the width where the matrices are `tall`, along the height else, with zeros where there was
    nothing; the middle one is as it was. Of a block they are `[c, copies * H, N * W]`, or `[c, N * H, copies * W]`.
    """

    def __init__(self, maps: np.ndarray, copies: int, tall: bool) -> None:
        images, self._channels, height, width = maps.shape
        self.size = height if tall else width
        rest = images * (width if tall else height)
        per_channel = copies * max(rest, self.size) * self.size * maps.itemsize
        self._count = min(max(1, BLOCK_BYTES // per_channel), self._channels)
        self._tall, self._reach = tall, copies // 2
        padded = [height, width + copies - 1] if tall else [height + copies - 1, width]
        self._padded = np.zeros([self._count, images, *padded], maps.dtype)
        shape = [copies * height, images * width] if tall else [images * height, copies * width]
        self._copies = paddle.empty([self._count, *shape], str(maps.dtype))
        channel, image, row, column = self._padded.strides
        if tall:
            shape, strides = [copies, height, images, width], [column, row, image, column]
        else:
            shape, strides = [images, height, copies, width], [image, row, row, column]
        self._windows = as_strided(self._padded, [self._count, *shape], [channel, *strides], writeable=False)
        #: The axes of `[N, C, H, W]` as products have them.
        self._order = (1, 2, 0, 3) if tall else (1, 0, 2, 3)

    def blocks(self) -> list[slice]:
        """Return which channels are computed at a time."""
        starts = range(0, self._channels, self._count)
        return [slice(start, min(start + self._count, self._channels)) for start in starts]

    def __call__(self, maps: np.ndarray) -> paddle.Tensor:
        """Return the shifted copies of a block, in memory that the next call overwrites."""
        count, middle = maps.shape[1], slice(self._reach, -self._reach or None)
        inside = (slice(count), slice(None), slice(None), middle) if self._tall else (slice(count), slice(None), middle)
        self._padded[inside] = maps.transpose(1, 0, 2, 3)
        # The last block may be smaller.
        copies = self._copies
        if count < self._count:
            copies = paddle.empty([count, *copies.shape[1:]], copies.dtype)
        windows = self._windows[:count]
        np.copyto(_array_of(copies).reshape(windows.shape), windows)
        return copies

    def product(self, shifted: paddle.Tensor, matrices: paddle.Tensor) -> paddle.Tensor:
        """Return the copies of a block times its matrices of `toeplitz`."""
        if self._tall:
            return paddle.matmul(matrices, shifted)
        return paddle.matmul(shifted, matrices, transpose_y=True)

    def gradient(self, shifted: paddle.Tensor, maps: np.ndarray) -> paddle.Tensor:
        """Return the gradient of the matrices, where `maps` is that of the product as `put` writes it."""
        maps = maps.transpose(self._order)
        shape = [len(maps), self.size, -1] if self._tall else [len(maps), -1, self.size]
        rows = paddle.empty(maps.shape, shifted.dtype)
        np.copyto(_array_of(rows), maps)
        return paddle.matmul(rows.reshape(shape), shifted, transpose_x=not self._tall, transpose_y=self._tall)

    def put(self, maps: np.ndarray, product: paddle.Tensor, add: bool = False) -> None:
        """Write a product, or add it, to a block `[N, c, H, W]`."""
        target = maps.transpose(self._order)
        product = _array_of(product).reshape(target.shape)
        if add:
            target += product
        else:
            target[...] = product


def toeplitz(kernel: np.ndarray, size: int) -> paddle.Tensor:
    """Return the matrices of kernels, `[C, b, a]` to `[C, size, b * size]`: T[p, (b, q)] = k[b, q - p + a // 2]."""
    channels, copies, taps = kernel.shape
    reach = min(taps // 2, size - 1)
    diagonals = np.zeros([channels, copies, 2 * size - 1], kernel.dtype)
    diagonals[:, :, size - 1 - reach : size + reach] = kernel[:, :, taps // 2 - reach : taps // 2 + reach + 1]
    channel, copy, tap = diagonals.strides
    rows = as_strided(diagonals[:, :, size - 1 :], [channels, size, copies, size], [channel, -tap, copy, tap])
    matrices = paddle.empty([channels, size, copies * size], str(kernel.dtype))
    np.copyto(_array_of(matrices).reshape(rows.shape), rows)
    return matrices


def sum_diagonals(matrices: paddle.Tensor, copies: int, taps: int) -> np.ndarray:
    """Return the gradient of kernels, `[C, b, a]`, from that of the matrices that `toeplitz` makes of them."""
    channels, size, _ = matrices.shape
    rows = _array_of(matrices).reshape([channels, size, copies, size])
    sums = np.zeros([channels, copies, taps], rows.dtype)
    for row in range(size):
        first, last = max(0, row - taps // 2), min(size, row + taps // 2 + 1)
        sums[:, :, taps // 2 + first - row : taps // 2 + last - row] += rows[:, row, :, first:last]
    return sums


def _array_of(tensor: paddle.Tensor) -> np.ndarray:
    """Return a tensor in a CPU's memory as an array of the same numbers, which keeps it alive; a copy if it must."""
    tensor = tensor.contiguous()
    kind = {paddle.float32: ctypes.c_float, paddle.float64: ctypes.c_double}[tensor.dtype]
    # `Tensor.numpy` copies, and what DLPack gives must not be written to.
    numbers = (kind * math.prod(tensor.shape)).from_address(tensor.data_ptr())
    numbers.tensor = tensor
    return np.ctypeslib.as_array(numbers).reshape(tensor.shape)
