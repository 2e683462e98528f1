"""The section `Reparam` of a config: which layer takes the place of which convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paddle import nn

from ..errors import UsageError
from ..layers.base import ReparamLayer
from ..surgery import rewrite
from ..surgery.tracing import walk

SECTION = "Reparam"
_KEYS = {"layer", "where"}


def put_layers_in(network: nn.Layer, section: Any, log: Callable[[str], None]) -> None:
    """Replace convolutions of a network, in place, as a section `Reparam` says; None says nothing.

    It holds a `layer`, which is a `name` with the options of its `from_conv`, and may hold `where`, patterns of paths.
    Raises `UsageError` for what is no such section, and what `replace` raises.
    """
    if section is None:
        return
    if not isinstance(section, dict) or not set(section) <= _KEYS or "layer" not in section:
        raise UsageError(f"{SECTION} is {section!r}; it holds a layer and, where not all convolutions are meant, where")
    layer = section["layer"]
    if not isinstance(layer, dict) or "name" not in layer:
        raise UsageError(f"{SECTION}.layer needs a name and options, as {{name: RefConv2D}}, not {layer!r}")
    options = dict(layer)
    name = options.pop("name")
    report = rewrite.replace(network, name, where=section.get("where"), **options)
    log(f"{name} in {type(network).__name__}:\n{report}")


def changes_with_epochs(network: nn.Layer) -> bool:
    """Tell whether some layer of a network is to be told of the epochs that it is trained for."""
    layers = [layer for _, layer in walk(network) if isinstance(layer, ReparamLayer)]
    return any(type(layer).start_epoch is not ReparamLayer.start_epoch for layer in layers)
