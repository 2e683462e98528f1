"""Paddle as it was, for frameworks that were written for it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import paddle

#: What Paddle 2 computed in the type of the left side, where the two sides were not both floats.
_OPERATORS = ("__add__", "__sub__", "__mul__", "__truediv__")


class OldPaddle:
    """Paddle as it was before 2.5: what is one number has a dimension."""

    def __getattr__(self, name: str) -> Any:
        return getattr(paddle, name)

    @staticmethod
    def concat(tensors: Sequence[paddle.Tensor], axis: int = 0) -> paddle.Tensor:
        # In a program that is traced it may be one array of tensors, which has no end.
        if isinstance(tensors, (list, tuple)):
            tensors = [_with_a_dimension(tensor) for tensor in tensors]
        return paddle.concat(tensors, axis)

    @staticmethod
    def to_tensor(*args: Any, **kwargs: Any) -> paddle.Tensor:
        return _with_a_dimension(paddle.to_tensor(*args, **kwargs))


def _with_a_dimension(tensor: paddle.Tensor) -> paddle.Tensor:
    return tensor.reshape([1]) if tensor.ndim == 0 else tensor


@contextlib.contextmanager
def left_side_decides() -> Iterator[None]:
    """While the `with` block runs, an operator gives its right side the type of the left, but between floats."""

    def like_the_left(own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def operator(left: paddle.Tensor, right: Any) -> Any:
            if isinstance(right, paddle.Tensor) and not (left.is_floating_point() and right.is_floating_point()):
                right = right.astype(left.dtype)
            return own(left, right)

        return operator

    with contextlib.ExitStack() as changes:
        for name in _OPERATORS:
            changes.enter_context(patch.object(paddle.Tensor, name, like_the_left(getattr(paddle.Tensor, name))))
        yield


def computed_as_before(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function in which the left side decides, as in `left_side_decides`."""

    @functools.wraps(own)
    def function(*arguments: Any, **options: Any) -> Any:
        with left_side_decides():
            return own(*arguments, **options)

    return function
