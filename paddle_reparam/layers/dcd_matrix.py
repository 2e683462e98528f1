"""DCD: "Revisiting Dynamic Convolution via Matrix Decomposition" (ICLR 2021, arXiv 2103.08756), by its formulas.

W(x) = Lambda(x) W0 + P Phi(x) Q^T, without the BNs and the shortcut that the released layers in `dcd` have. No kernel
is ever run as a convolution with one group for each image, which grows with the batch and which no exporter knows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import ConvGeometry, as_pair
from ..arithmetic.initializers import init_fan_out_normal, init_uniform_fan_in
from ..arithmetic.tensors import assign, to_float64
from ..errors import UnsupportedConv
from ..registry import register_layer
from .base import FLAG, WHOLE, InferenceForm, ReparamLayer, one_of, or_none
from .by_image import convolve_by_image
from .dcd import INITS, make_convs, refuse_without_centre
from .dcd_fused import Affine, DCDConv2DFused, DynamicBranch, Sizes, mixed, pooled


def latent_dimension_of(channels: int) -> int:
    """Return the paper's L = C / 2^floor(log2(sqrt(C))), rounded down: about sqrt(C), and at least that."""
    # floor(log2(sqrt(C))) is half of floor(log2(C)), rounded down: exact, where floats are not.
    return channels >> ((channels.bit_length() - 1) // 2)


class _MatrixDCD(ReparamLayer):
    """The paper's dynamic branch: average pooling, fc, ReLU, and one fully connected layer each for Phi and Lambda."""

    options = {  # noqa: RUF012
        "latent_dimension": or_none(WHOLE), "squeezed_width": or_none(WHOLE), "channel_attention": FLAG,
        "init": one_of(*INITS),
    }  # fmt: skip
    holders = {"weight": "conv.weight", "bias": "conv.bias"}  # noqa: RUF012
    keeps_function_with = {"init": "zero"}  # noqa: RUF012

    def _add_branch(
        self, geometry: ConvGeometry, latent: int, squeezed: int | None, blocks: int, attention: bool, init: str
    ) -> None:
        squeezed = max(geometry.in_channels // 16, 4) if squeezed is None else squeezed
        self.sizes = Sizes(1, latent // blocks, squeezed)
        self.fc = nn.Sequential(_linear(geometry.in_channels, squeezed), nn.ReLU())
        self.fc_phi = _linear(squeezed, latent**2 // blocks)
        self.fc_scale = None
        if attention:
            # Lambda starts around 1, where the static kernel is itself.
            self.fc_scale = _linear(squeezed, geometry.out_channels)
            assign(self.fc_scale.bias, np.ones(geometry.out_channels))
            if init == "zero":
                assign(self.fc_scale.weight, np.zeros(self.fc_scale.weight.shape))

    def coefficients(self, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        """Return (Phi `[N * blocks, L, L]`, Lambda `[N, out]` or None)."""
        y = self.fc(pooled(x, self.sizes.pool_size))
        phi = self.fc_phi(y).reshape([-1, self.sizes.latent, self.sizes.latent])
        return phi, None if self.fc_scale is None else self.fc_scale(y)

    def _fused_branch(self, dtype: str) -> DynamicBranch:
        factors = None if self.fc_scale is None else _affine_of(self.fc_scale)
        return DynamicBranch(self.sizes, _affine_of(self.fc[0]), None, _affine_of(self.fc_phi), factors, dtype)


@register_layer
class DCDMatrixConv2D(_MatrixDCD):
    """A convolution with the kernel W(x) = Lambda(x) W0 + P Phi(x) Q^T, the second part at the centre tap.

    Lambda(x) is diagonal over the output channels, P `[out, L]`, Phi(x) `[L, L]`, Q `[in, L]`: the paper's general form
    for 1x1 kernels, and for larger ones with L_k = 1. It runs on features, Lambda(x) (W0 x) + P (Phi(x) (Q^T x)).
    `[N, C, H, W]` of any size; BNs and activations of the network come after it. The kernel is odd, and the size stays
    at stride 1. The first arguments are those of `paddle.nn.Conv2D`. Options, for `build` and `from_conv` as well:

    latent_dimension: L, of all blocks together; by default `latent_dimension_of(in_channels)`, rounded up to `blocks`.
    squeezed_width: features of the dynamic branch between its two layers; in_channels / 16, at least 4, by default.
    blocks: B; the residual is block-diagonal, P_b `[out / B, L / B]`, Phi_b(x), Q_b `[in / B, L / B]` (the paper's
        sparse residual).
    channel_attention: without it W(x) = W0 + P Phi(x) Q^T.
    init: "random", or "zero": P and the weights for Lambda start at zero, and Lambda at 1, so that a layer made from a
        convolution computes what that did.

    Raises `UnsupportedConv` for a convolution that it cannot stand in for, `ReparamError` for any other wrong option.
    """

    fused_type = DCDConv2DFused
    options = {**_MatrixDCD.options, "blocks": WHOLE}  # noqa: RUF012
    train_form_keys = ("conv.weight", "q.weight", "p.weight", "fc_phi.weight", "fc_phi.bias")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        bias_attr: bool | None = False,
        **options: Any,
    ) -> None:
        padding = [k // 2 * d for k, d in zip(as_pair(kernel_size), as_pair(dilation))]
        conv = nn.Conv2D(in_channels, out_channels, kernel_size, stride, padding, dilation, bias_attr=bias_attr)
        self._create(ConvGeometry.of(conv), **options)

    @classmethod
    def build(cls, geometry: ConvGeometry, **options: Any) -> DCDMatrixConv2D:
        """Return a new layer for a convolution's geometry; the options and errors are those of the class."""
        layer = cls.__new__(cls)
        layer._create(geometry, **options)
        return layer

    def _create(
        self,
        geometry: ConvGeometry,
        latent_dimension: int | None = None,
        squeezed_width: int | None = None,
        blocks: int = 1,
        channel_attention: bool = True,
        init: str = "random",
    ) -> None:
        super().__init__()
        self.check_options(
            latent_dimension=latent_dimension, squeezed_width=squeezed_width, blocks=blocks,
            channel_attention=channel_attention, init=init,
        )  # fmt: skip
        refuse_without_centre("DCDMatrixConv2D", geometry)
        latent = latent_dimension
        if latent is None:
            latent = -(-latent_dimension_of(geometry.in_channels) // blocks) * blocks
        widths = (geometry.in_channels, geometry.out_channels, latent)
        if any(width % blocks for width in widths):
            raise UnsupportedConv(
                f"{widths[0]} input channels, {widths[1]} output channels and latent_dimension={latent} cannot all be "
                f"divided into blocks={blocks}; choose another number of blocks"
            )
        self.blocks = blocks
        self.conv, self.q, self.p = make_convs(geometry, latent, blocks, init)
        self._add_branch(geometry, latent, squeezed_width, blocks, channel_attention, init)
        self.to(dtype=geometry.dtype)

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        phi, scale = self.coefficients(x)
        static = self.conv(x)
        return self.p(mixed(phi, self.q(x))) + (static if scale is None else scale.unsqueeze([2, 3]) * static)

    def fuse(self) -> DCDConv2DFused:
        """Return the inference form, which takes in the BN that follows."""
        geometry = ConvGeometry.of(self.conv)
        static, q, p = (Affine(to_float64(c.weight), to_float64(c.bias)) for c in (self.conv, self.q, self.p))
        return DCDConv2DFused(geometry, static, q, p, self._fused_branch(geometry.dtype), self.blocks)

    def extra_repr(self) -> str:
        return f"{ConvGeometry.of(self.conv)}, {self.sizes}, blocks={self.blocks}"


# ---------------------------------------------------------------------------------------------------------------------
# Depthwise


class DCDDepthwiseConv2DFused(InferenceForm):
    """A fused `DCDDepthwiseConv2D`: out = W(x) * x + scale(x) bias + shift, W(x) = scale(x) kernel + p A(x) r.

    kernel `[out, kh * kw]`, p `[out, L]`, r `[L, kh * kw]`; bias and shift `[out]`.
    """

    def __init__(
        self, geometry: ConvGeometry, kernel: np.ndarray, bias: np.ndarray, p: np.ndarray, r: np.ndarray,
        branch: DynamicBranch,
    ) -> None:  # fmt: skip
        super().__init__()
        self.geometry = geometry
        arrays = {"kernel": kernel, "bias": bias, "p": p, "r": r, "shift": np.zeros(geometry.out_channels)}
        for name, array in arrays.items():
            parameter = self.create_parameter(list(array.shape), dtype=geometry.dtype)
            assign(parameter, array)
            setattr(self, name, parameter)
        self.branch = branch

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        matrices, scale = self.branch(x)
        scale = None if scale is None else scale.flatten(1)
        y = convolve_by_image(x, kernels_of_images(self.kernel, scale, self.p, matrices, self.r), self.geometry)
        shift = self.bias if scale is None else scale * self.bias
        return y + (shift + self.shift).reshape([-1, self.geometry.out_channels, 1, 1])

    def absorb_affine(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Make this layer compute scale * out + shift per channel: the rows of the kernel and of p take the scale."""
        for pair, own_shift in (((self.kernel, self.bias), np.zeros_like(shift)), ((self.p, self.shift), shift)):
            for parameter, array in zip(pair, kernels.fold_affine(*map(to_float64, pair), scale, own_shift)):
                assign(parameter, array)


@register_layer
class DCDDepthwiseConv2D(_MatrixDCD):
    """A depthwise convolution whose kernels, as a matrix `[out, kh * kw]`, are W(x) = Lambda(x) W0 + P Phi(x) R^T.

    Lambda(x) is diagonal over the channels, P `[out, L_k]`, Phi(x) `[L_k, L_k]` fuses latent kernel elements, and
    R `[kh * kw, L_k]`, kept transposed as `r`. Any kernel, stride, dilation and padding, and channel multipliers.
    The first arguments are those of `paddle.nn.Conv2D`, but `padding=None` keeps the size at stride 1 (odd kernels).
    Options, for `build` and `from_conv` as well:

    latent_dimension: L_k; by default half the number of kernel elements, rounded down.
    squeezed_width, channel_attention, init: as for `DCDMatrixConv2D`.

    Raises `UnsupportedConv` for a convolution that it cannot stand in for, `ReparamError` for any other wrong option.
    """

    fused_type = DCDDepthwiseConv2DFused
    train_form_keys = ("conv.weight", "p", "r", "fc_phi.weight")

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: Any = None,
        dilation: int | tuple[int, int] = 1,
        bias_attr: bool | None = False,
        **options: Any,
    ) -> None:
        if padding is None:
            padding = [k // 2 * d for k, d in zip(as_pair(kernel_size), as_pair(dilation))]
        conv = nn.Conv2D(
            channels, channels, kernel_size, stride, padding, dilation, groups=channels, bias_attr=bias_attr
        )
        self._create(ConvGeometry.of(conv), **options)

    @classmethod
    def build(cls, geometry: ConvGeometry, **options: Any) -> DCDDepthwiseConv2D:
        """Return a new layer for a convolution's geometry; the options and errors are those of the class."""
        layer = cls.__new__(cls)
        layer._create(geometry, **options)
        return layer

    def _create(
        self,
        geometry: ConvGeometry,
        latent_dimension: int | None = None,
        squeezed_width: int | None = None,
        channel_attention: bool = True,
        init: str = "random",
    ) -> None:
        super().__init__()
        self.check_options(
            latent_dimension=latent_dimension, squeezed_width=squeezed_width, channel_attention=channel_attention,
            init=init,
        )  # fmt: skip
        elements = geometry.kernel_size[0] * geometry.kernel_size[1]
        if not geometry.is_depthwise or elements == 1:
            raise UnsupportedConv(
                f"DCDDepthwiseConv2D stands in for depthwise convolutions of more than 1x1, this one is {geometry}"
            )
        if geometry.data_format != "NCHW" or geometry.padding == "SAME":
            raise UnsupportedConv(
                "DCDDepthwiseConv2D takes NCHW and a padding in numbers, this one has "
                f"{geometry.data_format} and padding {geometry.padding}"
            )
        self.geometry = geometry
        latent = elements // 2 if latent_dimension is None else latent_dimension
        zeros = np.zeros(geometry.out_channels) if geometry.bias else None
        self.conv = geometry.make_conv(np.zeros(geometry.weight_shape), zeros)
        self.conv.train()
        init_fan_out_normal(self.conv)
        # As the fan-in of a sum over L_k: P Phi R^T is then about as large as R is.
        spread = nn.initializer.Normal(0.0, (1.0 / latent) ** 0.5 if init != "zero" else 0.0)
        self.p = self.create_parameter([geometry.out_channels, latent], default_initializer=spread)
        spread = nn.initializer.Normal(0.0, (1.0 / elements) ** 0.5)
        self.r = self.create_parameter([latent, elements], default_initializer=spread)
        self._add_branch(geometry, latent, squeezed_width, 1, channel_attention, init)
        self.to(dtype=geometry.dtype)

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        phi, scale = self.coefficients(x)
        by_image = kernels_of_images(self.conv.weight.flatten(1), scale, self.p, phi, self.r)
        y = convolve_by_image(x, by_image, self.geometry)
        if self.conv.bias is None:
            return y
        bias = self.conv.bias if scale is None else scale * self.conv.bias
        return y + bias.reshape([-1, self.conv.bias.shape[0], 1, 1])

    def fuse(self) -> DCDDepthwiseConv2DFused:
        """Return the inference form, which takes in the BN that follows."""
        geometry = ConvGeometry.of(self.conv)
        kernel, bias = to_float64(self.conv.weight), to_float64(self.conv.bias)
        return DCDDepthwiseConv2DFused(
            geometry,
            kernel.reshape(len(kernel), -1),
            np.zeros(len(kernel)) if bias is None else bias,
            to_float64(self.p),
            to_float64(self.r),
            self._fused_branch(geometry.dtype),
        )

    def extra_repr(self) -> str:
        return f"{ConvGeometry.of(self.conv)}, {self.sizes}"


def kernels_of_images(
    kernel: paddle.Tensor, scale: paddle.Tensor | None, p: paddle.Tensor, matrices: paddle.Tensor, r: paddle.Tensor
) -> paddle.Tensor:
    """Return W(x) = scale(x) kernel + p A(x) r for each image, `[N, out, kh * kw]`; scale is `[N, out]` or None."""
    residual = paddle.matmul(paddle.matmul(p, matrices), r)
    return residual + (kernel if scale is None else scale.unsqueeze(2) * kernel)


def _affine_of(linear: nn.Linear) -> Affine:
    return Affine(to_float64(linear.weight).T, to_float64(linear.bias))


def _linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features)
    init_uniform_fan_in(linear)
    return linear
