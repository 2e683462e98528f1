"""Arithmetic on convolution kernels, in float64 and on numpy arrays.

A kernel is `[out_channels, in_channels / groups, height, width]`, or has another number of axes where the text says so
with dots, a bias `[out_channels]`. Every function takes arrays
of any float type and returns float64; the one cast back to the layer's own type happens where the result is stored.
"""

from __future__ import annotations

import numpy as np

from ..errors import ReparamError

Array = np.ndarray


def _f64(array: Array) -> Array:
    return np.asarray(array, dtype=np.float64)


def bn_affine(weight: Array | None, bias: Array | None, mean: Array, variance: Array, epsilon: float) -> tuple:
    """Return (scale, shift), each `[channels]`, with BN(x) = scale * x + shift in eval mode.

    A BN without `weight` or `bias` (both `[channels]`) counts as 1 and 0.
    """
    # Paddle's kernels keep epsilon as a float32, in float64 too: on a channel without variance that is 1e-8 apart.
    mean, variance, epsilon = _f64(mean), _f64(variance), float(np.float32(epsilon))
    scale = (1.0 if weight is None else _f64(weight)) / np.sqrt(variance + epsilon)
    shift = (0.0 if bias is None else _f64(bias)) - mean * scale
    return scale, shift


def fold_affine(kernel: Array, bias: Array | None, scale: Array, shift: Array) -> tuple:
    """Return (kernel, bias) of the convolution followed by scale * y + shift per output channel, for any groups.

    The kernel is `[out_channels, ...]`.
    """
    kernel, scale, shift = _f64(kernel), _f64(scale), _f64(shift)
    if scale.shape != kernel.shape[:1]:
        raise ReparamError(
            f"an affine of {scale.size} channels cannot follow a kernel of shape {list(kernel.shape)}: "
            f"it needs one factor for each of the {kernel.shape[0]} output channels"
        )
    bias = np.zeros_like(shift) if bias is None else _f64(bias)
    return kernel * scale.reshape([-1] + [1] * (kernel.ndim - 1)), bias * scale + shift


def swap_channels(kernel: Array, groups: int) -> Array:
    """Return the kernel of a transposed convolution, `[in, out / groups, ...]`, as `[out, in / groups, ...]`; and back.

    It is its own inverse. The matrix of a fully connected layer, `[in, out]`, is one of one group.
    """
    kernel = _f64(kernel)
    first, second = kernel.shape[0] // groups, kernel.shape[1]
    swapped = kernel.reshape(groups, first, second, *kernel.shape[2:]).swapaxes(1, 2)
    return swapped.reshape(groups * second, first, *kernel.shape[2:])


def fold_input_affine(kernel: Array, bias: Array | None, scale: Array, shift: Array, groups: int) -> tuple:
    """Return (kernel, bias) of scale * x + shift per input channel, followed by the convolution.

    Exact where the convolution does not pad: padding puts zeros behind the affine.
    """
    kernel, scale, shift = _f64(kernel), _f64(scale), _f64(shift)
    out_channels, group_in = kernel.shape[:2]
    if scale.shape != (group_in * groups,):
        raise ReparamError(
            f"an affine of {scale.size} channels cannot precede a kernel of shape {list(kernel.shape)} with "
            f"groups={groups}: it needs one factor for each of the {group_in * groups} input channels"
        )
    group_of_row = np.arange(out_channels) // (out_channels // groups)
    factors, shifts = (v.reshape(groups, group_in)[group_of_row] for v in (scale, shift))
    bias = np.zeros(out_channels) if bias is None else _f64(bias)
    return kernel * factors[:, :, None, None], bias + np.einsum("oihw,oi->o", kernel, shifts)


def centre_pad(kernel: Array, size: tuple[int, int]) -> Array:
    """Return the kernel in the middle of zeros; `size` = (height, width), each as large or larger by an even number.

    The larger kernel needs (size - kernel) / 2 * dilation more padding a side to compute the same.
    """
    kernel = _f64(kernel)
    extra = [big - small for big, small in zip(size, kernel.shape[2:])]
    if any(e < 0 or e % 2 for e in extra):
        raise ReparamError(
            f"a kernel of {kernel.shape[2]}x{kernel.shape[3]} has no middle place in one of {size[0]}x{size[1]}: "
            "each side must be as large or larger, by an even number"
        )
    return np.pad(kernel, [(0, 0), (0, 0)] + [(e // 2, e // 2) for e in extra])


def crop_to_map(kernel: Array, height: int, width: int) -> Array:
    """Return the middle of a kernel: what a "same" convolution uses on maps of this size and of smaller ones.

    For stride and dilation 1. A tap `size` pixels or more from the middle only ever meets the zeros of the padding, so
    2 * size - 1 are left; the smaller kernel needs half of what it lost less padding a side. Raises `ReparamError` for
    an even kernel.
    """
    kernel = _f64(kernel)
    if any(k % 2 == 0 for k in kernel.shape[2:]):
        raise ReparamError(f"a kernel of {kernel.shape[2]}x{kernel.shape[3]} has no middle tap to crop it around")
    lost = [max(k // 2 - size + 1, 0) for k, size in zip(kernel.shape[2:], (height, width))]
    rows, columns = (slice(n, k - n) for n, k in zip(lost, kernel.shape[2:]))
    return kernel[:, :, rows, columns].copy()


def sum_kernels(kernels: list[Array]) -> Array:
    """Return the one kernel of parallel convolutions whose outputs are added: centre-padded to the largest, summed."""
    size = (max(k.shape[2] for k in kernels), max(k.shape[3] for k in kernels))
    channels = {k.shape[:2] for k in kernels}
    if len(channels) > 1:
        raise ReparamError(f"kernels of different channel counts cannot be summed: {sorted(map(list, channels))}")
    return sum(centre_pad(k, size) for k in kernels)


def ungroup(kernel: Array, groups: int) -> Array:
    """Return a grouped kernel `[out, in / groups, h, w]` as a dense one `[out, in, h, w]`, zeros between the groups."""
    kernel = _f64(kernel)
    out_channels, group_in, height, width = kernel.shape
    group_out = out_channels // groups
    dense = np.zeros((out_channels, group_in * groups, height, width))
    for g in range(groups):
        rows = slice(g * group_out, (g + 1) * group_out)
        dense[rows, g * group_in : (g + 1) * group_in] = kernel[rows]
    return dense


def one_by_one_then(
    first: Array, first_bias: Array | None, second: Array, second_bias: Array | None, groups: int
) -> tuple:
    """Return (kernel, bias) of a 1x1 convolution followed by a kxk one of the same number of groups.

    first `[middle, in / groups, 1, 1]`, second `[out, middle / groups, k, k]`. Exact where the second convolution does
    not pad, or pads with the first one's bias (zeros if that has none).
    """
    first, second = _f64(first), _f64(second)
    middle, out_channels = first.shape[0], second.shape[0]
    if first.shape[2:] != (1, 1) or middle != second.shape[1] * groups:
        raise ReparamError(
            f"kernels {list(first.shape)} and {list(second.shape)} cannot follow each other with groups={groups}: "
            "the first must be 1x1 and have as many output channels as the second has input channels"
        )
    grouped_first = first.reshape(groups, middle // groups, -1)
    grouped_second = second.reshape(groups, out_channels // groups, *second.shape[1:])
    # A product of matrices, which einsum would not make of it: a tenth of the time.
    taps = grouped_second.reshape(*grouped_second.shape[:3], -1).swapaxes(2, 3)
    kernel = taps.reshape(groups, -1, middle // groups) @ grouped_first
    kernel = kernel.reshape(out_channels, -1, first.shape[1]).swapaxes(1, 2)
    kernel = np.ascontiguousarray(kernel).reshape(out_channels, -1, *second.shape[2:])
    bias = np.zeros(out_channels) if second_bias is None else _f64(second_bias)
    if first_bias is not None:
        grouped_bias = _f64(first_bias).reshape(groups, -1)
        bias = bias + np.einsum("gomhw,gm->go", grouped_second, grouped_bias).reshape(-1)
    return kernel, bias


def average_pool_kernel(channels: int, size: tuple[int, int], groups: int) -> Array:
    """Return average pooling as a grouped kernel `[channels, channels / groups, *size]`.

    It averages over the whole window: the pooling that counts padded zeros (`exclusive=False` in Paddle).
    """
    group_in = channels // groups
    kernel = np.zeros((channels, group_in, *size))
    kernel[np.arange(channels), np.arange(channels) % group_in] = 1.0 / (size[0] * size[1])
    return kernel


def conv_as_linear(kernel: Array, height: int, width: int) -> Array:
    """Return the matrix of the fully connected layer that a "same" convolution of stride 1 is on maps of one size.

    `[out_channels * height * width, in_channels / groups * height * width]`, both in (channel, row, column) order:
    M[(o, p), (c, q)] = K[o, c, q - p + k // 2] where that lies inside the kernel, else 0 (zero padding of k // 2).
    """
    kernel = _f64(kernel)
    out_channels, group_in, k_h, k_w = kernel.shape
    matrix = np.zeros((out_channels, height, width, group_in, height, width))
    for row in range(height):
        for column in range(width):
            top, left = row - k_h // 2, column - k_w // 2
            rows = slice(max(top, 0), min(top + k_h, height))
            columns = slice(max(left, 0), min(left + k_w, width))
            taps = kernel[:, :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
            matrix[:, row, column, :, rows, columns] = taps
    return matrix.reshape(out_channels * height * width, group_in * height * width)
