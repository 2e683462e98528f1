"""DCD's dynamic coefficients: how large they are, and how much they differ from image to image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ..layers.dcd import DCDConv2D, DCDLinear
from ..layers.dcd_matrix import DCDDepthwiseConv2D, DCDMatrixConv2D
from .observe import layers_of, watch

KINDS = (DCDConv2D, DCDLinear, DCDMatrixConv2D, DCDDepthwiseConv2D)


@dataclass(frozen=True)
class DCDRow:
    """One layer with Lambda(x), a factor for each output channel (None: it has none), and Phi(x), `latent` x `latent`.

    `*_mean` is over images and coefficients, for Phi of absolute values; `*_spread` is the standard deviation over
    images, averaged over the coefficients. `scale` `[2, out]` has each factor's mean and deviation, `phi` and
    `phi_deviation` `[blocks * latent, latent]` those of Phi.
    """

    path: str
    latent: int
    lambda_mean: float | None
    lambda_spread: float | None
    phi_mean: float
    phi_spread: float
    scale: np.ndarray
    phi: np.ndarray
    phi_deviation: np.ndarray


def analyze(model: nn.Layer, images: np.ndarray) -> list[DCDRow]:
    """Return a row for each dynamic layer of a model in eval mode, over images `[N, C, H, W]`.

    Raises `ReparamError` where the model has none, or is in training mode.
    """
    layers = layers_of(model, *KINDS)
    coefficients = watch(model, layers, images, _in_one_row)
    return [_row(path, layer, coefficients[path]) for path, layer in layers.items()]


def _in_one_row(layer: Any, x: paddle.Tensor, output: paddle.Tensor) -> paddle.Tensor:
    """Return Phi and then, where there is one, Lambda of each image, `[N, blocks * latent^2 + out]`."""
    phi, scale = layer.coefficients(x)
    phi = phi.reshape([x.shape[0], -1])
    return phi if scale is None else paddle.concat([phi, scale], axis=1)


def _row(path: str, layer: Any, values: np.ndarray) -> DCDRow:
    out = 0 if layer.fc_scale is None else layer.fc_scale.weight.shape[1]
    phi, scale = np.split(values, [values.shape[1] - out], axis=1)
    latent = layer.sizes.latent
    return DCDRow(
        path=path,
        latent=latent,
        lambda_mean=float(scale.mean()) if out else None,
        lambda_spread=float(scale.std(axis=0).mean()) if out else None,
        phi_mean=float(np.abs(phi).mean()),
        phi_spread=float(phi.std(axis=0).mean()),
        scale=np.stack([scale.mean(axis=0), scale.std(axis=0)]),
        phi=phi.mean(axis=0).reshape(-1, latent),
        phi_deviation=phi.std(axis=0).reshape(-1, latent),
    )
