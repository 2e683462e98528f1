"""A convolution's geometry, read once from a Paddle layer and carried as one value; and affines folded into layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..errors import ReparamError, UnsupportedConv
from . import kernels
from .tensors import assign, to_float64, type_name

#: Paddle's batch normalisations; `nn.BatchNorm` is the old one, which may apply an activation as well.
BATCH_NORMS = (nn.BatchNorm1D, nn.BatchNorm2D, nn.BatchNorm3D, nn.SyncBatchNorm, nn.BatchNorm)


#: Paddle's convolutions, and what an affine per output channel can be folded into.
CONVOLUTIONS = (nn.Conv1D, nn.Conv2D, nn.Conv3D, nn.Conv1DTranspose, nn.Conv2DTranspose, nn.Conv3DTranspose)
FOLDABLE = (*CONVOLUTIONS, nn.Linear)
# Their weights begin with the inputs: [in, out / groups, ...].
_INPUTS_FIRST = (nn.Conv1DTranspose, nn.Conv2DTranspose, nn.Conv3DTranspose, nn.Linear)


def is_convolution(layer: nn.Layer) -> bool:
    """Tell whether a layer convolves: one of Paddle's, a subclass, or a kernel in what calls itself a convolution."""
    weight = layer._parameters.get("weight")
    named = "Conv" in type(layer).__name__ and weight is not None and len(weight.shape) > 2
    return isinstance(layer, CONVOLUTIONS) or named


def channel_axis(layer: nn.Layer, axes: int) -> int:
    """Return which of so many axes counts the channels in what a convolution, BN or `nn.Linear` puts out."""
    data_format = getattr(layer, "_data_format", None) or getattr(layer, "_data_layout", "NCHW")
    return axes - 1 if isinstance(layer, nn.Linear) or data_format.endswith("C") else 1


def read_bn_affine(bn: nn.Layer) -> tuple[np.ndarray, np.ndarray]:
    """Return (scale, shift), each `[channels]` in float64, of one of `BATCH_NORMS` in eval mode.

    Raises `ReparamError` for a BN that normalises by the batch in eval mode as well.
    """
    by_batch = bn._trainable_statistics if isinstance(bn, nn.BatchNorm) else bn._use_global_stats is False
    if by_batch:
        raise ReparamError("this BN uses the statistics of the batch in eval mode too, so it is no fixed affine")
    weight, bias, mean, variance = (to_float64(t) for t in (bn.weight, bn.bias, bn._mean, bn._variance))
    return kernels.bn_affine(weight, bias, mean, variance, bn._epsilon)


def fold_into(layer: nn.Layer, scale: np.ndarray, shift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (weight, bias) in float64 of one of `FOLDABLE` followed by scale * y + shift per channel."""
    weight, bias = to_float64(layer.weight), to_float64(layer.bias)
    if not isinstance(layer, _INPUTS_FIRST):
        return kernels.fold_affine(weight, bias, scale, shift)
    groups = getattr(layer, "_groups", 1)
    rows, bias = kernels.fold_affine(kernels.swap_channels(weight, groups), bias, scale, shift)
    return kernels.swap_channels(rows, groups), bias


def absorb_affine_into(layer: nn.Layer, scale: np.ndarray, shift: np.ndarray | None = None) -> None:
    """Make one of `FOLDABLE`, in place, compute scale * y + shift per channel; without `shift` it is scale * y.

    A layer without a bias gets one where there is a shift.
    """
    weight, bias = fold_into(layer, scale, np.zeros_like(scale) if shift is None else shift)
    assign(layer.weight, weight)
    if layer.bias is None and shift is not None:
        layer.bias = layer.create_parameter([bias.size], dtype=layer.weight.dtype, is_bias=True)
    if layer.bias is not None:
        assign(layer.bias, bias)


def linear_behind(linear: nn.Linear, scale: np.ndarray, shift: np.ndarray) -> nn.Linear:
    """Return a fully connected layer that computes what this one does behind scale * x + shift, each `[channels]`.

    Its inputs may be several of each channel, in (channel, place) order.
    """
    scale, shift = (np.repeat(v, linear.weight.shape[0] // v.size) for v in (scale, shift))
    kernel = to_float64(linear.weight).T[:, :, None, None]
    kernel, bias = kernels.fold_input_affine(kernel, to_float64(linear.bias), scale, shift, 1)
    folded = nn.Linear(*linear.weight.shape, weight_attr=nn.initializer.Constant(0.0))
    folded.to(dtype=linear.weight.dtype)
    assign(folded.weight, kernel[:, :, 0, 0].T)
    assign(folded.bias, bias)
    return folded


def affine_of_layer_norm(norm: nn.LayerNorm) -> tuple[np.ndarray, np.ndarray]:
    """Return (scale, shift), each `[channels]` in float64, that an `nn.LayerNorm` over one axis ends with."""
    size = norm._normalized_shape[-1]
    scale, shift = to_float64(norm.weight), to_float64(norm.bias)
    return np.ones(size) if scale is None else scale, np.zeros(size) if shift is None else shift


def as_pair(value: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    """Return (height, width) of an int or of a pair."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


@dataclass(frozen=True)
class ConvGeometry:
    """What a 2-D convolution does apart from its weights.

    `padding` is (top, bottom, left, right) in pixels, or "SAME" where it depends on the input's size.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: str | tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    data_format: str = "NCHW"
    bias: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        # Paddle takes one int as the padding of these modes; `convolve` and `make_conv` build on that.
        if self.padding_mode != "zeros" and len(set(self.padding)) > 1:
            raise UnsupportedConv(
                f"padding {self.padding} in mode {self.padding_mode!r} is no convolution of Paddle's, "
                "which pads all four sides alike there"
            )

    @staticmethod
    def of(conv: nn.Conv2D) -> ConvGeometry:
        """Read a `paddle.nn.Conv2D`; what is no plain convolution raises `UnsupportedConv`."""
        if type(conv) is not nn.Conv2D and not getattr(conv, "computes_plain_convolution", False):
            other = "its forward may do more" if isinstance(conv, nn.Conv2D) else "layers stand in for that alone"
            raise UnsupportedConv(f"{type(conv).__name__} is not paddle.nn.Conv2D itself; {other}")
        if "weight" not in conv._parameters:
            hooks = ", ".join(type(hook).__name__ for hook in conv._forward_pre_hooks.values())
            raise UnsupportedConv(
                f"its weight is computed before each pass by a hook ({hooks}), which a new layer would lose; take the "
                "network that reparameterize(model) returns, where it is a parameter"
            )
        height, width = as_pair(conv._kernel_size)
        geometry = ConvGeometry(
            in_channels=conv._in_channels,
            out_channels=conv._out_channels,
            kernel_size=(height, width),
            stride=as_pair(conv._stride),
            dilation=as_pair(conv._dilation),
            groups=conv._groups,
            padding_mode=conv._padding_mode,
            data_format=conv._data_format,
            bias=conv.bias is not None,
            dtype=type_name(conv.weight),
        )
        if isinstance(conv._padding, str) and conv._padding.upper() == "SAME":
            # Paddle runs a "SAME" convolution without dilation, whatever dilation was given.
            geometry = replace(geometry, dilation=(1, 1))
        return replace(geometry, padding=geometry._read_padding(conv._padding))

    def _read_padding(self, padding: object) -> str | tuple[int, int, int, int]:
        """Normalise Paddle's forms: int, pair, 4 ints, 4 pairs (with the batch and channel ones), "SAME", "VALID"."""
        if isinstance(padding, str):
            if padding.upper() == "VALID":
                return (0, 0, 0, 0)
            if self.stride != (1, 1):
                return "SAME"
            total = [k - 1 for k in self.kernel_size]
            return (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
        if isinstance(padding, int):
            return (padding,) * 4
        flat = np.asarray(padding)
        if flat.shape == (4, 2):
            spatial = flat[2:] if self.data_format == "NCHW" else flat[1:3]
            return tuple(int(v) for v in spatial.reshape(-1))
        if flat.shape == (2,):
            return (int(flat[0]), int(flat[0]), int(flat[1]), int(flat[1]))
        if flat.shape == (4,):
            return tuple(int(v) for v in flat)
        raise UnsupportedConv(f"padding {padding!r} has none of the forms that paddle.nn.Conv2D documents")

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """[out_channels, in_channels / groups, height, width], whatever the data format."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def is_depthwise(self) -> bool:
        """True where each input channel is convolved on its own (any channel multiplier)."""
        return self.groups == self.in_channels

    def output_size(self, height: Any, width: Any) -> tuple[Any, Any]:
        """Return (height, width) of what comes out of maps of this size, numbers or tensors; padding is in numbers."""
        top, bottom, left, right = self.padding
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size)]
        return (
            (height + top + bottom - reach[0]) // self.stride[0] + 1,
            (width + left + right - reach[1]) // self.stride[1] + 1,
        )

    def __str__(self) -> str:
        parts = [f"{self.in_channels}->{self.out_channels}, {self.kernel_size[0]}x{self.kernel_size[1]}"]
        parts += [f"groups={self.groups}"] if self.groups > 1 else []
        parts += [f"{n}={getattr(self, n)}" for n in ("stride", "dilation") if getattr(self, n) != (1, 1)]
        return ", ".join(parts)

    def convolve(self, x: paddle.Tensor, weight: paddle.Tensor, bias: paddle.Tensor | None) -> paddle.Tensor:
        """Convolve `x` with this geometry and the given weight and bias."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, list(padding), mode=self.padding_mode, data_format=self.data_format)
            padding = (0, 0, 0, 0)
        return F.conv2d(
            x, weight, bias, list(self.stride), _paddle_padding(padding), list(self.dilation), self.groups,
            self.data_format,
        )  # fmt: skip

    def new_conv(self, weight_attr: Any = None, bias_attr: Any = None) -> nn.Conv2D:
        """Return a fresh `nn.Conv2D` of this geometry, with these attributes as Paddle takes them."""
        padding = _paddle_padding(self.padding) if self.padding_mode == "zeros" else self.padding[0]
        conv = nn.Conv2D(
            self.in_channels, self.out_channels, list(self.kernel_size), list(self.stride), padding,
            list(self.dilation), self.groups, padding_mode=self.padding_mode, data_format=self.data_format,
            weight_attr=weight_attr, bias_attr=bias_attr,
        )  # fmt: skip
        if self.dtype != type_name(conv.weight):
            conv.to(dtype=self.dtype)
        return conv

    def make_conv(self, weight: np.ndarray, bias: np.ndarray | None) -> nn.Conv2D:
        """Return a plain `nn.Conv2D` of this geometry that holds a float64 weight and bias, in eval mode."""
        conv = self.new_conv(nn.initializer.Constant(0.0), None if bias is not None else False)
        assign(conv.weight, weight)
        if bias is not None:
            assign(conv.bias, bias)
        conv.eval()
        return conv


def _paddle_padding(padding: str | tuple[int, int, int, int]) -> str | list[int]:
    # The shortest form: an exported graph shows symmetric padding as a pair, which more converters accept. A function
    # of the module, because the tracer of Paddle 3.3 does not find static methods of dataclass instances.
    if padding == "SAME":
        return padding
    top, bottom, left, right = padding
    return [top, left] if (top, left) == (bottom, right) else list(padding)
