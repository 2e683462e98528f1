"""How the published networks' weights start, where Paddle's own initial weights are others."""

from __future__ import annotations

import math

from paddle import nn


def uniform_fan_in(inputs: int) -> nn.initializer.Initializer:
    """Return the initializer that draws uniformly within 1 / sqrt(inputs of one output)."""
    bound = 1.0 / math.sqrt(inputs)
    return nn.initializer.Uniform(-bound, bound)


def init_uniform_fan_in(layer: nn.Conv2D | nn.Linear) -> None:
    """Draw a layer's weight and bias as `uniform_fan_in` says."""
    weight = layer.weight
    start = uniform_fan_in(weight.shape[0] if isinstance(layer, nn.Linear) else math.prod(weight.shape[1:]))
    for parameter in (weight, layer.bias):
        if parameter is not None:
            start(parameter)


def init_fan_out_normal(conv: nn.Conv2D) -> None:
    """Draw a convolution's weights from a normal distribution of variance 2 / (out_channels * kernel area)."""
    out_channels, _, height, width = conv.weight.shape
    nn.initializer.Normal(0.0, (2.0 / (out_channels * height * width)) ** 0.5)(conv.weight)
