"""RepVGG: "RepVGG: Making VGG-style ConvNets Great Again" (CVPR 2021, arXiv 2101.03697).

Entries are named as in the published weight files and in PaddleClas: `stage1.0.rbr_dense.conv.weight`; only
those of squeeze-and-excitation are `se.fc1` and `se.fc2` here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from paddle import nn

from ..arithmetic.geometry import ConvGeometry
from ..layers.repvgg import RepVGG2D
from ..registry import Published, register_model
from .activated import Activated, FiveStages, renamed_paths, split_merged
from .builders import check_arguments, load_pretrained


class RepVGGBlock(Activated, RepVGG2D):
    """ReLU(SE(RepVGG2D(x))) with a kernel of 3x3, padded by 1; SE where `se`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1, se: bool = False) -> None:
        super().__init__(
            ConvGeometry(in_channels, out_channels, (3, 3), (stride, stride), (1, 1, 1, 1), groups=groups, bias=False)
        )
        if se:
            self.squeeze_and_excite(out_channels)


class RepVGG(FiveStages):
    """A stem and four stages, each of which halves the size, the average over the image and a classifier.

    `blocks` is how many blocks each stage has, `widths` its channels in units of 64, 128, 256 and 512. Every second
    block, from the third one of the network on, convolves in `groups`; every one has SE where `se`.
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[float], groups: int = 1, se: bool = False, class_num: int = 1000
    ) -> None:
        super().__init__()
        channels = [int(64 * 2**i * width) for i, width in enumerate(widths)]
        before, index = min(64, channels[0]), 1
        self.stage0 = RepVGGBlock(3, before, stride=2, se=se)
        for stage, (count, after) in enumerate(zip(blocks, channels), 1):
            parts = []
            for stride in [2] + [1] * (count - 1):
                # The published rule counts the stem as block 0, and names even blocks up to 26: there are no more.
                grouped = groups if index % 2 == 0 else 1
                parts.append(RepVGGBlock(before, after, stride, grouped, se))
                before, index = after, index + 1
            setattr(self, f"stage{stage}", nn.Sequential(*parts))
        self.add_classifier(before, class_num)


# ---------------------------------------------------------------------------------------------------------------------
# Published weights

#: Parts of a path in timm's files -> in the authors'.
_OF_TIMM = {"conv_kxk": "rbr_dense", "conv_1x1": "rbr_1x1", "identity": "rbr_identity", "attn": "se"}
#: Of squeeze-and-excitation, in the authors' files and PaddleClas' -> here.
_OF_SE = {"se.down": "se.fc1", "se.up": "se.fc2"}


def _rename(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a state dict of the authors, of timm or of PaddleClas, merged or not, as that of the train form."""
    arrays = renamed_paths(state, _OF_TIMM, _OF_SE)
    return split_merged(arrays, "rbr_reparam", ["rbr_dense"], "rbr_1x1", "rbr_identity")


# ---------------------------------------------------------------------------------------------------------------------
# The networks

_ZOOS = "model zoos, for the authors' weights"
_A, _B, _D = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)


def _build(
    name: str,
    pretrained: bool | str,
    use_ssld: bool,
    unknown: Mapping[str, Any],
    **options: Any,
) -> RepVGG:
    check_arguments(name, pretrained, use_ssld, unknown)
    return load_pretrained(RepVGG(**options), pretrained)


@register_model(published=[Published(_ZOOS, 72.41)], rename=_rename, in_paddleclas=True)
def RepVGG_A0(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-A0, `[N, 3, H, W]` to `[N, class_num]`, for images of any size.

    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    return _build(
        "RepVGG_A0", pretrained, use_ssld, kwargs, blocks=_A, widths=(0.75, 0.75, 0.75, 2.5), class_num=class_num
    )


@register_model(published=[Published(_ZOOS, 74.46)], rename=_rename, in_paddleclas=True)
def RepVGG_A1(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-A1; arguments as for `RepVGG_A0`."""
    return _build("RepVGG_A1", pretrained, use_ssld, kwargs, blocks=_A, widths=(1, 1, 1, 2.5), class_num=class_num)


@register_model(published=[Published(_ZOOS, 76.48)], rename=_rename, in_paddleclas=True)
def RepVGG_A2(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-A2; arguments as for `RepVGG_A0`."""
    return _build(
        "RepVGG_A2", pretrained, use_ssld, kwargs, blocks=_A, widths=(1.5, 1.5, 1.5, 2.75), class_num=class_num
    )


@register_model(published=[Published(_ZOOS, 75.14)], rename=_rename, in_paddleclas=True)
def RepVGG_B0(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-B0; arguments as for `RepVGG_A0`."""
    return _build("RepVGG_B0", pretrained, use_ssld, kwargs, blocks=_B, widths=(1, 1, 1, 2.5), class_num=class_num)


@register_model(published=[Published(_ZOOS, 78.37)], rename=_rename, in_paddleclas=True)
def RepVGG_B1(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-B1; arguments as for `RepVGG_A0`."""
    return _build("RepVGG_B1", pretrained, use_ssld, kwargs, blocks=_B, widths=(2, 2, 2, 4), class_num=class_num)


@register_model(published=[Published(_ZOOS, 77.78)], rename=_rename, in_paddleclas=True)
def RepVGG_B1g2(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-B1g2, every second block in 2 groups; arguments as for `RepVGG_A0`."""
    return _build(
        "RepVGG_B1g2", pretrained, use_ssld, kwargs, blocks=_B, widths=(2, 2, 2, 4), groups=2, class_num=class_num
    )


@register_model(published=[Published(_ZOOS, 77.58)], rename=_rename, in_paddleclas=True)
def RepVGG_B1g4(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-B1g4, every second block in 4 groups; arguments as for `RepVGG_A0`."""
    return _build(
        "RepVGG_B1g4", pretrained, use_ssld, kwargs, blocks=_B, widths=(2, 2, 2, 4), groups=4, class_num=class_num
    )


@register_model(published=[Published(_ZOOS, 78.78)], rename=_rename, in_paddleclas=True)
def RepVGG_B2(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-B2; arguments as for `RepVGG_A0`."""
    return _build("RepVGG_B2", pretrained, use_ssld, kwargs, blocks=_B, widths=(2.5, 2.5, 2.5, 5), class_num=class_num)


@register_model(rename=_rename, in_paddleclas=True)
def RepVGG_B2g2(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-B2g2, every second block in 2 groups; arguments as for `RepVGG_A0`."""
    return _build(
        "RepVGG_B2g2", pretrained, use_ssld, kwargs, blocks=_B, widths=(2.5, 2.5, 2.5, 5), groups=2, class_num=class_num
    )


@register_model(published=[Published(_ZOOS, 79.38)], rename=_rename, in_paddleclas=True)
def RepVGG_B2g4(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-B2g4, every second block in 4 groups; arguments as for `RepVGG_A0`."""
    return _build(
        "RepVGG_B2g4", pretrained, use_ssld, kwargs, blocks=_B, widths=(2.5, 2.5, 2.5, 5), groups=4, class_num=class_num
    )


@register_model(published=[Published(_ZOOS, 80.52)], rename=_rename, in_paddleclas=True)
def RepVGG_B3(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-B3; arguments as for `RepVGG_A0`."""
    return _build("RepVGG_B3", pretrained, use_ssld, kwargs, blocks=_B, widths=(3, 3, 3, 5), class_num=class_num)


@register_model(rename=_rename, in_paddleclas=True)
def RepVGG_B3g2(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-B3g2, every second block in 2 groups; arguments as for `RepVGG_A0`."""
    return _build(
        "RepVGG_B3g2", pretrained, use_ssld, kwargs, blocks=_B, widths=(3, 3, 3, 5), groups=2, class_num=class_num
    )


@register_model(published=[Published(_ZOOS, 80.21)], rename=_rename, in_paddleclas=True)
def RepVGG_B3g4(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-B3g4, every second block in 4 groups; arguments as for `RepVGG_A0`."""
    return _build(
        "RepVGG_B3g4", pretrained, use_ssld, kwargs, blocks=_B, widths=(3, 3, 3, 5), groups=4, class_num=class_num
    )


@register_model(
    published=[
        Published("the authors' repository", 83.55, input_size=320),
        Published(_ZOOS, 81.81),
    ],
    rename=_rename,
    in_paddleclas=True,
)
def RepVGG_D2se(pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any) -> RepVGG:
    """RepVGG-D2se, deeper, with squeeze-and-excitation in every block; arguments as for `RepVGG_A0`."""
    return _build(
        "RepVGG_D2se", pretrained, use_ssld, kwargs, blocks=_D, widths=(2.5, 2.5, 2.5, 5), se=True, class_num=class_num
    )
