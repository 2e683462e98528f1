"""The gradient of a LayerNorm's input on a CPU, whose weight is frozen."""

import sys

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from helpers import relative_error

import paddle_reparam.ppcls
from paddle_reparam.arithmetic.layer_norm import mend_layer_norm

#: Paddle reads it in float32.
EPSILON = 2.0**-10


@pytest.fixture(autouse=True)
def as_paddle_has_it(monkeypatch):
    own = getattr(F.layer_norm, "__wrapped__", F.layer_norm)
    for name, module in list(sys.modules.items()):
        if name.startswith("paddle.nn.") and hasattr(module, "layer_norm"):
            monkeypatch.setattr(module, "layer_norm", own)


def values_of(*shapes):
    generator = np.random.default_rng(0)
    return [generator.standard_normal(shape) for shape in shapes]


def gradient_by_hand(x, weight, factors, epsilon):
    """d/dx of sum(factors * weight * (x - mean) / sqrt(variance + epsilon)), each row its own."""
    rows, scaled = x.reshape(len(x), -1), (weight * factors).reshape(len(x), -1)
    deviation = np.sqrt(rows.var(1, keepdims=True) + epsilon)
    normed = (rows - rows.mean(1, keepdims=True)) / deviation
    inner = scaled - scaled.mean(1, keepdims=True) - normed * (scaled * normed).mean(1, keepdims=True)
    return (inner / deviation).reshape(x.shape)


def normed_by(shape, weight, bias, frozen):
    norm = paddle.nn.LayerNorm(shape, epsilon=EPSILON, bias_attr=None if bias is not None else False)
    norm.to(dtype="float64")
    norm.weight.set_value(weight.reshape(-1))
    norm.weight.stop_gradient = "weight" in frozen
    if bias is not None:
        norm.bias.set_value(bias.reshape(-1))
        norm.bias.stop_gradient = "bias" in frozen
    return norm


@pytest.mark.parametrize("shape", [[6], [3, 2]])
@pytest.mark.parametrize("frozen", [[], ["weight"], ["bias"], ["weight", "bias"]])
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_gradient_is_right_whatever_is_frozen(shape, frozen, has_bias):
    values, factors, weight, bias = values_of([4, *shape], [4, *shape], shape, shape)
    norm = normed_by(shape, weight, bias if has_bias else None, frozen)
    before = norm(paddle.to_tensor(values)).numpy()
    mend_layer_norm()
    x = paddle.to_tensor(values, stop_gradient=False)
    y = norm(x)
    assert relative_error(y.numpy(), before) < 1e-15
    (y * paddle.to_tensor(factors)).sum().backward()
    assert relative_error(x.grad.numpy(), gradient_by_hand(values, weight, factors, EPSILON)) < 1e-12
    for name in {"weight", "bias"} & {name for name, _ in norm.named_parameters()}:
        assert (getattr(norm, name).grad is None) == (name in frozen)


def test_mended_once_and_by_what_trains():
    own = F.layer_norm
    paddle_reparam.ppcls.setup()
    paddle_reparam.ppcls.setup()
    assert F.layer_norm.__wrapped__ is own


def test_what_is_not_wrong_is_left_alone(monkeypatch):
    def right(x, normalized_shape, weight, bias, epsilon):
        return paddle.tanh(x) if weight is None else paddle.tanh(x) * weight

    monkeypatch.setattr(F, "layer_norm", right)
    mend_layer_norm()
    assert F.layer_norm is right
