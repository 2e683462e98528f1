"""OctConv2D: "Drop an Octave: Reducing Spatial Redundancy in Convolutional Neural Networks with Octave Convolution"
(ICCV 2019, arXiv 1904.05049)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional, Union

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import ConvGeometry, absorb_affine_into, read_bn_affine
from ..arithmetic.initializers import init_uniform_fan_in
from ..arithmetic.tensors import sides, to_float64
from ..errors import ReparamError, UnsupportedConv
from ..forms import is_number
from ..registry import register_layer
from .base import FLAG, InferenceForm, Option, ReparamLayer
from .branches import bn_of

#: Maps `[N, C, H, W]`; or (high, low), of which the low maps have half the height and width, None where there are none.
Maps = Union[paddle.Tensor, tuple[paddle.Tensor, Optional[paddle.Tensor]]]

ALPHA = Option("a number from 0 on and below 1", lambda value: is_number(value) and 0 <= value < 1)


class OctConv2DFused(InferenceForm):
    """A fused `OctConv2D`, which takes and puts out what that does.

    `high` gives the high maps, out of the high ones with stride 1 and out of all with stride 2; `from_low` adds to them
    what low maps give, with stride 1; `low` gives the low maps, out of all, or a depthwise one out of the low.
    """

    # Measured in Paddle Inference 3.3.1 on one thread at batch 1, AVX-512, beside other work. Averaging and the
    # convolution behind it as one, of twice the kernel with stride 2: 0.7 to 1.1 of the time for 1x1 kernels, 0.8 to
    # 1.2 for 3x3 of 16 and 32 channels, 1.5 to 2.9 for more and for 7x7; low maps are averaged for other readers too,
    # so nothing is left of the little there is to win. Doubling by `index_select` took 0.9 to 1.1 of the time of a
    # depthwise transposed convolution and of reshapes, and is the only one that takes odd sides as they are.
    #
    # On its own the layer is no faster than a plain convolution: blocks (1x1, this layer, 1x1) take 1.0 to 1.7 of the
    # time of the same with a plain 3x3, of 64 channels at 56x56 to 256 at 14x14, and six layers with pairs between them
    # 1.0 to 1.4. Averaging and doubling cost what fewer multiply-adds save; one convolution with zeros instead of two
    # halves put together does not help (1.2 to 1.4).
    def __init__(
        self, channels: tuple[int, int], stride: int, high: nn.Conv2D, from_low: nn.Conv2D | None, low: nn.Conv2D | None
    ) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride
        self.high = high
        self.from_low = from_low
        self.low = low
        self.averages_all = stride == 2 or (low is not None and low._in_channels > channels[1])

    def forward(self, x: Maps) -> Maps:
        full, half = _octaves(x, self.channels, self.averages_all)
        high = self.high(full if self.stride == 1 else _first(half, self.high._in_channels))
        if self.from_low is not None:
            high = high + _doubled(self.from_low(_last(half, self.channels[1])), high)
        low = None
        if self.low is not None:
            low = self.low(_last(half if self.stride == 1 else _halved(half), self.low._in_channels))
        return _like(x, high, low)

    def absorb_affine(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Make this layer compute scale * out + shift per channel, the low channels last."""
        count = self.high._out_channels
        absorb_affine_into(self.high, scale[:count], shift[:count])
        if self.from_low is not None:
            absorb_affine_into(self.from_low, scale[:count])
        if self.low is not None:
            absorb_affine_into(self.low, scale[count:], shift[count:])


@register_layer
class OctConv2D(ReparamLayer):
    """A convolution of which a share of the channels, the low ones, is computed at half the height and width.

        high = conv_h2h(x_high) + double(conv_l2h(x_low)),  low = conv_l2l(x_low) + conv_h2l(halve(x_high))

    halve averages over 2x2 pixels, double repeats each pixel 2x2 times. With stride 2 the inputs are halved first, and
    conv_l2h(x_low), which is then of the size of the high maps, is not doubled. All convolutions have the given kernel
    and keep the size. A depthwise one has conv_h2h and conv_l2l alone.

    The layer takes pairs (high, low) and gives pairs: a network that hands these on is the paper's. The low maps are
    None in the input for alpha_in=0, as in the first layer of such a network, and in the output for alpha_out=0, as in
    its last. It also takes `[N, in_channels, H, W]`, in the place of one convolution: the last channels are halved to
    be the low ones, and the low ones of the output are doubled to be the last. Layers with BNs and activations between
    them compute the same either way; pairs save the halving and doubling.

    A side of odd length is halved to one more than half of it, with its last row or column alone in the average, and
    what is doubled is cut to the size of the high maps. So halving what was doubled gives it back, at every size.

    alpha_in, alpha_out: the shares of low channels, of which int(alpha * channels) are made.
    bn: put a BN behind each output, `bn_h` and `bn_l`, which fusing folds, where a network hands pairs on.

    Weights start uniformly within 1 / sqrt(fan_in). Raises `UnsupportedConv` for strides other than 1 and 2, groups
    that are not depthwise, other padding than what keeps the size, NHWC, and shares by which no channel is low;
    `ReparamError` for a pair of other numbers of channels.
    """

    fused_type = OctConv2DFused
    options = {"alpha_in": ALPHA, "alpha_out": ALPHA, "bn": FLAG}  # noqa: RUF012
    train_form_keys = ("conv_h2h.weight",)

    def __init__(self, geometry: ConvGeometry, alpha_in: float = 0.5, alpha_out: float = 0.5, bn: bool = False) -> None:
        super().__init__()
        self.check_options(alpha_in=alpha_in, alpha_out=alpha_out, bn=bn)
        _refuse_unsupported(geometry)
        low_in, low_out = int(alpha_in * geometry.in_channels), int(alpha_out * geometry.out_channels)
        shares = f"of {geometry} {low_in} and {low_out} channels are low with {alpha_in=} and {alpha_out=}"
        if low_in == low_out == 0:
            raise UnsupportedConv(f"OctConv2D needs low channels, in or out; {shares}")
        depthwise = geometry.groups > 1
        if depthwise and low_in * geometry.out_channels != low_out * geometry.in_channels:
            raise UnsupportedConv(f"a depthwise OctConv2D makes low channels out of low ones alone; {shares}")
        self.channels = (geometry.in_channels - low_in, low_in)
        self.out_channels = (geometry.out_channels - low_out, low_out)
        self.stride = geometry.stride[0]
        for name, inputs, outputs in (
            ("conv_h2h", self.channels[0], self.out_channels[0]),
            ("conv_h2l", self.channels[0], 0 if depthwise else low_out),
            ("conv_l2h", low_in, 0 if depthwise else self.out_channels[0]),
            ("conv_l2l", low_in, low_out),
        ):
            part = replace(geometry, in_channels=inputs, out_channels=outputs, stride=(1, 1))
            setattr(self, name, _new_conv(part, depthwise) if inputs and outputs else None)
        for name, outputs in zip(("bn_h", "bn_l"), self.out_channels):
            setattr(self, name, bn_of(replace(geometry, out_channels=outputs)) if bn and outputs else None)

    @classmethod
    def build(cls, geometry: ConvGeometry, **options: Any) -> OctConv2D:
        """Return a layer in the place of a convolution that keeps the size or halves it; `options`: as for the class.

        The channels of an image stay together: alpha_in is 0 for 3 input channels and fewer, unless it is given.
        Nothing of the convolution's weights can be kept; a BN that follows the convolution stays after this layer.
        """
        options.setdefault("alpha_in", 0.0 if geometry.in_channels <= 3 else 0.5)
        return cls(geometry, **options)

    def extra_repr(self) -> str:
        low = f"low={self.channels[1]}->{self.out_channels[1]}"
        return f"{sum(self.channels)}->{sum(self.out_channels)}, {low}, stride={self.stride}"

    def forward_train_form(self, x: Maps) -> Maps:
        full, half = _octaves(x, self.channels, self.stride == 2 or self.conv_h2l is not None)
        high = self.conv_h2h(full if self.stride == 1 else _first(half, self.channels[0]))
        if self.conv_l2h is not None:
            of_low = self.conv_l2h(_last(half, self.channels[1]))
            high = high + (of_low if self.stride == 2 else _doubled(of_low, high))
        low = None
        if self.out_channels[1]:
            averages = half if self.stride == 1 else _halved(half)
            parts = [] if self.conv_h2l is None else [self.conv_h2l(_first(averages, self.channels[0]))]
            parts += [] if self.conv_l2l is None else [self.conv_l2l(_last(averages, self.channels[1]))]
            low = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        if self.bn_h is not None:
            high = self.bn_h(high)
        if self.bn_l is not None:
            low = self.bn_l(low)
        return _like(x, high, low)

    def fuse(self) -> OctConv2DFused:
        """Return the inference form: convolutions that read maps of one size are one, computed in float64."""
        high, from_low = [self.conv_h2h, self.conv_l2h], []
        if self.stride == 1:
            high, from_low = high[:1], high[1:]
        return OctConv2DFused(
            self.channels,
            self.stride,
            _merged(high, self.bn_h),
            _merged(from_low, self.bn_h, shifted=False),
            _merged([self.conv_h2l, self.conv_l2l], self.bn_l),
        )


def _refuse_unsupported(geometry: ConvGeometry) -> None:
    if geometry.stride not in ((1, 1), (2, 2)):
        raise UnsupportedConv(f"OctConv2D has stride 1 or 2 for height and width alike, this one is {geometry}")
    if geometry.groups > 1 and not geometry.is_depthwise:
        raise UnsupportedConv(
            f"OctConv2D stands in for convolutions without groups and for depthwise ones, this one is {geometry}"
        )
    if geometry.padding != "SAME":
        top, bottom, left, right = geometry.padding
        rows, columns = (d * (k - 1) for k, d in zip(geometry.kernel_size, geometry.dilation))
        if (top + bottom, left + right) != (rows, columns):
            raise UnsupportedConv(
                f"OctConv2D has kernels that keep the size of its maps, by a padding of {rows} rows and {columns} "
                f"columns in all for {geometry}; this one has padding {geometry.padding}"
            )
    if geometry.data_format != "NCHW":
        raise UnsupportedConv(f"OctConv2D takes NCHW, this one takes {geometry.data_format}")


def _new_conv(geometry: ConvGeometry, depthwise: bool) -> nn.Conv2D:
    groups = geometry.in_channels if depthwise else 1
    conv = replace(geometry, groups=groups).new_conv(bias_attr=None if geometry.bias else False)
    init_uniform_fan_in(conv)
    return conv


def _merged(convs: list[nn.Conv2D | None], bn: nn.BatchNorm2D | None, shifted: bool = True) -> nn.Conv2D | None:
    """Return the one convolution, of what all of some read, that gives the BN of their sum; its scale alone unless
    `shifted`."""
    convs = [conv for conv in convs if conv is not None]
    if not convs:
        return None
    geometry = ConvGeometry.of(convs[0])
    scale, shift = np.ones(geometry.out_channels), np.zeros(geometry.out_channels)
    if bn is not None:
        scale, shift = read_bn_affine(bn)
    kernel = np.concatenate([to_float64(conv.weight) for conv in convs], axis=1)
    bias = sum(to_float64(conv.bias) for conv in convs) if geometry.bias else None
    folded = kernels.fold_affine(kernel, bias, scale, shift if shifted else np.zeros_like(shift))
    return replace(geometry, in_channels=sum(conv._in_channels for conv in convs)).make_conv(*folded)


# ---------------------------------------------------------------------------------------------------------------------
# Maps of two sizes. None of these is converted when a network is traced: a side of unknown length is -1 to them.


@paddle.jit.not_to_static
def _octaves(x: Maps, channels: tuple[int, int], averages_all: bool) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Return the high maps of an input, and all of its maps at half their size; the low ones unless `averages_all`."""
    if not isinstance(x, (tuple, list)):
        return _first(x, channels[0]), _halved(x if averages_all else _last(x, channels[1]))
    high, low = x
    given = (high.shape[1], 0 if low is None else low.shape[1])
    if given != channels:
        raise ReparamError(
            f"this OctConv2D takes pairs of {channels[0]} high and {channels[1]} low channels, not of {given[0]} and "
            f"{given[1]}"
        )
    parts = [*([_halved(high)] if averages_all else []), *([] if low is None else [low])]
    return high, parts[0] if len(parts) == 1 else paddle.concat(parts, 1)


@paddle.jit.not_to_static
def _like(x: Maps, high: paddle.Tensor, low: paddle.Tensor | None) -> Maps:
    """Return what a layer puts out for an input: a pair for a pair, else maps of which the low ones are the last."""
    if isinstance(x, (tuple, list)):
        return high, low
    return high if low is None else paddle.concat([high, _doubled(low, high)], 1)


@paddle.jit.not_to_static
def _first(x: paddle.Tensor, count: int) -> paddle.Tensor:
    return x if x.shape[1] == count else paddle.split(x, [count, x.shape[1] - count], 1)[0]


@paddle.jit.not_to_static
def _last(x: paddle.Tensor, count: int) -> paddle.Tensor:
    # Not by `split`: a part of it, joined with its own last row as in halving, raises in Paddle Inference's bfloat16.
    return x if x.shape[1] == count else paddle.slice(x, [1], [x.shape[1] - count], [x.shape[1]])


@paddle.jit.not_to_static
def _halved(x: paddle.Tensor) -> paddle.Tensor:
    """Return averages over 2x2 pixels, with the last row or column of an odd side alone."""
    # What is doubled at the end of an even side of unknown length is beyond the last window.
    rows, columns = (side < 0 or side % 2 for side in x.shape[2:])
    if rows:
        x = paddle.concat([x, x[:, :, -1:]], 2)
    if columns:
        x = paddle.concat([x, x[:, :, :, -1:]], 3)
    return F.avg_pool2d(x, 2, 2)


@paddle.jit.not_to_static
def _doubled(low: paddle.Tensor, high: paddle.Tensor) -> paddle.Tensor:
    """Return low maps with each pixel repeated 2x2 times, cut to the size of high ones."""
    if paddle.in_dynamic_mode():
        # The gradient of `index_select` takes five times as long, and that of `gather` along other axes than the first
        # is silently wrong in Paddle 2.6.
        batch, channels, height, width = low.shape
        pixels = low.reshape([batch, channels, height, 1, width, 1]).expand([batch, channels, height, 2, width, 2])
        low = pixels.reshape([batch, channels, 2 * height, 2 * width])
        return low if low.shape[2:] == high.shape[2:] else low[:, :, : high.shape[2], : high.shape[3]]
    for axis, length in zip((2, 3), sides(high)):
        low = paddle.index_select(low, paddle.arange(length) // 2, axis)
    return low
