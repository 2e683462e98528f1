"""Convolutions with a kernel of its own for each image of a batch, as layers of dynamic kernels train and ship."""

from __future__ import annotations

from dataclasses import replace

import paddle
import paddle.nn.functional as F

from ..arithmetic.geometry import ConvGeometry
from ..arithmetic.tensors import sides


def convolve_by_image(x: paddle.Tensor, by_image: paddle.Tensor, geometry: ConvGeometry) -> paddle.Tensor:
    """Return the convolution of each image with its own kernels `[N, out, in / groups * kh * kw]`.

    It takes NCHW and a padding in numbers. One batched matrix product over unfolded patches, for any batch, in an
    export as well. It multiplies no more than a static convolution: of depthwise kernels, to add W0's convolution and
    L_k fixed ones, mixed per image, multiplies L_k + 1 times as much. Trained on a CPU with 144 channels at 56, 384 at
    14 and 960 at 7 pixels it took 3.6, 0.9 and 0.45 times as long as the static convolution; those took 3.9, 3.2 and
    2.9 times, and a sum over shifted maps 29, 15 and 6.
    """
    height, width = geometry.output_size(*sides(x))
    top, bottom, left, right = geometry.padding
    if geometry.padding_mode != "zeros":
        x = F.pad(x, list(geometry.padding), mode=geometry.padding_mode)
        top = bottom = left = right = 0
    elements, groups = by_image.shape[2], geometry.groups
    if geometry.kernel_size == geometry.stride == (1, 1) and top == bottom == left == right == 0:
        patches = x
    else:
        patches = F.unfold(
            x, list(geometry.kernel_size), list(geometry.stride), [top, left, bottom, right], list(geometry.dilation)
        )
    # oneDNN takes up to twice as long for several images with an axis of one group.
    by_group = [] if groups == 1 else [groups]
    patches = patches.reshape([-1, *by_group, elements, height * width])
    by_image = by_image.reshape([-1, *by_group, geometry.out_channels // groups, elements])
    return paddle.matmul(by_image, patches).reshape([-1, geometry.out_channels, height, width])


def convolve_in_groups(x: paddle.Tensor, by_image: paddle.Tensor, geometry: ConvGeometry) -> paddle.Tensor:
    """Return the convolution of each image with its own kernels `[N, out, in / groups * kh * kw]`, in dygraph.

    One convolution in which each image is a group, of any geometry. The number of groups is that of the images, so it
    is for training alone, and the kernels of all images are in memory at once. Forward and backward of 8 images on a
    CPU, as a share of the static convolution's time: 64 channels of 3x3 at 28 pixels 1.04, 256 at 14 pixels 1.5, 1x1
    kernels 0.6 to 0.9, depthwise ones 0.9 to 1.2; by unfolded patches 2.2, 1.8, 0.3 to 1.3 and 0.6 to 4.7; as a
    weighted sum of four convolutions 4.2 and more.
    """
    if geometry.data_format != "NCHW":
        x = x.transpose([0, 3, 1, 2])
    images = x.shape[0]
    all_images = replace(
        geometry, in_channels=images * geometry.in_channels, out_channels=images * geometry.out_channels,
        groups=images * geometry.groups, data_format="NCHW",
    )  # fmt: skip
    together = x.reshape([1, all_images.in_channels, *x.shape[2:]])
    y = all_images.convolve(together, by_image.reshape(list(all_images.weight_shape)), None)
    y = y.reshape([images, geometry.out_channels, *y.shape[2:]])
    return y if geometry.data_format == "NCHW" else y.transpose([0, 2, 3, 1])
