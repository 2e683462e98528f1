"""DYConv2D: "Dynamic Convolution: Attention over Convolution Kernels" (CVPR 2020, arXiv 1912.03458)."""

from __future__ import annotations

import math

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic.geometry import ConvGeometry
from ..arithmetic.initializers import init_fan_out_normal
from ..arithmetic.tensors import assign, to_float64
from ..registry import register_layer
from .base import POSITIVE, SHARE, TWO_OR_MORE, WHOLE
from .dcd_fused import Affine
from .experts import RoutedConv2D
from .experts_fused import Routing


@register_layer
class DYConv2D(RoutedConv2D):
    """A convolution with the kernel sum_k pi_k(x) W_k for each image, where the shares pi sum to one.

        pi(x) = softmax(fc2(relu(fc1(GAP(x)))) / temperature)

    Of any geometry; the first arguments are those of `paddle.nn.Conv2D`. Each kernel starts uniformly by its own
    fan-in. Made from a convolution, a layer computes what that did: all shares are alike, and the kernels lie around
    the convolution's. Options, for `build` and `from_conv` as well:

    experts: K, the number of kernels (4).
    ratio: the width of the attention, int(in_channels * ratio) + 1 (1/4); it is K for images of three channels.
    temperature, temperature_epochs: `start_epoch` lowers the temperature linearly, from 30 to 1 over the first 10
        epochs: at the start of epoch 1 it is 30, of epoch 2 27.1, and 1 from epoch 11 on. With a high temperature all
        kernels get their share of the gradient. It never rises: a trained layer that is trained further stays at 1.

    The temperature is in the state dict, as `attention.temperature`: a layer evaluates, fuses and ships with the one
    that its weights were trained with, also where a training ends before it is 1.
    """

    options = {"experts": TWO_OR_MORE, "ratio": SHARE, "temperature": POSITIVE, "temperature_epochs": WHOLE}  # noqa: RUF012
    holders = {"weight": "weight", "bias": "bias"}  # noqa: RUF012
    train_form_keys = ("weight", "attention.fc1.weight", "attention.fc2.weight", "attention.temperature")

    def _create(
        self,
        geometry: ConvGeometry,
        experts: int = 4,
        ratio: float = 0.25,
        temperature: float = 30.0,
        temperature_epochs: int = 10,
    ) -> None:
        nn.Layer.__init__(self)
        self.check_options(experts=experts, ratio=ratio, temperature=temperature, temperature_epochs=temperature_epochs)
        self.geometry = geometry
        self.first_temperature, self.temperature_epochs = temperature, temperature_epochs
        self.attention = _Attention(geometry.in_channels, experts, ratio, temperature)
        bound = math.sqrt(6.0 / math.prod(geometry.weight_shape[1:]))
        self.weight = self.create_parameter(
            [experts, *geometry.weight_shape], default_initializer=nn.initializer.Uniform(-bound, bound)
        )
        self.bias = None
        if geometry.bias:
            self.bias = self.create_parameter([experts, geometry.out_channels], is_bias=True)
        self.to(dtype=geometry.dtype)

    def start_epoch(self, epoch: int) -> None:
        """Lower the temperature to what it is in this epoch, counted from 1."""
        if self.is_repped:
            return
        done = min((epoch - 1) / self.temperature_epochs, 1.0)
        of_epoch = self.first_temperature + (1.0 - self.first_temperature) * done
        assign(self.attention.temperature, np.minimum(to_float64(self.attention.temperature), of_epoch))

    def routing(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.attention(x)

    def route_evenly(self) -> None:
        for parameter in (self.attention.fc2.weight, self.attention.fc2.bias):
            assign(parameter, np.zeros(parameter.shape))

    def fused_routing(self, dtype: str) -> Routing:
        temperature = to_float64(self.attention.temperature)
        squeeze = Affine(to_float64(self.attention.fc1.weight), None)
        weight, bias = (to_float64(p) / temperature for p in (self.attention.fc2.weight, self.attention.fc2.bias))
        return Routing(squeeze, Affine(weight, bias), sums_to_one=True, dtype=dtype)


class _Attention(nn.Layer):
    """The shares of the kernels, `[N, K]`, for `[N, C, H, W]`."""

    def __init__(self, channels: int, experts: int, ratio: float, temperature: float) -> None:
        super().__init__()
        hidden = experts if channels == 3 else int(channels * ratio) + 1
        self.fc1 = nn.Conv2D(channels, hidden, 1, bias_attr=False)
        self.fc2 = nn.Conv2D(hidden, experts, 1, bias_attr=nn.initializer.Constant(0.0))
        for conv in (self.fc1, self.fc2):
            init_fan_out_normal(conv)
        self.register_buffer("temperature", paddle.full([1], temperature))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        features = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        return F.softmax(features.flatten(1) / self.temperature, 1)
