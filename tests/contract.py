"""What every registered layer must keep, as functions that raise AssertionError: (layer class, convolution, ...)."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
import pytest
from helpers import BATCH_NORMS, as_array, randomise_batch_norms, relative_error
from paddle import nn

from paddle_reparam.errors import ReparamError, UnsupportedConv
from paddle_reparam.layers.base import InferenceForm, ReparamLayer

TOLERANCES = {"float64": 1e-10, "float32": 1e-5}
SIZES = [(11, 9), (8, 10)]


@dataclass(frozen=True)
class Case:
    """A convolution that a layer is to stand in for."""

    inputs: int
    outputs: int
    kernel: Any
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"{self.inputs}->{self.outputs}", f"k={self.kernel}".replace(" ", "")]
        return "-".join(words + [f"{k}={v}".replace(" ", "") for k, v in self.options.items()])

    def conv(self, dtype: str = "float64") -> nn.Conv2D:
        """Return the convolution with random weights and, where it has one, a random bias."""
        conv = nn.Conv2D(self.inputs, self.outputs, self.kernel, **self.options)
        if conv.bias is not None:
            conv.bias.set_value(paddle.randn([self.outputs]))
        conv.to(dtype=dtype)
        return conv

    def inputs_of_all_sizes(self, dtype: str, batch: int = 2) -> list[paddle.Tensor]:
        """Return inputs of odd and even sizes."""
        channels_last = self.options.get("data_format") == "NHWC"
        shapes = [[batch, *s, self.inputs] if channels_last else [batch, self.inputs, *s] for s in SIZES]
        return [paddle.randn(shape, dtype="float64").astype(dtype) for shape in shapes]


def _cases() -> list[Case]:
    none = {"bias_attr": False}
    cases = [
        # Kernel sizes, "same" padding
        Case(4, 6, 1), Case(4, 6, 3, {"padding": 1}), Case(4, 6, 5, {"padding": 2}), Case(8, 8, 7, {"padding": 3}),
        Case(4, 6, (3, 5), {"padding": (1, 2)}), Case(4, 6, (1, 3), {"padding": (0, 1)}),
        Case(4, 6, 4, {"padding": [1, 2, 1, 2]}), Case(4, 6, 3, {"padding": 1, **none}),
        Case(8, 8, 3, {"padding": 1, **none}), Case(16, 8, 3, {"padding": 1}), Case(3, 8, 3, {"padding": 1}),
        # Strides
        Case(4, 6, 1, {"stride": 2}), Case(4, 6, 3, {"padding": 1, "stride": 2}),
        Case(8, 16, 3, {"padding": 1, "stride": 2, **none}), Case(4, 6, 3, {"padding": 1, "stride": (2, 1)}),
        Case(4, 6, 5, {"padding": 2, "stride": 2}), Case(4, 6, 4, {"padding": 1, "stride": 2}),
        # Groups: two, depthwise, depthwise with a multiplier
        Case(4, 6, 1, {"groups": 2}), Case(4, 6, 3, {"padding": 1, "groups": 2}),
        Case(8, 8, 3, {"padding": 1, "groups": 4, "stride": 2, **none}),
        Case(6, 6, 3, {"padding": 1, "groups": 6}), Case(6, 6, 5, {"padding": 2, "groups": 6, "stride": 2, **none}),
        Case(6, 6, 7, {"padding": 3, "groups": 6}), Case(6, 6, (1, 3), {"padding": (0, 1), "groups": 6}),
        Case(8, 8, 9, {"padding": 4, "groups": 8, **none}), Case(6, 6, 13, {"padding": 6, "groups": 6}),
        Case(4, 8, 3, {"padding": 1, "groups": 4}), Case(4, 8, 5, {"padding": 2, "groups": 4, "stride": (2, 1)}),
        # Dilation
        Case(4, 6, 3, {"padding": 2, "dilation": 2}), Case(6, 6, 3, {"padding": 2, "dilation": 2, "groups": 6}),
        Case(4, 6, 3, {"padding": 2, "dilation": 2, "stride": 2}), Case(4, 6, 3, {"padding": 1, "dilation": (2, 1)}),
        # Other paddings
        Case(4, 6, 3), Case(6, 6, 5, {"groups": 6}), Case(4, 6, 3, {"padding": [0, 1, 2, 1]}),
        Case(4, 6, 3, {"padding": 3, "stride": 2}), Case(4, 6, 3, {"padding": "SAME"}),
        Case(4, 6, 3, {"padding": "SAME", "stride": 2}), Case(6, 6, 4, {"padding": "SAME", "groups": 6}),
        Case(4, 6, 3, {"padding": 1, "padding_mode": "reflect"}),
        Case(6, 6, 5, {"padding": 2, "padding_mode": "replicate", "groups": 6}),
        Case(4, 6, 3, {"padding": 1, "padding_mode": "circular", "stride": 2}),
        # Channels last
        Case(4, 6, 3, {"padding": 1, "data_format": "NHWC"}),
        Case(6, 6, 3, {"padding": 1, "groups": 6, "stride": 2, "data_format": "NHWC", **none}),
    ]  # fmt: skip
    return cases


CASES = _cases()


# --- Layers to test ----------------------------------------------------------------------------------------------


def build(cls: type[ReparamLayer], case: Case, dtype: str = "float64") -> ReparamLayer | None:
    """Return the layer that stands in for a convolution, or None where it says in a sentence that it cannot."""
    try:
        # Not cls.build: a layer with a frozen base weight does nothing until it has taken one.
        layer = cls.from_conv(case.conv(dtype))
    except UnsupportedConv as refusal:
        text = str(refusal)
        assert len(text.split()) >= 4, f"{cls.__name__} refuses {case} without a sentence: {text!r}"
        return None
    dtypes = {str(p.dtype) for p in layer.parameters()}
    assert dtypes == {f"paddle.{dtype}"}, f"{cls.__name__} for a {dtype} convolution has parameters of {dtypes}"
    return layer


def randomise(layer: nn.Layer, seed: int = 0) -> nn.Layer:
    """Move every parameter and every batch norm away from its initial value."""
    generator = np.random.default_rng(seed)
    for sublayer in layer.sublayers(include_self=True):
        for parameter in [] if isinstance(sublayer, BATCH_NORMS) else sublayer._parameters.values():
            if parameter is not None:
                scale = 0.5 if parameter.ndim < 2 else 1.0 / np.sqrt(np.prod(parameter.shape[1:]))
                value = scale * generator.standard_normal(parameter.shape)
                parameter.set_value(paddle.to_tensor(value).astype(parameter.dtype))
    randomise_batch_norms(layer, seed)
    return layer


def ready(cls: type[ReparamLayer], case: Case, dtype: str = "float64") -> ReparamLayer | None:
    """Return a randomised layer in eval mode, or None where the convolution is refused."""
    layer = build(cls, case, dtype)
    if layer is None:
        return None
    randomise(layer).eval()
    return layer


def state_of(layer: nn.Layer) -> dict[str, np.ndarray]:
    """Return a copy of the layer's state."""
    return {name: as_array(value).copy() for name, value in layer.state_dict().items()}


def assert_same_state(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], when: str) -> None:
    assert actual.keys() == expected.keys(), f"{when}: keys {sorted(actual.keys() ^ expected.keys())} differ"
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=f"{when}: {name}")


def assert_same_output(actual: paddle.Tensor, expected: paddle.Tensor, tolerance: float, case: Case) -> None:
    """Compare two maps, and their border pixels on their own: there a wrong padding cannot hide."""
    assert actual.dtype == expected.dtype, f"{case}: {actual.dtype}, expected {expected.dtype}"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{case}: relative error {error:.1e}"
    axes = (1, 2) if case.options.get("data_format") == "NHWC" else (2, 3)
    actual, expected = as_array(actual), as_array(expected)
    inner = [slice(None)] * 4
    inner[axes[0]] = inner[axes[1]] = slice(1, -1)
    border = np.ones(expected.shape, bool)
    border[tuple(inner)] = False
    error = relative_error(actual[border], expected[border])
    assert error <= tolerance, f"{case}: relative error {error:.1e} on the border"


def outputs(layer: nn.Layer, inputs: list[paddle.Tensor]) -> list[paddle.Tensor]:
    with paddle.no_grad():
        return [layer(x) for x in inputs]


# --- The checks --------------------------------------------------------------------------------------------------


def check_supports_some(cls: type[ReparamLayer], at_least: int = 3) -> None:
    """A layer that refuses everything keeps every other promise. What it prints says what it stands in for."""
    supported = [layer for case in CASES if (layer := build(cls, case)) is not None]
    assert len(supported) >= at_least, f"{cls.__name__} supports only {len(supported)} of {len(CASES)} convolutions"
    # A layer without layers of its own ends there.
    starts = [tuple(f"{cls.__name__}({layer.extra_repr()}{end}" for end in "\n)") for layer in supported]
    assert all(repr(layer).startswith(start) for layer, start in zip(supported, starts))
    assert all(layer.extra_repr() for layer in supported)


def check_fused_is_the_same_function(cls: type[ReparamLayer], case: Case) -> None:
    """layer.reparameterize()(x) == layer(x), and the layer stays as it was."""
    for dtype, tolerance in TOLERANCES.items():
        layer = ready(cls, case, dtype)
        if layer is None:
            return
        inputs = case.inputs_of_all_sizes(dtype)
        expected = outputs(layer, inputs)
        before = state_of(layer)
        fused = layer.reparameterize()
        assert_same_state(state_of(layer), before, f"{case}: fusing changed the layer")
        assert not layer.is_repped, f"{case}: reparameterize() fused in place"
        assert isinstance(fused, cls.fused_type), f"{case}: {type(fused).__name__}, not {cls.fused_type.__name__}"
        assert not any(part.training for part in fused.sublayers(include_self=True)), f"{case}: not in eval mode"
        assert not any(isinstance(part, BATCH_NORMS) for part in fused.sublayers()), f"{case}: a BN is left"
        for x, y, z in zip(inputs, expected, outputs(fused, inputs)):
            assert list(y.shape) == list(case.conv(dtype)(x).shape), f"{case}: {y.shape}, not the convolution's"
            assert_same_output(z, y, tolerance, case)
        alone = outputs(fused, inputs[:1])[0]
        randomise(layer, seed=5)
        np.testing.assert_array_equal(outputs(fused, inputs[:1])[0].numpy(), alone.numpy(), f"{case}: shared weights")


def check_fused_follows_a_cast(cls: type[ReparamLayer], case: Case) -> None:
    """Fusing gives the dtype that the layer has now, not the one that it was built with, and does not pass by it."""
    layer = ready(cls, case, "float32")
    if layer is None:
        return
    layer.to(dtype="float64")
    fused = layer.reparameterize()
    dtypes = {str(p.dtype) for p in fused.parameters()}
    assert dtypes == {"paddle.float64"}, f"{case}: built in float32, cast to float64, fused to {dtypes}"
    inputs = case.inputs_of_all_sizes("float64")
    for x, y in zip(inputs, outputs(fused, inputs)):
        assert_same_output(y, layer(x), TOLERANCES["float64"], case)


def check_fuses_in_place(cls: type[ReparamLayer], case: Case) -> None:
    """PaddleClas' protocol gives the same as `reparameterize`, once and for all."""
    layer = ready(cls, case)
    if layer is None:
        return
    inputs = case.inputs_of_all_sizes("float64")
    fused = layer.reparameterize()
    expected = [y.numpy() for y in outputs(fused, inputs)]
    for method in ("re_parameterize", "rep"):
        in_place = copy.deepcopy(layer)
        assert not in_place.is_repped
        getattr(in_place, method)()
        assert in_place.is_repped
        once = state_of(in_place)
        wanted = {f"fused.{name}": value for name, value in state_of(fused).items()}
        assert_same_state(once, wanted, f"{case}: {method}() left or lost state")
        first = in_place.fused
        getattr(in_place, method)()
        assert in_place.fused is first, f"{case}: a second {method}() did something"
        assert_same_state(state_of(in_place), once, f"{case}: a second {method}()")
        in_place.train()
        again = in_place.reparameterize()
        assert not again.training, f"{case}: fused twice, not in eval mode"
        assert again is not in_place.fused, f"{case}: fused twice, the layer's own part was handed out"
        for candidate in (in_place, again, copy.deepcopy(in_place)):
            for y, z in zip(outputs(candidate, inputs), expected):
                np.testing.assert_array_equal(y.numpy(), z, err_msg=f"{case}: {method}()")


def check_absorbs_an_affine(cls: type[ReparamLayer], case: Case) -> None:
    """An inference form takes the affines of two BNs that follow, negative, zero and one after the other, or says why
    not and stays as it is."""
    layer = ready(cls, case)
    if layer is None or not issubclass(cls.fused_type, InferenceForm):
        return
    inputs = case.inputs_of_all_sizes("float64")
    fused = layer.reparameterize()
    scale, shift = np.linspace(-1.5, 1.0, case.outputs), np.linspace(0.5, 2.0, case.outputs)
    scale[1] = 0.0
    axes = [1, 1, 1, -1] if case.options.get("data_format") == "NHWC" else [1, -1, 1, 1]
    factor, offset = (paddle.to_tensor(v.reshape(axes)) for v in (scale, shift))
    expected = outputs(fused, inputs)
    for _ in range(2):
        refusal = None
        try:
            fused.absorb_affine(scale, shift)
            expected = [y * factor + offset for y in expected]
        except UnsupportedConv as error:
            refusal = str(error)
        assert refusal is None or len(refusal.split()) >= 4, f"{case}: refused without a sentence: {refusal!r}"
        for y, z in zip(expected, outputs(fused, inputs)):
            assert_same_output(z, y, TOLERANCES["float64"], case)
    assert not fused.training


def check_copies_are_equal(cls: type[ReparamLayer], case: Case) -> None:
    """A deep copy, and a new layer that takes the state dict, compute the same."""
    layer = ready(cls, case)
    if layer is None:
        return
    inputs = case.inputs_of_all_sizes("float64")
    for mode in (layer.train, layer.eval):
        mode()
        layer(inputs[0])
        tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        kept = [name for name, tensor in tensors.items() if not tensor.is_leaf]
        assert not kept, f"{case}: a forward pass leaves tensors of its graph on the layer: {kept}"
    duplicate = copy.deepcopy(layer)
    other = randomise(build(cls, case), seed=7)
    other.eval()
    other(inputs[0])  # nor may what was computed before outlive the new weights
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        missing, unexpected = other.set_state_dict({k: v.numpy() for k, v in layer.state_dict().items()})
    assert not missing, f"{case}: the state dict lacks {missing}"
    assert not unexpected, f"{case}: the state dict has {unexpected} too many"
    for x in inputs:
        np.testing.assert_array_equal(duplicate(x).numpy(), layer(x).numpy(), err_msg=f"{case}: deepcopy")
        np.testing.assert_array_equal(other(x).numpy(), layer(x).numpy(), err_msg=f"{case}: state dict")
    before = state_of(layer)
    randomise(duplicate, seed=9)
    assert_same_state(state_of(layer), before, f"{case}: a deep copy shares weights")


def check_every_parameter_learns(cls: type[ReparamLayer], case: Case) -> None:
    """Every trainable parameter gets a gradient in every forward pass (DataParallel), freshly built and later."""
    for fresh in (True, False):
        layer = build(cls, case)
        if layer is None:
            return
        if not fresh:
            randomise(layer)
        layer.train()
        x = case.inputs_of_all_sizes("float64")[0]
        x.stop_gradient = False
        y = layer(x)
        (y * paddle.randn(y.shape, dtype=y.dtype)).sum().backward()
        assert x.grad is not None, f"{case}: no gradient for the input"
        assert np.abs(x.grad.numpy()).max() > 0, f"{case}: the gradient of the input is zero"
        trainable = {name: p for name, p in layer.named_parameters() if not p.stop_gradient}
        without = [name for name, p in trainable.items() if p.grad is None]
        assert not without, f"{case}: no gradient for {without}"
        largest = {name: np.abs(p.grad.numpy()).max() for name, p in trainable.items()}
        assert np.isfinite(list(largest.values())).all(), f"{case}: {largest}"
        # Some are zero for a reason: a bias in front of a BN, a branch behind a weight that starts at zero.
        learning = [name for name, size in largest.items() if size > 1e-9 * max(largest.values())]
        assert 2 * len(learning) > len(trainable), f"{case}: only {learning} of {sorted(trainable)} learn"


def check_training_mode_is_refused(cls: type[ReparamLayer], case: Case) -> None:
    """In training mode the output depends on the batch: fusing is refused, with the way to go on."""
    layer = ready(cls, case)
    if layer is None:
        return
    layer.train()
    for method in (layer.reparameterize, layer.re_parameterize, layer.rep):
        with pytest.raises(ReparamError, match=rf"{cls.__name__} is in training mode.*eval\(\)"):
            method()
    assert layer.training
    assert not layer.is_repped


def check_starts_from_a_conv(cls: type[ReparamLayer], case: Case) -> None:
    """Under `keeps_function_with` the layer computes what the convolution did, in its own copy of the weights."""
    if build(cls, case) is None:
        return
    conv = case.conv()
    inputs = case.inputs_of_all_sizes("float64")
    expected, before = outputs(conv, inputs), state_of(conv)
    conv.eval()
    assert not cls.from_conv(conv).training, f"{case}: the convolution was in eval mode, the layer is not"
    conv.train()
    plain = cls.from_conv(conv)
    assert plain.training, f"{case}: the convolution was in training mode, the layer is not"
    plain.eval()
    assert [list(y.shape) for y in outputs(plain, inputs)] == [list(y.shape) for y in expected]
    if cls.keeps_function_with is not None:
        layer = cls.from_conv(conv, **cls.keeps_function_with)
        layer.eval()
        fused = layer.reparameterize()
        for x, y in zip(inputs, expected):
            assert_same_output(layer(x), y, TOLERANCES["float64"], case)
            assert_same_output(fused(x), y, TOLERANCES["float64"], case)
        randomise(layer, seed=3)
    if cls.keeps_function_with != {}:
        error = relative_error(outputs(plain, inputs)[0], expected[0])
        assert error > 1e-6, f"{case}: without options from_conv kept the function, which `keeps_function_with` denies"
    assert_same_state(state_of(conv), before, f"{case}: from_conv changed the convolution or shares its weights")


def has_for_mean(array: np.ndarray, source: np.ndarray) -> bool:
    """Tell whether an array is what a convolution had, or several kernels that lie around it."""
    if array.size % source.size:
        return False
    mean = array.reshape(-1, *source.shape).mean(0)
    return float(np.abs(mean - source).max()) <= 1e-12 * float(np.abs(source).max())


def check_is_optimized_as_the_convolution_was(cls: type[ReparamLayer], case: Case) -> None:
    """What was frozen stays so: by stop_gradient what holds the old weight or bias, by a learning-rate multiplier of
    zero everything; regularizer and clipping hold for what is new as well."""
    plain = build(cls, case)
    if plain is None:
        return
    trains = {name: not p.stop_gradient for name, p in plain.named_parameters()}
    conv = case.conv()
    sources = {"weight": conv.weight} if conv.bias is None else {"weight": conv.weight, "bias": conv.bias}
    for rate, source in zip((0.25, 0.5), sources.values()):
        source.optimize_attr = {"learning_rate": rate}
        source.regularizer = paddle.regularizer.L2Decay(rate)
        source.need_clip = False
    layer = cls.from_conv(conv)
    # By value: a layer that takes a bias gives it to what starts as the bias was, the rest belongs to the weight.
    holds = {
        which: [n for n, t in layer.state_dict().items() if has_for_mean(as_array(t), as_array(source))]
        for which, source in sources.items()
    }
    if cls.keeps_function_with is not None:
        assert all(holds.values()), f"{case}: nothing holds what the convolution had: {holds}"
    for name, parameter in layer.named_parameters():
        source = conv.bias if name in holds.get("bias", ()) else conv.weight
        assert parameter.optimize_attr == source.optimize_attr, f"{case}: the multiplier of {name}"
        assert parameter.regularizer._coeff == source.regularizer._coeff, f"{case}: the regularizer of {name}"
        assert parameter.need_clip is False, f"{case}: {name} is clipped"
        assert parameter.stop_gradient is not trains[name], f"{case}: {name} was frozen or thawed"
    parameter.optimize_attr["learning_rate"] = 7.0
    assert conv.weight.optimize_attr == {"learning_rate": 0.25}, f"{case}: the multiplier is shared"

    for which, source in sources.items():
        for each in sources.values():
            each.stop_gradient = each is source
        layer = cls.from_conv(conv)
        for name, tensor in {**dict(layer.named_buffers()), **dict(layer.named_parameters())}.items():
            frozen = name in holds[which] or not trains.get(name, False)
            assert tensor.stop_gradient == frozen, f"{case}: {which} frozen, {name}: {tensor.stop_gradient}"

    for source in sources.values():
        source.stop_gradient, source.optimize_attr = False, {"learning_rate": 0.0}
    layer = cls.from_conv(conv)
    # Running statistics, which move in any case, are no trainable parameters.
    trainable = {name: p for name, p in layer.named_parameters() if not p.stop_gradient}
    before = {name: as_array(p).copy() for name, p in trainable.items()}
    optimizer = paddle.optimizer.SGD(1.0, parameters=layer.parameters(), weight_decay=0.1)
    layer(case.inputs_of_all_sizes("float64")[0]).pow(2).sum().backward()
    optimizer.step()
    for name, parameter in trainable.items():
        np.testing.assert_array_equal(as_array(parameter), before[name], err_msg=f"{case}: {name} moved")


class Unconverted(nn.Layer):
    """A network whose code Paddle does not convert when it traces it, nor what it calls: as one of paddle.vision."""

    def __init__(self, layer: nn.Layer) -> None:
        super().__init__()
        self.layer = layer

    @paddle.jit.not_to_static
    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.layer(x)


def check_traces(cls: type[ReparamLayer], case: Case) -> None:
    """to_static with an open batch, height and width, in the train form and fused, which others' networks hold too."""
    layer = ready(cls, case, "float32")
    assert layer is not None, f"{cls.__name__} does not support {case}"
    spec = [paddle.static.InputSpec([None, case.inputs, None, None], "float32")]
    fused = layer.reparameterize()
    for form in (layer, fused, Unconverted(fused)):
        traced = paddle.jit.to_static(copy.deepcopy(form), input_spec=spec, full_graph=True)
        for batch in (1, 3):
            for x in case.inputs_of_all_sizes("float32", batch):
                with paddle.no_grad():
                    assert_same_output(traced(x), form(x), TOLERANCES["float32"], case)


CHECKS = [
    check_fused_is_the_same_function,
    check_fused_follows_a_cast,
    check_fuses_in_place,
    check_absorbs_an_affine,
    check_copies_are_equal,
    check_every_parameter_learns,
    check_training_mode_is_refused,
    check_starts_from_a_conv,
    check_is_optimized_as_the_convolution_was,
]
