"""How a `DBB2D` is computed while it trains on a processor: the same numbers by fewer and larger matrix products.

The 1x1 convolutions that two branches begin with are linear, and so is the BN behind each once its statistics are
known. These follow from the mean m and the covariance S of the layer's input, exactly: w * x has the mean w * m and the
variance w * S * w. With the scale s and the shift t of that BN, and the value r that it pads with,

    conv(pad(s * w * x + t), k) = conv(x, k * s * w) + (t - r) * conv(ones, k) + r * sum(k)

with convolutions of x and of ones that pad with zeros. The ones are one more channel of x; the last term moves a
running mean, and is taken away again by the BN that follows. So dbb_1x1_kxk is one convolution of x, whose kernel is
made of two, and runs together with dbb_origin as one of twice the output channels; and dbb_avg is a 1x1 convolution of
the averages of x. The last BN of each branch takes its statistics from that branch's own outputs.

Where a batch has few pixels, making a kernel of two costs more than it saves, and Paddle's convolution, which
multiplies image by image, is slow: there the branches are computed as they stand, by products of all images at once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.autograd import PyLayer

from ..arithmetic.geometry import BATCH_NORMS
from .toeplitz import is_native

#: Pixels of an output up to which a product of all images at once is faster than Paddle's convolution, for any kernel,
#: and for one of `LARGE_KERNEL` numbers or more. A step on one thread, 64 images, 3x3, in ms (Paddle's / product):
#: 64 to 128 channels at 8x8 pixels 25 / 60, 128 to 256 at 4x4 38 / 30, 256 to 512 at 2x2 131 / 28, 512 at 1x1 80 / 23;
#: 8 images, 512 channels at 7x7 137 / 58, 256 at 14x14 47 / 56.
SMALL_MAP, SMALL_MAP_OF_LARGE, LARGE_KERNEL = 16, 64, 2_000_000
#: A kernel made of two pays from this many times as many pixels in a batch as there are channels between the two.
PIXELS_A_CHANNEL = 4

_EPSILON = 1e-5

Four = tuple  # (top, bottom, left, right)


def can_merge(layer: Any, x: paddle.Tensor) -> bool:
    """Tell whether `forward_merged` computes what the branches of a `DBB2D` do: in training, on a CPU.

    It does for zero padding, one group and no dilation, in float32 or float64, where all BNs normalise by the batch and
    nobody watches the parts of the layer by hooks; not in `formulation("native")`. There is no second derivative then.
    """
    if is_native() or not (layer.training and paddle.in_dynamic_mode() and paddle.get_device() == "cpu"):
        return False
    geometry = layer.geometry
    if (geometry.padding_mode, geometry.data_format) != ("zeros", "NCHW"):
        return False
    if geometry.groups > 1 or geometry.dilation != (1, 1) or "dbb_1x1" not in layer._sub_layers:
        return False
    if x.dtype != layer.dbb_origin.conv.weight.dtype or x.dtype not in (paddle.float32, paddle.float64):
        return False
    parts = layer.sublayers()
    if any(part._forward_pre_hooks or part._forward_post_hooks for part in parts):
        return False
    norms = [part for part in parts if isinstance(part, BATCH_NORMS)]
    return all(type(bn) is nn.BatchNorm2D and bn.training and bn._use_global_stats is None for bn in norms)


def forward_merged(layer: Any, x: paddle.Tensor) -> paddle.Tensor:
    """Return the output of a `DBB2D`, `[N, C, H, W]` in, and move the running statistics of its BNs."""
    size, stride, padding = layer.geometry.kernel_size, layer.geometry.stride, layer.geometry.padding
    beside = layer.dbb_1x1.bn(convolve(layer.middle(x), layer.dbb_1x1.conv.weight, stride))
    pixels, channels = beside.size // beside.shape[1], layer.dbb_1x1_kxk.conv2._in_channels
    if pixels < PIXELS_A_CHANNEL * channels or x.size == x.shape[1]:
        return beside + _as_they_stand(layer, x)

    origin, kxk, average = layer.dbb_origin, layer.dbb_1x1_kxk, layer.dbb_avg
    covariance, mean = _moments(x)
    # One channel more: ones in the map, and zeros in the padding as in all channels.
    x = paddle.concat([x, paddle.ones([len(x), 1, *x.shape[2:]], x.dtype)], 1)
    first = kxk[0].weight.flatten(1)
    if "idconv1" in kxk._sub_layers:
        first = first + paddle.eye(len(first), dtype=x.dtype)
    first, border = _with_bn(first, kxk.bn1, covariance, mean, pixels_of(x))
    taps = kxk.conv2.weight.flatten(2).transpose([0, 2, 1])
    made = paddle.matmul(taps, first).transpose([0, 2, 1]).reshape([len(taps), -1, *size])
    blind = paddle.zeros([len(origin.conv.weight), 1, *size], x.dtype)
    as_it_is = paddle.concat([origin.conv.weight, blind], 1)
    y = convolve(x, paddle.concat([as_it_is, made]), stride, padding)
    of_origin, of_kxk = paddle.split(y, 2, 1)
    out = beside + origin.bn(of_origin) + kxk.bn2(of_kxk)
    _shift_mean(kxk.bn2, paddle.matmul(taps.sum(1), border))

    first, border = _with_bn(average.conv.weight.flatten(1), average.bn, covariance, mean, pixels_of(x))
    of_average = convolve(averages(x, size, stride, padding), first.reshape([*first.shape, 1, 1]))
    out = out + average.avgbn(of_average)
    _shift_mean(average.avgbn, border)
    return out


def _as_they_stand(layer: Any, x: paddle.Tensor) -> paddle.Tensor:
    """Return the sum of all branches but dbb_1x1."""
    size, stride, padding = layer.geometry.kernel_size, layer.geometry.stride, layer.geometry.padding
    origin, kxk, average = layer.dbb_origin, layer.dbb_1x1_kxk, layer.dbb_avg
    first = convolve(x, kxk[0].weight)
    first = kxk.bn1(x + first if "idconv1" in kxk._sub_layers else first)
    out = origin.bn(convolve(x, origin.conv.weight, stride, padding))
    out = out + kxk.bn2(convolve(first, kxk.conv2.weight, stride))
    return out + average.avgbn(averages(average.bn(convolve(x, average.conv.weight)), size, stride))


def _with_bn(
    weight: paddle.Tensor, behind: Any, covariance: paddle.Tensor, mean: paddle.Tensor, pixels: int
) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Return (`[M, C + 1]`, `[M]`) of a 1x1 convolution `[M, C]` and a `BNAndPad` behind it: the affine that they are
    of C channels and of ones, less what the BN pads with; and that. Moves the BN's running statistics as it would."""
    bn, before = behind.bn, behind.bn._variance.clone()
    of_batch = paddle.matmul(weight, mean), (paddle.matmul(weight, covariance) * weight).sum(1)
    kept = float(np.float32(bn._momentum))  # Paddle keeps it, as it does epsilon, as a float32
    with paddle.no_grad():
        for running, new in zip((bn._mean, bn._variance), of_batch):
            running.set_value(kept * running + (1 - kept) * new)
    border = behind.value_of_zero(before, max(pixels - 1, 1))
    scale = bn.weight / paddle.sqrt(of_batch[1] + float(np.float32(bn._epsilon)))
    shift = bn.bias - of_batch[0] * scale - border
    return paddle.concat([weight * scale.unsqueeze(1), shift.unsqueeze(1)], 1), border


@paddle.no_grad()
def _shift_mean(bn: nn.BatchNorm2D, constant: paddle.Tensor) -> None:
    """Let a BN's running mean have seen a batch with a constant `[channels]` more, which changes nothing else of it."""
    bn._mean.set_value(bn._mean + (1 - float(np.float32(bn._momentum))) * constant)


def pixels_of(x: paddle.Tensor) -> int:
    """Return how many values each channel of `[N, C, H, W]` has."""
    return x.size // x.shape[1]


def _moments(x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Return the covariance `[C, C]` and the mean `[C]` of a batch `[N, C, H, W]` over all its pixels."""
    if x.stop_gradient or not paddle.is_grad_enabled():
        return _Moments.of(x)[:2]
    return _Moments.apply(x)


class _Moments(PyLayer):
    """`_moments`, written out: autograd would take four products and as many copies of the batch for it."""

    @staticmethod
    def of(x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        # Not of x itself: the difference of two large numbers would be left of a variance. Paddle's BN is its fastest
        # way to take the mean away, and divides by the deviation, to be multiplied with again.
        mean, variance = paddle.zeros([2, x.shape[1]], x.dtype)
        normal = F.batch_norm(x, mean, variance, training=True, momentum=0.0, epsilon=_EPSILON).flatten(2)
        deviation = paddle.sqrt(variance + float(np.float32(_EPSILON)))
        products = paddle.matmul(normal, normal, transpose_y=True).sum(0) / pixels_of(x)
        return products * deviation * deviation.unsqueeze(1), mean, normal, deviation

    @staticmethod
    def forward(ctx: Any, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        covariance, mean, normal, deviation = _Moments.of(x)
        ctx.save_for_backward(normal, deviation)
        ctx.shape = x.shape
        return covariance, mean

    @staticmethod
    def backward(ctx: Any, of_covariance: paddle.Tensor, of_mean: paddle.Tensor) -> paddle.Tensor:
        normal, deviation = ctx.saved_tensor()
        pixels = normal.size // len(deviation)
        matrix = (of_covariance + of_covariance.t()) * deviation / pixels
        ones = paddle.full([1, normal.shape[2]], 1 / pixels, normal.dtype)
        # Sums of maps and constants are slow in Paddle, and products are not.
        gradient = paddle.matmul(matrix, normal) + paddle.matmul(of_mean.unsqueeze(1), ones)
        return gradient.reshape(ctx.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions and averages as products


def convolve(
    x: paddle.Tensor, weight: paddle.Tensor, stride: tuple[int, int] = (1, 1), padding: Four = (0, 0, 0, 0)
) -> paddle.Tensor:
    """Return x, `[N, C, H, W]`, convolved with a weight `[out, C, h, w]`, in the faster way."""
    axes = _axes(x, weight.shape[2:], stride, padding)
    outputs = [len(_places(*axis)) for axis in axes]
    pixels = outputs[0] * outputs[1]
    if pixels > (SMALL_MAP_OF_LARGE if weight.size >= LARGE_KERNEL else SMALL_MAP):
        top, bottom, left, right = padding
        pads = [top, left] if (top, left) == (bottom, right) else list(padding)
        return F.conv2d(x, weight, None, list(stride), pads)
    images, channels = x.shape[:2]
    index, met = _windows(axes)
    # A kernel loses the taps that meet nothing but padding: 8 of 9 of 3x3 on maps of one pixel.
    taps = weight.flatten(2) if met is None else paddle.index_select(weight.flatten(2), met, 2)
    rows = x.flatten(2).transpose([0, 2, 1])
    rows = paddle.concat([rows, paddle.zeros([images, 1, channels], x.dtype)], 1)
    take = paddle.gather if _gather_has_its_gradient() else paddle.index_select
    rows = take(rows, index, 1).reshape([images * pixels, -1, channels])
    # One of the two has its axes in another order than it is stored in: the smaller one.
    if rows.size < taps.size:
        rows = rows.transpose([0, 2, 1])
    else:
        taps = taps.transpose([0, 2, 1])
    y = paddle.matmul(rows.flatten(1), taps.flatten(1), transpose_y=True)
    return y.reshape([images, pixels, -1]).transpose([0, 2, 1]).reshape([images, -1, *outputs])


@lru_cache(maxsize=1)
def _gather_has_its_gradient() -> bool:
    """Tell whether `gather` along the second axis has the right gradient, which Paddle 2.6 has not; it takes 0.6 of the
    time of `index_select`, forward and backward."""
    with paddle.enable_grad():
        x = paddle.zeros([2, 2])
        x.stop_gradient = False
        (paddle.gather(x, paddle.to_tensor([1, 0]), 1) * paddle.arange(4.0).reshape([2, 2])).sum().backward()
    return x.grad.tolist() == [[1.0, 0.0], [3.0, 2.0]]


def averages(
    x: paddle.Tensor, size: tuple[int, int], stride: tuple[int, int], padding: Four = (0, 0, 0, 0)
) -> paddle.Tensor:
    """Return the averages over the windows of x, `[N, C, H, W]`; the zeros of the padding count.

    Products with matrices of few numbers that are not zero take a third of the time of Paddle's pooling, forward and
    backward.
    """
    rows, columns = (_matrix_of_averages(*axis, x.dtype) for axis in _axes(x, size, stride, padding))
    return paddle.matmul(rows.t(), paddle.matmul(x, columns))


def _axes(x: paddle.Tensor, size: Any, stride: tuple[int, int], padding: Four) -> tuple:
    """Return (length, taps, stride, padding before, padding behind) of the height and the width."""
    return tuple(
        (int(x.shape[2 + i]), int(size[i]), int(stride[i]), int(padding[2 * i]), int(padding[2 * i + 1]))
        for i in (0, 1)
    )


@lru_cache(maxsize=256)
def _places(length: int, taps: int, stride: int, before: int, behind: int) -> np.ndarray:
    """Return where in the map each tap of each window is, `[windows, taps]`, or -1 in the padding."""
    windows = (length + before + behind - taps) // stride + 1
    places = np.arange(windows)[:, None] * stride - before + np.arange(taps)
    return np.where(places < length, np.maximum(places, -1), -1)


@lru_cache(maxsize=64)
def _windows(axes: tuple) -> tuple[paddle.Tensor, paddle.Tensor | None]:
    """Return which pixel each tap of each window is, the last one for a zero, and which taps meet any; None: all."""
    rows, columns = (_places(*axis) for axis in axes)
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    height, width = axes[0][0], axes[1][0]
    pixels = np.where((rows < 0) | (columns < 0), height * width, rows * width + columns)
    pixels = pixels.reshape(-1, axes[0][1] * axes[1][1])
    met = np.flatnonzero((pixels < height * width).any(0))
    return (
        paddle.to_tensor(pixels[:, met].reshape(-1)),
        None if len(met) == pixels.shape[1] else paddle.to_tensor(met),
    )


@lru_cache(maxsize=64)
def _matrix_of_averages(length: int, taps: int, stride: int, before: int, behind: int, dtype: Any) -> paddle.Tensor:
    """Return `[length, windows]`, by which the numbers of an axis become the averages over its windows."""
    places = _places(length, taps, stride, before, behind)
    matrix = (places[:, :, None] == np.arange(length)).sum(1).T / taps
    return paddle.to_tensor(matrix).astype(dtype)
