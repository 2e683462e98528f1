"""GhostConv2D: "GhostNet: More Features from Cheap Operations" (CVPR 2020, arXiv 1911.11907)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import paddle
from paddle import nn

from ..arithmetic.geometry import ConvGeometry, fold_into, read_bn_affine
from ..arithmetic.initializers import init_uniform_fan_in
from ..errors import UnsupportedConv
from ..registry import register_layer
from .base import FLAG, ODD, TWO_OR_MORE, InferenceForm, ReparamLayer
from .branches import bn_of


class GhostConv2DFused(InferenceForm):
    """A fused `GhostConv2D`: the same two convolutions, with their BNs inside; `[N, C, H, W]` in and out."""

    def __init__(self, primary: nn.Conv2D, cheap: nn.Conv2D, out_channels: int, act: bool) -> None:
        super().__init__()
        self.primary = primary
        self.cheap = cheap
        self.act = nn.ReLU() if act else nn.Identity()
        self.out_channels = out_channels

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        primary = self.act(self.primary(x))
        return _joined(primary, self.act(self.cheap(primary)), self.out_channels, self.primary._data_format)

    def absorb_affine(self, scale: Any, shift: Any) -> None:
        """Raise `UnsupportedConv`: there are no weights behind what is read twice."""
        raise UnsupportedConv(
            "GhostConv2D puts out the maps that its cheap convolution reads too, so a BN behind it stays where it is"
        )


@register_layer
class GhostConv2D(ReparamLayer):
    """A convolution that computes a share of its output channels, and makes the others of these by a cheap one.

        primary = act(BN(primary_conv(x))),  ghost = act(BN(cheap_operation(primary))),  out = [primary, ghost]

    For C output channels primary_conv is the convolution with ceil(C / ratio) of them; cheap_operation is depthwise,
    `dw_size` wide and padded by half of that, with ratio - 1 maps for each of its input's. What is more than C channels
    is cut off. act is ReLU; `act=False` leaves it out, for the place behind which a network has no activation.

    Weights start uniformly within 1 / sqrt(fan_in). Raises `UnsupportedConv` where the groups of the convolution do not
    divide the number of primary channels.
    """

    fused_type = GhostConv2DFused
    options = {"ratio": TWO_OR_MORE, "dw_size": ODD, "act": FLAG}  # noqa: RUF012
    train_form_keys = ("primary_conv.0.weight", "cheap_operation.0.weight", "cheap_operation.1.weight")

    def __init__(self, geometry: ConvGeometry, ratio: int = 2, dw_size: int = 3, act: bool = True) -> None:
        super().__init__()
        self.check_options(ratio=ratio, dw_size=dw_size, act=act)
        if ratio > geometry.out_channels:
            raise UnsupportedConv(
                f"GhostConv2D makes ratio={ratio} channels out of each that it computes, and this convolution has "
                f"{geometry.out_channels} in all: {geometry}"
            )
        primary = -(-geometry.out_channels // ratio)
        if primary % geometry.groups:
            raise UnsupportedConv(
                f"GhostConv2D computes {primary} of {geometry.out_channels} channels with ratio={ratio}, which are no "
                f"{geometry.groups} groups; choose another ratio, or leave this convolution as it is"
            )
        self.out_channels = geometry.out_channels
        pad = dw_size // 2
        self.primary_conv = _conv_bn_act(replace(geometry, out_channels=primary), act)
        self.cheap_operation = _conv_bn_act(
            ConvGeometry(
                primary, primary * (ratio - 1), (dw_size, dw_size), padding=(pad, pad, pad, pad), groups=primary,
                data_format=geometry.data_format, dtype=geometry.dtype,
            ),
            act,
        )  # fmt: skip

    @classmethod
    def build(cls, geometry: ConvGeometry, **options: Any) -> GhostConv2D:
        """Return a layer in the place of a convolution; `options`: `ratio`, `dw_size`, `act`.

        Nothing of the convolution's weights can be kept; a BN that follows the convolution stays after this layer.
        """
        return cls(geometry, **options)

    def extra_repr(self) -> str:
        primary = ConvGeometry.of(self.primary_conv[0])
        return f"{replace(primary, out_channels=self.out_channels)}, primary={primary.out_channels}"

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        primary = self.primary_conv(x)
        return _joined(primary, self.cheap_operation(primary), self.out_channels, self.primary_conv[0]._data_format)

    def fuse(self) -> GhostConv2DFused:
        convs = [
            ConvGeometry.of(conv).make_conv(*fold_into(conv, *read_bn_affine(bn)))
            for conv, bn, *_ in (self.primary_conv, self.cheap_operation)
        ]
        return GhostConv2DFused(*convs, self.out_channels, len(self.primary_conv) == 3)


def _conv_bn_act(geometry: ConvGeometry, act: bool) -> nn.Sequential:
    conv = geometry.new_conv(bias_attr=False)
    init_uniform_fan_in(conv)
    return nn.Sequential(conv, bn_of(geometry), *([nn.ReLU()] if act else []))


def _joined(primary: paddle.Tensor, ghost: paddle.Tensor, channels: int, data_format: str) -> paddle.Tensor:
    axis = 1 if data_format == "NCHW" else 3
    surplus = primary.shape[axis] + ghost.shape[axis] - channels
    if surplus:
        ghost = paddle.slice(ghost, [axis], [0], [ghost.shape[axis] - surplus])
    return paddle.concat([primary, ghost], axis)
