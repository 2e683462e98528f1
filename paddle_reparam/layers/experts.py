"""What CondConv and DY-Conv share: a convolution whose kernel is mixed of several, for each image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import paddle
from paddle import nn

from ..arithmetic.geometry import ConvGeometry
from ..arithmetic.tensors import assign, to_float64, type_name
from .base import ReparamLayer
from .by_image import convolve_in_groups
from .experts_fused import RoutedConv2DFused, Routing, fused_form

# How far the kernels of a layer that starts from a convolution lie around its kernel, in its own standard deviation.
_SPREAD = 0.5


class RoutedConv2D(ReparamLayer):
    """A convolution with the kernel sum_e r_e(x) W_e, and the bias sum_e r_e(x) b_e, for each image.

    A subclass has `routing`, which gives the shares r, and the kernels and biases, one a row.
    """

    fused_type = RoutedConv2DFused
    keeps_function_with: ClassVar[dict[str, Any] | None] = {}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: Any = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias_attr: bool | None = None,
        **options: Any,
    ) -> None:
        conv = nn.Conv2D(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias_attr=bias_attr)
        self._create(ConvGeometry.of(conv), **options)

    @classmethod
    def build(cls, geometry: ConvGeometry, **options: Any) -> RoutedConv2D:
        """Return a new layer for a convolution's geometry, whatever it is; the options are those of the class."""
        layer = cls.__new__(cls)
        layer._create(geometry, **options)
        return layer

    def _create(self, geometry: ConvGeometry, **options: Any) -> None:
        raise NotImplementedError

    def routing(self, x: paddle.Tensor) -> paddle.Tensor:
        """Return the shares of the kernels `[N, E]` for images `[N, C, H, W]`."""
        raise NotImplementedError

    def route_evenly(self) -> None:
        """Make every share 1 / E, whatever the image, so that the routing learns from there."""
        raise NotImplementedError

    def fused_routing(self, dtype: str) -> Routing:
        """Return the routing as it ships."""
        raise NotImplementedError

    def experts(self) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        """Return the kernels, one a row of any shape, and the biases `[E, out]` or None."""
        state = dict(self.named_parameters())
        return state[self.holders["weight"]], state.get(self.holders["bias"])

    def take_weights(self, conv: nn.Conv2D) -> None:
        """Start with kernels around the convolution's, which is their mean, and with even shares.

        They must differ, or they would all learn the same, and the routing nothing.
        """
        for source, holder in self._held(conv):
            row = to_float64(source).reshape(holder.shape[1:])
            assign(holder, np.broadcast_to(row, holder.shape))
        weight = self.experts()[0]
        apart = to_float64(paddle.randn(weight.shape))
        apart -= apart.mean(0)
        assign(weight, to_float64(weight) + _SPREAD * to_float64(conv.weight).std() * apart)
        self.route_evenly()

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        channels_last = self.geometry.data_format != "NCHW"
        shares = self.routing(x.transpose([0, 3, 1, 2]) if channels_last else x)
        weight, bias = self.experts()
        y = _convolved(x, shares, weight, self.geometry)
        if bias is None:
            return y
        axes = [-1, 1, 1, bias.shape[1]] if channels_last else [-1, bias.shape[1], 1, 1]
        return y + paddle.matmul(shares, bias).reshape(axes)

    def fuse(self) -> RoutedConv2DFused:
        """Return the inference form, which takes in the BN that follows."""
        weight, bias = map(to_float64, self.experts())
        geometry = replace(self.geometry, dtype=type_name(self.experts()[0]))
        biases = np.zeros([len(weight), geometry.out_channels]) if bias is None else bias
        weights = weight.reshape([-1, *geometry.weight_shape])
        return fused_form(geometry, self.fused_routing(geometry.dtype), weights, biases)

    def extra_repr(self) -> str:
        return f"{self.geometry}, experts={len(self.experts()[0])}"


def _convolved(x: paddle.Tensor, shares: paddle.Tensor, weight: paddle.Tensor, geometry: ConvGeometry) -> paddle.Tensor:
    """Return each image convolved with its own mixture of the kernels; a traced one has no number of images."""
    if paddle.in_dynamic_mode():
        by_image = paddle.matmul(shares, weight.reshape([weight.shape[0], -1]))
        return convolve_in_groups(x, by_image, geometry)
    y = 0.0
    for i in range(weight.shape[0]):
        alone = geometry.convolve(x, weight[i].reshape(list(geometry.weight_shape)), None)
        y = y + shares[:, i].reshape([-1, 1, 1, 1]) * alone
    return y
