"""Weights that go into PaddleDetection's networks: read without running them, and an error where they do not fit.

PaddleDetection unpickles a weight file, which runs what it says, and takes what fits of it by the ends of the names,
whatever is left over: the weights of a network with layers of this library go into the plain one without a word.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import paddle
from paddle import nn
from ppdet.engine import Trainer
from ppdet.utils import checkpoint
from ppdet.utils.download import get_weights_path
from ppdet.utils.logger import setup_logger

from ..errors import CheckpointError
from ..frameworks.loading import ReadingPaddle, load_fitting, read_optimizer
from ..weights import checkpoints, pickles

_log = setup_logger("ppdet.utils.checkpoint").info


def register() -> None:
    """Make every module of PaddleDetection load weights by this module."""
    ours = {"load_weight": load_weight, "load_pretrain_weight": load_pretrain_weight}
    theirs = {name: vars(checkpoint)[name] for name in ours}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "ppdet":
            continue
        for key, function in theirs.items():
            if vars(module).get(key) is function:
                setattr(module, key, ours[key])
        # Some backbones read a file themselves.
        if name.startswith("ppdet.modeling.") and hasattr(getattr(module, "paddle", None), "load"):
            module.paddle = ReadingPaddle(module.paddle)
    Trainer.load_weights = load_weights


def load_weights(self: Any, weights: str) -> None:
    """Load a weight file into the network of a trainer, as its method of this name: to train, what fits of it, else all
    of it or an error.
    """
    if self.is_loaded_weights:
        return
    self.start_epoch = 0
    if self.mode == "train":
        load_pretrain_weight(self.model, weights)
    else:
        checkpoints.load_into(self.model, _local_file(weights))


def load_pretrain_weight(model: nn.Layer, pretrain_weight: str) -> None:
    """Load what `pretrain_weights` names into a network that is then trained: what fits of it, or `CheckpointError`."""
    load_fitting(model, _local_file(pretrain_weight), _log, _names_in_file)


def _names_in_file(own: Iterable[str], arrays: Iterable[str]) -> dict[str, str]:
    """Return name of the network -> name in a file, which may lack what stands before it in the network.

    Of the names of the file that are the end of one, that is the longest. Raises `CheckpointError` where one of the
    file is that of several.
    """
    # Where a network has a part of its backbone in its head.
    known = {at.removeprefix("backbone.") if at.startswith("backbone.res5.") else at: at for at in arrays}
    pairs: dict[str, str] = {}
    of_file: dict[str, str] = {}
    for name in own:
        parts = name.split(".")
        ends = (".".join(parts[first:]) for first in range(len(parts)))
        end = next((end for end in ends if end in known), None)
        if end is None:
            continue
        other = of_file.setdefault(end, name)
        if other != name:
            raise CheckpointError(
                f"its {known[end]} may be {other} and {name} of the network; name a file of this network"
            )
        pairs[name] = known[end]
    return pairs


def load_weight(model: nn.Layer, weight: str, optimizer: Any = None, ema: Any = None, exchange: bool = True) -> int:
    """Go on from what a training saved, as PaddleDetection's function of this name; return how many epochs were done.

    Raises `CheckpointError` where the weights or the optimizer's state do not fit.
    """
    file = Path(_local_file(weight))
    averaged, state = file.with_suffix(".pdema"), file.with_suffix(".pdopt")
    trained = averaged if ema is not None and averaged.is_file() and exchange else file
    checkpoints.load_into(model, trained)
    epochs, steps = 0, 0
    if optimizer is not None and state.is_file():
        content = read_optimizer(model, trained, state)
        epochs = int(content.pop("last_epoch", 0))
        steps = int(content.get("LR_Scheduler", {}).get("last_epoch", 0))
        optimizer.set_state_dict(content)
    if ema is not None and averaged.is_file():
        other = file if exchange else averaged
        ema.resume({name: paddle.to_tensor(array) for name, array in pickles.read(other.read_bytes()).items()}, steps)
    _log(f"training goes on from {file}")
    return epochs


def _local_file(path: str) -> str:
    if checkpoint.is_url(path):
        path = get_weights_path(path)
    for suffix in (".pdopt", ".pdema"):
        path = os.fspath(path).removesuffix(suffix) if os.fspath(path).endswith(suffix) else path
    return checkpoints.weight_file(path)
