"""CondConv2D: "CondConv: Conditionally Parameterized Convolutions for Efficient Inference" (NeurIPS 2019,
arXiv 1904.04971)."""

from __future__ import annotations

import math

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic.geometry import ConvGeometry
from ..arithmetic.initializers import init_uniform_fan_in, uniform_fan_in
from ..arithmetic.tensors import assign, to_float64
from ..registry import register_layer
from .base import TWO_OR_MORE
from .dcd_fused import Affine, pooled
from .experts import RoutedConv2D
from .experts_fused import Routing


@register_layer
class CondConv2D(RoutedConv2D):
    """A convolution with the kernel sum_e r_e(x) W_e, r(x) = sigmoid(routing_fn(GAP(x))), for each image.

    Of any geometry; the first arguments are those of `paddle.nn.Conv2D`. `conv.weight` holds the kernels of the
    `experts` (8), one a row, `conv.bias` their biases, which are mixed by the same shares. Each kernel starts uniformly
    by its own fan-in. Made from a convolution, a layer computes what that did: all shares are 1 / experts, and the
    kernels lie around the convolution's.
    """

    options = {"experts": TWO_OR_MORE}  # noqa: RUF012
    holders = {"weight": "conv.weight", "bias": "conv.bias"}  # noqa: RUF012
    train_form_keys = ("conv.weight", "routing_fn.weight", "routing_fn.bias")

    def _create(self, geometry: ConvGeometry, experts: int = 8) -> None:
        nn.Layer.__init__(self)
        self.check_options(experts=experts)
        self.geometry = geometry
        self.routing_fn = nn.Linear(geometry.in_channels, experts)
        init_uniform_fan_in(self.routing_fn)
        self.conv = _Experts(geometry, experts)
        self.to(dtype=geometry.dtype)

    def routing(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.sigmoid(self.routing_fn(pooled(x, 1)))

    def route_evenly(self) -> None:
        assign(self.routing_fn.weight, np.zeros(self.routing_fn.weight.shape))
        # sigmoid(-log(E - 1)) = 1 / E
        experts = self.routing_fn.bias.shape[0]
        assign(self.routing_fn.bias, np.full([experts], -math.log(experts - 1)))

    def fused_routing(self, dtype: str) -> Routing:
        excite = Affine(to_float64(self.routing_fn.weight).T, to_float64(self.routing_fn.bias))
        return Routing(None, excite, sums_to_one=False, dtype=dtype)


class _Experts(nn.Layer):
    """Holds the kernels and biases, under their published names."""

    def __init__(self, geometry: ConvGeometry, experts: int) -> None:
        super().__init__()
        inputs = math.prod(geometry.weight_shape[1:])
        start = uniform_fan_in(inputs)
        shape = [experts, geometry.out_channels * inputs]
        self.weight = self.create_parameter(shape, default_initializer=start)
        if geometry.bias:
            self.bias = self.create_parameter([experts, geometry.out_channels], default_initializer=start)
