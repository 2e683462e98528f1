"""What layers of dynamic convolution decomposition (arXiv 2103.08756) fuse to: the released ones and the paper's."""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..errors import UnsupportedConv
from ..geometry import ConvGeometry, fold_into
from ..tensors import assign, to_float64
from .base import InferenceForm


class Sizes(NamedTuple):
    """The input is averaged to pool_size x pool_size pixels, squeezed to `squeezed` features, and these make the
    `latent` x `latent` dynamic matrix."""

    pool_size: int
    latent: int
    squeezed: int


def kernel_is_cheaper(positions: int, in_channels: int, out_channels: int, latent: int, pointwise: bool) -> bool:
    """Return whether a kernel made for each image takes fewer multiply-adds than the low-rank path on its features.

    On the features: positions * L * (in + L + out). For the kernel: out * L * (L + in), and where the static kernel is
    not 1x1, so that the two cannot be added, its own convolution: positions * in * out.
    """
    on_features = positions * latent * (in_channels + latent + out_channels)
    of_kernel = out_channels * latent * (latent + in_channels)
    return of_kernel + (0 if pointwise else positions * in_channels * out_channels) < on_features


class Affine(NamedTuple):
    """A float64 kernel `[out, in / groups, h, w]` or matrix `[out, in]`, and its bias `[out]`."""

    kernel: np.ndarray
    bias: np.ndarray | None


class DynamicBranch(nn.Layer):
    """A fused dynamic branch: `[N, C, H, W]` to dynamic matrices `[N * blocks, L, L]` and one factor for each output
    channel, `[N, out, 1, 1]`, which is None where the static kernel is left as it is.

    Average pooling, `squeeze`, an activation, `excite`. With a gate the activation is y * relu6(gate(y)) and the
    factors are relu6 of what comes out, without one it is ReLU.
    """

    def __init__(
        self, sizes: Sizes, squeeze: Affine, gate: Affine | None, matrices: Affine, factors: Affine | None, dtype: str
    ) -> None:
        super().__init__()
        self.pool_size, self.latent = sizes.pool_size, sizes.latent
        self.squeeze = make_linear(squeeze, dtype)
        self.gate = None if gate is None else make_linear(gate, dtype)
        parts = [matrices] if factors is None else [matrices, factors]
        self.excite = make_linear(Affine(*(np.concatenate(p) for p in zip(*parts))), dtype)
        self.sections = [len(part.kernel) for part in parts]

    def forward(self, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        y = self.squeeze(pooled(x, self.pool_size))
        y = self.excite(F.relu(y) if self.gate is None else y * F.relu6(self.gate(y)))
        factors = None
        if len(self.sections) == 2:
            y, factors = paddle.split(y, self.sections, axis=1)
            factors = (factors if self.gate is None else F.relu6(factors)).unsqueeze([2, 3])
        return y.reshape([-1, self.latent, self.latent]), factors


class DCDConv2DFused(InferenceForm):
    """A fused dynamic convolution: out = scale(x) * conv(x) + p(A(x) q(x)), `[N, C, H, W]` in and out.

    `conv` is static; q and p are 1x1 with as many groups as there are blocks, q at the centre tap of `conv`, and the
    dynamic matrices A(x) mix the latent channels of each block. Where `conv` is 1x1 too, and there is one block, q is
    None and its rows are the last ones of `conv`.
    """

    def __init__(
        self, geometry: ConvGeometry, static: Affine, q: Affine, p: Affine, branch: DynamicBranch, blocks: int = 1
    ) -> None:
        super().__init__()
        latent = len(q.kernel)
        self.blocks = blocks
        self.sections = [geometry.out_channels, latent]
        before = at_centre(geometry, geometry.in_channels, latent, blocks)
        if geometry.kernel_size == (1, 1) and blocks == 1:
            both = Affine(*(np.concatenate(parts) for parts in zip(_with_bias(static), _with_bias(q))))
            self.conv = dataclasses.replace(before, out_channels=sum(self.sections)).make_conv(*both)
            self.q = None
        else:
            self.conv = geometry.make_conv(*static)
            self.q = before.make_conv(*q)
        after = at_centre(dataclasses.replace(geometry, stride=(1, 1)), latent, geometry.out_channels, blocks)
        self.p = after.make_conv(*_with_bias(p))
        self.branch = branch

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.run(x)

    def run(self, x: paddle.Tensor) -> paddle.Tensor:
        """Compute `forward`; the tracer of Paddle 2.6 knows no super(), by which a subclass would call that."""
        matrices, scale = self.branch(x)
        if self.q is None:
            static, z = paddle.split(self.conv(x), self.sections, axis=1)
        else:
            static, z = self.conv(x), self.q(x)
        return self.p(mixed(matrices, z)) + (static if scale is None else scale * static)

    def absorb_affine(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Make this layer compute scale * out + shift per channel: the rows of `conv` and p take the scale."""
        rows = np.concatenate([scale, np.ones(self.conv.weight.shape[0] - len(scale))])
        kernel, bias = fold_into(self.conv, rows, np.zeros_like(rows))
        p_kernel, p_bias = fold_into(self.p, scale, shift)
        assign(self.conv.weight, kernel)
        if self.conv.bias is not None:
            assign(self.conv.bias, bias)
        assign(self.p.weight, p_kernel)
        assign(self.p.bias, p_bias)

    def for_size(self, height: int, width: int) -> DCDConv2DOfOneSize | None:
        """Return the form that makes a kernel for each image, where `kernel_is_cheaper` for maps of this size."""
        geometry = ConvGeometry.of(self.conv)
        rows, columns = (-(-side // s) for side, s in zip((height, width), geometry.stride))
        channels = (geometry.in_channels, *self.sections)
        if self.blocks > 1 or not kernel_is_cheaper(rows * columns, *channels, self.q is None):
            return None
        return DCDConv2DOfOneSize(self, rows, columns)


class DCDConv2DOfOneSize(InferenceForm):
    """A `DCDConv2DFused` of one block for maps of one size, with the dynamic kernel of each image made and run as one
    batched matrix product; with a static kernel of 1x1 added to it, else beside the static convolution.

    W(x) = scale(x) W0 + P A(x) Q, b(x) = scale(x) b0 + P A(x) q_bias + p_bias.
    """

    def __init__(self, form: DCDConv2DFused, rows: int, columns: int) -> None:
        super().__init__()
        geometry = ConvGeometry.of(form.conv)
        self.out_size = [form.sections[0], rows, columns]
        self.stride = geometry.stride
        self.branch = copy.deepcopy(form.branch)
        weight, bias = to_float64(form.conv.weight), to_float64(form.conv.bias)
        if form.q is None:
            self.conv = None
            (static, q), (static_bias, q_bias) = (np.split(a, form.sections[:1]) for a in (weight, bias))
            self.static = self._keep(static[:, :, 0, 0], geometry.dtype)
            self.static_bias = self._keep(static_bias[:, None], geometry.dtype)
        else:
            self.conv = copy.deepcopy(form.conv)
            q, q_bias = _with_bias(Affine(to_float64(form.q.weight), to_float64(form.q.bias)))
        self.q = self._keep(q[:, :, 0, 0], geometry.dtype)
        self.q_bias = self._keep(q_bias[:, None], geometry.dtype)
        self.p = self._keep(to_float64(form.p.weight)[:, :, 0, 0], geometry.dtype)
        self.p_bias = self._keep(to_float64(form.p.bias)[:, None], geometry.dtype)

    def _keep(self, array: np.ndarray, dtype: str) -> paddle.Tensor:
        zeros = nn.initializer.Constant(0.0)
        parameter = self.create_parameter(list(array.shape), dtype=dtype, default_initializer=zeros)
        assign(parameter, array)
        return parameter

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        matrices, scale = self.branch(x)
        rows = paddle.matmul(self.p, matrices)
        kernel, bias = paddle.matmul(rows, self.q), paddle.matmul(rows, self.q_bias) + self.p_bias
        if self.conv is None:
            static, static_bias = self.static, self.static_bias
            if scale is not None:
                static, static_bias = (scale.flatten(2) * part for part in (static, static_bias))
            kernel, bias = kernel + static, bias + static_bias
        met = x if self.stride == (1, 1) else x[:, :, :: self.stride[0], :: self.stride[1]]
        y = (paddle.matmul(kernel, met.flatten(2)) + bias).reshape([-1, *self.out_size])
        if self.conv is None:
            return y
        static = self.conv(x)
        return y + (static if scale is None else scale * static)

    def absorb_affine(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Refuse: BNs are folded before layers take the form for one size."""
        raise UnsupportedConv("this layer was made for maps of one size; fold BNs before that, with fold_bn=True")

    def __str__(self) -> str:
        return f"{type(self).__name__}({'a 1x1' if self.conv is None else 'the centre of a'} kernel for each image)"


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def pooled(x: paddle.Tensor, size: int) -> paddle.Tensor:
    """Return the averages of `[N, C, H, W]` over size x size windows as features `[N, C * size^2]`."""
    return F.adaptive_avg_pool2d(x, size).flatten(1)


def mixed(matrices: paddle.Tensor, z: paddle.Tensor) -> paddle.Tensor:
    """Return the dynamic matrices `[N * blocks, L, L]` times the channels of z `[N, blocks * L, H, W]`, by blocks."""
    latent, channels, height, width = matrices.shape[1], z.shape[1], z.shape[2], z.shape[3]
    rows = paddle.matmul(matrices, z.reshape([-1, latent, height * width]))
    return rows.reshape([-1, channels, height, width])


def make_linear(affine: Affine, dtype: str) -> nn.Linear:
    """Return a linear layer that holds a float64 matrix `[out, in]` and bias."""
    out_features, in_features = affine.kernel.shape
    zeros = nn.initializer.Constant(0.0)
    bias_attr = False if affine.bias is None else None
    linear = nn.Linear(in_features, out_features, weight_attr=zeros, bias_attr=bias_attr)
    linear.to(dtype=dtype)
    assign(linear.weight, affine.kernel.T)
    if affine.bias is not None:
        assign(linear.bias, affine.bias)
    return linear


def at_centre(geometry: ConvGeometry, in_channels: int, out_channels: int, blocks: int) -> ConvGeometry:
    """Return the geometry of a 1x1 convolution that meets the pixels which the centre tap meets."""
    return ConvGeometry(
        in_channels, out_channels, (1, 1), geometry.stride, groups=blocks, bias=False, dtype=geometry.dtype
    )


def _with_bias(affine: Affine) -> Affine:
    return Affine(affine.kernel, np.zeros(len(affine.kernel)) if affine.bias is None else affine.bias)
