"""OrthogonalWeightNormConv2D: "Orthogonal Weight Normalization" (AAAI 2018, arXiv 1709.06079)."""

from __future__ import annotations

import math

import paddle

from ..arithmetic.geometry import ConvGeometry
from ..registry import register_layer
from .base import WHOLE, or_none
from .normed import NormedConv2D

# Eigenvalues of C C^T count as no smaller than this share of their mean: filters that depend on each other have some of
# zero, whose inverse roots would be infinite. All others are exact.
_SMALLEST = 1e-10
# Of a group of zeros, the mean.
_NOTHING = 1e-24


@register_layer
class OrthogonalWeightNormConv2D(NormedConv2D):
    """A convolution whose filters are g times orthonormal ones: W = (C C^T)^(-1/2) C, C the filters less their means.

    The filters are the rows of the weight as `[out, in / groups * kh * kw]`, whatever the convolution's groups. No
    more of them can be orthonormal than they have weights, less one for the mean: so they are taken in consecutive
    groups of at most that many, all of one size but the last, which may be smaller.

    Options: `group_size`, the most filters in a group; None: as many as can be. The cost of a step grows with it.

    It cannot keep a convolution's function: it starts from the nearest filters of this kind. State, initial values and
    errors as in `NormedConv2D`; filters of fewer than three weights raise `UnsupportedConv`. The kernel is computed in
    float64: the inverse root of C C^T loses twice as many digits as C, and C may be nearly square.
    """

    options = {"group_size": or_none(WHOLE)}  # noqa: RUF012
    centred = True
    in_float64 = True

    def __init__(self, geometry: ConvGeometry, group_size: int | None = None) -> None:
        largest = max(1, min(group_size or geometry.out_channels, math.prod(geometry.weight_shape[1:]) - 1))
        groups = math.ceil(geometry.out_channels / largest)
        self.group_size = math.ceil(geometry.out_channels / groups)
        super().__init__(geometry)

    def directions(self, rows: paddle.Tensor) -> paddle.Tensor:
        """Return u, `[out, fan_in]`, of centred filters of that shape: orthonormal within each group."""
        whole = rows.shape[0] // self.group_size * self.group_size
        groups = [orthonormalised(rows[:whole].reshape([-1, self.group_size, self.fan]))]
        if whole < rows.shape[0]:
            groups.append(orthonormalised(rows[whole:].reshape([1, -1, self.fan])))
        return paddle.concat([group.reshape([-1, self.fan]) for group in groups])

    def extra_repr(self) -> str:
        return f"{self.geometry}, groups of {self.group_size} filters"


def orthonormalised(rows: paddle.Tensor) -> paddle.Tensor:
    """Return (C C^T)^(-1/2) C for each matrix C of `[groups, n, fan]`: the orthonormal rows nearest to its own.

    Rows that depend on each other give shorter ones, with bounded gradients.
    """
    products = paddle.matmul(rows, rows, transpose_y=True)
    mean = (rows.detach().square().sum(axis=[1, 2]) / rows.shape[1]).unsqueeze(-1)
    return paddle.matmul(inverse_root(products, _SMALLEST * mean + _NOTHING), rows)


def inverse_root(matrices: paddle.Tensor, smallest: paddle.Tensor) -> paddle.Tensor:
    """Return S^(-1/2) of symmetric matrices `[groups, n, n]`, eigenvalues below `smallest` `[groups, 1]` taken as that.

    It is differentiable in S, once. The gradient of an eigendecomposition divides by the differences of eigenvalues,
    which may be equal; that of Y = S^(-1/2) does not. From Y S Y = I, with eigenvectors U and roots r of the
    eigenvalues, dY = U (K * U^T dS U) U^T where K_ij = -1 / (r_i r_j (r_i + r_j)). So Y is computed as its first-order
    expansion around the decomposition, which is a constant: value and gradient are then those of Y, and the first-order
    error of the decomposition itself is gone.
    """
    with paddle.no_grad():
        # Of what is no number LAPACK makes an error. Here it becomes what it becomes in a convolution: no number.
        finite = paddle.where(paddle.isfinite(matrices), matrices.detach(), paddle.zeros_like(matrices))
        values, vectors = paddle.linalg.eigh(finite)
        taken = paddle.maximum(values, smallest)
        roots = taken.sqrt()
        rows, columns = roots.unsqueeze(-1), roots.unsqueeze(-2)
        slopes = -_share_above(values, taken) / (rows * columns * (rows + columns))
        eye = paddle.eye(matrices.shape[-1], dtype=matrices.dtype)
    change = paddle.matmul(paddle.matmul(vectors, matrices, transpose_x=True), vectors) - eye * values.unsqueeze(-1)
    return paddle.matmul(paddle.matmul(vectors, eye / rows + slopes * change), vectors, transpose_y=True)


def _share_above(values: paddle.Tensor, taken: paddle.Tensor) -> paddle.Tensor:
    """Return for each pair of eigenvalues how far apart they are taken, as a share of how far apart they are."""
    kept = values >= taken
    one, other = kept.unsqueeze(-1), kept.unsqueeze(-2)
    apart, were_apart = (v.unsqueeze(-1) - v.unsqueeze(-2) for v in (taken, values))
    mixed = paddle.logical_xor(one, other)
    shares = apart / paddle.where(mixed, were_apart, paddle.ones_like(were_apart))
    return paddle.where(mixed, shares, paddle.logical_and(one, other).astype(values.dtype))
