"""RepMLPNet, a hierarchical MLP whose convolutions go into its fully connected layers (arXiv 2112.11081)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic.geometry import as_pair
from ..arithmetic.initializers import uniform_fan_in
from ..arithmetic.tensors import to_float64
from ..errors import CheckpointError, ReparamError
from ..layers.repmlpnet import RepMLPBlock, RepMLPNetUnit, conv_bn
from ..registry import Published, create_model, register_model
from ..weights.checkpoints import form_of, load_into
from .builders import bn_that_adds, check_arguments, load_pretrained

#: Height and width of the images in pixels, or one number for both.
ImageSize = Union[int, Sequence[int]]

# How many pixels of the image, a side, are one pixel of the map of each stage.
_STRIDES = (4, 8, 16, 32)
_CONV_SIZES = (1, 3)


class RepMLPNet(nn.Layer):
    """Stages of `RepMLPNetUnit`s, an embedding before each; `[N, 3, H, W]` to `[N, class_num]`.

    The map of the first stage has 1/`patch_size` of the image's side, that of each other half of the one before. A
    stage has a number of channels, of units and of share sets, and partitions of `hs` x `ws` pixels. Images of other
    sizes have more partitions on each map; see `RepMLPBlock` for the order of their results (`published_order`), and
    for sizes that the partitions do not divide.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_blocks: Sequence[int],
        sharesets_nums: Sequence[int],
        hs: Sequence[int],
        ws: Sequence[int],
        reparam_conv_k: Sequence[int] | None = _CONV_SIZES,
        globalperceptron_reduce: int = 4,
        class_num: int = 1000,
        published_order: bool = True,
        patch_size: int = 4,
    ) -> None:
        super().__init__()
        self.conv_embedding = _embedding(3, channels[0], patch_size)
        self.stages = nn.LayerList(
            nn.LayerList(
                RepMLPNetUnit(
                    width,
                    h,
                    w,
                    reparam_conv_k,
                    globalperceptron_reduce,
                    num_sharesets=sets,
                    published_order=published_order,
                )
                for _ in range(blocks)
            )
            for width, blocks, sets, h, w in zip(channels, num_blocks, sharesets_nums, hs, ws)
        )
        self.embeds = nn.LayerList(_embedding(before, after, 2) for before, after in zip(channels, channels[1:]))
        self.head_norm = nn.BatchNorm2D(channels[-1])
        init = uniform_fan_in(channels[-1])
        self.head = nn.Linear(channels[-1], class_num, weight_attr=init, bias_attr=init)

    def stage_maps(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        """Return the maps of the stages, from the largest to the smallest."""
        maps = []
        for embedding, stage in zip([self.conv_embedding, *self.embeds], self.stages):
            x = embedding(x)
            for unit in stage:
                x = unit(x)
            maps.append(x)
        return maps

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x = self.stage_maps(x)[-1]
        return self.head(paddle.flatten(F.adaptive_avg_pool2d(self.head_norm(x), 1), 1))


def _embedding(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    embedding = conv_bn(in_channels, out_channels, stride, stride)
    embedding.add_sublayer("relu", nn.ReLU())
    return embedding


# ---------------------------------------------------------------------------------------------------------------------
# The published networks


@dataclass(frozen=True)
class _Member:
    channels: tuple[int, ...]
    num_blocks: tuple[int, ...]
    sharesets_nums: tuple[int, ...]
    image_size: int


_MEMBERS = {
    "T224": _Member((64, 128, 256, 512), (2, 2, 6, 2), (1, 4, 16, 128), 224),
    "T256": _Member((64, 128, 256, 512), (2, 2, 6, 2), (1, 4, 16, 128), 256),
    "B224": _Member((96, 192, 384, 768), (2, 2, 12, 2), (1, 4, 32, 128), 224),
    "B256": _Member((96, 192, 384, 768), (2, 2, 12, 2), (1, 4, 32, 128), 256),
    "D256": _Member((80, 160, 320, 640), (2, 2, 18, 2), (1, 4, 16, 128), 256),
    "L256": _Member((96, 192, 384, 768), (2, 2, 18, 2), (1, 4, 32, 256), 256),
}


def _build(
    member: str,
    pretrained: bool | str,
    use_ssld: bool,
    class_num: int,
    image_size: ImageSize | None,
    published_order: bool,
    unknown: Mapping[str, Any],
) -> RepMLPNet:
    check_arguments(f"RepMLPNet_{member}", pretrained, use_ssld, unknown, ["image_size", "published_order"])
    of = _MEMBERS[member]
    height, width = as_pair(of.image_size if image_size is None else image_size)
    if height < 32 or width < 32 or height % 32 or width % 32:
        raise ReparamError(
            f"RepMLPNet_{member} cannot be built for images of {height}x{width}: its partitions are 1/4 to 1/32 of "
            "image_size, so each side must be a multiple of 32"
        )
    hs, ws = ([side // stride for stride in _STRIDES] for side in (height, width))
    model = RepMLPNet(
        of.channels, of.num_blocks, of.sharesets_nums, hs, ws, class_num=class_num, published_order=published_order
    )
    return load_pretrained(model, pretrained)


def _published(member: str, top1: float, *others: tuple[str, float]) -> list[Published]:
    size = _MEMBERS[member].image_size
    own = ("the authors' repository, weights of June 2022", top1)
    return [Published(source, accuracy, input_size=size) for source, accuracy in (own, *others)]


def _from_published(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a published state dict in train form; the names are ours already.

    The published deploy form has an fc3 with a bias in the place of fc3, its BN and the convolutions. It becomes an
    fc3 whose BN does nothing but add that bias, and convolutions of zeros.
    """
    renamed = dict(state)
    for key, bias in state.items():
        block, _, name = key.rpartition(".fc3.")
        weight = state.get(f"{block}.fc3.weight")
        has_train_form = f"{block}.fc3_bn.weight" in state
        if name != "bias" or has_train_form or np.ndim(weight) != 4 or np.size(bias) % weight.shape[1]:
            continue
        by_set = np.reshape(bias, [-1, weight.shape[1]])
        if (by_set != by_set[:, :1]).any():
            raise CheckpointError(
                f"{key}: the bias differs between the pixels of a share set, as it does after training in deploy form; "
                "no network in train form computes that; convert a file in train form, or the deploy form of one"
            )
        del renamed[key]
        renamed.update(bn_that_adds(f"{block}.fc3_bn", by_set[:, 0]))
        for k in _CONV_SIZES:
            none = np.zeros(len(by_set), np.float32)
            renamed[f"{block}.repconv{k}.conv.weight"] = np.zeros([len(by_set), 1, k, k], np.float32)
            renamed.update(bn_that_adds(f"{block}.repconv{k}.bn", none))
    return renamed


@register_model(published=_published("T224", 76.62), rename=_from_published)
def RepMLPNet_T224(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    image_size: ImageSize | None = None,
    published_order: bool = True,
    **kwargs: Any,
) -> RepMLPNet:
    """RepMLPNet-T224, `[N, 3, H, W]` to `[N, class_num]`, with partitions as large as the maps of 224x224 images.

    `image_size` (height, width, or one number, in multiples of 32) makes the partitions as large as the maps of other
    images; weights for them come out of training or of `change_resolution`. It takes images of any size as it is; with
    `published_order=False` it does not put the partitions of larger ones in disorder, as the published network does.
    `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or does not fit.
    """
    return _build("T224", pretrained, use_ssld, class_num, image_size, published_order, kwargs)


@register_model(published=_published("T256", 77.44), rename=_from_published)
def RepMLPNet_T256(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    image_size: ImageSize | None = None,
    published_order: bool = True,
    **kwargs: Any,
) -> RepMLPNet:
    """RepMLPNet-T256, for images of 256x256; arguments as for `RepMLPNet_T224`."""
    return _build("T256", pretrained, use_ssld, class_num, image_size, published_order, kwargs)


@register_model(
    published=_published("B224", 80.32, ("mmpretrain, the authors' weights of December 2021", 80.41)),
    rename=_from_published,
)
def RepMLPNet_B224(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    image_size: ImageSize | None = None,
    published_order: bool = True,
    **kwargs: Any,
) -> RepMLPNet:
    """RepMLPNet-B224, for images of 224x224; arguments as for `RepMLPNet_T224`."""
    return _build("B224", pretrained, use_ssld, class_num, image_size, published_order, kwargs)


@register_model(
    published=_published("B256", 81.03, ("mmpretrain, the authors' weights of December 2021", 81.11)),
    rename=_from_published,
)
def RepMLPNet_B256(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    image_size: ImageSize | None = None,
    published_order: bool = True,
    **kwargs: Any,
) -> RepMLPNet:
    """RepMLPNet-B256, for images of 256x256; arguments as for `RepMLPNet_T224`."""
    return _build("B256", pretrained, use_ssld, class_num, image_size, published_order, kwargs)


@register_model(published=_published("D256", 80.83), rename=_from_published)
def RepMLPNet_D256(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    image_size: ImageSize | None = None,
    published_order: bool = True,
    **kwargs: Any,
) -> RepMLPNet:
    """RepMLPNet-D256, deeper, for images of 256x256; arguments as for `RepMLPNet_T224`."""
    return _build("D256", pretrained, use_ssld, class_num, image_size, published_order, kwargs)


@register_model(published=_published("L256", 81.68, ("the paper", 81.8)), rename=_from_published)
def RepMLPNet_L256(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 1000,
    image_size: ImageSize | None = None,
    published_order: bool = True,
    **kwargs: Any,
) -> RepMLPNet:
    """RepMLPNet-L256, for images of 256x256; arguments as for `RepMLPNet_T224`."""
    return _build("L256", pretrained, use_ssld, class_num, image_size, published_order, kwargs)


@register_model(published=[Published("this library's own, for small images", input_size=32)])
def RepMLPNet_micro(
    pretrained: bool | str = False,
    use_ssld: bool = False,
    class_num: int = 10,
    image_size: int = 32,
    channels: Sequence[int] = (16, 32, 64, 128),
    num_blocks: Sequence[int] = (1, 1, 2, 1),
    sharesets_nums: Sequence[int] = (1, 4, 8, 16),
    patch_size: int = 4,
    **kwargs: Any,
) -> RepMLPNet:
    """A RepMLPNet of any size, by default a small one for images of 32 pixels, with partitions as large as its maps.

    channels, num_blocks, sharesets_nums: of each stage. patch_size: the side of the squares of pixels that the first
    stage sees as one. `pretrained` is False or the path of a weight file. Raises `ReparamError` where that is True or
    does not fit, and for an image_size that the stages cannot halve.
    """
    options = ["image_size", "channels", "num_blocks", "sharesets_nums", "patch_size"]
    check_arguments("RepMLPNet_micro", pretrained, use_ssld, kwargs, options)
    strides = [patch_size * 2**stage for stage in range(len(channels))]
    if image_size < strides[-1] or image_size % strides[-1]:
        raise ReparamError(
            f"RepMLPNet_micro cannot be built for images of {image_size}x{image_size}: with patch_size={patch_size} "
            f"and {len(channels)} stages each side must be a multiple of {strides[-1]}"
        )
    sides = [image_size // stride for stride in strides]
    model = RepMLPNet(channels, num_blocks, sharesets_nums, sides, sides, class_num=class_num, patch_size=patch_size)
    return load_pretrained(model, pretrained)


# ---------------------------------------------------------------------------------------------------------------------
# Other resolutions


def change_resolution(
    name: str,
    state: Mapping[str, Any],
    to_size: ImageSize,
    from_size: ImageSize | None = None,
    **options: Any,
) -> RepMLPNet:
    """Return the network `name` for images of `to_size`, from its state dict in train form for images of `from_size`.

    `from_size` is the network's own size unless given; `options` go to the builder (`class_num`). Each FC3 is resampled
    over its input and its output pixels; everything else, the convolutions among it, is kept, and keeps its sharpness.
    It is approximate: fine-tune or at least evaluate the network. (The unchanged network takes larger images too, in
    several partitions.)

    Raises `CheckpointError` for a state dict in fused form, where the convolutions are inside FC3, and for one that
    does not fit; `ReparamError` for a network that is no RepMLPNet.
    """
    known = [f"RepMLPNet_{member}" for member in _MEMBERS]
    if name not in known:
        raise ReparamError(f"the resolution of {name!r} cannot be changed; that of {', '.join(known)} can")
    why_not = "its convolutions are inside FC3, where resampling would blur them; give the state dict of the train form"
    if form_of(state) == "fused":
        raise CheckpointError(f"the state dict is in fused form: {why_not}")
    old = create_model(name, **options, **({} if from_size is None else {"image_size": from_size}))
    load_into(old, state)
    new = create_model(name, **options, image_size=to_size)
    arrays = dict(old.state_dict())
    larger = dict(new.named_sublayers())
    for path, block in old.named_sublayers():
        if not isinstance(block, RepMLPBlock):
            continue
        convs = [p for key, p in block.named_parameters() if key.endswith(".conv.weight")]
        if not any(conv.any() for conv in convs):
            raise CheckpointError(f"{path}: all convolutions are zero, as in a converted deploy form: {why_not}")
        arrays[f"{path}.fc3.weight"] = _resample_pixels(
            to_float64(block.fc3.weight), block.num_sharesets, block.partition, larger[path].partition
        )
    load_into(new, arrays)
    return new


def _resample_pixels(weight: np.ndarray, sets: int, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """Return FC3's weight `[sets * h * w, h * w, 1, 1]` for partitions of another size.

    The new layer is the old one between a resampling of its input to the old size and one of its output to the new
    size: a map without details is treated as before.
    """
    up_h, up_w = (_resampling(a, b) for a, b in zip(old, new))
    down_h, down_w = (_resampling(a, b) for a, b in zip(new, old))
    matrix = weight.reshape([sets, *old, *old])
    matrix = np.einsum("sijkl,ai,bj,kc,ld->sabcd", matrix, up_h, up_w, down_h, down_w, optimize=True)
    pixels = new[0] * new[1]
    return matrix.reshape([sets * pixels, pixels, 1, 1])


def _resampling(old: int, new: int) -> np.ndarray:
    """Return the matrix `[new, old]` of linear resampling of a line of pixels: its rows sum to one.

    To fewer pixels, a new pixel is the mean of the old ones around it, by the weights with which they would be
    interpolated from it.
    """
    if new < old:
        matrix = _resampling(new, old).T
        return matrix / matrix.sum(axis=1, keepdims=True)
    places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0.0, 1.0 - np.abs(places[:, None] - np.arange(old)))
