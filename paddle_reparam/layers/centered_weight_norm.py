"""CenteredWeightNormConv2D: "Centered Weight Normalization in Accelerating Training of Deep Networks" (ICCV 2017)."""

from __future__ import annotations

from ..registry import register_layer
from .normed import NormedConv2D


@register_layer
class CenteredWeightNormConv2D(NormedConv2D):
    """A convolution whose filters are w = g * c / ||c||, c = v - mean(v): of mean zero and of a trained length.

    It cannot keep a convolution's function, whose filters have a mean: it starts from the nearest filters that have
    none. State, initial values and errors as in `NormedConv2D`; filters of fewer than three weights raise
    `UnsupportedConv`. There are no options.
    """

    options = {}  # noqa: RUF012
    centred = True
