"""Layers that change from one epoch of training to the next, such as by a temperature that falls."""

from __future__ import annotations

from paddle import nn

from ..layers.base import ReparamLayer
from ..surgery.tracing import walk


def start_epoch(model: nn.Layer, epoch: int) -> None:
    """Tell every layer of a network that an epoch begins, counted from 1; for a loop of one's own, before each epoch.

    What a layer does then depends on the epoch and its state alone: all processes do the same, and so does a resumed
    run.
    """
    for _, layer in walk(model):
        if isinstance(layer, ReparamLayer):
            layer.start_epoch(epoch)
