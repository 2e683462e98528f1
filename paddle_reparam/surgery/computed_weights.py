"""Weights that Paddle's `weight_norm` and `spectral_norm` compute before each pass, from parameters under other names.

What stands in the layer as its weight is a plain tensor: that of the last forward pass, whatever was loaded since.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.nn.utils.spectral_norm_hook import SpectralNorm
from paddle.nn.utils.weight_norm_hook import WeightNorm

from ..arithmetic.tensors import assign, to_float64
from .places import RewriteReport, places_of

#: What the names of the parameters and buffers behind such a weight end with.
_SUFFIXES = ("_g", "_v", "_u", "_orig")


def _computing(layer: nn.Layer) -> list[tuple[int, Any]]:
    """Return (key, hook) of every hook that computes a weight of the layer."""
    return [(k, hook) for k, hook in layer._forward_pre_hooks.items() if isinstance(hook, (WeightNorm, SpectralNorm))]


def _parts(layer: nn.Layer, hook: Any) -> dict[str, paddle.Tensor]:
    """Return the parameters and buffers that a hook computes a weight from, by name."""
    held = {**layer._parameters, **layer._buffers}
    return {name: held[name] for name in (f"{hook.name}{suffix}" for suffix in _SUFFIXES) if name in held}


def _computed(parts: dict[str, paddle.Tensor], hook: Any) -> np.ndarray:
    """Return in float64 the weight that a hook computes in eval mode, where it moves no estimate of its own."""
    exact = SimpleNamespace(**{name: part.detach().astype("float64") for name, part in parts.items()})
    options = {"do_power_iteration": False} if isinstance(hook, SpectralNorm) else {}
    return to_float64(hook.compute_weight(exact, **options))


def store_computed_weights(model: nn.Layer, report: RewriteReport | None = None) -> nn.Layer:
    """Make every weight that is computed before each pass a parameter, in place, in the place of what it came from."""
    for layer, paths in places_of(model).values():
        for key, hook in _computing(layer):
            parts = _parts(layer, hook)
            weight = _computed(parts, hook)
            del layer._forward_pre_hooks[key]
            delattr(layer, hook.name)
            for name in parts:
                delattr(layer, name)
            parameter = layer.create_parameter(weight.shape, dtype=next(iter(parts.values())).dtype)
            assign(parameter, weight)
            layer.add_parameter(hook.name, parameter)
            if report is not None:
                report.touched.append((paths[0], f"{type(hook).__name__} of {hook.name} -> a parameter"))
    return model


def refresh_computed_weights(model: nn.Layer) -> None:
    """Compute the weights anew, in place, so that they are those of the parameters before the next pass already."""
    for layer, _ in places_of(model).values():
        for _, hook in _computing(layer):
            parts = _parts(layer, hook)
            weight = paddle.to_tensor(_computed(parts, hook)).astype(next(iter(parts.values())).dtype)
            setattr(layer, hook.name, weight)
