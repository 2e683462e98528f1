"""The section `Reparam` of a config of PaddleSeg: which layer takes the place of which convolutions."""

from __future__ import annotations

from typing import Any

from paddle import nn
from paddleseg.cvlibs import SegBuilder
from paddleseg.utils import logger

from ..errors import UsageError
from ..layers.base import ReparamLayer
from ..surgery import rewrite
from ..training.epochs import start_epoch

SECTION = "Reparam"
_KEYS = {"layer", "where"}


def register() -> None:
    """Let `SegBuilder(config).model` have what the section of a config asks for, in whatever script builds it."""
    of_class = vars(SegBuilder)["model"]
    build = of_class.func

    def model(self: SegBuilder) -> nn.Layer:
        network = build(self)
        put_layers_in(network, self.config.dic.get(SECTION))
        _tell_epochs(network, self)
        return network

    of_class.func = _named_as(build, model)


def _named_as(own: Any, ours: Any) -> Any:
    ours.__name__, ours.__doc__ = own.__name__, own.__doc__
    return ours


def _tell_epochs(network: nn.Layer, builder: SegBuilder) -> None:
    """Let layers that change from one epoch to the next be told of it, as the network trains."""
    if all(type(layer).start_epoch is ReparamLayer.start_epoch for layer in _reparam_layers(network)):
        return
    batches = max(len(builder.train_dataset) // builder.config.batch_size, 1)
    network.batches_seen = 0

    def count(layer: nn.Layer, _inputs: Any) -> None:
        if layer.training:
            if layer.batches_seen % batches == 0:
                start_epoch(layer, layer.batches_seen // batches + 1)
            layer.batches_seen += 1

    network.register_forward_pre_hook(count)


def _reparam_layers(network: nn.Layer) -> list[ReparamLayer]:
    return [layer for layer in network.sublayers() if isinstance(layer, ReparamLayer)]


def put_layers_in(network: nn.Layer, section: Any) -> None:
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
    logger.info(f"{name} in {type(network).__name__}:\n{report}")
