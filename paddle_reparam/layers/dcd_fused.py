"""What layers of dynamic convolution decomposition (arXiv 2103.08756) fuse to: the released ones and the paper's."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic.geometry import ConvGeometry, absorb_affine_into
from ..arithmetic.tensors import sides
from .base import InferenceForm


class Sizes(NamedTuple):
    """The input is averaged to pool_size x pool_size pixels, squeezed to `squeezed` features, and these make the
    `latent` x `latent` dynamic matrix."""

    pool_size: int
    latent: int
    squeezed: int


class Affine(NamedTuple):
    """A float64 kernel `[out, in / groups, h, w]` or matrix `[out, in]`, and its bias `[out]`."""

    kernel: np.ndarray
    bias: np.ndarray | None


class DynamicBranch(nn.Layer):
    """A fused dynamic branch: `[N, C, H, W]` to dynamic matrices `[N * blocks, L, L]` and one factor for each output
    channel, `[N, out, 1, 1]`, which is None where the static kernel is left as it is.

    Average pooling, `squeeze`, an activation, then `excite` for the matrices and `factors`. With a gate the activation
    is y * relu6(gate(y)) and the factors are relu6 of what comes out, without one it is ReLU. All are 1x1 convolutions
    but for the first, whose kernel is as large as what was pooled.
    """

    # On maps of one pixel, and not on features, because each step more takes Paddle Inference 10 to 40 us: the branch
    # takes 0.82 to 1.03 of the time of the same with linear layers, one of them split in two (3.3.1, one thread).
    def __init__(
        self, sizes: Sizes, squeeze: Affine, gate: Affine | None, matrices: Affine, factors: Affine | None, dtype: str
    ) -> None:
        super().__init__()
        self.pool_size, self.latent = sizes.pool_size, sizes.latent
        window = squeeze.kernel.reshape(len(squeeze.kernel), -1, sizes.pool_size, sizes.pool_size)
        self.squeeze = make_small_conv(Affine(window, squeeze.bias), dtype)
        self.gate = None if gate is None else make_small_conv(gate, dtype)
        self.excite = make_small_conv(matrices, dtype)
        self.factors = None if factors is None else make_small_conv(factors, dtype)

    def forward(self, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        y = self.squeeze(averages(x, self.pool_size))
        y = F.relu(y) if self.gate is None else y * F.relu6(self.gate(y))
        matrices = self.excite(y).reshape([-1, self.latent, self.latent])
        if self.factors is None:
            return matrices, None
        factors = self.factors(y)
        return matrices, factors if self.gate is None else F.relu6(factors)


class DCDConv2DFused(InferenceForm):
    """A fused dynamic convolution: out = scale(x) * conv(x) + p(A(x) q(x)), `[N, C, H, W]` in and out.

    `conv` is static; q and p are 1x1 with as many groups as there are blocks, q at the centre tap of `conv`, and the
    dynamic matrices A(x) mix the latent channels of each block.
    """

    # Measured in Paddle Inference 3.3.1 on one thread at batch 1, AVX-512 / AVX2, the layers of ResNet50's blocks at
    # 56x56 pixels: 0.85 to 0.97 / 0.64 to 1.00 of the time with a kernel made for each image, run as one matrix product
    # (which oneDNN does in another layout than convolutions), although that takes fewer multiply-adds; 0.94 to 1.05 /
    # 0.82 to 1.02 of the time with q stacked on a 1x1 `conv` and split off again. As a whole, with the branch as it is,
    # ResNet50 takes 0.88 / 0.93 of the time with those kernels, MobileNetV2 0.93 / 0.85.
    # With the squeezed features as channels of q, which takes no average of all channels, ResNet50 takes 1.02 to 1.04.
    def __init__(
        self, geometry: ConvGeometry, static: Affine, q: Affine, p: Affine, branch: DynamicBranch, blocks: int = 1
    ) -> None:
        super().__init__()
        latent = len(q.kernel)
        self.conv = geometry.make_conv(*_with_bias(static))
        self.q = at_centre(geometry, geometry.in_channels, latent, blocks).make_conv(*_with_bias(q))
        after = at_centre(dataclasses.replace(geometry, stride=(1, 1)), latent, geometry.out_channels, blocks)
        self.p = after.make_conv(*_with_bias(p))
        self.branch = branch

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.run(x)

    def run(self, x: paddle.Tensor) -> paddle.Tensor:
        """Compute `forward`; the tracer of Paddle 2.6 knows no super(), by which a subclass would call that."""
        matrices, scale = self.branch(x)
        static = self.conv(x)
        return self.p(mixed(matrices, self.q(x))) + (static if scale is None else scale * static)

    def absorb_affine(self, scale: np.ndarray, shift: np.ndarray) -> None:
        """Make this layer compute scale * out + shift per channel: `conv` and p take the scale."""
        absorb_affine_into(self.conv, scale)
        absorb_affine_into(self.p, scale, shift)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def pooled(x: paddle.Tensor, size: int) -> paddle.Tensor:
    """Return the averages of `[N, C, H, W]` over size x size windows as features `[N, C * size^2]`."""
    return F.adaptive_avg_pool2d(x, size).flatten(1)


# Not converted when a network is traced, so that a side of unknown length is -1 to it: as it is anyway in the blocks of
# paddle.vision, and no tensor, on which an `if` would be a branch of the exported program.
@paddle.jit.not_to_static
def averages(x: paddle.Tensor, size: int) -> paddle.Tensor:
    """Return the averages of `[N, C, H, W]` over size x size windows, `[N, C, size, size]`."""
    # A single pixel is repeated, which is faster than pooling; and paddle2onnx writes such pooling with a stride of 0.
    repeated = [size if side == 1 else side for side in x.shape[2:]]
    if repeated != list(x.shape[2:]):
        x = x.expand([-1, -1, *repeated])
    return x if repeated == [size, size] else F.adaptive_avg_pool2d(x, size)


def mixed(matrices: paddle.Tensor, z: paddle.Tensor) -> paddle.Tensor:
    """Return the dynamic matrices `[N * blocks, L, L]` times the channels of z `[N, blocks * L, H, W]`, by blocks."""
    latent, channels, (height, width) = matrices.shape[1], z.shape[1], sides(z)
    rows = paddle.matmul(matrices, z.reshape([-1, latent, height * width]))
    return rows.reshape([-1, channels, height, width])


def _with_bias(affine: Affine) -> Affine:
    """Return an affine with a bias, of zeros where it has none.

    In a `.pdmodel` under bfloat16 what a convolution without a bias puts out is float32, and multiplying it raises.
    """
    return affine if affine.bias is not None else Affine(affine.kernel, np.zeros(len(affine.kernel)))


def make_small_conv(affine: Affine, dtype: str) -> nn.Conv2D:
    """Return a convolution that does not pad and holds a float64 kernel `[out, in, h, w]`, or a matrix as a 1x1 one."""
    kernel = affine.kernel if affine.kernel.ndim == 4 else affine.kernel[:, :, None, None]
    out_channels, in_channels, height, width = kernel.shape
    geometry = ConvGeometry(in_channels, out_channels, (height, width), dtype=dtype)
    return geometry.make_conv(*_with_bias(Affine(kernel, affine.bias)))


def at_centre(geometry: ConvGeometry, in_channels: int, out_channels: int, blocks: int) -> ConvGeometry:
    """Return the geometry of a 1x1 convolution that meets the pixels which the centre tap meets."""
    return ConvGeometry(
        in_channels, out_channels, (1, 1), geometry.stride, groups=blocks, bias=False, dtype=geometry.dtype
    )
