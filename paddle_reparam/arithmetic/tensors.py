"""Tensors to float64 arrays and back, the only two places where a dtype changes; what a dtype is called; and sides."""

from __future__ import annotations

import numpy as np
import paddle


def to_float64(tensor: paddle.Tensor | None) -> np.ndarray | None:
    """Return a tensor of any float type as a float64 array; None stays None."""
    return None if tensor is None else tensor.detach().astype("float64").numpy()


def assign(parameter: paddle.Tensor, array: np.ndarray) -> None:
    """Store a float64 array in a parameter or buffer of the same shape: the one cast, to the dtype that it has."""
    parameter.set_value(paddle.to_tensor(np.asarray(array, dtype=np.float64)).astype(parameter.dtype))


def type_name(value: paddle.Tensor | np.ndarray) -> str:
    """Return the name of a dtype as Paddle takes it, such as "float32"; an array holds bfloat16 as uint16."""
    name = str(value.dtype).rsplit(".", 1)[-1]
    return "bfloat16" if name == "uint16" else name


# Not converted when a network is traced: whether Paddle converts what reads a shape depends on whose layer calls it.
@paddle.jit.not_to_static
def sides(x: paddle.Tensor) -> list[int | paddle.Tensor]:
    """Return [H, W] of maps `[N, C, H, W]`: numbers, or a tensor for a side that a traced network leaves open."""
    return [x.shape[axis] if x.shape[axis] >= 0 else paddle.shape(x)[axis] for axis in (2, 3)]
