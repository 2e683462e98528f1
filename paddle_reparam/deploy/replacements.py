"""What a network is exported with in place of operators that Paddle Inference runs wrongly, or that end its process.

Each is the same function. Found with Paddle 3.3.1 and oneDNN, by each operator alone and behind a convolution:

* leaky ReLU behind a convolution ends the process where the program is a `.json`, in float32 too;
* PReLU is silently wrong in bfloat16;
* adaptive pooling to a size that does not divide the map raises in bfloat16, and is silently wrong in a `.pdmodel`;
* interpolation raises where the program is a `.json`, in float32 too, and takes other pixels in a `.pdmodel` where the
  factor is not whole. It is computed in float64, as pooling of maps of every size is: a `.pdmodel` with them can then
  not be run in bfloat16;
* a reshape behind a transpose, to maps for a convolution or pooling, raises in bfloat16 where the program is a `.json`;
* a matrix product that reads a convolution's or pooling's maps, as they are or behind what works number by number, is
  silently wrong, in float32 too.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any
from unittest.mock import patch

import paddle
import paddle.nn.functional as F
from paddle import _C_ops
from paddle.base.framework import Variable

from ..arithmetic.tensors import type_name


@contextlib.contextmanager
def replaced_operators() -> Iterator[None]:
    """While the `with` block runs, let others stand for functions of Paddle, in whatever module holds these."""
    originals = {id(getattr(F, name)): function for name, function in _REPLACED.items()}
    originals[id(paddle.matmul)] = _of_maps(paddle.matmul)
    with contextlib.ExitStack() as changes:
        for module in [each for each in sys.modules.values() if isinstance(each, ModuleType)]:
            for name in [name for name, value in vars(module).items() if id(value) in originals]:
                changes.enter_context(patch.object(module, name, originals[id(vars(module)[name])]))
        for name, function in {each: _behind_a_transpose(getattr(_C_ops, each)) for each in _RESHAPES}.items():
            changes.enter_context(patch.object(_C_ops, name, function))
        for traced, name in [(each, name) for each in _TRACED for name in ("matmul", "__matmul__")]:
            changes.enter_context(patch.object(traced, name, _of_maps(getattr(traced, name))))
        yield


# None of these is converted when a network is traced: what depends on a size is decided once.


@paddle.jit.not_to_static
def _leaky_relu(x: Any, negative_slope: float = 0.01, name: str | None = None) -> Any:
    return F.relu(x) - negative_slope * F.relu(-x)


@paddle.jit.not_to_static
def _prelu(x: Any, weight: Any, data_format: str = "NCHW", name: str | None = None) -> Any:
    channels = x.ndim - 1 if data_format[-1] == "C" else 1
    slopes = (
        weight.reshape([-1 if axis == channels else 1 for axis in range(x.ndim)])
        if math.prod(weight.shape) > 1
        else weight
    )
    return F.relu(x) - slopes * F.relu(-x)


def _adaptive(pool: Callable[..., Any], original: Callable[..., Any], reduce: Callable[..., Any]) -> Callable[..., Any]:
    @paddle.jit.not_to_static
    def adaptive(x: Any, output_size: Any, *others: Any, **named: Any) -> Any:
        sizes = list(x.shape[2:])
        wanted = list(output_size) if isinstance(output_size, (list, tuple)) else [output_size] * 2
        wanted = [size if out is None else int(out) for size, out in zip(sizes, wanted)]
        plain = not any(others) and all(value in (None, False, "NCHW") for value in named.values())
        if plain and min(sizes) < 1 and wanted != [1, 1]:
            return _in_float64(original)(x, output_size)
        if not plain or min(sizes) < 1 or all(size % out == 0 for size, out in zip(sizes, wanted)):
            return original(x, output_size, *others, **named)
        windows = [_windows(size, out) for size, out in zip(sizes, wanted)]
        lengths = [{stop - start for start, stop in each} for each in windows]
        strides = [{b[0] - a[0] for a, b in zip(each, each[1:])} or {1} for each in windows]
        if all(len(each) == 1 for each in (*lengths, *strides)):
            return pool(x, [each.pop() for each in lengths], [each.pop() for each in strides])
        for axis, each in zip((2, 3), windows):
            parts = [paddle.slice(x, [axis], [start], [stop]) for start, stop in each]
            x = paddle.concat([reduce(part, axis, keepdim=True) for part in parts], axis)
        return x

    return adaptive


def _windows(size: int, out: int) -> Sequence[tuple[int, int]]:
    """Return the first pixel of each window of adaptive pooling along an axis, and the one behind its last."""
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def _in_float64(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of maps that oneDNN, which has no float64, leaves to Paddle's own operator."""
    # 19 maps of 64x64 pixels to 512x512 take 34 ms by oneDNN, where that is right, and 56 so, in a .pdmodel; sums of
    # chosen pixels took 160.

    @paddle.jit.not_to_static
    def computed(x: Any, *others: Any, **named: Any) -> Any:
        dtype = type_name(x)
        if dtype != "float32":
            return original(x, *others, **named)
        return original(x.astype("float64"), *others, **named).astype(dtype)

    return computed


def _behind_a_transpose(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a reshape or unsqueeze that gives maps for a convolution or pooling, and is none of a transpose itself."""
    flat = _C_ops.reshape

    def reshape(x: Any, sizes: Any, *others: Any) -> Any:
        made_by = getattr(x, "get_defining_op", lambda: None)()
        if made_by is not None and made_by.name() == "pd_op.transpose" and (original is not flat or len(sizes) == 4):
            # Paddle Inference makes one operator of the transpose and what follows it: then of this one.
            x = flat(x, [0, -1] if original is flat else [*[0] * (len(x.shape) - 1), -1])
        return original(x, sizes, *others)

    return reshape


def _of_maps(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a matrix product that reads maps in the order of their axes, and not in oneDNN's."""

    @paddle.jit.not_to_static
    def matmul(x: Any, y: Any, *others: Any, **named: Any) -> Any:
        return original(*(_in_order(each) if _are_maps(each) else each for each in (x, y)), *others, **named)

    return matmul


def _in_order(maps: Any) -> Any:
    *first, height, width = maps.shape
    if height < 0 and width < 0:
        return maps  # an export for all sizes is compared with the network all the same
    return maps.flatten(2).reshape([*(0 for _ in first), height, width])


def _are_maps(value: Any) -> bool:
    """Tell whether a value of a program is a convolution's or pooling's, or made of one number by number."""
    open_ends, seen = [value], set()
    while open_ends:
        value = open_ends.pop()
        if not isinstance(value, _TRACED) or len(value.shape) != 4:
            continue
        operator, kind, inputs = _made_by(value)
        if operator in seen:
            continue
        seen.add(operator)
        if "conv" in kind or "pool" in kind:
            return True
        open_ends += [each for each in inputs if list(each.shape) == list(value.shape)]
    return False


def _made_by(value: Any) -> tuple[int | None, str, list[Any]]:
    """Return the number and the name of the operator that puts a value out, and what it reads."""
    if not isinstance(value, Variable):
        made_by = value.get_defining_op()
        return (None, "", []) if made_by is None else (made_by.id(), made_by.name(), made_by.operands_source())
    made_by = next((each for each in value.block.ops if value.name in each.output_arg_names), None)
    if made_by is None:
        return None, "", []
    return made_by.idx, made_by.type, [value.block._var_recursive(name) for name in made_by.input_arg_names]


#: What stands for a tensor while a network is traced, in a `.json` and in a `.pdmodel`.
_TRACED = (paddle.pir.Value, Variable)

_RESHAPES = ("reshape", "unsqueeze")

_REPLACED = {
    "leaky_relu": _leaky_relu,
    "prelu": _prelu,
    **{name: _in_float64(F.interpolate) for name in ("interpolate", "upsample")},
    "adaptive_avg_pool2d": _adaptive(F.avg_pool2d, F.adaptive_avg_pool2d, paddle.mean),
    "adaptive_max_pool2d": _adaptive(F.max_pool2d, F.adaptive_max_pool2d, paddle.max),
}
