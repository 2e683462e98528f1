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

import paddle
from paddle import nn
from paddleseg.models.backbones import cae, vision_transformer
from paddleseg.utils import logger, utils

from ..errors import CheckpointError
from ..weights import checkpoints, pickles


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
        module.paddle = _ReadingPaddle()


class _ReadingPaddle:
    """Paddle, but for what reads a weight file."""

    def __getattr__(self, name: str) -> Any:
        return getattr(paddle, name)

    @staticmethod
    def load(path: str) -> dict[str, Any]:
        return checkpoints.load(path)


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
    Raises `CheckpointError` where nothing fits, and where the file holds more of a layer than the network has of it:
    such a file is of the network with layers of this library in it.
    """
    if pretrained_model is None:
        return
    file = _local_file(pretrained_model)
    arrays, own = checkpoints.load(file), model.state_dict()
    fitting = [name for name in own if name in arrays and list(arrays[name].shape) == list(own[name].shape)]
    if not fitting:
        raise CheckpointError(
            f"{file}: none of its {len(arrays)} entries is one of {type(model).__name__}, such as "
            f"{checkpoints.listed(list(arrays)[:3])}; name a file of this network"
        )
    layers = {name.rpartition(".")[0] for name in own}
    more = [name for name in arrays if name not in own and _layers_above(name) & layers - {""}]
    if more:
        raise CheckpointError(
            f"{file}: it holds more of {len(more)} layers than {type(model).__name__} has, such as {more[0]}; it is of "
            "a network with other layers in their place, and this one would compute something else"
        )
    # Of what is missing there, a network keeps its own.
    checkpoints.load_into(model, {**own, **{name: arrays[name] for name in fitting}})
    left = [name for name in own if name not in fitting]
    logger.info(f"{file}: {len(fitting)} of the {len(own)} entries of {type(model).__name__} are taken from it")
    if left:
        logger.warning(f"not taken from it but as they were drawn: {checkpoints.listed(left)}")


def _layers_above(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:depth]) for depth in range(1, len(parts))}


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
    try:
        content, of_file = pickles.read_state(state.read_bytes()), pickles.parameter_names(weights.read_bytes())
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{state}: it cannot be read ({error})") from error
    # Paddle numbers parameters as they are made: those of this process may have other names.
    own = model.state_dict()
    names = {of_file[name]: tensor.name for name, tensor in own.items() if name in of_file}
    renamed = {}
    for entry, value in content.items():
        old = next((entry[:end] for end in range(len(entry), 0, -1) if entry[:end] in names), None)
        if old is None and hasattr(value, "shape"):
            raise CheckpointError(f"{state}: its entry {entry} is of no parameter of {type(model).__name__}")
        renamed[entry if old is None else names[old] + entry[len(old) :]] = value
    optimizer.set_state_dict(renamed)
    if hasattr(model, "batches_seen"):
        model.batches_seen = int(iteration)
    logger.info(f"training goes on from {folder}")
    return int(iteration)


def _local_file(path: str) -> str:
    if urlparse(path).netloc:
        path = utils.download_pretrained_model(path)
    return checkpoints.weight_file(path)
