"""DBB2D: "Diverse Branch Block: Building a Convolution as an Inception-like Unit" (CVPR 2021, arXiv 2103.13425)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import ConvGeometry, channel_axis, fold_into, read_bn_affine
from ..arithmetic.initializers import uniform_fan_in
from ..arithmetic.tensors import assign, to_float64
from ..errors import UnsupportedConv
from ..registry import register_layer
from .base import WHOLE, ReparamLayer, one_of, or_none
from .branches import INITS, MiddleTap, bn_of, conv_bn_of, fold_conv_bn, one_by_one_of, start_as_identity
from .dbb_training import can_merge, forward_merged


@register_layer
class DBB2D(ReparamLayer):
    """A convolution with three branches beside it, each of which is linear and fuses into its kernel.

        out = dbb_origin(x) + dbb_1x1(x) + dbb_1x1_kxk(x) + dbb_avg(x),  `[N, C, H, W]` in

    dbb_origin: the convolution, BN.  dbb_1x1: a 1x1 convolution, BN.
    dbb_1x1_kxk: a 1x1 convolution to `internal_channels`, BN, a convolution of the kernel's size, BN.
    dbb_avg: a 1x1 convolution, BN, the average over a window of the kernel's size, BN.

    The first BN of the last two pads, with what it makes of a zero: so the bias of the 1x1 convolution that it becomes
    counts at the borders too. In a depthwise convolution, dbb_avg is an average and its BN, and there is no dbb_1x1.
    Where dbb_1x1_kxk has as many internal channels as the input, its 1x1 convolution adds the input to what it puts
    out, and starts as zero.

    The kernel is odd, of any size but 1x1, with any stride, dilation, padding and groups; the published layer fails
    with a dilation. How the branches are computed while training, `dbb_training` says.

    init: the branches beside dbb_origin start as "random" (published), or as "zero", by the weights of their last BNs,
        so that a layer made from a convolution computes what that did.
    internal_channels: as many as the input has, and twice as many in a depthwise convolution, unless told.

    Raises `UnsupportedConv` for another kernel, for padding="SAME" with a stride, and for internal channels that the
    groups do not divide.
    """

    options = {"init": one_of(*INITS), "internal_channels": or_none(WHOLE)}  # noqa: RUF012
    holders = {"weight": "dbb_origin.conv.weight", "bias": "dbb_origin.bn.bias"}  # noqa: RUF012
    keeps_function_with = {"init": "zero"}  # noqa: RUF012
    train_form_keys = ("dbb_origin.conv.weight", "dbb_1x1_kxk.conv2.weight", "dbb_avg.avgbn.weight")

    def __init__(self, geometry: ConvGeometry, init: str = "random", internal_channels: int | None = None) -> None:
        super().__init__()
        self.check_options(init=init, internal_channels=internal_channels)
        if geometry.kernel_size == (1, 1):
            raise UnsupportedConv(f"DBB2D puts 1x1 kernels beside a larger one, this one is 1x1 itself: {geometry}")
        inputs, outputs, groups = geometry.in_channels, geometry.out_channels, geometry.groups
        alone = inputs == outputs == groups
        internal = inputs * (2 if alone else 1) if internal_channels is None else internal_channels
        if internal % groups:
            raise UnsupportedConv(f"its groups do not divide internal_channels={internal}: {geometry}")
        self.middle = MiddleTap(geometry, "DBB2D")
        geometry = replace(geometry, bias=False)
        pointwise = replace(one_by_one_of(geometry), stride=(1, 1))
        behind_padding = replace(geometry, in_channels=internal, padding=(0, 0, 0, 0), padding_mode="zeros")

        self.geometry = geometry
        self.dbb_origin = conv_bn_of(geometry)
        average, last = Average(geometry), ("avgbn", bn_of(geometry))
        if alone:
            self.dbb_avg = nn.Sequential(("avg", nn.Sequential(Padding(geometry), average)), last)
        else:
            first = ("conv", _fresh(pointwise))
            self.dbb_avg = nn.Sequential(first, ("bn", BNAndPad(geometry, outputs)), ("avg", average), last)
            self.dbb_1x1 = conv_bn_of(one_by_one_of(geometry))
        if internal == inputs:
            first = ("idconv1", AddedConv1x1(replace(pointwise, out_channels=internal)))
        else:
            first = ("conv1", _fresh(replace(pointwise, out_channels=internal)))
        self.dbb_1x1_kxk = nn.Sequential(
            first, ("bn1", BNAndPad(geometry, internal)), ("conv2", _fresh(behind_padding)), ("bn2", bn_of(geometry))
        )
        if init == "zero":
            for bn in self.last_bns()[1:]:
                assign(bn.weight, np.zeros(bn.weight.shape))

    @classmethod
    def build(cls, geometry: ConvGeometry, init: str = "random", internal_channels: int | None = None) -> DBB2D:
        """Return a layer in the place of a convolution with an odd kernel; `options`: `init`, `internal_channels`."""
        return cls(geometry, init, internal_channels)

    def take_weights(self, conv: nn.Conv2D) -> None:
        """Take the convolution's weight and bias into dbb_origin, whose BN starts as the identity."""
        super().take_weights(conv)
        start_as_identity(self.dbb_origin.bn)

    def extra_repr(self) -> str:
        return f"{ConvGeometry.of(self.dbb_origin.conv)}"

    def last_bns(self) -> list[nn.BatchNorm2D]:
        """Return the last BN of each branch, that of dbb_origin first."""
        beside = [self.dbb_1x1.bn] if "dbb_1x1" in self._sub_layers else []
        return [self.dbb_origin.bn, *beside, self.dbb_1x1_kxk.bn2, self.dbb_avg.avgbn]

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        return forward_merged(self, x) if can_merge(self, x) else self.forward_branches(x)

    def forward_branches(self, x: paddle.Tensor) -> paddle.Tensor:
        """Compute each branch on its own and add them, as published."""
        out = self.dbb_origin(x)
        if "dbb_1x1" in self._sub_layers:
            out = out + self.dbb_1x1(self.middle(x))
        return out + self.dbb_1x1_kxk(x) + self.dbb_avg(x)

    def fuse(self) -> nn.Conv2D:
        """Return the plain convolution: the kernels of all branches, added in float64 (transforms I to VI)."""
        geometry = ConvGeometry.of(self.dbb_origin.conv)
        outputs, groups = geometry.out_channels, geometry.groups
        parts = [fold_conv_bn(self.dbb_origin)]
        if "dbb_1x1" in self._sub_layers:
            parts.append(fold_conv_bn(self.dbb_1x1))
        branch = self.dbb_1x1_kxk
        first = kernels.fold_affine(self.first_kernel(), None, *read_bn_affine(branch.bn1.bn))
        parts.append(kernels.one_by_one_then(*first, *fold_into(branch.conv2, *read_bn_affine(branch.bn2)), groups))
        average = kernels.average_pool_kernel(outputs, geometry.kernel_size, groups)
        last = kernels.fold_affine(average, None, *read_bn_affine(self.dbb_avg.avgbn))
        if "conv" in self.dbb_avg._sub_layers:
            first = fold_into(self.dbb_avg.conv, *read_bn_affine(self.dbb_avg.bn.bn))
            last = kernels.one_by_one_then(*first, *last, groups)
        parts.append(last)
        return geometry.make_conv(kernels.sum_kernels([k for k, _ in parts]), sum(b for _, b in parts))

    def first_kernel(self) -> np.ndarray:
        """Return the kernel of the first convolution of dbb_1x1_kxk in float64, with the input that it adds."""
        branch = self.dbb_1x1_kxk
        if "conv1" in branch._sub_layers:
            return to_float64(branch.conv1.weight)
        channels, groups = branch.idconv1._in_channels, branch.idconv1._groups
        return to_float64(branch.idconv1.weight) + kernels.average_pool_kernel(channels, (1, 1), groups)


def _fresh(geometry: ConvGeometry) -> nn.Conv2D:
    """Return a convolution without bias that starts as published."""
    _, inputs, height, width = geometry.weight_shape
    return geometry.new_conv(weight_attr=uniform_fan_in(inputs * height * width), bias_attr=False)


class AddedConv1x1(nn.Conv2D):
    """x + conv(x), with a 1x1 convolution that starts as zero."""

    def __init__(self, geometry: ConvGeometry) -> None:
        channels, groups = geometry.in_channels, geometry.groups
        zero = nn.initializer.Constant(0.0)
        super().__init__(
            channels, channels, 1, groups=groups, weight_attr=zero, bias_attr=False, data_format=geometry.data_format
        )
        self.to(dtype=geometry.dtype)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        # Not super().forward, which Paddle 2.6 cannot trace.
        return x + nn.Conv2D.forward(self, x)


class Padding(nn.Layer):
    """The padding of a convolution on its own."""

    def __init__(self, geometry: ConvGeometry) -> None:
        super().__init__()
        top, bottom, left, right = geometry.padding
        self.border = [left, right, top, bottom]
        self.mode = {"zeros": "constant"}.get(geometry.padding_mode, geometry.padding_mode)
        self.data_format = geometry.data_format

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.pad(x, self.border, mode=self.mode, data_format=self.data_format) if any(self.border) else x


class BNAndPad(nn.Layer):
    """A BN and the padding of a convolution behind it: with what the running statistics make of a zero.

    In training that is no number of the graph, as published, and from the unbiased variance of the batch, which PyTorch
    keeps; Paddle's CPU keeps the biased one.
    """

    def __init__(self, geometry: ConvGeometry, channels: int) -> None:
        super().__init__()
        self.bn = bn_of(replace(geometry, out_channels=channels))
        self.padding = Padding(geometry)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if not any(self.padding.border):
            return self.bn(x)
        before = self.bn._variance.clone() if _by_batch(self.bn) else None
        y = self.bn(x)
        if self.padding.mode != "constant":
            return self.padding(y)
        axis, variance = channel_axis(self.bn, 4), self.bn._variance
        others = paddle.clip(paddle.numel(x).astype(variance.dtype) / variance.shape[0] - 1, min=1)
        border = self.value_of_zero(before, others).reshape([-1 if each == axis else 1 for each in range(4)])
        return self.padding(y - border) + border

    def value_of_zero(self, before: paddle.Tensor | None, others: paddle.Tensor | float) -> paddle.Tensor:
        """Return what to pad with, `[channels]`, after a batch of one and so many other values in each channel.

        `before` is the running variance that there was before it; None: the BN did not normalise by the batch.
        """
        bn, variance = self.bn, self.bn._variance
        if before is not None and paddle.get_device() == "cpu":
            variance = variance + (variance - float(np.float32(bn._momentum)) * before) / others
        scale = bn.weight / paddle.sqrt(variance + float(np.float32(bn._epsilon)))
        return (bn.bias - bn._mean * scale).detach()


def _by_batch(bn: nn.BatchNorm2D) -> bool:
    """Tell whether a BN normalises by the batch now, and moves its running statistics."""
    return bn.training if bn._use_global_stats is None else not bn._use_global_stats


class Average(nn.Layer):
    """The average over the windows of a convolution that does not pad."""

    def __init__(self, geometry: ConvGeometry) -> None:
        super().__init__()
        self.geometry = replace(geometry, padding=(0, 0, 0, 0), padding_mode="zeros")

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        size, stride, dilation = self.geometry.kernel_size, self.geometry.stride, self.geometry.dilation
        data_format = self.geometry.data_format
        if dilation == (1, 1):
            return F.avg_pool2d(x, list(size), list(stride), exclusive=False, data_format=data_format)
        channels = x.shape[3 if data_format == "NHWC" else 1]
        kernel = paddle.full([channels, 1, *size], 1 / (size[0] * size[1]), x.dtype)
        return F.conv2d(x, kernel, None, list(stride), 0, list(dilation), channels, data_format)
