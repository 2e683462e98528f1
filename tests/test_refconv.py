"""RefConv2D against loops in float64; its options, what it refuses, and what an optimizer sees of it."""

import copy

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from helpers import as_array, relative_error
from paddle import nn
from paddle.static import InputSpec

from paddle_reparam.arithmetic.geometry import ConvGeometry
from paddle_reparam.errors import ReparamError, UnsupportedConv
from paddle_reparam.layers import refconv
from paddle_reparam.layers.refconv import RefConv2D, refocused

# in, out, kernel, groups, map_k -> shape of the refocusing weight
SHAPES = {
    "depthwise": (8, 8, (3, 3), 8, 3, [8, 8, 3, 3]),
    "depthwise 5x5": (6, 6, (5, 5), 6, 5, [6, 6, 5, 5]),
    "multiplier 3": (4, 12, (3, 3), 4, 3, [12, 4, 3, 3]),
    "group-wise": (12, 24, (3, 3), 4, 3, [72, 4, 3, 3]),
    "pairs": (4, 6, (3, 3), 2, 3, [12, 2, 3, 3]),
    "dense 3x3": (3, 16, (3, 3), 1, 3, [48, 1, 3, 3]),
    "dense 3x3, map 1": (3, 4, (3, 3), 1, 1, [12, 1, 1, 1]),
    "dense 7x7": (3, 4, (7, 7), 1, 5, [12, 1, 5, 5]),
    "dense 4x4": (3, 4, (4, 4), 1, 3, [12, 1, 3, 3]),
    "dense 3x5": (3, 4, (3, 5), 1, 3, [12, 1, 3, 3]),
    "depthwise 6x4": (4, 4, (6, 4), 4, 3, [4, 4, 3, 3]),
    "dense 1x3": (3, 4, (1, 3), 1, 1, [12, 1, 1, 1]),
}
every_shape = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)


def conv_of(case, **options):
    inputs, outputs, kernel, groups, _, _ = case
    conv = nn.Conv2D(inputs, outputs, kernel, padding=[k // 2 for k in kernel], groups=groups, **options)
    conv.to(dtype="float64")
    return conv


def layer_of(case, **options):
    return RefConv2D.from_conv(conv_of(case), map_k=case[4], **options)


def refocused_by_loops(base, refocus):
    """The definition: plane n sees the `mixed` planes of its group, through windows that run over the edge."""
    out_channels, group_in, height, width = base.shape
    planes, mixed, map_k, _ = refocus.shape
    flat, change = base.reshape(planes, height, width), np.zeros((planes, height, width))
    for n in range(planes):
        for m in range(mixed):
            source = flat[n // mixed * mixed + m]
            for y, x, u, v in np.ndindex(height, width, map_k, map_k):
                row, column = y + u - map_k // 2, x + v - map_k // 2
                if 0 <= row < height and 0 <= column < width:
                    change[n, y, x] += source[row, column] * refocus[n, m, u, v]
    return base + change.reshape(out_channels, group_in, height, width)


def refocused_by_convolution(base, refocus):
    """The definition, as Paddle's grouped convolution."""
    planes, mixed, map_k, _ = refocus.shape
    image = base.reshape([1, planes, *base.shape[2:]])
    return base + F.conv2d(image, refocus, padding=map_k // 2, groups=planes // mixed).reshape(base.shape)


# --- The transform -----------------------------------------------------------------------------------------------


@every_shape
def test_shapes_are_those_of_the_paper(case):
    layer = layer_of(case)
    state = {name: list(value.shape) for name, value in layer.state_dict().items()}
    inputs, outputs, kernel, groups, _, expected = case
    assert state == {
        "weight": [outputs, inputs // groups, *kernel],
        "convmap.weight": expected,
        "bias": [outputs],
    }


@every_shape
def test_the_transform_is_the_definition(case):
    layer = layer_of(case)
    base, refocus = as_array(layer.weight), as_array(layer.convmap.weight)
    expected = refocused_by_loops(base, refocus)
    assert relative_error(refocused(layer.weight, layer.convmap.weight), expected) < 1e-12
    assert relative_error(refocused(layer.weight, layer.convmap.weight, identity=False), expected - base) < 1e-12
    layer.eval()
    assert relative_error(layer.reparameterize().weight, expected) < 1e-12


@every_shape
@pytest.mark.parametrize("train_base", [False, True])
def test_gradients_are_those_of_the_grouped_convolution(case, train_base):
    base, refocus, cotangent = (
        paddle.randn(shape, dtype="float64")
        for shape in [conv_of(case).weight.shape, case[5], conv_of(case).weight.shape]
    )
    base.stop_gradient, refocus.stop_gradient = not train_base, False
    gradients = []
    for form in (refocused, refocused_by_convolution):
        form(base, refocus).backward(cotangent)
        gradients.append([as_array(t.grad) for t in (refocus, base) if not t.stop_gradient])
        refocus.clear_gradient(False)
        base.clear_gradient(False)
    assert len(gradients[0]) == 1 + train_base
    for actual, expected in zip(*gradients):
        assert relative_error(actual, expected) < 1e-12


@every_shape
@pytest.mark.parametrize("wanted", [0, 1])
def test_each_gradient_can_be_had_alone(case, wanted):
    tensors = [paddle.randn(shape, dtype="float64") for shape in (conv_of(case).weight.shape, case[5])]
    for tensor in tensors:
        tensor.stop_gradient = False
    [expected] = paddle.grad(refocused_by_convolution(*tensors).square().sum(), [tensors[wanted]])
    [actual] = paddle.grad(refocused(*tensors).square().sum(), [tensors[wanted]])
    assert relative_error(actual, expected) < 1e-12
    tensors[1 - wanted].stop_gradient = True
    refocused(*tensors).square().sum().backward()
    assert relative_error(tensors[wanted].grad, expected) < 1e-12
    assert tensors[1 - wanted].grad is None


def test_the_pieces_of_a_large_dense_kernel_fit_together(monkeypatch):
    monkeypatch.setattr(refconv, "_PLANES_AT_ONCE", 5)
    layer = layer_of((3, 4, (3, 3), 1, 3, None))  # 12 planes: 5, 5 and 2
    expected = refocused_by_loops(as_array(layer.weight), as_array(layer.convmap.weight))
    kernel = refocused(layer.weight, layer.convmap.weight)
    assert relative_error(kernel, expected) < 1e-12
    cotangent = paddle.randn(kernel.shape, dtype="float64")
    kernel.backward(cotangent)
    actual = as_array(layer.convmap.weight.grad)
    layer.convmap.weight.clear_gradient(False)
    refocused_by_convolution(layer.weight, layer.convmap.weight).backward(cotangent)
    assert relative_error(actual, layer.convmap.weight.grad) < 1e-12


def test_float32_is_as_exact_as_the_definition():
    base, refocus = np.random.randn(64, 16, 3, 3), np.random.randn(1024, 1, 3, 3)
    exact = refocused(paddle.to_tensor(base), paddle.to_tensor(refocus))
    single = refocused(paddle.to_tensor(base.astype("float32")), paddle.to_tensor(refocus.astype("float32")))
    assert relative_error(single, exact) < 1e-6


# --- How it starts -----------------------------------------------------------------------------------------------


@every_shape
def test_zero_keeps_the_function_and_random_does_not(case):
    conv = conv_of(case)
    x = paddle.randn([2, case[0], 9, 8], dtype="float64")
    np.testing.assert_array_equal(RefConv2D.from_conv(conv, map_k=case[4], init="zero")(x).numpy(), conv(x).numpy())
    for init in ("xavier", "torch_default"):
        assert relative_error(RefConv2D.from_conv(conv, map_k=case[4], init=init)(x), conv(x)) > 1e-3


@pytest.mark.parametrize(
    ("init", "groups", "bound"),
    # By hand: fan-in and fan-out are groups * 9; sqrt(6 / (2 * fan)) and 1 / sqrt(fan).
    [("xavier", 96, 0.058926), ("torch_default", 96, 0.034021), ("xavier", 1, 0.577350), ("torch_default", 1, 1 / 3)],
)
def test_the_bounds_of_the_initial_values(init, groups, bound):
    values = as_array(RefConv2D(96, 96, 3, groups=groups, init=init).convmap.weight)
    assert 0.99 * bound < np.abs(values).max() <= bound * (1 + 1e-5)
    assert abs(values.mean()) < 0.02 * bound
    assert abs(values.std() / bound - 3**-0.5) < 0.01


def test_a_random_base_is_the_layers_own():
    conv = conv_of(SHAPES["dense 3x3"])
    conv.bias.set_value(paddle.randn([16], dtype="float64"))
    layer = RefConv2D.from_conv(conv, base="random")
    assert relative_error(layer.weight, conv.weight) > 0.1
    np.testing.assert_array_equal(layer.bias.numpy(), conv.bias.numpy())
    assert abs(as_array(RefConv2D(64, 64, 3, base="random").weight).std() / (2 / (64 * 9)) ** 0.5 - 1) < 0.02
    assert "weight" in dict(layer.named_buffers())


def test_a_plain_networks_weights_load_with_only_the_refocusing_weight_missing():
    plain = nn.Sequential(nn.Conv2D(3, 4, 3, padding=1), nn.BatchNorm2D(4))
    network = nn.Sequential(RefConv2D(3, 4, 3, init="zero"), nn.BatchNorm2D(4))
    missing, unexpected = network.set_state_dict(plain.state_dict())
    assert (missing, unexpected) == (["0.convmap.weight"], [])
    x = paddle.randn([2, 3, 5, 5])
    np.testing.assert_array_equal(network(x).numpy(), plain(x).numpy())


def test_the_constructor_reads_what_conv2d_reads():
    layer = RefConv2D(4, 6, (3, 5), stride=2, dilation=(2, 1), groups=2, bias_attr=False, base="random")
    assert layer.geometry == ConvGeometry(
        4, 6, (3, 5), stride=(2, 2), padding=(2, 2, 2, 2), dilation=(2, 1), groups=2, bias=False
    )
    assert layer.bias is None
    layer = RefConv2D(4, 6, 3, padding=[0, 1, 2, 1], data_format="NHWC", base="random")
    assert list(layer(paddle.randn([2, 7, 8, 4])).shape) == [2, 6, 9, 6]
    assert RefConv2D(4, 6, 3, padding=1, padding_mode="reflect").geometry.padding_mode == "reflect"


# --- What learns -------------------------------------------------------------------------------------------------


def steps(layer, count=2):
    """Train a little; return the names of what changed and the names that the optimizer holds."""
    optimizer = paddle.optimizer.Momentum(0.1, parameters=layer.parameters())
    before = {name: as_array(value).copy() for name, value in layer.state_dict().items()}
    for _ in range(count):
        (layer(paddle.randn([2, layer.geometry.in_channels, 6, 6])) ** 2).sum().backward()
        optimizer.step()
        optimizer.clear_grad()
    changed = {name for name, value in layer.state_dict().items() if (as_array(value) != before[name]).any()}
    states = {name for name in optimizer.state_dict() if "velocity" in name}
    return changed, states


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("base", ["pretrained", "random"])
@pytest.mark.parametrize("identity", [True, False])
def test_a_frozen_base_has_no_gradient_and_no_optimizer_state(groups, base, identity):
    layer = RefConv2D.from_conv(nn.Conv2D(4, 4, 3, groups=groups), base=base, identity=identity)
    assert {name for name, _ in layer.named_parameters()} == {"convmap.weight", "bias"}
    changed, states = steps(layer)
    assert changed == {"convmap.weight", "bias"}
    assert len(states) == 2
    assert layer.weight.grad is None


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("base", ["pretrained", "random"])
@pytest.mark.parametrize("identity", [True, False])
def test_a_trained_base_learns(groups, base, identity):
    layer = RefConv2D.from_conv(nn.Conv2D(4, 4, 3, groups=groups), base=base, train_base=True, identity=identity)
    changed, states = steps(layer)
    assert changed == {"weight", "convmap.weight", "bias"}
    assert len(states) == 3


def test_without_identity_the_kernel_is_the_change_alone():
    conv = conv_of(SHAPES["dense 3x3"], bias_attr=False)
    layer = RefConv2D.from_conv(conv, identity=False)
    with_identity = RefConv2D.from_conv(conv)
    with_identity.set_state_dict(layer.state_dict())
    x = paddle.randn([2, 3, 6, 6], dtype="float64")
    assert relative_error(layer(x), with_identity(x) - conv(x)) < 1e-12
    layer.eval()
    assert relative_error(layer.reparameterize()(x), layer(x)) < 1e-12


# --- What is refused ---------------------------------------------------------------------------------------------

ALL_ZEROS = r"base weight of this RefConv2D \(3->4, 3x3\) is all zeros.*load.*from_conv.*base='random'"


@pytest.mark.parametrize("train_base", [False, True])
def test_a_base_of_zeros_is_refused_in_all_three_places(train_base):
    conv = nn.Conv2D(3, 4, 3, weight_attr=nn.initializer.Constant(0.0))
    with pytest.raises(ReparamError, match=ALL_ZEROS):
        RefConv2D.from_conv(conv, train_base=train_base)
    fresh = RefConv2D(3, 4, 3, train_base=train_base)
    for layer in (fresh, copy.deepcopy(fresh)):
        for _ in range(2):
            with pytest.raises(ReparamError, match=ALL_ZEROS):
                layer(paddle.randn([1, 3, 5, 5]))
    fresh.eval()
    for method in (fresh.reparameterize, fresh.re_parameterize, fresh.rep):
        with pytest.raises(ReparamError, match=ALL_ZEROS):
            method()
    RefConv2D.from_conv(conv, base="random")
    fresh.set_state_dict(RefConv2D.from_conv(nn.Conv2D(3, 4, 3), train_base=train_base).state_dict())
    x = paddle.randn([1, 3, 5, 5])
    assert relative_error(fresh.reparameterize()(x), fresh(x)) < 1e-5


def test_the_base_is_looked_at_once(monkeypatch):
    looks = []
    monkeypatch.setattr(RefConv2D, "_refuse_zero_base", lambda layer: looks.append(layer))
    layer = RefConv2D(3, 4, 3, base="random")
    for _ in range(3):
        layer(paddle.randn([1, 3, 5, 5]))
    assert len(looks) == 1


def test_a_convolution_without_a_pattern_is_refused():
    with pytest.raises(UnsupportedConv, match="1x1 convolution has no spatial pattern to refocus"):
        RefConv2D.from_conv(nn.Conv2D(4, 4, 1))
    with pytest.raises(UnsupportedConv, match="its kernel 3x5 is smaller than map_k=5; choose a smaller map_k"):
        RefConv2D.from_conv(nn.Conv2D(4, 4, (3, 5)), map_k=5)
    with pytest.raises(UnsupportedConv, match="its kernel 1x3 is smaller than map_k=3"):
        RefConv2D.from_conv(nn.Conv2D(4, 4, (1, 3)))


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [("map_k", value, r"1, 3, 5, \.\.\. \(odd\)") for value in (2, 0, -1, "3", 3.0, True, None)]
    + [("init", value, "xavier, zero, torch_default") for value in ("kaiming", None)]
    + [("base", value, "pretrained, random") for value in ("imagenet", True)]
    + [("train_base", value, "True, False") for value in ("yes", 1)]
    + [("identity", value, "True, False") for value in ("no", 0)],
)
def test_a_wrong_option_is_answered_with_the_allowed_ones(option, value, allowed):
    conv = nn.Conv2D(4, 4, 3)
    for build in (RefConv2D.from_conv, lambda conv, **options: RefConv2D(4, 4, 3, **options)):
        with pytest.raises(ReparamError, match=f"^RefConv2D has no {option}={value!r}; choose one of {allowed}$") as e:
            build(conv, **{option: value})
        assert type(e.value) is ReparamError


# --- Tracing -----------------------------------------------------------------------------------------------------


def small_network():
    layers = [RefConv2D.from_conv(nn.Conv2D(*c, 3, padding=1, groups=g)) for *c, g in [(3, 4, 1), (4, 4, 4), (4, 8, 2)]]
    return nn.Sequential(*layers)


def test_a_saved_layer_runs_with_any_batch_and_size(tmp_path):
    network = small_network()
    network.eval()
    paddle.jit.save(network, str(tmp_path / "net"), input_spec=[InputSpec([None, 3, None, None], "float32")])
    loaded = paddle.jit.load(str(tmp_path / "net"))
    for shape in ([1, 3, 8, 8], [3, 3, 7, 9]):
        x = paddle.randn(shape)
        # The first eager pass of this network comes after it was traced.
        assert relative_error(loaded(x), network(x)) < 1e-5


@pytest.mark.parametrize("full_graph", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_traced_layer_trains_as_it_does_without(groups, full_graph):
    network = RefConv2D.from_conv(nn.Conv2D(4, 4, 3, padding=1, groups=groups))
    traced = paddle.jit.to_static(copy.deepcopy(network), full_graph=full_graph)
    x = paddle.randn([2, 4, 6, 6])
    for each in (network, traced):
        (each(x) ** 2).sum().backward()
    assert relative_error(traced(x), network(x)) < 1e-5
    pairs = list(zip(traced.parameters(), network.parameters()))
    assert len(pairs) == 2
    for actual, expected in pairs:
        assert relative_error(actual.grad, expected.grad) < 1e-5


def test_tracing_does_not_ask_for_weights():
    layer = RefConv2D(3, 4, 3)
    traced = paddle.jit.to_static(layer, input_spec=[InputSpec([None, 3, 6, 6], "float32")], full_graph=True)
    traced.set_state_dict(RefConv2D.from_conv(nn.Conv2D(3, 4, 3)).state_dict())
    assert list(traced(paddle.randn([2, 3, 6, 6])).shape) == [2, 4, 6, 6]
