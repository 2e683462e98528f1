"""What a network is exported with in place of operators that Paddle Inference runs wrongly, or that end its process.

Each is the same function. Found with Paddle 3.3.1 and oneDNN, by each operator alone and behind a convolution:

* leaky ReLU behind a convolution ends the process where the program is a `.json`, in float32 too;
* PReLU is silently wrong in bfloat16;
* adaptive pooling to a size that does not divide the map raises in bfloat16, and is silently wrong in a `.pdmodel`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import paddle
import paddle.nn.functional as F


@contextlib.contextmanager
def replaced_operators() -> Iterator[None]:
    """While the `with` block runs, let `paddle.nn.functional`, which layers call too, use operators that are right."""
    with contextlib.ExitStack() as changes:
        for name, function in _REPLACED.items():
            changes.enter_context(patch.object(F, name, function))
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


_REPLACED = {
    "leaky_relu": _leaky_relu,
    "prelu": _prelu,
    "adaptive_avg_pool2d": _adaptive(F.avg_pool2d, F.adaptive_avg_pool2d, paddle.mean),
    "adaptive_max_pool2d": _adaptive(F.max_pool2d, F.adaptive_max_pool2d, paddle.max),
}
