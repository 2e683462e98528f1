"""WeightNormConv2D: "Weight Normalization: A Simple Reparameterization" (NeurIPS 2016, arXiv 1602.07868)."""

from __future__ import annotations

from ..registry import register_layer
from .normed import NormedConv2D


@register_layer
class WeightNormConv2D(NormedConv2D):
    """A convolution whose filters are w = g * v / ||v||: length and direction are trained apart (equation 2).

    It starts as the convolution that it stands for. Unlike `paddle.nn.utils.weight_norm`, it computes its kernel in
    the forward pass, so that it exports what was loaded, and it keeps what an optimizer was told of the weight. State,
    initial values and errors as in `NormedConv2D`; there are no options.
    """

    options = {}  # noqa: RUF012
    keeps_function_with = {}  # noqa: RUF012
