"""MobileOne: "MobileOne: An Improved One Millisecond Mobile Backbone" (CVPR 2023, arXiv 2206.04040).

Entries are named as in the authors' weight files but for their branches, which have timm's names:
`stage1.0.conv_kxk.0.conv.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from paddle import nn

from ..arithmetic.geometry import ConvGeometry
from ..layers.mobileone import MobileOne2D
from ..registry import Published, register_model
from .activated import Activated, FiveStages, renamed_paths, split_merged
from .builders import check_arguments, load_pretrained

_BLOCKS = (2, 8, 10, 1)


class MobileOneBlock(Activated, MobileOne2D):
    """ReLU(SE(MobileOne2D(x))) that keeps the size at stride 1; SE where `se`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        num_conv_branches: int = 1,
        se: bool = False,
    ) -> None:
        geometry = ConvGeometry(
            in_channels, out_channels, (kernel_size, kernel_size), (stride, stride), (kernel_size // 2,) * 4,
            groups=groups, bias=False,
        )  # fmt: skip
        super().__init__(geometry, num_conv_branches)
        if se:
            self.squeeze_and_excite(out_channels)


class MobileOne(FiveStages):
    """A stem and four stages of depthwise 3x3 and 1x1 blocks by turns, the average over the image and a classifier.

    The stem and each stage halve the size. `widths` is the stages' channels in units of 64, 128, 256 and 512, `blocks`
    how many pairs of blocks each has, `num_conv_branches` how many copies of its convolution each block has but the
    stem. With `se` the last half of the third stage and all of the fourth have squeeze-and-excitation.
    """

    def __init__(
        self,
        widths: Sequence[float],
        num_conv_branches: int = 1,
        se: bool = False,
        class_num: int = 1000,
        blocks: Sequence[int] = _BLOCKS,
    ) -> None:
        super().__init__()
        channels = [int(64 * 2**i * width) for i, width in enumerate(widths)]
        before = min(64, channels[0])
        self.stage0 = MobileOneBlock(3, before, 3, stride=2)
        with_se = (0, 0, blocks[2] // 2, blocks[3]) if se else (0, 0, 0, 0)
        for stage, (count, last, after) in enumerate(zip(blocks, with_se, channels), 1):
            parts = []
            for index in range(count):
                options = {"num_conv_branches": num_conv_branches, "se": index >= count - last}
                parts.append(MobileOneBlock(before, before, 3, 1 if index else 2, before, **options))
                parts.append(MobileOneBlock(before, after, 1, **options))
                before = after
            setattr(self, f"stage{stage}", nn.Sequential(*parts))
        self.add_classifier(before, class_num)


# ---------------------------------------------------------------------------------------------------------------------
# Published weights

#: Parts of a path in the authors' files, and in timm's where they differ -> here.
_OF_AUTHORS = {
    "rbr_conv": "conv_kxk", "rbr_scale": "conv_scale", "rbr_skip": "identity",
    "se.reduce": "se.fc1", "se.expand": "se.fc2",
}  # fmt: skip
_OF_TIMM = {"attn": "se"}


def _rename(state: Mapping[str, np.ndarray], num_conv_branches: int = 1) -> dict[str, np.ndarray]:
    """Return a state dict of the authors or of timm, merged or not, as that of the train form."""
    arrays = renamed_paths(state, _OF_TIMM, _OF_AUTHORS)
    stem = {key: value for key, value in arrays.items() if key.startswith("stage0.")}
    rest = {key: value for key, value in arrays.items() if key not in stem}
    return {
        **split_merged(stem, "reparam_conv", ["conv_kxk.0"], "conv_scale", "identity"),
        **split_merged(
            rest, "reparam_conv", [f"conv_kxk.{i}" for i in range(num_conv_branches)], "conv_scale", "identity"
        ),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The networks


def _build(
    name: str, pretrained: bool | str, use_ssld: bool, class_num: int, unknown: Mapping[str, Any], **options: Any
) -> MobileOne:
    check_arguments(name, pretrained, use_ssld, unknown)
    return load_pretrained(MobileOne(class_num=class_num, **options), pretrained)


_REPOSITORY = "the authors' repository"


@register_model(published=[Published(_REPOSITORY, 71.4)], rename=partial(_rename, num_conv_branches=4))
def MobileOne_S0(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> MobileOne:
    """MobileOne-S0, with four copies of each convolution, `[N, 3, H, W]` to `[N, class_num]`, for images of any size.

    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    return _build("MobileOne_S0", pretrained, use_ssld, class_num, kwargs, widths=(0.75, 1, 1, 2), num_conv_branches=4)


@register_model(published=[Published(_REPOSITORY, 75.9)], rename=_rename)
def MobileOne_S1(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> MobileOne:
    """MobileOne-S1; arguments as for `MobileOne_S0`."""
    return _build("MobileOne_S1", pretrained, use_ssld, class_num, kwargs, widths=(1.5, 1.5, 2, 2.5))


@register_model(published=[Published(_REPOSITORY, 77.4)], rename=_rename)
def MobileOne_S2(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> MobileOne:
    """MobileOne-S2; arguments as for `MobileOne_S0`."""
    return _build("MobileOne_S2", pretrained, use_ssld, class_num, kwargs, widths=(1.5, 2, 2.5, 4))


@register_model(published=[Published(_REPOSITORY, 78.1)], rename=_rename)
def MobileOne_S3(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> MobileOne:
    """MobileOne-S3; arguments as for `MobileOne_S0`."""
    return _build("MobileOne_S3", pretrained, use_ssld, class_num, kwargs, widths=(2, 2.5, 3, 4))


@register_model(published=[Published(_REPOSITORY, 79.4)], rename=_rename)
def MobileOne_S4(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> MobileOne:
    """MobileOne-S4, with squeeze-and-excitation at its end; arguments as for `MobileOne_S0`."""
    return _build("MobileOne_S4", pretrained, use_ssld, class_num, kwargs, widths=(3, 3.5, 3.5, 4), se=True)
