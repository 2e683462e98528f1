"""What the checkpoints of a training take on the disk, said before its first step."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import paddle
from ppcls.utils import logger

from ..errors import ReparamError
from ..training.sparsity import inner_optimizer
from .resuming import parameters_of


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one checkpoint: its weight files, and the state of the optimizers; and how many a run may keep."""

    weights: int
    optimizers: int
    kept: int

    @property
    def one(self) -> int:
        """Bytes of all files of one checkpoint."""
        return self.weights + self.optimizers

    def __str__(self) -> str:
        several = f"; the run keeps {self.kept} at most, {_in_words(self.kept * self.one)}" if self.kept > 1 else ""
        return (
            f"a checkpoint takes {_in_words(self.one)}, of it {_in_words(self.weights)} for weights and "
            f"{_in_words(self.optimizers)} for the optimizer{several}"
        )


def require_space(engine: Any, epoch: int) -> None:
    """Log what the checkpoints of an Engine take that is about to train an epoch, and what the disk has room for.

    Raises `ReparamError` where that is less than one checkpoint.
    """
    if paddle.distributed.get_rank() != 0:
        return
    size = checkpoint_size(engine, epoch)
    folder = engine.output_dir
    os.makedirs(folder, exist_ok=True)
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < size.one:
        raise ReparamError(
            f"{folder}: {size}, and the disk has room for {_in_words(disk.free)}; free some, or set Global.output_dir "
            "to a folder on another disk"
        )
    logger.info(f"{folder}: {size}; the disk has room for {_in_words(disk.free)}")
    # The next one is written beside what is there.
    if disk.total and disk.free < (size.kept + 1) * size.one:
        logger.warning(
            f"the disk of {folder} has room for {disk.free // size.one} checkpoints, and this run may keep {size.kept} "
            "and write the next one beside them: raise Global.save_interval, or free some"
        )


def checkpoint_size(engine: Any, epoch: int) -> CheckpointSize:
    """Return what the checkpoints of an Engine take that is about to train an epoch."""
    settings = engine.config["Global"]
    trained = [engine.model.state_dict(), engine.train_loss_func.state_dict()]
    averaged = [engine.model_ema.module.state_dict()] if getattr(engine, "ema", False) else []
    last, interval = settings["epochs"], settings["save_interval"]
    numbered = [each for each in range(epoch, last + 1) if interval > 0 and each % interval == 0]
    # Those of one epoch are one on the disk; the best one may be of any epoch.
    latest = last not in numbered
    best = bool(settings["eval_during_train"]) and interval != 1
    return CheckpointSize(
        sum(_bytes(state.values()) for state in [*trained, *averaged]),
        sum(map(_state_bytes, map(inner_optimizer, engine.optimizer))),
        len(numbered) + latest + best,
    )


def _bytes(tensors: Iterable[paddle.Tensor]) -> int:
    return sum(tensor.size * tensor.element_size() for tensor in tensors)


def _state_bytes(optimizer: Any) -> int:
    """Return the bytes that an optimizer will keep of its parameters; it makes them in its first step.

    Of what is frozen, and so gets no gradient, there will be none.
    """
    kind = type(optimizer)
    entries = {getattr(kind, name) for name in dir(kind) if name.endswith("_acc_str")}
    # A power of a beta is one number.
    arrays = sum("pow" not in entry for entry in entries)
    total = 0
    for parameter in parameters_of(optimizer):
        if parameter.stop_gradient:
            continue
        copied = getattr(optimizer, "_multi_precision", False) and parameter.element_size() == 2
        # All of it is kept of a float32 copy, where there is one.
        total += (arrays + 1) * 4 * parameter.size if copied else arrays * parameter.element_size() * parameter.size
    return int(total)


def _in_words(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
