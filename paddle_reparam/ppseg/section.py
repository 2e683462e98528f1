"""The section `Reparam` of a config of PaddleSeg: put in wherever the network is built."""

from __future__ import annotations

from typing import Any

from paddle import nn
from paddleseg.cvlibs import SegBuilder
from paddleseg.utils import logger

from ..frameworks.section import SECTION, changes_with_epochs, put_layers_in
from ..training.epochs import start_epoch


def register() -> None:
    """Let `SegBuilder(config).model` have what the section of a config asks for, in whatever script builds it."""
    of_class = vars(SegBuilder)["model"]
    build = of_class.func

    def model(self: SegBuilder) -> nn.Layer:
        network = build(self)
        put_layers_in(network, self.config.dic.get(SECTION), logger.info)
        _tell_epochs(network, self)
        return network

    of_class.func = _named_as(build, model)


def _named_as(own: Any, ours: Any) -> Any:
    ours.__name__, ours.__doc__ = own.__name__, own.__doc__
    return ours


def _tell_epochs(network: nn.Layer, builder: SegBuilder) -> None:
    """Let layers that change from one epoch to the next be told of it, as the network trains."""
    if not changes_with_epochs(network):
        return
    batches = max(len(builder.train_dataset) // builder.config.batch_size, 1)
    network.batches_seen = 0

    def count(layer: nn.Layer, _inputs: Any) -> None:
        if layer.training:
            if layer.batches_seen % batches == 0:
                start_epoch(layer, layer.batches_seen // batches + 1)
            layer.batches_seen += 1

    network.register_forward_pre_hook(count)
