"""What networks and their builders share: arguments that nobody takes, pretrained weights, widths, stages in a row."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ..errors import ReparamError, UnknownName


def check_arguments(
    name: str,
    pretrained: bool | str | os.PathLike[str],
    use_ssld: bool,
    unknown: Mapping[str, Any],
    options: Sequence[str] = (),
) -> None:
    """Refuse, before the model `name` is built, weights that nobody published and arguments that it does not have.

    `options` are the arguments that it has besides `pretrained`, `use_ssld` and `class_num`. Raises `ReparamError`, and
    `UnknownName` for the `unknown` ones.
    """
    if unknown:
        allowed = ", ".join(["pretrained", "use_ssld", "class_num", *options])
        raise UnknownName(f"{name} has no argument {', '.join(map(repr, unknown))}; it takes {allowed}")
    if pretrained is True or use_ssld:
        raise ReparamError(
            f"no weights of {name} are published in Paddle's format; "
            "give pretrained the path of a weight file, or False, and leave use_ssld out"
        )


def load_pretrained(model: nn.Layer, pretrained: bool | str | os.PathLike[str]) -> nn.Layer:
    """Load a weight file into the model, all of it, and return the model; `pretrained=False` leaves it as it is."""
    if pretrained is not False:
        from ..weights.checkpoints import load_into

        load_into(model, pretrained)
    return model


def nearest_multiple(channels: float, divisor: int = 8) -> int:
    """Return the multiple of `divisor` nearest to a number of channels, or the next one where that is 10% too few.

    It is never 0.
    """
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


def bn_that_adds(path: str, bias: np.ndarray) -> dict[str, np.ndarray]:
    """Return the published entries of a BN under `path` that adds a bias in eval mode and does nothing else."""
    epsilon = float(np.float32(nn.BatchNorm2D(1)._epsilon))
    return {
        f"{path}.weight": np.full(bias.shape, math.sqrt(1.0 + epsilon)),
        f"{path}.bias": bias,
        f"{path}.running_mean": np.zeros(bias.shape),
        f"{path}.running_var": np.ones(bias.shape),
    }


def maps_of(stages: Iterable[nn.Layer], x: paddle.Tensor) -> list[paddle.Tensor]:
    """Return what each of several stages in a row puts out, the first of which is given `x`."""
    maps = []
    for stage in stages:
        x = stage(x)
        maps.append(x)
    return maps
