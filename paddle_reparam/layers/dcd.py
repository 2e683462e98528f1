"""DCD: "Revisiting Dynamic Convolution via Matrix Decomposition" (ICLR 2021, arXiv 2103.08756), as it was released.

The released layers work on features, with BNs and a shortcut around the dynamic matrix. The layers of the paper's own
formulas are in `dcd_matrix`, the form that both fuse to in `dcd_fused`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import ConvGeometry, as_pair, read_bn_affine
from ..arithmetic.initializers import init_fan_out_normal, init_uniform_fan_in
from ..arithmetic.tensors import assign, to_float64, type_name
from ..errors import ReparamError, UnsupportedConv
from ..registry import register_layer
from .base import WHOLE, ReparamLayer, one_of, or_none
from .dcd_fused import Affine, DCDConv2DFused, DynamicBranch, Sizes, at_centre, pooled

INITS = ("random", "zero")


# ---------------------------------------------------------------------------------------------------------------------
# How large the dynamic parts are


def resnet_bottleneck_sizes(in_channels: int, out_channels: int, fc_squeeze: int = 16) -> Sizes:
    """Return the sizes of all three convolutions of a bottleneck: L = floor(sqrt(in))."""
    latent = math.isqrt(in_channels)
    # Published layers of less than 16 channels have no squeezed features at all.
    return Sizes(1, latent, max(max(in_channels, latent**2) // fc_squeeze, 1))


def resnet_basic_sizes(in_channels: int, out_channels: int, fc_squeeze: int = 16) -> Sizes:
    """Return the sizes of both convolutions of a basic block: L = floor(sqrt(4 in)), pooled to 2x2."""
    latent = math.isqrt(4 * in_channels)
    return Sizes(2, latent, max(max(4 * in_channels, latent**2) // fc_squeeze, 4))


def mobilenet_sizes(in_channels: int, out_channels: int, fc_squeeze: int = 16) -> Sizes:
    """Return the sizes of a 1x1 convolution of MobileNetV2: L halves until L^2 <= 2 * features; at least 4."""
    expands = in_channels < out_channels
    features, reduction = (4 * in_channels, 8) if expands else (in_channels, 2)
    latent = min(features, out_channels) // reduction
    while latent**2 > 2 * features:
        reduction *= 2
        latent = min(features, out_channels) // reduction
    latent = max(latent, 4)
    return Sizes(2 if expands else 1, latent, max(max(features, latent**2) // fc_squeeze, 4))


VARIANTS = {
    "resnet_bottleneck": resnet_bottleneck_sizes,
    "resnet_basic": resnet_basic_sizes,
    "mobilenet": mobilenet_sizes,
}


# ---------------------------------------------------------------------------------------------------------------------
# The released layers


class _ReleasedDCD(ReparamLayer):
    """y = scale(x) * conv(x) + p(bn2(Phi(x) z) + z), z = bn1(q(x)); Phi and scale from a gated dynamic branch.

    With v the averaged input: u = fc.0 v, u = u * h(fc.1.fc.0 u), Phi = fc_phi u (row by row), scale = h(fc_scale u);
    h(v) = relu6(v + 3) / 3, which is 1 at 0.
    """

    def _add_branch(self, features: int, out_channels: int, sizes: Sizes, init: str) -> None:
        self.sizes = sizes
        self.bn2 = nn.BatchNorm1D(sizes.latent)
        self.fc = nn.Sequential(_linear(features, sizes.squeezed), _Gate(sizes.squeezed))
        self.fc_phi = _linear(sizes.squeezed, sizes.latent**2)
        self.fc_scale = _linear(sizes.squeezed, out_channels)
        if init == "zero":
            assign(self.fc_scale.weight, np.zeros(self.fc_scale.weight.shape))

    def coefficients(self, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Return (Phi `[N, L, L]`, scale `[N, out]`)."""
        u = self.fc(pooled(x, self.sizes.pool_size))
        phi = self.fc_phi(u).reshape([-1, self.sizes.latent, self.sizes.latent])
        return phi, _hard_sigmoid(self.fc_scale(u))

    def _fold(self, geometry: ConvGeometry, static: Affine, q: np.ndarray, p: np.ndarray) -> tuple:
        """Return what `DCDConv2DFused` is made of, with both BNs folded; q `[L, in, 1, 1]`, p `[out, L, 1, 1]`.

        A(x) = diag(s2) Phi(x) + I, and p A(x) z + p t2 remains of p(bn2(Phi(x) z) + z) for bn2(v) = s2 * v + t2.
        """
        latent = self.sizes.latent
        scale, shift = read_bn_affine(self.bn2)
        phi = to_float64(self.fc_phi.weight).T * np.repeat(scale, latent)[:, None]
        # relu6 stays, the thirds of both h and their 3s go into the weights around it.
        gate = to_float64(self.fc[1].fc[0].weight).T
        factors = to_float64(self.fc_scale.weight).T
        branch = DynamicBranch(
            self.sizes,
            squeeze=Affine(to_float64(self.fc[0].weight).T, None),
            gate=Affine(gate, np.full(len(gate), 3.0)),
            matrices=Affine(phi / 3.0, np.eye(latent).reshape(-1)),
            factors=Affine(factors / 3.0, np.full(len(factors), 3.0)),
            dtype=geometry.dtype,
        )
        static = Affine(static.kernel / 3.0, None if static.bias is None else static.bias / 3.0)
        q = Affine(*kernels.fold_affine(q, None, *read_bn_affine(self.bn1)))
        return geometry, static, q, Affine(p, p[:, :, 0, 0] @ shift), branch


@register_layer
class DCDConv2D(_ReleasedDCD):
    """A convolution with dynamic channel attention and a dynamic low-rank 1x1 convolution at its centre tap.

        y = scale(x) * conv(x) + p(bn2(Phi(x) z) + z),  z = bn1(q(x)),  Phi(x) [L, L]

    as in the authors' code: the paper's formula with BNs and a shortcut around Phi. `[N, C, H, W]` of any size; BNs and
    activations of the network come after it. The static `conv` has an odd kernel and keeps the size at stride 1.
    The first arguments are those of `paddle.nn.Conv2D`. Options, for `build` and `from_conv` as well:

    variant: the rule for the sizes of the dynamic parts, "resnet_bottleneck", "resnet_basic" or "mobilenet".
    fc_squeeze: by how much the dynamic branch is narrower than what it reads (16; MobileNetV2 also 8).
    pool_size, latent_dimension, squeezed_width: these sizes themselves, instead of the rule's.
    init: "random" (as published), or "zero": p and fc_scale start at zero, and scale(x) is 1, so that a layer made from
        a convolution computes what that did.

    Raises `UnsupportedConv` for a convolution that it cannot stand in for, `ReparamError` for any other wrong option.
    """

    fused_type = DCDConv2DFused
    options = {  # noqa: RUF012
        "variant": one_of(*VARIANTS), "fc_squeeze": WHOLE, "pool_size": or_none(WHOLE),
        "latent_dimension": or_none(WHOLE), "squeezed_width": or_none(WHOLE), "init": one_of(*INITS),
    }  # fmt: skip
    holders = {"weight": "conv.weight", "bias": "conv.bias"}  # noqa: RUF012
    keeps_function_with = {"init": "zero"}  # noqa: RUF012
    train_form_keys = ("conv.weight", "q.weight", "p.weight", "fc_phi.weight")

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
    def build(cls, geometry: ConvGeometry, **options: Any) -> DCDConv2D:
        """Return a new layer for a convolution's geometry; the options and errors are those of the class."""
        layer = cls.__new__(cls)
        layer._create(geometry, **options)
        return layer

    def _create(
        self,
        geometry: ConvGeometry,
        variant: str = "resnet_bottleneck",
        fc_squeeze: int = 16,
        pool_size: int | None = None,
        latent_dimension: int | None = None,
        squeezed_width: int | None = None,
        init: str = "random",
    ) -> None:
        super().__init__()
        given = {"pool_size": pool_size, "latent_dimension": latent_dimension, "squeezed_width": squeezed_width}
        self.check_options(variant=variant, init=init, fc_squeeze=fc_squeeze, **given)
        refuse_without_centre("DCDConv2D", geometry)
        sizes = VARIANTS[variant](geometry.in_channels, geometry.out_channels, fc_squeeze)
        sizes = Sizes(*(rule if value is None else value for rule, value in zip(sizes, given.values())))
        self.conv, self.q, self.p = make_convs(geometry, sizes.latent, init=init)
        self.bn1 = nn.BatchNorm2D(sizes.latent)
        self._add_branch(geometry.in_channels * sizes.pool_size**2, geometry.out_channels, sizes, init)
        self.to(dtype=geometry.dtype)

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        phi, scale = self.coefficients(x)
        z = self.bn1(self.q(x))
        rows = z.flatten(2)
        rows = self.bn2(paddle.matmul(phi, rows)) + rows
        features = self.p(rows.reshape([-1, self.sizes.latent, z.shape[2], z.shape[3]]))
        return features + scale.unsqueeze([2, 3]) * self.conv(x)

    def fuse(self) -> DCDConv2DFused:
        """Return the inference form, with both BNs folded."""
        static = Affine(to_float64(self.conv.weight), to_float64(self.conv.bias))
        parts = self._fold(ConvGeometry.of(self.conv), static, to_float64(self.q.weight), to_float64(self.p.weight))
        return DCDConv2DFused(*parts)

    def extra_repr(self) -> str:
        return f"{ConvGeometry.of(self.conv)}, {self.sizes}"


class DCDLinearFused(DCDConv2DFused):
    """A fused `DCDLinear`, `[N, C]` to `[N, classes]`: the fused convolution on maps of one pixel."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.run(x.unsqueeze([2, 3])).flatten(1)

    def for_size(self, height: int = 1, width: int = 1, form: str | None = None) -> None:
        """There are no maps, and nothing faster."""
        return None


@register_layer(untestable="it is a classifier, [N, C] to [N, classes], and stands in for no convolution")
class DCDLinear(_ReleasedDCD):
    """The classifier of the released networks, `[N, in_features]` to `[N, class_num]`.

        y = scale(x) * cls(x) + cls_p(bn2(Phi(x) z) + z),  z = bn1(cls_q(x)),  Phi(x) [32, 32]

    A batch of one image in training mode, which has no statistics to normalise by, raises `ReparamError`.
    """

    fused_type = DCDLinearFused
    options = {}  # noqa: RUF012
    train_form_keys = ("cls.weight", "cls_q.weight", "cls_p.weight", "fc_phi.weight")

    def __init__(self, in_features: int, class_num: int) -> None:
        super().__init__()
        sizes = Sizes(pool_size=1, latent=32, squeezed=32)
        self.cls = nn.Linear(in_features, class_num)
        init_uniform_fan_in(self.cls)
        self.cls_q = _linear(in_features, sizes.latent)
        self.cls_p = _linear(sizes.latent, class_num)
        self.bn1 = nn.BatchNorm1D(sizes.latent)
        self._add_branch(in_features, class_num, sizes, "random")

    @classmethod
    def build(cls, geometry: ConvGeometry, **options: Any) -> DCDLinear:
        """Refuse, in a sentence: this layer is no convolution."""
        raise UnsupportedConv("DCDLinear is a classifier, [N, C] to [N, classes]; put DCDConv2D in this place")

    def coefficients(self, x: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Return (Phi `[N, 32, 32]`, scale `[N, class_num]`) for features `[N, in_features]`."""
        return _ReleasedDCD.coefficients(self, x.unsqueeze([2, 3]))

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        # Paddle's BNs hand a single sample on as it is: then this would be another function than with two.
        if self.training and paddle.in_dynamic_mode() and x.shape[0] == 1:
            raise ReparamError(
                "DCDLinear normalises over the batch, and this batch is one image: train with batches of two or more "
                "(drop_last=True drops a last one that is shorter)"
            )
        phi, scale = self.coefficients(x)
        z = self.bn1(self.cls_q(x))
        z = self.bn2(paddle.matmul(phi, z.unsqueeze(2)).squeeze(2)) + z
        return self.cls_p(z) + scale * self.cls(x)

    def fuse(self) -> DCDLinearFused:
        """Return the inference form, with the BNs folded."""
        static, q, p = (to_float64(layer.weight).T[:, :, None, None] for layer in (self.cls, self.cls_q, self.cls_p))
        geometry = ConvGeometry(static.shape[1], static.shape[0], (1, 1), dtype=type_name(self.cls.weight))
        return DCDLinearFused(*self._fold(geometry, Affine(static, to_float64(self.cls.bias)), q, p))


class _Gate(nn.Layer):
    """u * h(fc.0 u) for features u `[N, width]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(_linear(width, width))

    def forward(self, u: paddle.Tensor) -> paddle.Tensor:
        return u * _hard_sigmoid(self.fc(u))


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that the layers of the paper's formulas use as well


def make_convs(
    geometry: ConvGeometry, latent: int, blocks: int = 1, init: str = "random"
) -> tuple[nn.Conv2D, nn.Conv2D, nn.Conv2D]:
    """Return new (static convolution, q, p), drawn from normal distributions by fan-out; p of init "zero" is zero."""
    after = dataclasses.replace(geometry, stride=(1, 1))
    geometries = [
        geometry,
        at_centre(geometry, geometry.in_channels, latent, blocks),
        at_centre(after, latent, geometry.out_channels, blocks),
    ]
    convs = []
    for each, bias in zip(geometries, (geometry.bias, False, False)):
        conv = each.make_conv(np.zeros(each.weight_shape), np.zeros(each.out_channels) if bias else None)
        convs.append(conv)
        conv.train()
    for conv in convs[:2] if init == "zero" else convs:
        init_fan_out_normal(conv)
    return convs[0], convs[1], convs[2]


def refuse_without_centre(layer: str, geometry: ConvGeometry) -> None:
    """Raise `UnsupportedConv` where a 1x1 kernel has no place at the centre tap, or would meet other pixels there."""
    if geometry.data_format != "NCHW":
        raise UnsupportedConv(f"{layer} takes NCHW, this one takes {geometry.data_format}")
    if geometry.groups != 1:
        raise UnsupportedConv(f"{layer} stands in for convolutions without groups only, this one is {geometry}")
    height, width = geometry.kernel_size
    if height % 2 == 0 or width % 2 == 0:
        raise UnsupportedConv(f"its kernel {height}x{width} has no centre tap, where the dynamic 1x1 kernel belongs")
    vertical, horizontal = (k // 2 * d for k, d in zip(geometry.kernel_size, geometry.dilation))
    if geometry.padding != (vertical, vertical, horizontal, horizontal):
        raise UnsupportedConv(
            f"{layer} needs padding {(vertical, vertical, horizontal, horizontal)} for a kernel of {height}x{width} "
            f"(its centre tap then meets every stride-th pixel), this one has {geometry.padding}"
        )


def _linear(in_features: int, out_features: int) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias_attr=False)
    init_uniform_fan_in(linear)
    return linear


def _hard_sigmoid(v: paddle.Tensor) -> paddle.Tensor:
    return F.relu6(v + 3.0) / 3.0
