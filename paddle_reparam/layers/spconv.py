"""SPConv2D: "Split to Be Slim: An Overlooked Redundancy in Vanilla Convolution" (IJCAI 2020, arXiv 2006.12085)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import ConvGeometry, absorb_affine_into, fold_into, read_bn_affine
from ..arithmetic.initializers import init_fan_out_normal
from ..arithmetic.tensors import assign, to_float64
from ..errors import UnsupportedConv
from ..registry import register_layer
from .base import FLAG, SHARE, InferenceForm, ReparamLayer

# float32 holds no reciprocal of what is smaller than about 1e-38; the rest is room for what is multiplied with it.
_SMALLEST_FACTOR = 1e-30

# Groups of channels that do not fill whole vectors of AVX-512 are convolved as one, with zeros between them: oneDNN has
# no fast kernel for them there. Blocks as below, AVX-512 / AVX2, dense to grouped: 8 channels a group at 56x56 pixels
# 0.35 / 1.03, at 28x28 0.48 / 1.00, 4 a group of 16 channels 0.47 / 0.92; of 16 a group and more 0.94 to 1.08.
_VECTOR = 16


class SPConv2DFused(InferenceForm):
    """A fused `SPConv2D`: out = u1 + sigmoid(gate_scale * GAP(d)) * d with d = u3 - u1, `[N, C, H, W]` in and out.

    `uncertain` (1x1) gives u1, `spatial` (3x3, of the representative channels) and `difference` (1x1, of all channels)
    together give d. `gate_scale` is 1 until an affine is absorbed; it is the kernel of a depthwise convolution.
    """

    # Of five ways to write this, the fastest and the only one without a slow case. Measured in Paddle Inference 3.3.1
    # with oneDNN on one thread, blocks (1x1, this layer, 1x1) of ResNet50 at ratio 1/2, batch 1, AVX-512 / AVX2: 0.76
    # to 0.91 / 0.74 to 0.93 of the time of the same block with a plain 3x3. Without the second convolution of the
    # uncertain channels, as g * d - v, oneDNN subtracts maps of two layouts where it lays grouped convolutions out in
    # another way than others: 2.6 with AVX-512 at 56x56 pixels, and an exception on 16 channels. Here all additions of
    # maps are done inside convolutions, which convert what they add to.
    #
    # As a product with numbers, the gate's scale would stand between two conversions in Paddle's bfloat16, where a
    # convolution takes up the sigmoid as well: ResNet50 has 235 operators instead of 267 there and takes 0.97 of the
    # time (one thread, batch 1, beside other work). Also tried, in OpenVINO (both), onnxruntime and Paddle's bfloat16:
    # the 3x3 and `difference` as one dense 3x3 of all channels, so that nothing is split, 1.42, 1.36, 1.30 and 0.98; of
    # the representative ones 1.08, 1.06, 1.01 and 1.12; `uncertain` with zeros for the representative channels and a
    # slice for the 3x3, 1.05, 0.99, 0.95 and 0.96.
    def __init__(self, spatial: nn.Conv2D, difference: nn.Conv2D, uncertain: nn.Conv2D) -> None:
        super().__init__()
        self.spatial = spatial
        self.difference = difference
        self.uncertain = uncertain
        self.stride = spatial._stride[0]
        self.channels = [spatial._in_channels, uncertain._in_channels]
        self.register_buffer("gate_scale", paddle.ones([spatial._out_channels, 1, 1, 1], spatial.weight.dtype))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        representative, uncertain = paddle.split(x, self.channels, axis=1)
        d = self.spatial(representative) + self.difference(_pooled(x, self.stride))
        gate = F.sigmoid(F.conv2d(F.adaptive_avg_pool2d(d, 1), self.gate_scale, groups=self.spatial._out_channels))
        return self.uncertain(_pooled(uncertain, self.stride)) + gate * d

    def absorb_affine(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Make this layer compute scale * out + shift per channel, with the gate as it was.

        u3 and u1 both take the affine, and the gate divides their difference by the scale again. A scale of zero, or
        one too small to divide by in float32 (1e-30), leaves the shift alone.
        """
        scale, gate_scale = np.asarray(scale, np.float64), to_float64(self.gate_scale).reshape(-1)
        vanishes = np.abs(scale) <= _SMALLEST_FACTOR * np.abs(gate_scale)
        scale = np.where(vanishes, 0.0, scale)
        gate_scale = np.where(vanishes, 0.0, gate_scale / np.where(vanishes, 1.0, scale))
        absorb_affine_into(self.spatial, scale)
        absorb_affine_into(self.difference, scale)
        absorb_affine_into(self.uncertain, scale, shift)
        assign(self.gate_scale, gate_scale.reshape(self.gate_scale.shape))


@register_layer
class SPConv2D(ReparamLayer):
    """A 3x3 convolution that spends its weights on a share of the input channels and little on the rest.

    Of `[N, in_channels, H, W]` the first A = int(in_channels * ratio) channels are representative (x3), the rest
    uncertain (x1):

        u3 = BN1(gwc(x3) + pwc(x3)),  u1 = BN2(conv1x1(x1))
        out = g * u3 + (1 - g) * u1,  g = sigmoid(GAP(u3) - GAP(u1))

    gwc is 3x3 in two groups, pwc and conv1x1 are 1x1; padding is the dilation. With stride 2 the inputs of pwc and
    conv1x1 are averaged over 2x2 pixels. A side of odd length gets one row or column of zeros at its end for that, and
    the zeros count: so out has the size that the 3x3 convolution gives, where the published layer fails.

    `bias=True` gives gwc and pwc biases as well. Weights start from a normal distribution of variance 2 / fan_out.
    Raises `UnsupportedConv` for channels that cannot be split so, and for a dilation with stride 2.
    """

    fused_type = SPConv2DFused
    options = {"ratio": SHARE, "bias": FLAG}  # noqa: RUF012
    keeps_function_with = None
    train_form_keys = ("gwc.weight", "pwc.weight", "conv1x1.weight")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        ratio: float = 0.5,
        dilation: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        representative = _representative_channels(in_channels, out_channels, ratio)
        if stride not in (1, 2) or (stride == 2 and dilation != 1):
            raise UnsupportedConv(
                f"SPConv2D has stride 1 with any dilation, or stride 2 with dilation 1; stride={stride} with "
                f"dilation={dilation} is neither"
            )
        self.stride = stride
        self.channels = [representative, in_channels - representative]
        bias_attr = None if bias else False
        self.gwc = nn.Conv2D(representative, out_channels, 3, stride, dilation, dilation, groups=2, bias_attr=bias_attr)
        self.pwc = nn.Conv2D(representative, out_channels, 1, bias_attr=bias_attr)
        self.conv1x1 = nn.Conv2D(in_channels - representative, out_channels, 1)
        self.bn1 = nn.BatchNorm2D(out_channels)
        self.bn2 = nn.BatchNorm2D(out_channels)
        for conv in (self.gwc, self.pwc, self.conv1x1):
            init_fan_out_normal(conv)

    @classmethod
    def build(cls, geometry: ConvGeometry, **options: Any) -> SPConv2D:
        """Return a layer in the place of a 3x3 convolution with padding == dilation; `options`: `ratio`, `bias`.

        Nothing of the convolution's weights can be kept; a BN that follows the convolution stays after this layer.
        """
        stride, dilation = geometry.stride[0], geometry.dilation[0]
        if geometry.kernel_size != (3, 3):
            raise UnsupportedConv(f"SPConv2D stands in for 3x3 kernels only, this one is {geometry}")
        if geometry.groups != 1:
            raise UnsupportedConv(f"SPConv2D stands in for convolutions without groups only, this one is {geometry}")
        if geometry.stride != (stride, stride) or geometry.dilation != (dilation, dilation):
            raise UnsupportedConv(
                f"SPConv2D has one stride and one dilation for height and width, this one is {geometry}"
            )
        if geometry.padding != (dilation,) * 4 or geometry.padding_mode != "zeros":
            raise UnsupportedConv(
                f"SPConv2D pads by its dilation ({dilation}) with zeros, this one has padding {geometry.padding} "
                f"in mode {geometry.padding_mode!r}"
            )
        if geometry.data_format != "NCHW":
            raise UnsupportedConv(f"SPConv2D takes NCHW, this one takes {geometry.data_format}")
        layer = cls(geometry.in_channels, geometry.out_channels, stride, dilation=dilation, **options)
        layer.to(dtype=geometry.dtype)
        return layer

    def extra_repr(self) -> str:
        representative, uncertain = self.channels
        channels = f"{representative + uncertain}->{self.conv1x1._out_channels}"
        return f"{channels}, representative={representative}, stride={self.stride}"

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        representative, uncertain = paddle.split(x, self.channels, axis=1)
        u3 = self.bn1(self.gwc(representative) + self.pwc(_pooled(representative, self.stride)))
        u1 = self.bn2(self.conv1x1(_pooled(uncertain, self.stride)))
        difference = u3 - u1
        return u1 + F.sigmoid(F.adaptive_avg_pool2d(difference, 1)) * difference

    def fuse(self) -> SPConv2DFused:
        scale, shift = read_bn_affine(self.bn1)
        spatial, bias = fold_into(self.gwc, scale, shift)
        pointwise, more_bias = fold_into(self.pwc, scale, np.zeros_like(shift))
        uncertain, uncertain_bias = fold_into(self.conv1x1, *read_bn_affine(self.bn2))
        geometry, one_by_one = ConvGeometry.of(self.gwc), ConvGeometry.of(self.conv1x1)
        if any(channels % _VECTOR for channels in spatial.shape[:2]):
            spatial, geometry = kernels.ungroup(spatial, geometry.groups), replace(geometry, groups=1)
        return SPConv2DFused(
            geometry.make_conv(spatial, bias + more_bias - uncertain_bias),
            replace(one_by_one, in_channels=sum(self.channels)).make_conv(
                np.concatenate([pointwise, -uncertain], axis=1), None
            ),
            one_by_one.make_conv(uncertain, uncertain_bias),
        )


def _representative_channels(in_channels: int, out_channels: int, ratio: float) -> int:
    representative = int(in_channels * ratio)
    numbers = f"in_channels={in_channels} with ratio={ratio} gives {representative} representative channels"
    if not 0 < representative < in_channels:
        raise UnsupportedConv(
            f"{numbers} of {in_channels}: there must be some of them and some others; choose another ratio"
        )
    if representative % 2 or out_channels % 2:
        raise UnsupportedConv(
            f"{numbers} for {out_channels} output channels: both numbers must be even, for two groups; "
            "choose another ratio, or leave this convolution as it is"
        )
    return representative


def _pooled(x: paddle.Tensor, stride: int) -> paddle.Tensor:
    if stride == 1:
        return x
    # A side of unknown length counts as odd: if it turns out even, its zeros are beyond the last window. (avg_pool2d's
    # own padding would not do: Paddle's kernels do not agree on whether zeros at the end alone count.)
    rows, columns = (int(not isinstance(side, int) or side < 0 or side % 2) for side in x.shape[2:])
    if rows or columns:
        x = F.pad(x, [0, columns, 0, rows])
    return F.avg_pool2d(x, 2, 2)
