"""What an older PaddleSeg trips over with a current Paddle, each mended only where it is needed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import paddle
from paddleseg.cvlibs import manager
from paddleseg.models.losses import CrossEntropyLoss
from paddleseg.utils import metrics

#: The module; `paddleseg.core` has the function of the same name in its place.
train = importlib.import_module("paddleseg.core.train")

#: What Paddle 2 computed in the type of the left side, where only one side held floats.
_OPERATORS = ("__add__", "__sub__", "__mul__", "__truediv__")


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


@contextlib.contextmanager
def _left_side_decides() -> Iterator[None]:
    """While the `with` block runs, an operator between floats and others gives the right side the type of the left."""

    def like_the_left(own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def operator(left: paddle.Tensor, right: Any) -> Any:
            if isinstance(right, paddle.Tensor) and right.is_floating_point() != left.is_floating_point():
                right = right.astype(left.dtype)
            return own(left, right)

        return operator

    with contextlib.ExitStack() as changes:
        for name in _OPERATORS:
            changes.enter_context(patch.object(paddle.Tensor, name, like_the_left(getattr(paddle.Tensor, name))))
        yield


def _mend_losses() -> None:
    def mended(own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def forward(*arguments: Any, **options: Any) -> Any:
            with _left_side_decides():
                return own(*arguments, **options)

        return forward

    for loss in manager.LOSSES.components_dict.values():
        if "forward" in vars(loss):
            loss.forward = mended(loss.forward)


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


class _OldPaddle:
    """Paddle as it was before 2.5: what is one number has a dimension."""

    def __getattr__(self, name: str) -> Any:
        return getattr(paddle, name)

    @staticmethod
    def concat(tensors: Any, axis: int = 0) -> paddle.Tensor:
        return paddle.concat([tensor.reshape([1]) if tensor.ndim == 0 else tensor for tensor in tensors], axis)


def _mend_areas() -> None:
    metrics.paddle = _OldPaddle()
