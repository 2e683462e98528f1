"""The section `Reparam` of a config of PaddleDetection: put in wherever the network is built."""

from __future__ import annotations

import functools
import sys
from typing import Any

from paddle import nn
from ppdet.core.workspace import create, global_config
from ppdet.modeling.architectures.meta_arch import BaseArch
from ppdet.utils.logger import setup_logger

from ..frameworks.section import SECTION, changes_with_epochs, put_layers_in
from ..training.epochs import start_epoch

_log = setup_logger("ppdet.engine").info


def register() -> None:
    """Let a trainer of PaddleDetection build what the section of a config asks for, in whatever script builds it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ppdet.engine.") and vars(module).get("create") is create:
            module.create = _create


@functools.wraps(create)
def _create(cls_or_name: Any, **options: Any) -> Any:
    made = create(cls_or_name, **options)
    if isinstance(made, BaseArch):
        put_layers_in(made, global_config.get(SECTION), _log)
        _tell_epochs(made)
    return made


def _tell_epochs(network: nn.Layer) -> None:
    """Let layers that change from one epoch to the next be told of it: the epoch is among a detector's inputs."""
    if not changes_with_epochs(network):
        return
    network.epoch_told = -1

    def tell(layer: nn.Layer, inputs: Any) -> None:
        epoch = inputs[0].get("epoch_id", -1) if layer.training else -1
        if epoch >= 0 and epoch != layer.epoch_told:
            layer.epoch_told = epoch
            start_epoch(layer, epoch + 1)

    network.register_forward_pre_hook(tell)
