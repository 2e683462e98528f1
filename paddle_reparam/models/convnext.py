"""ConvNeXt: "A ConvNet for the 2020s" (CVPR 2022, arXiv 2201.03545), and the frame that SLaK shares with it.

Entries are named as in the published weight files: `stages.0.0.dwconv.weight`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Callable, ClassVar

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic import kernels
from ..arithmetic.geometry import ConvGeometry, affine_of_layer_norm
from ..arithmetic.tensors import to_float64, type_name
from ..errors import ReparamError
from ..layers.base import ReparamLayer
from ..layers.toeplitz import DepthwiseConv2D
from ..registry import Published, register_model
from .builders import check_arguments, load_pretrained

_EPSILON = 1e-6
_STD = 0.02

#: How all kernels and matrices start. The published networks cut the distribution off at 2, a hundred standard
#: deviations: not at all.
init_normal = nn.initializer.Normal(0.0, _STD)


class LayerNorm2D(nn.LayerNorm):
    """LayerNorm over the channels of `[N, C, H, W]`."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        # Not super().forward, which Paddle 2.6 cannot trace.
        x = x.transpose([0, 2, 3, 1])
        return F.layer_norm(x, self._normalized_shape, self.weight, self.bias, self._epsilon).transpose([0, 3, 1, 2])


class _PixelwiseLinear(nn.Linear):
    """A fully connected layer on many pixels, `[..., in]` to `[..., out]`.

    Where a CPU trains it, its bias is added as a product with ones, which has one for its gradient, too: the sum over
    pixels that is Paddle's own takes as long as the layer's matrix product.
    """

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        learns = paddle.in_dynamic_mode() and paddle.is_grad_enabled() and not self.bias.stop_gradient
        if not (learns and x.place.is_cpu_place() and x.dtype == self.bias.dtype):
            return F.linear(x, self.weight, self.bias)
        y = paddle.matmul(x, self.weight)
        ones = paddle.ones([math.prod(x.shape[:-1]), 1], x.dtype)
        return y + paddle.matmul(ones, self.bias.unsqueeze(0)).reshape(y.shape)


class FusedBlock(nn.Layer):
    """x + pwconv2(GELU(pwconv1(LN(K(x))))), `[N, C, H, W]` in and out: a block without layer scale and drop path.

    K is the sublayer named `spatial`. LN has no weights of its own; the fully connected layers are 1x1 convolutions.
    """

    # As fully connected layers on `[N, H, W, C]` they run outside of oneDNN. Measured in Paddle Inference 3.3.1 on one
    # thread at batch 1, AVX-512 / AVX2: SLaK-T's blocks of 56, 28, 14, 7 pixels take 0.50, 0.45, 0.39, 0.34 / 0.61,
    # 0.55, 0.47, 0.40 of that time as convolutions, which take up bias, GELU and sum as well. On `[N, H * W, C]`, where
    # oneDNN does run them, they take 1.00 to 1.18 times as long as convolutions at batch 1, 0.99 to 1.15 at batch 8.
    # Hidden channels filled up to a multiple of 16 gain nothing.
    def __init__(self, spatial: str, layers: Mapping[str, nn.Layer]) -> None:
        super().__init__()
        self.spatial = spatial
        for name, layer in layers.items():
            self.add_sublayer(name, layer)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        y = self.norm(getattr(self, self.spatial)(x))
        return x + self.pwconv2(self.act(self.pwconv1(y)))


class ResidualBlock(ReparamLayer):
    """x + DropPath(gamma * pwconv2(GELU(pwconv1(LN(K(x)))))), `[N, dim, H, W]` in and out.

    K is `layer`, from `dim` channels to as many, held under the name `spatial`; the two fully connected layers work on
    every pixel, with 4 * dim channels between them. gamma, one number a channel, starts at `layer_scale_init_value`;
    where that is not positive there is none. In training, `drop_path` is the share of samples that lose the branch.
    Fused, gamma is part of `pwconv2`, and what LN multiplies and adds is part of `pwconv1`.
    """

    fused_type = FusedBlock
    is_block = True
    spatial: ClassVar[str]

    def __init__(self, dim: int, layer: nn.Layer, drop_path: float, layer_scale_init_value: float) -> None:
        super().__init__()
        self.add_sublayer(self.spatial, layer)
        self.norm = nn.LayerNorm(dim, epsilon=_EPSILON)
        self.pwconv1 = _PixelwiseLinear(dim, 4 * dim, init_normal)
        self.act = nn.GELU()
        self.pwconv2 = _PixelwiseLinear(4 * dim, dim, init_normal)
        start = nn.initializer.Constant(layer_scale_init_value)
        self.gamma = self.create_parameter([dim], default_initializer=start) if layer_scale_init_value > 0 else None
        # A dropout whose mask lies along the batch: whole samples lose the branch.
        self.drop_path = nn.Dropout(drop_path, axis=0)

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        y = getattr(self, self.spatial)(x).transpose([0, 2, 3, 1])
        y = self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y.transpose([0, 3, 1, 2]))

    def fuse(self) -> FusedBlock:
        """Return the block with K fused, and LN's weights and gamma folded into the layers beside them in float64."""
        spatial = self._sub_layers[self.spatial]
        first, first_bias = _as_kernel(self.pwconv1)
        second, second_bias = _as_kernel(self.pwconv2)
        first, first_bias = kernels.fold_input_affine(first, first_bias, *affine_of_layer_norm(self.norm), 1)
        if self.gamma is not None:
            gamma = to_float64(self.gamma)
            second, second_bias = kernels.fold_affine(second, second_bias, gamma, np.zeros_like(gamma))
        dim, hidden = self.pwconv1.weight.shape
        dtype = type_name(self.pwconv1.weight)
        return FusedBlock(
            self.spatial,
            {
                self.spatial: _as_shipped(spatial),
                "norm": LayerNorm2D(dim, self.norm._epsilon, weight_attr=False, bias_attr=False),
                "pwconv1": ConvGeometry(dim, hidden, (1, 1), dtype=dtype).make_conv(first, first_bias),
                "act": copy.deepcopy(self.act),
                "pwconv2": ConvGeometry(hidden, dim, (1, 1), dtype=dtype).make_conv(second, second_bias),
            },
        )


def _as_shipped(layer: nn.Layer) -> nn.Layer:
    if isinstance(layer, ReparamLayer):
        return layer.reparameterize()
    if isinstance(layer, DepthwiseConv2D):
        return ConvGeometry.of(layer).make_conv(to_float64(layer.weight), to_float64(layer.bias))
    return copy.deepcopy(layer)


def _as_kernel(linear: nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    """Return (kernel, bias), in float64, of the 1x1 convolution that a fully connected layer is on every pixel."""
    return to_float64(linear.weight).T[:, :, None, None], to_float64(linear.bias)


class ConvNeXtBlock(ResidualBlock):
    """The block with a depthwise 7x7 convolution; arguments as for `ResidualBlock`."""

    spatial = "dwconv"

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale_init_value: float = 1e-6) -> None:
        conv = DepthwiseConv2D(dim, dim, 7, padding=3, groups=dim, weight_attr=init_normal)
        super().__init__(dim, conv, drop_path, layer_scale_init_value)


class StagedNetwork(nn.Layer):
    """Four stages of blocks at 1/4, 1/8, 1/16 and 1/32 of the image's size; `[N, 3, H, W]` to `[N, class_num]`.

    With another `patch_size` than 4 the first is at 1/`patch_size`, and each of the others at half of the one before.
    depths, dims: blocks and channels of each stage. `make_block(stage, drop_path)` returns a block of the stage's
    channels; `drop_path` grows evenly from 0 in the first block to `drop_path_rate` in the last. Weights start from a
    normal distribution of standard deviation 0.02, biases at 0; the head's deviation is `head_init_scale` times that.

    Raises `ReparamError` for a drop path rate outside of 0 <= rate < 1.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        make_block: Callable[[int, float], nn.Layer],
        drop_path_rate: float,
        head_init_scale: float,
        class_num: int,
        patch_size: int = 4,
    ) -> None:
        super().__init__()
        if not 0.0 <= drop_path_rate < 1.0:
            raise ReparamError(f"drop_path_rate={drop_path_rate!r} is no share of samples: give one from 0 to below 1")
        patches = nn.Conv2D(3, dims[0], patch_size, patch_size, weight_attr=init_normal)
        stem = nn.Sequential(patches, LayerNorm2D(dims[0], _EPSILON))
        downsampling = [
            nn.Sequential(LayerNorm2D(before, _EPSILON), nn.Conv2D(before, after, 2, 2, weight_attr=init_normal))
            for before, after in zip(dims, dims[1:])
        ]
        self.downsample_layers = nn.LayerList([stem, *downsampling])
        rates = np.split(np.linspace(0.0, drop_path_rate, sum(depths)), np.cumsum(depths)[:-1])
        self.stages = nn.LayerList(
            [nn.Sequential(*[make_block(stage, float(rate)) for rate in part]) for stage, part in enumerate(rates)]
        )
        self.norm = nn.LayerNorm(dims[-1], epsilon=_EPSILON)
        self.head = nn.Linear(dims[-1], class_num, nn.initializer.Normal(0.0, _STD * head_init_scale))

    def stage_maps(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        """Return the maps of the stages, from the largest to the smallest."""
        maps = []
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
            maps.append(x)
        return maps

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.head(self.norm(self.stage_maps(x)[-1].mean([2, 3])))


class ConvNeXt(StagedNetwork):
    """ConvNeXt; arguments as for `StagedNetwork` and `ConvNeXtBlock`."""

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        class_num: int,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
    ) -> None:
        def make_block(stage: int, drop_path: float) -> ConvNeXtBlock:
            return ConvNeXtBlock(dims[stage], drop_path, layer_scale_init_value)

        super().__init__(depths, dims, make_block, drop_path_rate, head_init_scale, class_num)


# ---------------------------------------------------------------------------------------------------------------------
# The networks


_OPTIONS = ("drop_path_rate", "layer_scale_init_value", "head_init_scale")
_SMALL_DEPTHS, _DEPTHS = (3, 3, 9, 3), (3, 3, 27, 3)
_PAPER = "the paper, 300 epochs"


def _build(
    name: str,
    pretrained: bool | str,
    use_ssld: bool,
    options: Mapping[str, Any],
    **arguments: Any,
) -> ConvNeXt:
    unknown = {key: value for key, value in options.items() if key not in _OPTIONS}
    check_arguments(name, pretrained, use_ssld, unknown, _OPTIONS)
    return load_pretrained(ConvNeXt(**arguments, **options), pretrained)


@register_model(
    published=[
        Published(_PAPER, 82.1),
        Published("SLaK's repository, distilled from SLaK-T, 300 epochs", 83.1, {"drop_path_rate": 0.1}),
    ],
    rename=dict,
)
def ConvNeXt_T(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    drop_path_rate: float = 0.1,
    **kwargs: Any,
) -> nn.Layer:
    """ConvNeXt-T, `[N, 3, H, W]` to `[N, class_num]`, for images of any size from 32 pixels.

    drop_path_rate: the share of samples that the last block is left out for in training; it grows from 0 in the first.
    layer_scale_init_value: what a block's branch is multiplied with at first, 1e-6 unless told.
    head_init_scale: what the classifier's initial weights are multiplied with.

    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    return _build(
        "ConvNeXt_T", pretrained, use_ssld, kwargs, depths=_SMALL_DEPTHS, dims=(96, 192, 384, 768),
        drop_path_rate=drop_path_rate, class_num=class_num,
    )  # fmt: skip


@register_model(
    published=[
        Published(_PAPER, 83.1),
        Published("SLaK's repository, distilled from SLaK-S, 300 epochs", 84.3, {"drop_path_rate": 0.1}),
    ],
    rename=dict,
)
def ConvNeXt_S(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    drop_path_rate: float = 0.4,
    **kwargs: Any,
) -> nn.Layer:
    """ConvNeXt-S; arguments as for `ConvNeXt_T`."""
    return _build(
        "ConvNeXt_S", pretrained, use_ssld, kwargs, depths=_DEPTHS, dims=(96, 192, 384, 768),
        drop_path_rate=drop_path_rate, class_num=class_num,
    )  # fmt: skip


@register_model(published=[Published(_PAPER, 83.8)], rename=dict)
def ConvNeXt_B(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    drop_path_rate: float = 0.5,
    **kwargs: Any,
) -> nn.Layer:
    """ConvNeXt-B; arguments as for `ConvNeXt_T`."""
    return _build(
        "ConvNeXt_B", pretrained, use_ssld, kwargs, depths=_DEPTHS, dims=(128, 256, 512, 1024),
        drop_path_rate=drop_path_rate, class_num=class_num,
    )  # fmt: skip


@register_model(published=[Published(_PAPER)], rename=dict)
def ConvNeXt_L(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    drop_path_rate: float = 0.5,
    **kwargs: Any,
) -> nn.Layer:
    """ConvNeXt-L; arguments as for `ConvNeXt_T`."""
    return _build(
        "ConvNeXt_L", pretrained, use_ssld, kwargs, depths=_DEPTHS, dims=(192, 384, 768, 1536),
        drop_path_rate=drop_path_rate, class_num=class_num,
    )  # fmt: skip
