"""What goes wrong in the middle of a training, as one sentence instead of a number that nobody reads.

PaddleClas trains on with a loss that is not a number, and takes another image at random for one that it cannot read.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import paddle
from ppcls.utils import logger

from ..errors import ReparamError
from ..tensors import to_float64


def check_samples(loader: Any, class_num: int | None, split: str) -> None:
    """Raise `ReparamError` for a data set without images, and for labels that the network has no output for."""
    dataset = getattr(loader, "dataset", None)
    labels = getattr(dataset, "labels", None)
    if labels is None:
        return
    if len(labels) == 0:
        raise ReparamError(f"DataLoader.{split}: its list of images is empty")
    if len(loader) == 0:
        raise ReparamError(
            f"DataLoader.{split}: {len(labels)} images do not fill one batch; choose a smaller batch_size, or "
            "drop_last=False"
        )
    values = np.asarray(labels)
    if class_num is None or values.dtype.kind not in "iu" or values.ndim != 1:
        return
    wrong = np.flatnonzero((values < 0) | (values >= class_num))
    if wrong.size:
        images = getattr(dataset, "images", None)
        name = f" ({images[wrong[0]]})" if images else ""
        raise ReparamError(
            f"DataLoader.{split}: {wrong.size} of {values.size} labels are none of 0 to {class_num - 1}, the first is "
            f"{values[wrong[0]]}{name}; set Arch.class_num, or mend the list"
        )


class _Recorder:
    """PaddleClas' logger in the modules that read images: what is an error to them is one to the run."""

    def __init__(self, failures: Any) -> None:
        self._failures = failures

    def __getattr__(self, name: str) -> Any:
        return getattr(logger, name)

    def error(self, message: str, *arguments: Any) -> None:
        self._failures.put(str(message))
        logger.error(message, *arguments)


class ImageFailures:
    """Collects what the readers of images, in this process or in workers, could not read."""

    def __init__(self) -> None:
        # Made before the workers, which inherit it.
        self._failures = multiprocessing.SimpleQueue()
        recorder = _Recorder(self._failures)
        for name, module in list(sys.modules.items()):
            if name.startswith("ppcls.data.dataloader.") and hasattr(module, "logger"):
                module.logger = recorder

    def raise_first(self) -> None:
        """Raise `ReparamError` for an image that could not be read."""
        if not self._failures.empty():
            raise ReparamError(f"an image cannot be read, and no other takes its place: {self._failures.get()}")


def check_loss(losses: dict[str, Any], epoch: int, step: int) -> None:
    """Raise `ReparamError` for a loss that is not finite; `step` counts from the start of the run."""
    for name, value in losses.items():
        number = float(value)
        if not math.isfinite(number):
            raise ReparamError(
                f"the {name} is {number} in epoch {epoch}, at step {step}; the last checkpoint is from before that. "
                "Train with a smaller learning rate, or look for a broken image or label"
            )


def check_states(states: Iterable[Mapping[str, Any]], step: int) -> None:
    """Raise `ReparamError` for weights, or what an optimizer keeps of them, that are not finite and would be saved."""
    for state in states:
        for name, value in state.items():
            if (
                isinstance(value, paddle.Tensor)
                and value.is_floating_point()
                and not np.isfinite(to_float64(value)).all()
            ):
                raise ReparamError(
                    f"{name} is not finite after step {step}, and is not saved; the last checkpoint is from before "
                    "that. Train with a smaller learning rate"
                )
