"""SPConv's gate: how much of each output channel comes from the representative channels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from paddle import nn

from ..layers.spconv import SPConv2D
from .observe import layers_of, watch

KINDS = (SPConv2D,)


@dataclass(frozen=True)
class SPConvRow:
    """One `SPConv2D`: how its input is split, and its gate over images and channels.

    `gate` is the mean over both; `spread_of_images` the standard deviation over images, averaged over channels;
    `spread_of_channels` that of the channels' means. `mean` and `deviation` over images are `[out_channels]`.
    """

    path: str
    representative: int
    uncertain: int
    gate: float
    spread_of_images: float
    spread_of_channels: float
    mean: np.ndarray
    deviation: np.ndarray


def analyze(model: nn.Layer, images: np.ndarray) -> list[SPConvRow]:
    """Return a row for each `SPConv2D` of a model in eval mode, over images `[N, C, H, W]`.

    Raises `ReparamError` where the model has none, or is in training mode.
    """
    layers = layers_of(model, *KINDS)
    norms = {f"{path}.{name}": getattr(layer, name) for path, layer in layers.items() for name in ("bn1", "bn2")}
    means = watch(model, norms, images, lambda norm, x, out: out.mean(axis=[2, 3]))
    rows = []
    for path, layer in layers.items():
        gates = gate(means[f"{path}.bn1"], means[f"{path}.bn2"])
        mean, deviation = gates.mean(axis=0), gates.std(axis=0)
        rows.append(
            SPConvRow(
                path, *layer.channels, float(mean.mean()), float(deviation.mean()), float(mean.std()), mean, deviation
            )
        )
    return rows


def gate(representative: np.ndarray, uncertain: np.ndarray) -> np.ndarray:
    """Return g = sigmoid(GAP(u3) - GAP(u1)), the share of u3 in out = g * u3 + (1 - g) * u1.

    representative, uncertain: GAP(u3) and GAP(u1), means over pixels of what both BNs give; all `[N, channels]`.
    """
    return 1.0 / (1.0 + np.exp(uncertain - representative))
