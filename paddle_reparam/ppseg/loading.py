"""Weights that go into PaddleSeg's networks: read without running them, and an error where they do not fit.

PaddleSeg unpickles a weight file, which runs what it says, and takes a file in which no name fits with a warning for
each. `register` puts the reader here in the place of its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from paddle import nn
from paddleseg.models.backbones import cae, vision_transformer
from paddleseg.utils import logger, utils

from ..errors import CheckpointError
from ..frameworks.loading import ReadingPaddle, load_fitting, read_optimizer
from ..weights import checkpoints


def register() -> None:
    """Make every module of PaddleSeg load weights by this module."""
    ours: dict[str, Callable[..., Any]] = {
        "load_entire_model": load_entire_model,
        "load_pretrained_model": load_pretrained_model,
        "resume": resume,
    }
    theirs = {name: vars(utils)[name] for name in ours}
    for module in [each for name, each in sys.modules.items() if name.partition(".")[0] == "paddleseg"]:
        for name, function in theirs.items():
            if vars(module).get(name) is function:
                setattr(module, name, ours[name])
    # They read one file a second time, for its position embedding.
    for module in (cae, vision_transformer):
        module.paddle = ReadingPaddle()


def load_entire_model(model: nn.Layer, pretrained: str | None) -> None:
    """Load a weight file into a whole network, as PaddleSeg's function of this name, all of it or an error.

    Where a network asks for it as it is built, that file is what `pretrained` names: see `load_pretrained_model`.
    """
    if pretrained is None:
        logger.warning(f"{type(model).__name__} has the weights that it drew: no weight file is named")
    elif sys._getframe(1).f_locals.get("self") is model:
        load_pretrained_model(model, pretrained)
    else:
        checkpoints.load_into(model, _local_file(pretrained))


def load_pretrained_model(model: nn.Layer, pretrained_model: str | None) -> None:
    """Load what `pretrained` names into a network, or a backbone, that is then trained: what fits of it.

    A classifier that is left over, and heads for another number of classes, are what they were drawn as, and logged.
    Raises `CheckpointError` as `load_fitting` does.
    """
    if pretrained_model is None:
        return
    load_fitting(model, _local_file(pretrained_model), logger.info)


def resume(model: nn.Layer, optimizer: Any, resume_model: str | None) -> int | None:
    """Go on from a folder of a training, as PaddleSeg's function of this name; return its iteration.

    Raises `CheckpointError` where the weights or the optimizer's state do not fit.
    """
    if resume_model is None:
        return None
    folder = Path(os.path.normpath(resume_model))
    iteration = folder.name.rpartition("_")[2]
    if not iteration.isdigit():
        raise CheckpointError(f"{folder} is no folder of a checkpoint: its name does not end as iter_1000 does")
    weights, state = folder / "model.pdparams", folder / "model.pdopt"
    checkpoints.load_into(model, weights)
    optimizer.set_state_dict(read_optimizer(model, weights, state))
    if hasattr(model, "batches_seen"):
        model.batches_seen = int(iteration)
    logger.info(f"training goes on from {folder}")
    return int(iteration)


def _local_file(path: str) -> str:
    if urlparse(path).netloc:
        path = utils.download_pretrained_model(path)
    return checkpoints.weight_file(path)
