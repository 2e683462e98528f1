"""Lets Paddle 3 write and read the programs of Paddle 2, `.pdmodel`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import paddle
from paddle.base.framework import Variable, convert_np_dtype_to_dtype_
from paddle.base.layer_helper import LayerHelper

#: Whether this Paddle writes programs of its own unless it is told not to; Paddle 2 does nothing else.
HAS_NEW_PROGRAMS = hasattr(getattr(paddle, "pir_utils", None), "DygraphOldIrGuard")

#: Function of Paddle -> its operator, where the function takes nothing but tensors.
_OF_ONE = {name: name for name in (
    "abs", "acos", "acosh", "asin", "atanh", "ceil", "cos", "cosh", "exp", "expm1", "floor", "log", "log10", "log1p",
    "log2", "rsqrt", "sigmoid", "sign", "sin", "sinh", "sqrt", "tanh",
)}  # fmt: skip
_OF_TWO = {
    "bmm": "bmm", "dot": "dot", "maximum": "elementwise_max", "minimum": "elementwise_min",
    "multiply": "elementwise_mul",
}  # fmt: skip
_TRUTH_OF_ONE = {"isfinite": "isfinite_v2", "isinf": "isinf_v2", "isnan": "isnan_v2", "logical_not": "logical_not"}
_TRUTH_OF_TWO = {name: name for name in ("greater_than", "logical_and", "logical_or", "logical_xor")}
#: Function -> operator, and the type of what it puts out where that is not the input's.
_REDUCTIONS = {
    "all": ("reduce_all", "bool"), "any": ("reduce_any", "bool"), "amax": ("reduce_amax", None),
    "amin": ("reduce_amin", None),
}  # fmt: skip


@contextlib.contextmanager
def old_programs() -> Iterator[None]:
    """While the `with` block runs, let Paddle trace, write and load `.pdmodel`; on Paddle 2 it does so anyway.

    Since 3.3 Paddle's most common functions know the new programs only: here they know the old ones too, those of
    `_operators`. Others raise what Paddle raises, a TypeError that names the function; so does index_put, which Paddle
    Inference runs wrongly in such a program.
    """
    if not HAS_NEW_PROGRAMS:
        yield
        return
    with contextlib.ExitStack() as changes:
        changes.enter_context(paddle.pir_utils.DygraphOldIrGuard())
        for name, operator in _operators().items():
            if hasattr(Variable, name):
                # What is traced is not to be rewritten once more.
                changes.enter_context(patch.object(Variable, name, paddle.jit.not_to_static(operator)))
            own = getattr(paddle._C_ops, name)
            changes.enter_context(patch.object(paddle._C_ops, name, _either(own, operator)))
        yield


def _either(own: Callable[..., Any], old: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that is the second one while a program is traced."""
    return lambda *arguments, **named: (own if paddle.in_dynamic_mode() else old)(*arguments, **named)


def _append(operator: str, attributes: dict[str, Any], dtype: Any = None, out: str = "Out", **inputs: Any) -> Any:
    """Append an operator to the program that is traced, and return what it puts out: of the first input's type, or of
    `dtype`.
    """
    helper = LayerHelper(operator)
    made = helper.create_variable_for_type_inference(dtype or next(iter(inputs.values())).dtype)
    helper.append_op(type=operator, inputs=inputs, outputs={out: made}, attrs=attributes)
    return made


def _axes(axis: Any) -> list[int]:
    """Return the axes that a reduction names; none of them stands for all."""
    return [] if axis is None else [axis] if isinstance(axis, int) else list(axis)


def _operators() -> dict[str, Callable[..., Any]]:
    """Return, for the names of Paddle's functions, what appends them to an old program."""

    def unary(operator: str, dtype: str | None = None) -> Callable[..., Any]:
        return lambda x, name=None: _append(operator, {}, dtype, X=x)

    def binary(operator: str, dtype: str | None = None) -> Callable[..., Any]:
        attributes = {"axis": -1} if operator.startswith("elementwise") else {}
        return lambda x, y, name=None: _append(operator, attributes, dtype, X=x, Y=y)

    def reduction(operator: str, dtype: str | None = None) -> Callable[..., Any]:
        def reduce(x: Any, axis: Any = None, keepdim: bool = False, name: str | None = None) -> Any:
            attributes = {"dim": _axes(axis), "keep_dim": keepdim, "reduce_all": not _axes(axis)}
            return _append(operator, attributes, dtype, X=x)

        return reduce

    def place(operator: str) -> Callable[..., Any]:
        def of(x: Any, axis: Any = None, keepdim: bool = False, dtype: Any = "int64", name: str | None = None) -> Any:
            kind = convert_np_dtype_to_dtype_(dtype)
            attributes = {"axis": axis or 0, "keepdims": keepdim, "flatten": axis is None, "dtype": int(kind)}
            return _append(operator, attributes, kind, X=x)

        return of

    def triangle(lower: bool) -> Callable[..., Any]:
        return lambda x, diagonal=0, name=None: _append("tril_triu", {"diagonal": diagonal, "lower": lower}, X=x)

    def add_up(x: Any, axis: Any = None, dtype: Any = None, keepdim: bool = False, name: str | None = None) -> Any:
        if dtype is not None:
            raise TypeError("sum(): with a dtype it cannot be written into a .pdmodel")
        # Truth values are counted.
        kind = "int64" if x.dtype == convert_np_dtype_to_dtype_("bool") else None
        whole = {} if kind is None else {"in_dtype": int(x.dtype), "out_dtype": int(convert_np_dtype_to_dtype_(kind))}
        attributes = {"dim": _axes(axis), "keep_dim": keepdim, "reduce_all": not _axes(axis), **whole}
        return _append("reduce_sum", attributes, kind, X=x)

    def diagonal(x: Any, offset: int = 0, axis1: int = 0, axis2: int = 1, name: str | None = None) -> Any:
        return _append("diagonal", {"offset": offset, "axis1": axis1, "axis2": axis2}, Input=x)

    def expand_as(x: Any, y: Any, name: str | None = None) -> Any:
        return _append("expand_as_v2", {"target_shape": list(y.shape)}, X=x, Y=y)

    def gelu(x: Any, approximate: bool = False, name: str | None = None) -> Any:
        return _append("gelu", {"approximate": approximate}, X=x)

    def grid_sample(
        x: Any, grid: Any, mode: str = "bilinear", padding_mode: str = "zeros", align_corners: bool = True,
        name: str | None = None,
    ) -> Any:  # fmt: skip
        attributes = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
        return _append("grid_sampler", attributes, out="Output", X=x, Grid=grid)

    def isclose(
        x: Any, y: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False, name: str | None = None
    ) -> Any:
        attributes = {"rtol": str(rtol), "atol": str(atol), "equal_nan": equal_nan}
        return _append("isclose", attributes, "bool", Input=x, Other=y)

    def logsumexp(x: Any, axis: Any = None, keepdim: bool = False, name: str | None = None) -> Any:
        axes = _axes(axis)
        return _append("logsumexp", {"axis": axes or [0], "keepdim": keepdim, "reduce_all": not axes}, X=x)

    def matmul(x: Any, y: Any, transpose_x: bool = False, transpose_y: bool = False, name: str | None = None) -> Any:
        return _append("matmul_v2", {"trans_x": transpose_x, "trans_y": transpose_y}, X=x, Y=y)

    def roll(x: Any, shifts: Any, axis: Any = None, name: str | None = None) -> Any:
        return _append("roll", {"shifts": _axes(shifts), "axis": _axes(axis)}, X=x)

    def round_to(x: Any, decimals: int = 0, name: str | None = None) -> Any:
        return _append("round", {"decimals": decimals}, X=x)

    def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0, name: str | None = None) -> Any:
        return _append("softplus", {"beta": float(beta), "threshold": float(threshold)}, X=x)

    return {
        **{name: unary(operator) for name, operator in _OF_ONE.items()},
        **{name: binary(operator) for name, operator in _OF_TWO.items()},
        **{name: unary(operator, "bool") for name, operator in _TRUTH_OF_ONE.items()},
        **{name: binary(operator, "bool") for name, operator in _TRUTH_OF_TWO.items()},
        **{name: reduction(*operator) for name, operator in _REDUCTIONS.items()},
        "argmax": place("arg_max"),
        "argmin": place("arg_min"),
        "diagonal": diagonal,
        "expand_as": expand_as,
        "gelu": gelu,
        "grid_sample": grid_sample,
        "isclose": isclose,
        "logsumexp": logsumexp,
        "matmul": matmul,
        "roll": roll,
        "round": round_to,
        "softplus": softplus,
        "sum": add_up,
        "tril": triangle(lower=True),
        "triu": triangle(lower=False),
    }
