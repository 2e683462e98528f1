"""RefConv's figures: how far a kernel was refocused, which kernel channels took from which, how alike they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from paddle import nn

from ..arithmetic.tensors import to_float64
from ..layers.refconv import RefConv2D
from .observe import layers_of

#: The paper shows the first 64 channels.
CHANNELS = 64

KINDS = (RefConv2D,)


@dataclass(frozen=True)
class RefConvRow:
    """One `RefConv2D`: `relative_change` = ||Wt - Wb|| / ||Wb||, the mean divergence between two kernel channels of
    Wb and of Wt (None: there is one only), and the matrices of the first 64 channels behind them.

    `connectivity` `[planes, groups]` is empty but for depthwise convolutions; `divergence_*` `[channels, channels]`.
    """

    path: str
    kernel: str
    relative_change: float
    base_divergence: float | None
    refocused_divergence: float | None
    connectivity: np.ndarray
    divergence_of_base: np.ndarray
    divergence_of_refocused: np.ndarray


def analyze(model: nn.Layer) -> list[RefConvRow]:
    """Return a row for each `RefConv2D` of a model in eval mode; raises `ReparamError` where it has none."""
    return [_row(path, layer) for path, layer in layers_of(model, *KINDS).items()]


def _row(path: str, layer: RefConv2D) -> RefConvRow:
    base, refocused = to_float64(layer.weight), to_float64(layer.reparameterize().weight)
    of_base, of_refocused = divergence(base), divergence(refocused)
    depthwise = layer.geometry.is_depthwise
    return RefConvRow(
        path=path,
        kernel=str(layer.geometry),
        relative_change=relative_change(base, refocused),
        base_divergence=mean_divergence(of_base),
        refocused_divergence=mean_divergence(of_refocused),
        connectivity=connectivity(to_float64(layer.convmap.weight)) if depthwise else np.zeros((0, 0)),
        divergence_of_base=of_base,
        divergence_of_refocused=of_refocused,
    )


def relative_change(base: np.ndarray, refocused: np.ndarray) -> float:
    """Return ||Wt - Wb|| / ||Wb|| of two kernels of one shape, in the Frobenius norm."""
    return float(np.linalg.norm(refocused - base) / np.linalg.norm(base))


def connectivity(refocus: np.ndarray, channels: int = CHANNELS) -> np.ndarray:
    """Return the connectivity degree D[i, j] = sum over u, v of |Wr[i, j, u, v]|: how much of channel j of Wb goes into
    channel i of Wt, besides the identity.

    refocus: Wr of a depthwise convolution, `[planes, groups, map_k, map_k]`; the first `channels` of either axis.
    """
    return np.abs(refocus[:channels, :channels]).sum(axis=(2, 3))


def divergence(kernel: np.ndarray, channels: int = CHANNELS) -> np.ndarray:
    """Return KL(p_i || p_j) between the first kernel channels, `[channels, channels]`; small: they are redundant.

    kernel: `[out, in / groups, height, width]`; p_i is the softmax over the height * width values of channel i, in the
    order (out, in).
    """
    planes = kernel.reshape(-1, kernel.shape[2] * kernel.shape[3])[:channels]
    shifted = planes - planes.max(axis=1, keepdims=True)
    logarithm = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    probability = np.exp(logarithm)
    return (probability * logarithm).sum(axis=1)[:, None] - probability @ logarithm.T


def mean_divergence(matrix: np.ndarray) -> float | None:
    """Return the mean of a matrix of divergences without its diagonal; None for a single channel."""
    count = len(matrix)
    return float(matrix.sum() - np.trace(matrix)) / (count * (count - 1)) if count > 1 else None
