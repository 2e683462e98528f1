"""What an older PaddleSeg trips over with a current Paddle, each mended only where it is needed."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import paddle
from paddleseg.cvlibs import manager
from paddleseg.models.losses import CrossEntropyLoss
from paddleseg.utils import metrics

from ..frameworks.old_paddle import OldPaddle, computed_as_before

#: The module; `paddleseg.core` has the function of the same name in its place.
train = importlib.import_module("paddleseg.core.train")


def apply() -> list[str]:
    """Apply the mends that this PaddleSeg needs and return their names."""
    applied = []
    for needed, mend in (
        (_losses_mix_types, _mend_losses),
        (_log_indexes_numbers, _mend_log),
        (_areas_have_no_dimension, _mend_areas),
    ):
        if needed():
            mend()
            applied.append(mend.__name__)
    return applied


def _losses_mix_types() -> bool:
    """Its losses multiply floats by whole numbers and truth values, which Paddle no longer does."""
    try:
        CrossEntropyLoss()(paddle.zeros([1, 2, 1, 1]), paddle.zeros([1, 1, 1], "int64"))
    except TypeError:
        return True
    return False


def _mend_losses() -> None:
    for loss in manager.LOSSES.components_dict.values():
        if "forward" in vars(loss):
            loss.forward = computed_as_before(loss.forward)


def _log_indexes_numbers() -> bool:
    """It logs each loss as `.numpy()[0]`; since Paddle 2.5 a mean has no dimension to index."""
    return "l[0] / log_iters" in inspect.getsource(train.train)


def _mend_log() -> None:
    def mended(own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def losses(*arguments: Any, **options: Any) -> Any:
            return [loss.reshape([1]) if loss.ndim == 0 else loss for loss in own(*arguments, **options)]

        return losses

    train.loss_computation = mended(train.loss_computation)
    for model in manager.MODELS.components_dict.values():
        # Some compute their losses themselves.
        if "loss_computation" in vars(model):
            model.loss_computation = mended(model.loss_computation)


def _areas_have_no_dimension() -> bool:
    """It puts the areas of the classes behind one another, which since Paddle 2.5 have no dimension."""
    try:
        metrics.calculate_area(paddle.zeros([1, 1, 1], "int32"), paddle.zeros([1, 1, 1], "int64"), 1)
    except ValueError:
        return True
    return False


def _mend_areas() -> None:
    metrics.paddle = OldPaddle()
