"""The pure MLP for CIFAR-10 and its ablations (arXiv 2105.01883, section 4.1, figure 3 and table 1).

The authors' repository does not contain it. From the paper: three stages of 16, 32 and 64 channels at 32, 16 and 8
pixels, of RepMLPs (partitions of 8x8, 2 groups) with fully connected layers between them, that is 1x1 convolutions;
max pooling between the stages; the last layer of a stage widens to the next; a BN follows every convolution, and a ReLU
every RepMLP and every convolution's BN; kernels of 1, 3, 5, 7 beside partitions larger than 7x7; 52.8 million
multiply-adds.

Ours are the number of RepMLPs in a stage, two, and what stands at the ends: a 1x1 convolution before the first RepMLP
and after the last one, then the average over the map and a linear classifier. That is what gives the published 52.8
million multiply-adds, and for the wide ConvNet the published 65.1. That the 9x9 convolutions of two ablations have
RepMLP's two groups is ours as well.
"""

from __future__ import annotations

from typing import Any

import paddle
from paddle import nn

from ..errors import ReparamError
from ..layers.repmlp import RepMLP
from ..registry import Published, register_model
from .builders import check_arguments, load_pretrained
from .resnet_repmlp import ConvBN, kernels_within

_SIDE = 32
_GROUPS = 2
#: Variant -> what differs in its RepMLPs; None: something else stands in their places.
_VARIANTS: dict[str, dict[str, Any] | None] = {
    "pure_mlp": {},
    "without_local": {"reparam_conv_k": ()},
    "without_global": {"global_perceptron": False},
    "fc3_as_conv9": {"fc3_conv_k": 9},
    "repmlp_as_conv9": None,
    "wide_convnet": None,
}


class RepMLPForCifar(nn.Layer):
    """Three stages of RepMLPs with 1x1 convolutions between them, `[N, 3, image_size, image_size]` to `[N, class_num]`.

    `width` is the number of channels of the first stage; the others have two and four times as many. Partitions have
    1/4 of the side of the images, as the map of the last stage has.
    """

    def __init__(self, variant: str, width: int, class_num: int, image_size: int = _SIDE) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 4 * width]
        for number in (1, 2, 3):
            channels, side = widths[number - 1], image_size // 2 ** (number - 1)
            layers = [ConvBN(3, channels, 1)] if number == 1 else [nn.MaxPool2D(2, 2)]
            for out_channels in (channels, widths[number]):
                layers += [*_mixer(variant, channels, side, image_size // 4), ConvBN(channels, out_channels, 1)]
            setattr(self, f"stage{number}", nn.Sequential(*layers))
        self.gap = nn.AdaptiveAvgPool2D(1)
        self.linear = nn.Linear(widths[3], class_num)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.linear(paddle.flatten(self.gap(x), 1))


def _mixer(variant: str, channels: int, side: int, partition: int) -> list[nn.Layer]:
    """Return what mixes the pixels of a map of side x side: a RepMLP with its ReLU, or what the variant has there."""
    options = _VARIANTS[variant]
    if options is not None:
        options = {"reparam_conv_k": kernels_within(partition**2), "fc3_groups": _GROUPS, **options}
        return [RepMLP(channels, channels, side, side, partition, partition, **options), nn.ReLU()]
    k, groups = (3, 1) if variant == "wide_convnet" else (9, _GROUPS)
    conv = nn.Conv2D(channels, channels, k, padding=k // 2, groups=groups, bias_attr=False)
    return [conv, nn.BatchNorm2D(channels), nn.ReLU()]


_PAPER = "arXiv 2105.01883"


@register_model(
    published=[
        Published(_PAPER, 91.11, input_size=_SIDE),
        Published(f"{_PAPER}: 8.5 lower", 82.6, {"variant": "without_local"}, _SIDE),
        Published(f"{_PAPER}: 1.5 lower", 89.6, {"variant": "without_global"}, _SIDE),
        Published(f"{_PAPER}: 3.5 lower", 87.6, {"variant": "fc3_as_conv9"}, _SIDE),
        Published(f"{_PAPER}: lower than with FC3 as a convolution", None, {"variant": "repmlp_as_conv9"}, _SIDE),
        Published(_PAPER, 91.99, {"variant": "wide_convnet"}, _SIDE),
    ]
)
def RepMLP_CIFAR(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 10,
    variant: str = "pure_mlp",
    image_size: int = _SIDE,
    **kwargs: Any,
) -> nn.Layer:
    """The pure MLP for CIFAR-10, `[N, 3, image_size, image_size]` to `[N, class_num]`.

    `variant` is "pure_mlp" or one of the ablations: "without_local", "without_global" (perceptron), "fc3_as_conv9",
    "repmlp_as_conv9", or "wide_convnet", twice as wide with 3x3 convolutions in the RepMLPs' places. Partitions have
    1/4 of the side of the images, as in the paper.

    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    check_arguments("RepMLP_CIFAR", pretrained, use_ssld, kwargs, ["variant", "image_size"])
    if image_size < 4 or image_size % 4:
        raise ReparamError(f"RepMLP_CIFAR halves its images twice; image_size={image_size} is no multiple of 4")
    if variant not in _VARIANTS:
        raise ReparamError(f"RepMLP_CIFAR has no variant {variant!r}; it has {', '.join(_VARIANTS)}")
    width = 32 if variant == "wide_convnet" else 16
    return load_pretrained(RepMLPForCifar(variant, width, class_num, image_size), pretrained)
