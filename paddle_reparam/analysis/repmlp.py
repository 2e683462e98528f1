"""RepMLP's and RepMLPNet's fused FC3: how much of it the convolutions are, and what one unit of it looks at."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from paddle import nn

from ..arithmetic.tensors import assign, to_float64
from ..layers.repmlp import RepMLP
from ..layers.repmlpnet import RepMLPBlock
from .observe import layers_of, share

KINDS = (RepMLP, RepMLPBlock)


@dataclass(frozen=True)
class RepMLPRow:
    """One layer's fused FC3, which is the sum of FC3 and of the convolutions as fully connected layers, BNs folded.

    `share_of_*`: their Frobenius norms, as shares of the sum of both. `concentration`: of the absolute weights that
    the middle unit of a partition gives to all its pixels, the share in the 3x3 around its own. `unit_*`: those
    weights, the mean over channels, `[h, w]`.
    """

    path: str
    partition: str
    groups: int
    share_of_fc3: float
    share_of_convolutions: float
    concentration_of_fc3: float
    concentration_of_fused: float
    unit_of_fc3: np.ndarray
    unit_of_fused: np.ndarray


def analyze(model: nn.Layer) -> list[RepMLPRow]:
    """Return a row for each `RepMLP` and `RepMLPBlock` of a model in eval mode.

    Raises `ReparamError` where the model has none, or is in training mode.
    """
    return [_row(path, layer) for path, layer in layers_of(model, *KINDS).items()]


def _row(path: str, layer: RepMLP | RepMLPBlock) -> RepMLPRow:
    fused, convolutions = fused_parts(layer)
    fc3 = fused - convolutions
    middle = {name: middle_unit(weight, layer.partition) for name, weight in (("fc3", fc3), ("fused", fused))}
    return RepMLPRow(
        path=path,
        partition="x".join(map(str, layer.partition)),
        groups=len(fused),
        share_of_fc3=share(fc3, (fc3, convolutions)),
        share_of_convolutions=share(convolutions, (fc3, convolutions)),
        concentration_of_fc3=concentration(middle["fc3"]),
        concentration_of_fused=concentration(middle["fused"]),
        unit_of_fc3=middle["fc3"],
        unit_of_fused=middle["fused"],
    )


def fused_parts(layer: RepMLP | RepMLPBlock) -> tuple[np.ndarray, np.ndarray]:
    """Return the fused FC3, `[groups, inputs, outputs]`, and the part of it that the convolutions are."""
    fused = to_float64(layer.reparameterize().weight)
    # Fusing is linear in FC3's weight, so what is left without it is the convolutions' part.
    without_fc3 = copy.deepcopy(layer)
    assign(without_fc3.fc3.weight, np.zeros(layer.fc3.weight.shape))
    return fused, to_float64(without_fc3.reparameterize().weight)


def middle_unit(weight: np.ndarray, partition: tuple[int, int]) -> np.ndarray:
    """Return mean absolute weights from the middle pixel of a partition to all its pixels, `[h, w]`.

    weight: `[groups, in_channels * h * w, out_channels * h * w]`, per group, pixels in the order (row, column).
    """
    height, width = partition
    pixels = height * width
    by_pixel = np.abs(weight).reshape(len(weight), -1, pixels, weight.shape[2] // pixels, pixels)
    return by_pixel[..., height // 2 * width + width // 2].mean(axis=(0, 1, 3)).reshape(height, width)


def concentration(unit: np.ndarray) -> float:
    """Return the share of absolute weights `[h, w]` that lies in the 3x3 around the middle; 0 where all are zero."""
    rows, columns = (slice(max(size // 2 - 1, 0), size // 2 + 2) for size in unit.shape)
    total = float(unit.sum())
    return float(unit[rows, columns].sum()) / total if total else 0.0
