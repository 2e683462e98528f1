"""The section `Reparam` of a config of PaddleDetection: put in wherever the network is built, fused where it ships."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from paddle import nn
from ppdet.core.workspace import create, global_config
from ppdet.engine import Trainer
from ppdet.modeling.architectures.meta_arch import BaseArch
from ppdet.utils.logger import setup_logger

from ..errors import ReparamError
from ..frameworks.section import SECTION, changes_with_epochs, put_layers_in
from ..layers.base import ReparamLayer
from ..surgery import rewrite
from ..surgery.foreign import holds_norms
from ..surgery.tracing import walk
from ..training.epochs import start_epoch

_log = setup_logger("ppdet.engine").info


def register() -> None:
    """Let a trainer of PaddleDetection build what the section of a config asks for, and export it fused."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ppdet.engine.") and vars(module).get("create") is create:
            module.create = _create
        for value in list(vars(module).values()) if name.startswith("ppdet.modeling.") else ():
            if isinstance(value, type) and value.__module__ == name and "convert_to_deploy" in vars(value):
                value.convert_to_deploy = _whole_and_once(value.convert_to_deploy)
    Trainer.export = _fused_before(Trainer.export)


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


def _fused_before(export: Callable[..., Any]) -> Callable[..., Any]:
    """Return the export of a trainer, whose network is fused first: its own way leaves these layers out."""

    @functools.wraps(export)
    def fused(self: Any, *arguments: Any, **options: Any) -> Any:
        if any(isinstance(layer, ReparamLayer) for _, layer in walk(self.model)):
            self.model.eval()
            self.model, report = rewrite.reparameterize(self.model)
            _log(f"fused:\n{report}")
        return export(self, *arguments, **options)

    return fused


def _whole_and_once(convert: Callable[[nn.Layer], None]) -> Callable[[nn.Layer], None]:
    """Return a block's way to fuse itself, which reads a kernel from whatever stands in a convolution's place."""

    @functools.wraps(convert)
    def convert_to_deploy(self: nn.Layer) -> None:
        layer = next((layer for _, layer in walk(self) if isinstance(layer, ReparamLayer)), None)
        if layer is not None:
            raise ReparamError(
                f"{type(self).__name__}.convert_to_deploy() would leave out the {type(layer).__name__} inside of it; "
                "fuse the network by reparameterize, which fuses both"
            )
        if holds_norms(self):
            convert(self)

    return convert_to_deploy
