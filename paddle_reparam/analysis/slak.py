"""SLaK's and RepLKNet's large kernels: how many of their weights are there, and how far out they are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from paddle import nn

from ..arithmetic.tensors import to_float64
from ..layers.base import ReparamLayer
from ..layers.replknet import ReparamLargeKernelConv2D
from ..layers.slak import DecomposedLargeKernelConv2D
from .observe import layers_of

KINDS = (DecomposedLargeKernelConv2D, ReparamLargeKernelConv2D)


@dataclass(frozen=True)
class LargeKernelRow:
    """One large kernel, as the plain MxM kernel that its branches are together, BNs folded.

    `density`: the share of the weights of all branches that are not zero, `density_of_small` that of the small branch
    (None: there is none). `half_within`, `nine_tenths_within`: the side of the smallest square around the middle that
    holds that share of the kernel's energy (its squared weights). `within` has that share for the sides 1, 3, ..., M;
    `magnitude` `[M, M]` is the mean of |weight| over channels.
    """

    path: str
    kernel: str
    channels: int
    density: float
    density_of_small: float | None
    half_within: int
    nine_tenths_within: int
    magnitude: np.ndarray
    within: np.ndarray


def analyze(model: nn.Layer) -> list[LargeKernelRow]:
    """Return a row for each `DecomposedLargeKernelConv2D` and `ReparamLargeKernelConv2D` of a model in eval mode.

    Raises `ReparamError` where the model has none, or is in training mode.
    """
    layers = layers_of(model, *KINDS)
    return [_row(path, layer) for path, layer in layers.items()]


def _row(path: str, layer: ReparamLayer) -> LargeKernelRow:
    plain = layer.reparameterize()
    kernel = to_float64((plain.cross() if isinstance(layer, DecomposedLargeKernelConv2D) else plain).weight)
    branches = {name: to_float64(conv.weight) for name, conv in _convolutions(layer)}
    small = [weight for name, weight in branches.items() if name.startswith("small_conv")]
    within = energy_within(kernel)
    sizes = " + ".join(f"{weight.shape[2]}x{weight.shape[3]}" for weight in branches.values())
    return LargeKernelRow(
        path=path,
        kernel=sizes,
        channels=len(kernel),
        density=density(list(branches.values())),
        density_of_small=density(small) if small else None,
        half_within=smallest_side(within, 0.5),
        nine_tenths_within=smallest_side(within, 0.9),
        magnitude=np.abs(kernel).mean(axis=(0, 1)),
        within=within,
    )


def _convolutions(layer: ReparamLayer) -> list[tuple[str, nn.Conv2D]]:
    return [(name, each) for name, each in layer.named_sublayers() if isinstance(each, nn.Conv2D)]


def density(weights: Sequence[np.ndarray]) -> float:
    """Return the share of all weights that are not zero."""
    return sum(np.count_nonzero(weight) for weight in weights) / sum(weight.size for weight in weights)


def energy_within(kernel: np.ndarray) -> np.ndarray:
    """Return the share of the squared weights within the middle square of side 1, 3, ..., M of `[C, 1, M, M]`, M odd.

    All shares are 0 where all weights are.
    """
    energy = np.square(kernel).sum(axis=(0, 1))
    size = len(energy)
    squares = [energy[cut : size - cut, cut : size - cut].sum() for cut in reversed(range(size // 2 + 1))]
    total = energy.sum()
    return np.array(squares) / total if total else np.zeros(len(squares))


def smallest_side(within: np.ndarray, least: float) -> int:
    """Return the side of the smallest middle square that holds at least a share; the largest where none does."""
    enough = np.flatnonzero(within >= least)
    return 2 * int(enough[0] if len(enough) else len(within) - 1) + 1
