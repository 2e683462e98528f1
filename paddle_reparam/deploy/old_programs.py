"""Lets Paddle 3 write and read the programs of Paddle 2, `.pdmodel`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import paddle
from paddle.base.framework import Variable
from paddle.base.layer_helper import LayerHelper

#: Whether this Paddle writes programs of its own unless it is told not to; Paddle 2 does nothing else.
HAS_NEW_PROGRAMS = hasattr(getattr(paddle, "pir_utils", None), "DygraphOldIrGuard")

_UNARY = ("abs", "cos", "exp", "floor", "log", "round", "rsqrt", "sigmoid", "sign", "sin", "sqrt", "tanh")
_BINARY = {"multiply": "elementwise_mul", "maximum": "elementwise_max", "minimum": "elementwise_min"}


@contextlib.contextmanager
def old_programs() -> Iterator[None]:
    """While the `with` block runs, let Paddle trace, write and load `.pdmodel`; on Paddle 2 it does so anyway.

    Since 3.3 Paddle's most common functions know the new programs only: here they know the old ones too, those of
    `_operators`. Others raise what Paddle raises, a TypeError that names the function.
    """
    if not HAS_NEW_PROGRAMS:
        yield
        return
    with contextlib.ExitStack() as changes:
        changes.enter_context(paddle.pir_utils.DygraphOldIrGuard())
        for name, operator in _operators().items():
            if hasattr(Variable, name):
                changes.enter_context(patch.object(Variable, name, operator))
            own = getattr(paddle._C_ops, name)
            changes.enter_context(patch.object(paddle._C_ops, name, _either(own, operator)))
        yield


def _either(own: Callable[..., Any], old: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is the second one while a program is traced."""
    return lambda *arguments, **named: (own if paddle.in_dynamic_mode() else old)(*arguments, **named)


def _append(operator: str, attributes: dict[str, Any], **inputs: Any) -> Any:
    """Append an operator to the program that is traced, and return what it puts out."""
    helper = LayerHelper(operator)
    out = helper.create_variable_for_type_inference(next(iter(inputs.values())).dtype)
    helper.append_op(type=operator, inputs=inputs, outputs={"Out": out}, attrs=attributes)
    return out


def _operators() -> dict[str, Callable[..., Any]]:
    """Return, for the names of Paddle's functions, what appends them to an old program."""

    def unary(operator: str) -> Callable[..., Any]:
        return lambda x, name=None: _append(operator, {}, X=x)

    def binary(operator: str) -> Callable[..., Any]:
        return lambda x, y, name=None: _append(operator, {"axis": -1}, X=x, Y=y)

    def gelu(x: Any, approximate: bool = False, name: str | None = None) -> Any:
        return _append("gelu", {"approximate": approximate}, X=x)

    def matmul(x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False, name: str | None = None) -> Any:
        return _append("matmul_v2", {"trans_x": transpose_x, "trans_y": transpose_y}, X=x, Y=y)

    def add_up(x: Any, axis: Any = None, dtype: Any = None, keepdim: bool = False, name: str | None = None) -> Any:
        if dtype is not None:
            raise TypeError("sum(): with a dtype it cannot be written into a .pdmodel")
        axes = [] if axis is None else [axis] if isinstance(axis, int) else list(axis)
        return _append("reduce_sum", {"dim": axes, "keep_dim": keepdim, "reduce_all": not axes}, X=x)

    return {
        **{name: unary(name) for name in _UNARY},
        **{name: binary(operator) for name, operator in _BINARY.items()},
        "gelu": gelu,
        "matmul": matmul,
        "sum": add_up,
    }
