"""What Paddle's LayerNorm gets wrong on a CPU, mended: the gradient of its input where its weight is frozen."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import paddle
import paddle.nn.functional as F


def mend_layer_norm() -> None:
    """Give `paddle.nn.functional.layer_norm`, and so every `nn.LayerNorm`, the right gradient of its input on a CPU.

    Paddle's is wrong unless the gradient of the weight is computed with it, which of a frozen weight it is not: there
    weight and bias are applied behind the norm. Only where a probe shows the need, and once in a process. Where the
    weight trains, `paddle.grad` of the input alone stays wrong; a backward pass is right.
    """
    own = F.layer_norm
    if not _is_wrong(own):
        return

    @functools.wraps(own)
    def layer_norm(
        x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, epsilon: float = 1e-05, name: Any = None
    ) -> Any:
        if paddle.in_dynamic_mode() and weight is not None and weight.stop_gradient and not x.stop_gradient:
            return _in_two(own, x, normalized_shape, weight, bias, epsilon)
        return own(x, normalized_shape, weight, bias, epsilon, name)

    # `nn.LayerNorm` has it under a name of its module.
    for module in [module for name, module in sys.modules.items() if name.startswith("paddle.nn.")]:
        if vars(module).get("layer_norm") is own:
            module.layer_norm = layer_norm


def _in_two(
    own: Callable[..., Any], x: Any, normalized_shape: int | Sequence[int], weight: Any, bias: Any, epsilon: float
) -> Any:
    axes = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    normed = own(x, axes, None, None, epsilon)
    normed = normed * weight.reshape(axes).astype(normed.dtype)
    return normed if bias is None else normed + bias.reshape(axes).astype(normed.dtype)


def _is_wrong(layer_norm: Callable[..., Any]) -> bool:
    """Tell whether the gradient of an input is another one than where a frozen weight is applied behind the norm."""
    if paddle.get_device() != "cpu":
        return False
    values, weight = [[1.0, 2.0, 4.0, -3.0]], paddle.to_tensor([1.0, 3.0, 9.0, 2.0])
    gradients = []
    with paddle.enable_grad():
        for normed in (layer_norm, functools.partial(_in_two, layer_norm)):
            x = paddle.to_tensor(values, stop_gradient=False)
            gradients.append(paddle.grad(normed(x, [4], weight, None, 1e-5)[0, 2], [x])[0])
    return float((gradients[0] - gradients[1]).abs().max()) > 1e-3
