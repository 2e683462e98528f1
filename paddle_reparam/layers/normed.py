"""What the weight normalisations share: a kernel that is a factor times a direction, computed in every forward pass."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
import paddle
from paddle import nn

from ..arithmetic.geometry import ConvGeometry
from ..arithmetic.tensors import assign, to_float64, type_name
from ..errors import UnsupportedConv
from .base import ReparamLayer

# Below this norm a filter has no direction to speak of. Its square is far from where float32 ends.
_NO_NORM = 1e-12
# What is left of a centred filter, relative to the filter, where all of its weights are alike but for rounding.
_NO_SPREAD = 1e-6


class NormedConv2D(ReparamLayer):
    """A convolution whose filters are w = g * u(v): a trained factor g each, and the directions u of trained weights v.

    State: `weight_v` `[out, in / groups, kh, kw]`, `weight_g` `[out, 1, 1, 1]` and, where the convolution has one,
    `bias`. v starts as the convolution's weight, or from a normal distribution of variance 2 / fan_in, and g as what
    makes w nearest to that. A filter without a direction, such as one of zeros, keeps the drawn one and gets g = 0: so
    it is what it was and can learn.

    u is computed in every forward pass, never kept; in float32 at least, whatever the autocast around it.
    """

    holders = {"weight": "weight_v", "bias": "bias"}  # noqa: RUF012
    train_form_keys = ("weight_g", "weight_v")
    #: Whether the mean of each filter is taken off first.
    centred: ClassVar[bool] = False
    #: Whether directions are computed in float64 whatever the layer's own type is.
    in_float64: ClassVar[bool] = False

    def __init__(self, geometry: ConvGeometry) -> None:
        super().__init__()
        self.fan = math.prod(geometry.weight_shape[1:])
        if self.centred and self.fan < 3:
            raise UnsupportedConv(
                f"its filters have {self.fan} weights each; centred and of norm 1, fewer than 3 have nothing to learn"
            )
        self.geometry = geometry
        starts = {
            "weight_v": (geometry.weight_shape, nn.initializer.KaimingNormal()),
            "weight_g": ((geometry.out_channels, 1, 1, 1), nn.initializer.Constant(0.0)),
            "bias": ((geometry.out_channels,), nn.initializer.Constant(0.0)),
        }
        self.bias = None
        for name, (shape, start) in starts.items():
            if name != "bias" or geometry.bias:
                parameter = self.create_parameter(list(shape), dtype=geometry.dtype, default_initializer=start)
                setattr(self, name, parameter)
        self._start_g(to_float64(self.weight_v))

    @classmethod
    def build(cls, geometry: ConvGeometry, **options: Any) -> NormedConv2D:
        """Return a new layer for a convolution's geometry; the options and errors are those of the class."""
        cls.check_options(**options)
        return cls(geometry, **options)

    def take_weights(self, conv: nn.Conv2D) -> None:
        """Take the convolution's weight as v, its bias, and g as what makes w nearest to the weight."""
        drawn = to_float64(self.weight_v)
        super().take_weights(conv)
        weight = to_float64(conv.weight)
        left = np.linalg.norm(self._rows(conv.weight.astype("float64")).numpy(), axis=1)
        norms = np.linalg.norm(weight.reshape(len(left), -1), axis=1)
        empty = left <= _NO_NORM + _NO_SPREAD * norms
        if empty.any():
            assign(self.weight_v, np.where(empty[:, None, None, None], drawn, weight))
        self._start_g(weight)

    def _start_g(self, weight: np.ndarray) -> None:
        """Let w be as near to a weight as the directions allow: the g of each filter is its product with its u."""
        with paddle.no_grad():
            directions = self.directions(self._rows(self.weight_v.astype("float64"))).numpy()
        products = (directions * weight.reshape(directions.shape)).sum(axis=1)
        assign(self.weight_g, products.reshape(self.weight_g.shape))

    def directions(self, rows: paddle.Tensor) -> paddle.Tensor:
        """Return u, `[out, fan_in]`, of filters of that shape (centred where they are to be): each of norm 1."""
        return rows * paddle.rsqrt(rows.square().sum(axis=1, keepdim=True) + _NO_NORM**2)

    def _rows(self, v: paddle.Tensor) -> paddle.Tensor:
        rows = v.reshape([self.geometry.out_channels, self.fan])
        rows = rows.astype("float64") if self.in_float64 else rows
        return rows - rows.mean(axis=1, keepdim=True) if self.centred else rows

    def _kernel(self, v: paddle.Tensor, g: paddle.Tensor) -> paddle.Tensor:
        return g * self.directions(self._rows(v)).reshape(list(self.geometry.weight_shape)).astype(g.dtype)

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        v, g = self.weight_v, self.weight_g
        with paddle.amp.auto_cast(enable=False):
            if v.dtype in (paddle.float16, paddle.bfloat16):
                kernel = self._kernel(v.astype("float32"), g.astype("float32")).astype(v.dtype)
            else:
                kernel = self._kernel(v, g)
        return self.geometry.convolve(x, kernel, self.bias)

    def fuse(self) -> nn.Conv2D:
        """Return the plain convolution with w as its weight, computed in float64."""
        with paddle.no_grad():
            kernel = self._kernel(self.weight_v.astype("float64"), self.weight_g.astype("float64"))
        geometry = dataclasses.replace(self.geometry, dtype=type_name(self.weight_v))
        return geometry.make_conv(kernel.numpy(), to_float64(self.bias))

    def extra_repr(self) -> str:
        return str(self.geometry)
