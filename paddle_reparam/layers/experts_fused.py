"""What layers of several kernels, mixed anew for each image, fuse to: their BNs and biases are folded in."""

from __future__ import annotations

import copy

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import ConvGeometry
from ..arithmetic.tensors import assign, to_float64
from .base import InferenceForm
from .by_image import convolve_by_image
from .dcd_fused import Affine, averages, make_small_conv


class Routing(nn.Layer):
    """A fused routing: `[N, C, H, W]` to the shares of the kernels, `[N, kernels, 1, 1]`.

    The averaged input, through `squeeze` and ReLU where there is one, and `excite`; then a softmax, whose shares sum to
    one, or a sigmoid.
    """

    def __init__(self, squeeze: Affine | None, excite: Affine, sums_to_one: bool, dtype: str) -> None:
        super().__init__()
        self.squeeze = None if squeeze is None else make_small_conv(squeeze, dtype)
        self.excite = make_small_conv(excite, dtype)
        self.sums_to_one = sums_to_one

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = averages(x, 1)
        y = y if self.squeeze is None else F.relu(self.squeeze(y))
        y = self.excite(y)
        return F.softmax(y, 1) if self.sums_to_one else F.sigmoid(y)


class RoutedConv2DFused(InferenceForm):
    """A fused convolution with the kernel sum_e r_e(x) W_e and the bias sum_e r_e(x) b_e + shift, for each image.

    Its forms: `added`, in which each kernel convolves and the maps are added, and `mixed`, in which the kernels are
    mixed for each image and multiplied with its patches. No convolution has a group for each image, which is right for
    one size of batch only. Nor is a kernel that was computed handed to a convolution: oneDNN keeps the first one that
    it got, and convolves all later images by that.
    """

    # As a share of the static convolution's time, for four kernels in Paddle Inference 3.3.1 with oneDNN, one thread,
    # AVX-512, batch 1 and 4, added / mixed. 3x3: 64 channels at 56 pixels 3.9 / 3.7 and 1.9 / 7.0, 256 at 14 pixels
    # 4.1 / 3.7 and 1.7 / 2.5, 512 at 7 pixels 3.6 / 4.2 and 5.0 / 11. 1x1: 24 to 144 at 56 pixels 5.2 / 2.8 and
    # 5.9 / 3.3, 64 to 384 at 14 pixels 4.3 / 2.7 and 5.4 / 2.7, 960 to 160 at 7 pixels 3.6 / 3.5 and 3.7 / 3.9; eight
    # kernels, 1280 to 1000 at 1 pixel, 6.8 / 7.8 and 12 / 30. Depthwise: 4.6 / 8.3 and 3.5 / 45 at 56 pixels, 4.7 / 7.9
    # and 4.0 / 9.1 at 7 pixels. In 32 groups of 4 channels: 31 / 5.6 and 89 / 6.2. Mixed multiplies as often as a
    # static convolution, but reads all kernels for each image and unfolds patches. Also tried, at batch 1: patches by
    # slices, 1.1 to 1.6 of the time of mixed; one convolution of all kernels, as added; one of all scaled inputs, 0.9
    # to 1.5 of added; depthwise kernels over shifted maps, 2.1 to 3.3 of added.
    forms = ("added", "mixed")

    def __init__(self, geometry: ConvGeometry, routing: Routing) -> None:
        super().__init__()
        self.geometry, self.routing = geometry, routing

    def experts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (kernels `[E, out, in / groups, kh, kw]`, biases `[E, out]`, shift `[out]`) in float64."""
        raise NotImplementedError

    def hold(self, weights: np.ndarray, biases: np.ndarray, shift: np.ndarray) -> None:
        """Store what `experts` returns."""
        raise NotImplementedError

    def absorb_affine(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Make this layer compute scale * out + shift per channel: all kernels and biases take the scale.

        The shift goes into every bias where the shares sum to one, and is added once where they do not.
        """
        weights, biases, own_shift = self.experts()
        for_each = shift if self.routing.sums_to_one else np.zeros_like(shift)
        folded = [kernels.fold_affine(weight, bias, scale, for_each) for weight, bias in zip(weights, biases)]
        self.hold(*(np.stack(each) for each in zip(*folded)), own_shift * scale + shift - for_each)

    def for_size(self, height: int, width: int, form: str | None = None) -> RoutedConv2DFused | None:
        """Return the other form, where `form` asks for it and can be it, or on maps of one pixel is faster."""
        if form is None and (height, width) == (1, 1):
            form = "added"
        wanted = {"added": AddedConv2D, "mixed": MixedConv2D, None: type(self)}[form]
        if isinstance(self, wanted) or (wanted is MixedConv2D and not can_be_mixed(self.geometry)):
            return None
        return wanted(self.geometry, copy.deepcopy(self.routing), *self.experts())

    def extra_repr(self) -> str:
        return f"{self.geometry}, kernels={self.routing.excite._out_channels}"


class MixedConv2D(RoutedConv2DFused):
    """The form `mixed`."""

    def __init__(
        self, geometry: ConvGeometry, routing: Routing, weights: np.ndarray, biases: np.ndarray, shift: np.ndarray
    ) -> None:
        super().__init__(geometry, routing)
        count, out_channels = biases.shape
        shapes = {"weight": [count, weights[0].size], "bias": [count, out_channels], "shift": [out_channels]}
        for name, shape in shapes.items():
            setattr(self, name, self.create_parameter(shape, dtype=geometry.dtype))
        self.hold(weights, biases, shift)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        shares, out_channels = self.routing(x).flatten(1), self.geometry.out_channels
        by_image = paddle.matmul(shares, self.weight).reshape([-1, out_channels, self.weight.shape[1] // out_channels])
        bias = paddle.matmul(shares, self.bias) + self.shift
        return convolve_by_image(x, by_image, self.geometry) + bias.unsqueeze([2, 3])

    def experts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weights, biases, shift = map(to_float64, (self.weight, self.bias, self.shift))
        return weights.reshape([-1, *self.geometry.weight_shape]), biases, shift

    def hold(self, weights: np.ndarray, biases: np.ndarray, shift: np.ndarray) -> None:
        assign(self.weight, weights.reshape(len(weights), -1))
        assign(self.bias, biases)
        assign(self.shift, shift)


class AddedConv2D(RoutedConv2DFused):
    """The form `added`.

    `spread` repeats the shares for all channels: oneDNN multiplies maps of several images by one factor for each
    channel as it should, and by one for each image 8 to 16 times slower.
    """

    def __init__(
        self, geometry: ConvGeometry, routing: Routing, weights: np.ndarray, biases: np.ndarray, shift: np.ndarray
    ) -> None:
        super().__init__(geometry, routing)
        self.convs = nn.LayerList([geometry.make_conv(*each) for each in zip(weights, biases)])
        each_channel = np.repeat(np.eye(len(weights)), geometry.out_channels, axis=0)
        self.spread = make_small_conv(Affine(each_channel, None), geometry.dtype)
        self.shift = self.create_parameter([geometry.out_channels], dtype=geometry.dtype)
        assign(self.shift, shift)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        channels_last = self.geometry.data_format != "NCHW"
        shares = self.spread(self.routing(x.transpose([0, 3, 1, 2]) if channels_last else x))
        axes = [-1, 1, 1, self.geometry.out_channels] if channels_last else [-1, self.geometry.out_channels, 1, 1]
        y = self.shift.reshape(axes)
        for conv, share in zip(self.convs, paddle.split(shares, len(self.convs), 1)):
            y = y + share.reshape(axes) * conv(x)
        return y

    def experts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weights, biases = (np.stack([to_float64(getattr(c, n)) for c in self.convs]) for n in ("weight", "bias"))
        return weights, biases, to_float64(self.shift)

    def hold(self, weights: np.ndarray, biases: np.ndarray, shift: np.ndarray) -> None:
        for conv, weight, bias in zip(self.convs, weights, biases):
            assign(conv.weight, weight)
            assign(conv.bias, bias)
        assign(self.shift, shift)


def can_be_mixed(geometry: ConvGeometry) -> bool:
    """Tell whether `convolve_by_image` takes a geometry: NCHW, and padding in numbers."""
    return geometry.data_format == "NCHW" and geometry.padding != "SAME"


def fused_form(geometry: ConvGeometry, routing: Routing, weights: np.ndarray, biases: np.ndarray) -> RoutedConv2DFused:
    """Return the inference form that is, as a rule, the fastest in Paddle Inference: mixed for 1x1 kernels and groups.

    Not for depthwise kernels, which have one row of patches each.
    """
    suits = geometry.kernel_size == (1, 1) or geometry.groups > 1
    mixes = suits and not geometry.is_depthwise and can_be_mixed(geometry)
    form = MixedConv2D if mixes else AddedConv2D
    return form(geometry, routing, weights, biases, np.zeros(geometry.out_channels))
