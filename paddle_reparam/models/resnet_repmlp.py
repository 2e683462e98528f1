"""ResNet-50 with RepMLP (arXiv 2105.01883).

The stages c2, c3, c4, c5 of the paper are `stage1` to `stage4` here, as in the authors' code, whose names all entries
have: `stage2.1.btnk_repmlp.fc3.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..errors import CheckpointError, ReparamError
from ..layers.partitions import size_of
from ..layers.repmlp import RepMLP
from ..registry import Published, register_model
from .builders import check_arguments, load_pretrained, maps_of

_STAGES = ("c2", "c3", "c4", "c5")
_OPTIONS = ["block", "fc3_groups", "reduction", "fc1_fc2_reduction", "image_size"]


class ConvBN(nn.Layer):
    """A convolution with its BN and, where asked for, a ReLU."""

    def __init__(self, in_channels: int, out_channels: int, k: int, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2D(in_channels, out_channels, k, stride, k // 2, bias_attr=False)
        self.bn = nn.BatchNorm2D(out_channels)
        self.relu = relu

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.relu else x


class _Block(nn.Layer):
    """What the three blocks share: out = ReLU(body(x) + shortcut(x))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        plain = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if plain else ConvBN(in_channels, out_channels, 1, stride, relu=False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class BaseBlock(_Block):
    """ResNet's bottleneck: 1x1 to out_channels / squeeze, 3x3 with the stride, 1x1."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, squeeze: int) -> None:
        super().__init__(in_channels, out_channels, stride)
        middle = out_channels // squeeze
        self.conv1 = ConvBN(in_channels, middle, 1)
        self.conv2 = ConvBN(middle, middle, 3, stride)
        self.conv3 = ConvBN(middle, out_channels, 1, relu=False)

    def body(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.conv3(self.conv2(self.conv1(x)))


class LightBlock(_Block):
    """1x1 to out_channels / 8, RepMLP, 1x1."""

    def __init__(self, in_channels: int, out_channels: int, **repmlp: Any) -> None:
        super().__init__(in_channels, out_channels, 1)
        middle = out_channels // 8
        self.light_conv1 = ConvBN(in_channels, middle, 1)
        self.light_repmlp = RepMLP(middle, middle, relu=True, **repmlp)
        self.light_conv3 = ConvBN(middle, out_channels, 1, relu=False)

    def body(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.light_conv3(self.light_repmlp(self.light_conv1(x)))


class BottleneckBlock(_Block):
    """1x1 to out_channels / squeeze, 3x3 to a part of that by `reduction`, RepMLP, 3x3 back, 1x1."""

    def __init__(self, in_channels: int, out_channels: int, squeeze: int, reduction: int, **repmlp: Any) -> None:
        super().__init__(in_channels, out_channels, 1)
        middle = out_channels // squeeze
        reduced = middle // reduction
        self.btnk_conv1 = ConvBN(in_channels, middle, 1)
        self.btnk_conv2 = ConvBN(middle, reduced, 3)
        self.btnk_repmlp = RepMLP(reduced, reduced, relu=True, **repmlp)
        self.btnk_conv4 = ConvBN(reduced, middle, 3)
        self.btnk_conv5 = ConvBN(middle, out_channels, 1, relu=False)

    def body(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.btnk_repmlp(self.btnk_conv2(self.btnk_conv1(x)))
        return self.btnk_conv5(self.btnk_conv4(x))


class RepMLPResNet(nn.Layer):
    """A ResNet with RepMLP in all blocks of some stages but those of stride 2; `[N, 3, H, W]` to `[N, class_num]`.

    `fc3_groups` names these stages with the number of FC3's groups in each, `reduction` the share of a bottleneck's
    channels that RepMLP gets there: `{"c3": 8, "c4": 16}` and `{"c3": 2, "c4": 4}`. Images must then be of
    image_size x image_size pixels; partitions are of partition x partition. `width` is the number of channels of the
    stem, `depths` that of the blocks of each stage. The first stage puts out `expansion` times the stem's channels, and
    each further one twice as many; in a block's middle there are `squeeze` times fewer. With `plain_first` the first
    block of every stage has no RepMLP.
    """

    def __init__(
        self,
        block: str,
        fc3_groups: Mapping[str, int],
        reduction: Mapping[str, int],
        fc1_fc2_reduction: float,
        image_size: int,
        partition: int,
        class_num: int,
        depths: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        expansion: int = 4,
        squeeze: int = 4,
        plain_first: bool = False,
    ) -> None:
        super().__init__()
        self.image_size = image_size if fc3_groups else None
        self.stage0 = nn.Sequential(ConvBN(3, width, 7, 2), nn.MaxPool2D(3, 2, 1))
        in_channels, side = width, -(-image_size // 4)
        for number, (stage, depth) in enumerate(zip(_STAGES, depths), start=1):
            out_channels = width * expansion * 2 ** (number - 1)
            side = side if number == 1 else -(-side // 2)
            blocks = []
            for i in range(depth):
                stride = 2 if i == 0 and number > 1 else 1
                if stage not in fc3_groups or stride == 2 or (plain_first and i == 0):
                    blocks.append(BaseBlock(in_channels, out_channels, stride, squeeze))
                else:
                    repmlp = {
                        "H": side, "W": side, "h": partition, "w": partition, "fc3_groups": fc3_groups[stage],
                        "reparam_conv_k": kernels_within(partition**2), "fc1_fc2_reduction": fc1_fc2_reduction,
                    }  # fmt: skip
                    if block == "light":
                        blocks.append(LightBlock(in_channels, out_channels, **repmlp))
                    else:
                        blocks.append(BottleneckBlock(in_channels, out_channels, squeeze, reduction[stage], **repmlp))
                in_channels = out_channels
            setattr(self, f"stage{number}", nn.Sequential(*blocks))
        self.gap = nn.AdaptiveAvgPool2D(1)
        self.linear = nn.Linear(in_channels, class_num)

    def stage_maps(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        """Return the maps of the stages, from the largest to the smallest."""
        if self.image_size is not None:
            require_size(x, self.image_size)
        return maps_of((self.stage1, self.stage2, self.stage3, self.stage4), self.stage0(x))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.linear(paddle.flatten(self.gap(self.stage_maps(x)[-1]), 1))


def require_size(images: paddle.Tensor, side: int) -> None:
    """Raise `ReparamError` for images that are not of the side that a network was built for."""
    built, got = f"{side}x{side}", size_of(images)
    if got != built:
        raise ReparamError(
            f"this network is built for images of {built} pixels and got images of {got}; "
            "build it with another image_size, or resize the images"
        )


def kernels_within(area: int) -> tuple[int, ...]:
    """Return the kernels of the Local Perceptron on partitions of so many pixels: 1, 3, 5, 7 where they are smaller."""
    return tuple(k for k in (1, 3, 5, 7) if k * k < area)


# ---------------------------------------------------------------------------------------------------------------------
# Published weights


def rename(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a published state dict under our names, which are the published ones.

    A file of the deploy form has no BNs and no Local Perceptron. It becomes the train form that computes the same: BNs
    that only add the bias, and convolutions of zeros.
    """
    if any(key.endswith(".bn.weight") for key in state):
        return dict(state)
    train: dict[str, np.ndarray] = {}
    for key, value in state.items():
        path, _, last = key.rpartition(".")
        if path.endswith(".fc3"):
            train.update({key: value} if last == "weight" else _batch_norm(f"{path}_bn", value))
            if last == "weight":
                train.update(_idle_perceptrons(path[: -len(".fc3")], value, state))
        elif path.endswith(".conv") and last == "bias":
            train.update(_batch_norm(f"{path[: -len('.conv')]}.bn", value))
        else:
            train[key] = value
    return train


def _batch_norm(path: str, bias: np.ndarray) -> dict[str, np.ndarray]:
    """Return the entries of a BN that adds a bias and does nothing else."""
    ones = np.ones(bias.shape)
    return {
        f"{path}.weight": ones * np.sqrt(1.0 + 1e-5), f"{path}.bias": bias,
        f"{path}.running_mean": 0.0 * ones, f"{path}.running_var": ones,
    }  # fmt: skip


def _idle_perceptrons(path: str, fc3: np.ndarray, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return what the train form of a RepMLP has besides FC3, its BN, FC1 and FC2; nothing of it changes the output."""
    # The convolution before a RepMLP tells its channels, and they the number of pixels of a partition.
    before = {"light_repmlp": "light_conv1", "btnk_repmlp": "btnk_conv2"}
    block, _, name = path.rpartition(".")
    conv = f"{block}.{before.get(name)}.conv.weight"
    if conv not in state:
        raise CheckpointError(f"the published weights have {path}.fc3.weight, but not {conv} before it")
    channels = state[conv].shape[0]
    area = fc3.shape[0] // channels
    nothing = np.zeros(channels)
    entries = _batch_norm(f"{path}.avg.bn", nothing) if f"{path}.fc1_fc2.fc1.weight" in state else {}
    for k in kernels_within(area):
        entries[f"{path}.repconv{k}.conv.weight"] = np.zeros((channels, fc3.shape[1] // area, k, k))
        entries.update(_batch_norm(f"{path}.repconv{k}.bn", nothing))
    return entries


# ---------------------------------------------------------------------------------------------------------------------
# Builders


_PAPER = "arXiv 2105.01883"
_C4 = {"reduction": {"c4": 4}, "fc3_groups": {"c4": 8}}
_G8_16 = {"fc3_groups": {"c3": 8, "c4": 16}}
_G4_8 = {"fc3_groups": {"c3": 4, "c4": 8}}


def _build(
    name: str,
    pretrained: bool | str,
    use_ssld: bool,
    class_num: int,
    unknown: Mapping[str, Any],
    allowed: Sequence[str] = (),
    block: str = "bottleneck",
    fc3_groups: Mapping[str, int] | None = None,
    reduction: Mapping[str, int] | None = None,
    fc1_fc2_reduction: float = 1,
    image_size: int = 224,
) -> nn.Layer:
    check_arguments(name, pretrained, use_ssld, unknown, allowed)
    default_groups = {"base": {}, "light": {"c3": 4, "c4": 4}, "bottleneck": {"c3": 8, "c4": 8}}
    if block not in default_groups:
        raise ReparamError(f"{name} has no block {block!r}; it has {', '.join(default_groups)}")
    useless = {"base": {"fc3_groups": fc3_groups, "reduction": reduction}, "light": {"reduction": reduction}}
    for option, value in useless.get(block, {}).items():
        if value:
            raise ReparamError(f"{name}: {option} says nothing about the block {block!r}; leave it out")
    for option, value in (("fc3_groups", fc3_groups), ("reduction", reduction)):
        if value is not None and not (isinstance(value, Mapping) and set(value) <= set(_STAGES)):
            raise ReparamError(
                f"{name}: {option} is a number for each stage, such as {{'c3': 2, 'c4': 4}}, not {value}"
            )
    if image_size % 32:
        raise ReparamError(f"{name} halves its images five times; image_size={image_size} is no multiple of 32")
    model = RepMLPResNet(
        block,
        default_groups[block] if fc3_groups is None else fc3_groups,
        {"c2": 2, "c3": 2, "c4": 4, "c5": 4, **(reduction or {})},
        fc1_fc2_reduction,
        image_size,
        partition=image_size // 32,
        class_num=class_num,
    )
    return load_pretrained(model, pretrained)


@register_model(
    published=[
        Published(f"{_PAPER}, code: g8 in c3 and c4"),
        Published(f"{_PAPER}: 0.94 above its ResNet-50 of 77.19", 78.13, _C4),
        Published(_PAPER, None, {**_C4, "reduction": {"c4": 8}}),
        Published("Papers with Code", 78.60, {**_C4, "reduction": {"c4": 2}}),
        Published(f"{_PAPER}, g8/16", None, _G8_16),
        Published(f"{_PAPER}, g4/8", None, _G4_8),
        Published(f"{_PAPER}, g8/16", None, {**_G8_16, "image_size": 320}, 320),
        Published(f"{_PAPER}, g4/8", None, {**_G4_8, "image_size": 320}, 320),
    ],
    rename=rename,
)
def RepMLPResNet50(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    block: str = "bottleneck",
    fc3_groups: Mapping[str, int] | None = None,
    reduction: Mapping[str, int] | None = None,
    fc1_fc2_reduction: float = 1,
    image_size: int = 224,
    **kwargs: Any,
) -> nn.Layer:
    """ResNet-50 with RepMLP, `[N, 3, image_size, image_size]` to `[N, class_num]`, as large as any of the paper's.

    `block` is "bottleneck", "light" or "base" (none). `fc3_groups` names the stages with RepMLP and the number of FC3's
    groups in each, `{"c3": 8, "c4": 8}` unless given ("light": 4 and 4); `reduction` by how much a bottleneck's RepMLP
    is narrower than its block, `{"c2": 2, "c3": 2, "c4": 4, "c5": 4}` unless given; `fc1_fc2_reduction` by how much FC1
    reduces. Partitions have 1/32 of the side of the images, 7x7 at 224 and 10x10 at 320, and the Local Perceptron
    kernels of 1, 3, 5, 7 where these are smaller than a partition.

    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    return _build(
        "RepMLPResNet50", pretrained, use_ssld, class_num, kwargs, _OPTIONS, block, fc3_groups, reduction,
        fc1_fc2_reduction, image_size,
    )  # fmt: skip


@register_model(published=[Published(f"{_PAPER}: its ResNet-50", 77.19)], rename=rename)
def RepMLPResNet50_base_224(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """The ResNet-50 that the others are compared with, stride on the 3x3 convolutions; for images of any size."""
    return _build("RepMLPResNet50_base_224", pretrained, use_ssld, class_num, kwargs, block="base")


@register_model(published=[Published(f"{_PAPER}; 77.01 measured by PaddleViT", 77.14)], rename=rename)
def RepMLPResNet50_light_224(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """RepMLP without 3x3 convolutions in c3 and c4, 4 groups, for images of 224x224; arguments as `RepMLPResNet50`."""
    return _build("RepMLPResNet50_light_224", pretrained, use_ssld, class_num, kwargs, block="light")


@register_model(published=[Published(f"{_PAPER}, code: g8 in c3 and c4")], rename=rename)
def RepMLPResNet50_bottleneck_224(
    pretrained: bool | str = False, use_ssld: bool = False, class_num: int = 1000, **kwargs: Any
) -> nn.Layer:
    """RepMLP bottlenecks in c3 and c4, 8 groups, for images of 224x224; arguments as `RepMLPResNet50`."""
    return _build("RepMLPResNet50_bottleneck_224", pretrained, use_ssld, class_num, kwargs)
