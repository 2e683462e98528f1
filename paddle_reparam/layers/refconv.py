"""RefConv2D: "RefConv: Reparameterized Refocusing Convolution for Powerful ConvNets" (TNNLS 2025, arXiv 2310.10563)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.autograd import PyLayer

from ..arithmetic.geometry import ConvGeometry, as_pair
from ..arithmetic.tensors import to_float64, type_name
from ..errors import ReparamError, UnsupportedConv
from ..registry import register_layer
from .base import FLAG, ODD, ReparamLayer, one_of

INITS = ("xavier", "zero", "torch_default")
BASES = ("pretrained", "random")

# Planes that the 3x3 transform takes at once on a CPU: enough for a product of matrices to be worth a call, and few
# enough for its temporaries (25 floats a plane) to be written where the last ones were. Twice as many take 1.3 times as
# long for a kernel of 512x512x3x3, forward and backward, an eighth 1.3 to 1.6.
_PLANES_AT_ONCE = 65536


@register_layer
class RefConv2D(ReparamLayer):
    """A convolution whose kernel is Wt = Wb + T(Wb; Wr): a trained, frozen base weight Wb, refocused by a trained Wr.

    T reads Wb `[out, in / groups, kh, kw]` as one image of N = out * in / groups planes in that order and convolves it
    with Wr `[N, groups, map_k, map_k]`: stride 1, padding map_k // 2, N / groups groups, no bias. State: buffer
    `weight` (Wb), parameter `convmap.weight` (Wr) and, where the convolution has one, parameter `bias`; so the plain
    network's weights load as they are, and only `*.convmap.weight` are missing.

    The first ten arguments are those of `paddle.nn.Conv2D`, but `padding=None` keeps the size at stride 1 (odd
    kernels). Options, for `build` and `from_conv` as well:

    map_k: side of Wr, odd, at most the kernel's smaller side.
    init: Wr starts as "xavier" (the paper), "zero" (the network starts as it was) or "torch_default" (the released
        code: uniform within 1 / sqrt(groups) / map_k).
    base: "pretrained" (the base weight is taken from a convolution, or loaded) or "random" (an ablation).
    train_base: train Wb as well; `weight` is then a parameter (an ablation).
    identity: without it Wt = T(Wb; Wr) (an ablation).

    Raises `UnsupportedConv` where the convolution has no spatial pattern, or one smaller than map_k, and `ReparamError`
    for any other wrong option. A base weight of zeros, which could never learn, raises `ReparamError` in `from_conv`,
    in the first forward pass outside of tracing, and in fusing.
    """

    options = {  # noqa: RUF012
        "map_k": ODD, "init": one_of(*INITS), "base": one_of(*BASES), "train_base": FLAG, "identity": FLAG,
    }  # fmt: skip
    holders = {"weight": "weight", "bias": "bias"}  # noqa: RUF012
    keeps_function_with = {"init": "zero"}  # noqa: RUF012
    train_form_keys = ("convmap.weight",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: Any = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        bias_attr: bool | None = None,
        data_format: str = "NCHW",
        **options: Any,
    ) -> None:
        if padding is None:
            padding = [k // 2 * d for k, d in zip(as_pair(kernel_size), as_pair(dilation))]
        conv = nn.Conv2D(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
            padding_mode=padding_mode, bias_attr=bias_attr, data_format=data_format,
        )  # fmt: skip
        self._create(ConvGeometry.of(conv), **options)

    @classmethod
    def build(cls, geometry: ConvGeometry, **options: Any) -> RefConv2D:
        """Return a new layer for a convolution's geometry; the options and errors are those of the class."""
        layer = cls.__new__(cls)
        layer._create(geometry, **options)
        return layer

    def _create(
        self,
        geometry: ConvGeometry,
        map_k: int = 3,
        init: str = "xavier",
        base: str = "pretrained",
        train_base: bool = False,
        identity: bool = True,
    ) -> None:
        super().__init__()
        self.check_options(map_k=map_k, init=init, base=base, train_base=train_base, identity=identity)
        if geometry.kernel_size == (1, 1):
            raise UnsupportedConv("a 1x1 convolution has no spatial pattern to refocus")
        if map_k > min(geometry.kernel_size):
            height, width = geometry.kernel_size
            raise UnsupportedConv(f"its kernel {height}x{width} is smaller than map_k={map_k}; choose a smaller map_k")
        self.geometry = geometry
        self.map_k = map_k
        self.init = init
        self.base = base
        self.identity = identity
        if base == "random":
            self.holders = {"bias": "bias"}

        start = nn.initializer.KaimingNormal() if base == "random" else nn.initializer.Constant(0.0)
        weight = self._create_parameter_like(geometry.weight_shape, start)
        if train_base:
            self.weight = weight
        else:
            self.register_buffer("weight", weight.detach())
        # A bare layer, not a Conv2D: a search for convolutions must not find the transform.
        self.convmap = nn.Layer()
        planes = geometry.out_channels * geometry.in_channels // geometry.groups
        self.convmap.weight = self._create_parameter_like(
            (planes, geometry.groups, map_k, map_k), _refocusing_init(init, geometry.groups * map_k * map_k)
        )
        self.bias = self._create_parameter_like((geometry.out_channels,), None) if geometry.bias else None
        self._base_was_checked = False

    def _create_parameter_like(self, shape: tuple[int, ...], start: nn.initializer.Initializer | None) -> paddle.Tensor:
        start = start or nn.initializer.Constant(0.0)
        return self.create_parameter(list(shape), dtype=self.geometry.dtype, default_initializer=start)

    def take_weights(self, conv: nn.Conv2D) -> None:
        """Take the convolution's bias and, unless base="random", its weight as the base; all zeros are refused."""
        super().take_weights(conv)
        self._refuse_zero_base()

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        # Once only: reading a value back stops a GPU. A traced program has no value to read.
        if not self._base_was_checked and paddle.in_dynamic_mode():
            self._refuse_zero_base()
            self._base_was_checked = True
        # The kernel is computed in its own precision; the convolution follows the autocast around it.
        with paddle.amp.auto_cast(enable=False):
            kernel = refocused(self.weight, self.convmap.weight, self.identity)
        return self.geometry.convolve(x, kernel, self.bias)

    def fuse(self) -> nn.Conv2D:
        """Return the plain convolution with Wt as its weight, computed in float64."""
        self._refuse_zero_base()
        dtype = type_name(self.weight)
        with paddle.no_grad():
            kernel = refocused(self.weight.astype("float64"), self.convmap.weight.astype("float64"), self.identity)
        return dataclasses.replace(self.geometry, dtype=dtype).make_conv(kernel.numpy(), to_float64(self.bias))

    def _refuse_zero_base(self) -> None:
        # Without .numpy(), which the code that Paddle 2.6 leaves in a layer after jit.save turns into nothing.
        if not bool(self.weight.astype("bool").any()):
            raise ReparamError(
                f"the base weight of this RefConv2D ({self.geometry}) is all zeros, so T(Wb; Wr) and its gradient stay "
                "zero: load a trained weight, make the layer with from_conv, or choose base='random'"
            )

    def extra_repr(self) -> str:
        return f"{self.geometry}, map_k={self.map_k}, init={self.init}"


def _refocusing_init(init: str, fan: int) -> nn.initializer.Initializer:
    """Return how Wr starts; `fan` = groups * map_k^2 is its fan-in and, within one group, its fan-out."""
    if init == "zero":
        return nn.initializer.Constant(0.0)
    bound = math.sqrt(3.0 / fan) if init == "xavier" else math.sqrt(1.0 / fan)
    return nn.initializer.Uniform(-bound, bound)


# ---------------------------------------------------------------------------------------------------------------------
# The transform


def refocused(base: paddle.Tensor, refocus: paddle.Tensor, identity: bool = True) -> paddle.Tensor:
    """Return Wt = Wb + T(Wb; Wr), or T(Wb; Wr) alone, with the shape of Wb.

    base: `[out, in / groups, kh, kw]`; refocus: `[out * in / groups, groups, map_k, map_k]`, map_k odd.
    """
    planes, mixed, map_k, _ = refocus.shape
    size = tuple(base.shape[2:])
    if (mixed, map_k, size) == (1, 3, (3, 3)):
        change = _refocus_planes_3x3(base.reshape([planes, 9]), refocus.reshape([planes, 9]))
    else:
        # Groups of `mixed` planes as one batched matrix product. Against a grouped convolution, forward and backward
        # take 0.8 of the time for one group of 960 planes, for 8192 planes in groups of 32 0.6 (0.2 on Paddle 2.6.2),
        # for 32768 in pairs 0.1 (0.005). The patches take map_k^2 times the memory of the base weight.
        patches = F.unfold(base.reshape([1, planes, *size]), [map_k, map_k], paddings=map_k // 2)
        rows = mixed * map_k * map_k
        change = paddle.matmul(
            refocus.reshape([planes // mixed, mixed, rows]), patches.reshape([planes // mixed, rows, size[0] * size[1]])
        )
    change = change.reshape(base.shape)
    return base + change if identity else change


# A dense convolution's planes (millions in a network) are each filtered on their own. For that neither a convolution
# in N groups nor N products of small matrices is fast. Along one axis, t[p] = sum_q b[p + q - 1] * r[q] for p = 0, 1, 2
# are the coefficients of x, x^2 and x^3 of the product of the polynomials (b[0], b[1], b[2]) and (r[2], r[1], r[0]).
# Modulo x^4 - 1 only its coefficients of 1 and x^4, which nobody needs, fall together. So the product is needed
# at 1, -1 and i: 5 real multiplications, t = C ((A b) * (R r)), where the definition takes 7; in two axes 25, not 49,
# with the Kronecker squares of A, R and C. Exact but for rounding: all entries are 0 or +-1, in C also +-1/2, +-1/4.
# ResNet18, forward and backward of all 17 transforms against a training step (two threads, Paddle 3.3.1): 0.15 at 224
# px, batch 8, and 0.34 at 32 px, batch 64. A quarter of that are fresh pages for the temporaries and the results; the
# planes are the rows of every product, so that nothing is transposed.
_A = np.array([[1, 1, 1], [1, -1, 1], [1, 0, -1], [0, 1, 0], [1, 1, -1]])
_R = _A[:, ::-1]
_C = np.array([[1, -1, -2, -2, 2], [1, 1, -2, 2, 0], [1, -1, 2, 2, -2]]) / 4


def _matrix(of_one_axis: np.ndarray, like: paddle.Tensor) -> paddle.Tensor:
    """Return what multiplies rows of both axes from the right, for the matrix of one axis, in the dtype of `like`."""
    # float32 holds every entry, and the tracer of Paddle 2.6 has no constants of float64.
    return paddle.to_tensor(np.kron(of_one_axis, of_one_axis).T.astype("float32")).astype(like.dtype)


def _refocus_planes_3x3(base: paddle.Tensor, refocus: paddle.Tensor) -> paddle.Tensor:
    """Return T for planes that are not mixed: `[N, 9]` and `[N, 9]` to `[N, 9]`."""
    if not paddle.in_dynamic_mode():
        return _combine(base, _matrix(_A, base), refocus, _matrix(_R, base), _matrix(_C, base))
    change = _OfRefocus.apply(refocus, base.detach())
    if base.stop_gradient or not paddle.is_grad_enabled():
        return change
    return change + _OfBase.apply(base, refocus.detach())


# The transform in pieces that fit the cache, which keeps its inputs alone for the backward pass. There is one for each
# of the two gradients: Paddle refuses what a PyLayer returns for an input that is frozen or not asked for.


class _OfRefocus(PyLayer):
    """The transform, with a gradient for the refocusing weight."""

    @staticmethod
    def forward(ctx: Any, refocus: paddle.Tensor, base: paddle.Tensor) -> paddle.Tensor:
        ctx.save_for_backward(base)
        return _in_pieces(base, _matrix(_A, base), refocus, _matrix(_R, base), _matrix(_C, base))

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> tuple[paddle.Tensor, None]:
        [base] = ctx.saved_tensor()
        return _in_pieces(base, _matrix(_A, base), gradient, _matrix(_C.T, base), _matrix(_R.T, base)), None


class _OfBase(PyLayer):
    """Zeros, which have what the gradient of the transform is for the base weight."""

    @staticmethod
    def forward(ctx: Any, base: paddle.Tensor, refocus: paddle.Tensor) -> paddle.Tensor:
        ctx.save_for_backward(refocus)
        return paddle.zeros_like(base)

    @staticmethod
    def backward(ctx: Any, gradient: paddle.Tensor) -> tuple[paddle.Tensor, None]:
        [refocus] = ctx.saved_tensor()
        turned = [_matrix(each, refocus) for each in (_R, _C.T, _A.T)]
        return _in_pieces(refocus, turned[0], gradient, turned[1], turned[2]), None


def _in_pieces(
    x: paddle.Tensor, of_x: paddle.Tensor, y: paddle.Tensor, of_y: paddle.Tensor, out: paddle.Tensor
) -> paddle.Tensor:
    planes = x.shape[0]
    step = _PLANES_AT_ONCE if x.place.is_cpu_place() else planes
    pieces = [slice(i, i + step) for i in range(0, planes, step)]
    return paddle.concat([_combine(x[piece], of_x, y[piece], of_y, out) for piece in pieces])


def _combine(
    x: paddle.Tensor, of_x: paddle.Tensor, y: paddle.Tensor, of_y: paddle.Tensor, out: paddle.Tensor
) -> paddle.Tensor:
    """Return ((x of_x) * (y of_y)) out, for x and y `[planes, 9]`."""
    return paddle.matmul(paddle.matmul(x, of_x) * paddle.matmul(y, of_y), out)
