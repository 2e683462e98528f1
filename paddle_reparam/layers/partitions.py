"""Maps cut into partitions of one size, and fully connected layers over them: what RepMLP and RepMLPNet share."""

from __future__ import annotations

from collections.abc import Sequence

import paddle
import paddle.nn.functional as F

from ..arithmetic.tensors import sides


def pad_to_partitions(x: paddle.Tensor, height: int, width: int) -> paddle.Tensor:
    """Return `[N, C, H, W]` with zeros at the bottom and right, so that H and W are multiples of height and width."""
    rows, columns = partition_counts(x, height, width)
    bottom, right = (filled - side for filled, side in zip((rows * height, columns * width), sides(x)))
    if not isinstance(bottom, int) or not isinstance(right, int):
        # A side of unknown length, in a network that is being traced: Paddle 2.6 pads by numbers only.
        x = F.pad(x, [0, width - 1, 0, height - 1])
        return x[:, :, : rows * height, : columns * width]
    return F.pad(x, [0, right, 0, bottom]) if bottom or right else x


def split_into_partitions(x: paddle.Tensor, height: int, width: int) -> paddle.Tensor:
    """Return `[N, C, H, W]` as `[N, C, rows * columns, height * width]`; zeros fill up the last row and column.

    In no more than four axes, as all of this file: oneDNN moves six by its reference code, and in bfloat16 Paddle
    Inference 3.3 raises where six lead into a convolution.
    """
    rows, columns = partition_counts(x, height, width)
    channels = x.shape[1]
    x = pad_to_partitions(x, height, width).reshape([-1, height, columns, width])
    return moved(x, [0, 2, 1, 3], [-1, channels, rows * columns, height * width])


def join_partitions(
    parts: paddle.Tensor, channels: int, partition: tuple[int, int], size: tuple[int, int]
) -> paddle.Tensor:
    """Return what holds a partition after the other, image by image and channel by channel, as `[N, channels, *size]`.

    What was filled up is cut off again.
    """
    (height, width), (part_height, part_width) = size, partition
    rows, columns = -(-height // part_height), -(-width // part_width)
    x = parts.reshape([-1, columns, part_height, part_width])
    x = moved(x, [0, 2, 1, 3], [-1, channels, rows * part_height, columns * part_width])
    known = all(isinstance(side, int) for side in size)
    if known and (rows * part_height, columns * part_width) == tuple(size):
        return x
    return x[:, :, :height, :width]


def moved(x: paddle.Tensor, order: Sequence[int], shape: Sequence[int]) -> paddle.Tensor:
    """Return `x.transpose(order).reshape(shape)`, as Paddle Inference 3.3 computes it in every precision.

    With oneDNN it makes one operator of a transposition and a reshape right behind it. In bfloat16 that one has lost
    the shape: what reads it then raises. So another operator stands between them, which costs nothing.
    """
    return paddle.flatten(x.transpose(order), x.ndim - 2, x.ndim - 1).reshape(shape)


def partition_counts(x: paddle.Tensor, height: int, width: int) -> tuple[int, int]:
    """Return (rows, columns) of the partitions of `[N, C, H, W]`, the last ones filled up."""
    rows, columns = sides(x)
    return (rows + height - 1) // height, (columns + width - 1) // width


def size_of(x: paddle.Tensor) -> str:
    """Return height x width of `[N, C, H, W]` as words, "open" for a side that a traced graph leaves open."""
    sides = x.shape[2:]
    return "x".join(str(side) if isinstance(side, int) and side >= 0 else "open" for side in sides)


def grouped_linear(x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    """Return a fully connected layer in groups as one batched matrix product.

    `[rows, groups, in]` times `[groups * out, in]` (the layout of a grouped 1x1 convolution): `[rows, groups, out]`.
    A grouped 1x1 convolution over thousands of channels computes the same many times slower.
    """
    groups = x.shape[1]
    weight = weight.reshape([groups, -1, x.shape[2]])
    return paddle.matmul(x.transpose([1, 0, 2]), weight, transpose_y=True).transpose([1, 0, 2])
