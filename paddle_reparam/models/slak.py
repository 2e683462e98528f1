"""SLaK: "More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity" (ICLR 2023, arXiv 2207.03620).

It is ConvNeXt with large kernels. Entries are named as in the published weight files:
`stages.0.0.large_kernel.LoRA1.conv.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paddle import nn

from ..errors import ReparamError
from ..layers.replknet import ReparamLargeKernelConv2D
from ..layers.slak import DecomposedLargeKernelConv2D
from ..registry import Published, register_model
from .builders import check_arguments, load_pretrained
from .convnext import ResidualBlock, StagedNetwork, init_normal


class SLaKBlock(ResidualBlock):
    """The block with a large kernel, decomposed or not; `drop_path` and `layer_scale_init_value` as in `ResidualBlock`.

    kernel_size, small_kernel, bn: as for `DecomposedLargeKernelConv2D`.
    """

    spatial = "large_kernel"

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        small_kernel: int = 5,
        drop_path: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        decomposed: bool = True,
        bn: bool = True,
    ) -> None:
        make = DecomposedLargeKernelConv2D if decomposed else ReparamLargeKernelConv2D
        large_kernel = make(dim, kernel_size, small_kernel, bn=bn)
        for layer in large_kernel.sublayers():
            if isinstance(layer, nn.Conv2D):
                init_normal(layer.weight)
        super().__init__(dim, large_kernel, drop_path, layer_scale_init_value)


class SLaK(StagedNetwork):
    """SLaK; depths, `drop_path_rate`, `head_init_scale`, `class_num` and `patch_size` as for `StagedNetwork`.

    dims: channels of each stage, multiplied by `width_factor` and cut to whole numbers. kernel_size: one for each
    stage and, fifth, the small kernel, which is 5 where there are only four. A small kernel larger than all others is
    the published way to say that there is none; nothing is decomposed then. Other arguments as for `SLaKBlock`.

    Raises `ReparamError` for another number of kernel sizes, and for a width that leaves a stage without channels.
    """

    def __init__(
        self,
        depths: Sequence[int],
        dims: Sequence[int],
        class_num: int,
        kernel_size: Sequence[int] = (51, 49, 47, 13, 5),
        width_factor: float = 1.3,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        head_init_scale: float = 1.0,
        decomposed: bool = True,
        bn: bool = True,
        patch_size: int = 4,
    ) -> None:
        if not isinstance(kernel_size, (list, tuple)) or len(kernel_size) not in (4, 5):
            raise ReparamError(
                f"kernel_size={kernel_size!r}: SLaK needs one kernel size for each of its four stages and, if that is "
                "not 5, the small kernel as a fifth"
            )
        kernels, small_kernel = kernel_size[:4], kernel_size[4] if len(kernel_size) == 5 else 5
        decomposed = decomposed and small_kernel <= max(kernels)
        widths = [int(width_factor * dim) for dim in dims]
        if min(widths) < 1:
            raise ReparamError(f"width_factor={width_factor!r} leaves a stage without channels: {widths}")

        def make_block(stage: int, drop_path: float) -> SLaKBlock:
            return SLaKBlock(
                widths[stage], kernels[stage], small_kernel, drop_path, layer_scale_init_value, decomposed, bn
            )

        super().__init__(depths, widths, make_block, drop_path_rate, head_init_scale, class_num, patch_size)


# ---------------------------------------------------------------------------------------------------------------------
# The networks


_OPTIONS = (
    "kernel_size", "width_factor", "drop_path_rate", "layer_scale_init_value", "head_init_scale", "decomposed", "bn"
)  # fmt: skip
_SMALL_DEPTHS, _DEPTHS = (3, 3, 9, 3), (3, 3, 27, 3)


def _build(
    name: str,
    pretrained: bool | str,
    use_ssld: bool,
    options: Mapping[str, Any],
    own_options: Sequence[str] = (),
    **arguments: Any,
) -> SLaK:
    unknown = {key: value for key, value in options.items() if key not in _OPTIONS}
    check_arguments(name, pretrained, use_ssld, unknown, [*_OPTIONS, *own_options])
    return load_pretrained(SLaK(**arguments, **options), pretrained)


def _published(epochs: int, top1: float, **options: Any) -> Published:
    return Published(f"the authors' repository, {epochs} epochs, 40 % sparse", top1, options, sparsity=0.4)


@register_model(
    published=[
        _published(300, 82.5),
        _published(120, 81.5, kernel_size=[31, 29, 27, 13, 5]),
        _published(120, 81.6, kernel_size=[51, 49, 47, 13, 5]),
        _published(120, 81.5, kernel_size=[61, 59, 57, 13, 5]),
    ],
    rename=dict,
)
def SLaK_tiny(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    drop_path_rate: float = 0.1,
    **kwargs: Any,
) -> nn.Layer:
    """SLaK-T, `[N, 3, H, W]` to `[N, class_num]`, for images of any size from 32 pixels.

    kernel_size: of the four stages and, fifth, the small kernel; (51, 49, 47, 13, 5) unless told.
    width_factor: what the 96, 192, 384, 768 channels are multiplied with, 1.3 unless told.
    drop_path_rate: the share of samples that the last block is left out for in training; it grows from 0 in the first.
    layer_scale_init_value: what a block's branch is multiplied with at first, 1e-6 unless told.
    head_init_scale: what the classifier's initial weights are multiplied with.
    decomposed: without it the large kernels are square ones, `ReparamLargeKernelConv2D`.
    bn: without it the kernels have no BNs.

    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit, and
    for options that make no network.
    """
    return _build(
        "SLaK_tiny", pretrained, use_ssld, kwargs, depths=_SMALL_DEPTHS, dims=(96, 192, 384, 768),
        drop_path_rate=drop_path_rate, class_num=class_num,
    )  # fmt: skip


@register_model(published=[_published(300, 83.8)], rename=dict)
def SLaK_small(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    drop_path_rate: float = 0.4,
    **kwargs: Any,
) -> nn.Layer:
    """SLaK-S; arguments as for `SLaK_tiny`."""
    return _build(
        "SLaK_small", pretrained, use_ssld, kwargs, depths=_DEPTHS, dims=(96, 192, 384, 768),
        drop_path_rate=drop_path_rate, class_num=class_num,
    )  # fmt: skip


@register_model(published=[_published(300, 84.0)], rename=dict)
def SLaK_base(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    drop_path_rate: float = 0.5,
    **kwargs: Any,
) -> nn.Layer:
    """SLaK-B; arguments as for `SLaK_tiny`."""
    return _build(
        "SLaK_base", pretrained, use_ssld, kwargs, depths=_DEPTHS, dims=(128, 256, 512, 1024),
        drop_path_rate=drop_path_rate, class_num=class_num,
    )  # fmt: skip


@register_model(rename=dict)
def SLaK_large(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    drop_path_rate: float = 0.5,
    **kwargs: Any,
) -> nn.Layer:
    """SLaK-L, of which no weights were published; arguments as for `SLaK_tiny`."""
    return _build(
        "SLaK_large", pretrained, use_ssld, kwargs, depths=_DEPTHS, dims=(192, 384, 768, 1536),
        drop_path_rate=drop_path_rate, class_num=class_num,
    )  # fmt: skip


@register_model(published=[Published("this library's own, for small images", input_size=32)])
def SLaK_micro(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 10,
    depths: Sequence[int] = (1, 1, 2, 1),
    dims: Sequence[int] = (16, 32, 48, 64),
    kernel_size: Sequence[int] = (15, 7, 7, 7, 5),
    width_factor: float = 1.0,
    patch_size: int = 4,
    drop_path_rate: float = 0.0,
    layer_scale_init_value: float = 1.0,
    **kwargs: Any,
) -> nn.Layer:
    """A SLaK of any size, by default a small one for images of 32 pixels.

    depths, dims: blocks and channels of each of the four stages. patch_size: the side of the squares of pixels that the
    first stage sees as one. Other arguments as for `SLaK_tiny`.
    """
    return _build(
        "SLaK_micro", pretrained, use_ssld, kwargs, ("depths", "dims", "patch_size"), depths=depths, dims=dims,
        kernel_size=kernel_size, width_factor=width_factor, patch_size=patch_size, drop_path_rate=drop_path_rate,
        layer_scale_init_value=layer_scale_init_value, class_num=class_num,
    )  # fmt: skip
