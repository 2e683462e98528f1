"""What RepVGG and MobileOne share: blocks of a layer, squeeze-and-excitation and ReLU, stages, and names of weights."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..arithmetic.initializers import uniform_fan_in
from ..layers.base import ReparamLayer
from ..layers.repmlpnet import GlobalPerceptron
from .builders import bn_that_adds, maps_of

#: Squeeze-and-excitation has so many times fewer channels in its middle.
_REDUCTION = 16


class Scaled(nn.Layer):
    """x * gate(x), `[N, C, H, W]` in and out."""

    def __init__(self, gate: GlobalPerceptron) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return x * self.gate(x)


class Activated(ReparamLayer):
    """To be put in front of a layer's class: ReLU(layer(x) * se(layer(x))), without `se` ReLU(layer(x)).

    Its entries have the names of the layer's, with no more of a path. Fused it is a sequence of the fused layer and
    what follows it.
    """

    fused_type = nn.Sequential

    def squeeze_and_excite(self, channels: int) -> None:
        """Give the block an `se` for this many channels."""
        self.se = GlobalPerceptron(channels, channels // _REDUCTION)

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        out = super().forward_train_form(x)
        return F.relu(out * self.se(out) if "se" in self._sub_layers else out)

    def fuse(self) -> nn.Sequential:
        parts = [("conv", super().fuse())]
        if "se" in self._sub_layers:
            parts.append(("se", Scaled(copy.deepcopy(self.se))))
        return nn.Sequential(*parts, ("nonlinearity", nn.ReLU()))


class FiveStages(nn.Layer):
    """A stem, `stage0`, and `stage1` to `stage4` of such blocks, the average over the image and a classifier."""

    def add_classifier(self, channels: int, class_num: int) -> None:
        """Put the average and a classifier for so many channels behind the stages."""
        self.gap = nn.AdaptiveAvgPool2D(1)
        start = uniform_fan_in(channels)
        self.linear = nn.Linear(channels, class_num, weight_attr=start, bias_attr=start)

    def stage_maps(self, x: paddle.Tensor) -> list[paddle.Tensor]:
        """Return the maps of the stages, from the largest to the smallest."""
        return maps_of((self.stage1, self.stage2, self.stage3, self.stage4), self.stage0(x))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.linear(paddle.flatten(self.gap(self.stage_maps(x)[-1]), 1))


# ---------------------------------------------------------------------------------------------------------------------
# Published weights


def renamed_paths(
    state: Mapping[str, np.ndarray], of_timm: Mapping[str, str], of_authors: Mapping[str, str]
) -> dict[str, np.ndarray]:
    """Return a state dict under our names; both maps are parts of a path -> what they are called here.

    timm counts stages from 0 behind a stem, the authors call the stem stage0; their classifiers differ as well.
    """
    patterns = {r"^stem\.": "stage0.", r"^head\.fc\.": "linear."}
    patterns.update({rf"(?<=\.){re.escape(old)}(?=\.)": new for old, new in (of_authors | of_timm).items()})
    renamed = {}
    for key, value in state.items():
        ours = re.sub(r"^stages\.(\d+)\.", lambda found: f"stage{int(found[1]) + 1}.", key)
        for pattern, new in patterns.items():
            ours = re.sub(pattern, new, ours)
        renamed[ours] = value
    return renamed


def split_merged(
    state: Mapping[str, np.ndarray], merged: str, whole: Sequence[str], pointwise: str, identity: str
) -> dict[str, np.ndarray]:
    """Return a state dict of merged blocks as one of the train form; one without any is returned as it is.

    Of a merged convolution, `merged` by name, the first of the `whole` branches takes the kernel, and its BN adds the
    bias. All other branches begin as zeros: convolutions of zeros, and for the identity a BN of weight 0.
    """
    arrays = dict(state)
    for path in [key[: -len(".weight")] for key in state if key.endswith(f".{merged}.weight")]:
        kernel, bias = np.asarray(arrays.pop(f"{path}.weight")), np.asarray(arrays.pop(f"{path}.bias"))
        block = path[: -len(merged) - 1]
        zeros = np.zeros_like(bias)
        others = {name: kernel.shape for name in whole[1:]}
        if kernel.shape[-1] > 1:
            others[pointwise] = (*kernel.shape[:2], 1, 1)
        arrays[f"{block}.{whole[0]}.conv.weight"] = kernel
        arrays.update(bn_that_adds(f"{block}.{whole[0]}.bn", bias))
        for name, shape in others.items():
            arrays[f"{block}.{name}.conv.weight"] = np.zeros(shape, kernel.dtype)
            arrays.update(bn_that_adds(f"{block}.{name}.bn", zeros))
        # The first block of a stage halves the size; behind it, larger kernels keep the number of channels.
        is_first = not block.rpartition(".")[2].isdigit() or block.endswith(".0")
        if not is_first and (kernel.shape[-1] > 1 or kernel.shape[0] == kernel.shape[1]):
            arrays.update({**bn_that_adds(f"{block}.{identity}", zeros), f"{block}.{identity}.weight": zeros})
    return arrays
