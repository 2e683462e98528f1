"""What an older PaddleDetection trips over with a current Paddle, each mended only where it is needed."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from ppdet.data import reader
from ppdet.modeling.assigners import TaskAlignedAssigner
from ppdet.modeling.proposal_generator import RPNHead
from ppdet.utils.logger import logger_initialized

from ..errors import ReparamError, reason_of
from ..frameworks.old_paddle import OldPaddle, computed_as_before
from ..images import why_unreadable


def apply() -> list[str]:
    """Apply the mends that this PaddleDetection needs and return their names."""
    applied = []
    for needed, mend in (
        (_logs_keep_the_first_output, _mend_logs),
        (_assigners_mix_integers, _mend_types),
        (_numbers_have_no_dimension, _mend_numbers),
        (_readers_hide_errors, _mend_readers),
    ):
        if needed():
            mend()
            applied.append(mend.__name__)
    return applied


class _Output:
    """What `sys.stdout` is when something is written to it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


def _handlers() -> list[logging.StreamHandler]:
    handlers = [handler for name in logger_initialized for handler in logging.getLogger(name).handlers]
    return [each for each in handlers if type(each) is logging.StreamHandler and not isinstance(each.stream, _Output)]


def _logs_keep_the_first_output() -> bool:
    """Its logs go to what was the output as it was imported, whatever became of that."""
    return bool(_handlers())


def _mend_logs() -> None:
    for handler in _handlers():
        handler.stream = _Output()


def _assigners_mix_integers() -> bool:
    """Its assigners add integers of 32 bits to some of 64, which Paddle no longer does."""
    boxes = paddle.to_tensor([[[0.0, 0.0, 8.0, 8.0]]])
    inputs = [paddle.ones([1, 1, 1]), boxes, paddle.to_tensor([[4.0, 4.0]]), 1, paddle.zeros([1, 1, 1], "int32")]
    try:
        TaskAlignedAssigner(topk=1)(*inputs, boxes, paddle.ones([1, 1, 1]), 1)
    except TypeError:
        return True
    return False


def _mend_types() -> None:
    """Let the left side decide in what is computed in training alone; what is exported stays as it is written."""
    for name, module in list(sys.modules.items()):
        method = _IN_TRAINING.get(name.rpartition(".")[0])
        for value in list(vars(module).values()) if method else ():
            if isinstance(value, type) and value.__module__ == name and method in vars(value):
                setattr(value, method, computed_as_before(vars(value)[method]))


#: Where the classes are of which a method runs in training alone; distillation calls some assigners itself.
_IN_TRAINING = {"ppdet.modeling.architectures": "get_loss", "ppdet.modeling.assigners": "forward"}


def _numbers_have_no_dimension() -> bool:
    """It puts numbers of boxes behind one another, which since Paddle 2.5 have no dimension."""
    module = sys.modules[RPNHead.__module__]
    try:
        module.paddle.concat([paddle.shape(paddle.zeros([1, 4])).slice([0], [0], [1])[0]])
    except ValueError:
        return True
    return False


def _mend_numbers() -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("ppdet.modeling.") and vars(module).get("paddle") is paddle:
            module.paddle = OldPaddle()


class _Watched(paddle.io.Dataset):
    """A data set that gives, in the place of a sample that cannot be read, why."""

    def __init__(self, dataset: Any) -> None:
        self._own = dataset

    def __len__(self) -> int:
        return len(self._own)

    def __getitem__(self, number: int) -> Any:
        try:
            return self._own[number]
        except Exception as error:
            file = str(self._own.roidbs[number % len(self._own.roidbs)].get("im_file", f"image {number}"))
            reason = why_unreadable(file) if os.path.isfile(file) else None
            return _Failure(f"{file}: {reason or reason_of(error)}")


@dataclass
class _Failure:
    """Why there is no sample."""

    reason: str


class _Loader:
    """Paddle's loader, whose errors end the run. Paddle raises them elsewhere, while the run waits for a batch."""

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any], **options: Any) -> None:
        def collate(samples: list[Any]) -> Any:
            reasons = [sample.reason for sample in samples if isinstance(sample, _Failure)]
            try:
                return collate_fn(samples) if not reasons else _without_batch(reasons[0])
            except Exception as error:
                return _without_batch(reason_of(error))

        self._own = paddle.io.DataLoader(dataset=_Watched(dataset), collate_fn=collate, **options)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._own:
            if isinstance(batch, dict) and _UNREADABLE in batch:
                raise ReparamError(batch[_UNREADABLE])
            yield batch


_UNREADABLE = "why there is no batch"


def _without_batch(reason: str) -> dict[str, Any]:
    # A loader hands on nothing that holds no array.
    return {_UNREADABLE: reason, "array": np.zeros(1, "float32")}


def _readers_hide_errors() -> bool:
    """What goes wrong as Paddle reads, in a thread or in a worker, is not raised where the run waits for a batch."""
    return reader.DataLoader is paddle.io.DataLoader


def _mend_readers() -> None:
    reader.DataLoader = _Loader
    # It logs with a traceback what is raised now.
    reader.logger.setLevel(logging.ERROR)
