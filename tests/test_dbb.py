"""DBB2D and ACB2D beyond the shared contract: above all, that branches merged in training compute the same."""

from __future__ import annotations

import copy

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from contract import Case, build, randomise
from helpers import as_array, relative_error
from paddle import nn

from paddle_reparam.errors import ReparamError, UnsupportedConv
from paddle_reparam.layers import dbb, dbb_training
from paddle_reparam.layers.acb import ACB2D
from paddle_reparam.layers.dbb import DBB2D

SAME = {"padding": 1}
#: (convolution, batch, height, width)
MERGED = [
    (Case(4, 6, 3, SAME), 8, 9, 7), (Case(4, 6, 3, {"padding": 1, "stride": 2}), 8, 9, 8),
    (Case(8, 4, (3, 5), {"padding": [0, 1, 3, 2], "stride": (2, 1)}), 3, 9, 7), (Case(6, 6, 5), 3, 8, 9),
    (Case(6, 6, 3, SAME), 3, 1, 1), (Case(6, 8, 3, {"padding": 1, "stride": 2}), 2, 2, 2),
]  # fmt: skip
#: A kernel made of two: never, always. Products of all images at once: never, always.
RULES = [(pixels, largest) for pixels in (10**9, 0) for largest in (0, 10**9)]


@pytest.fixture(autouse=True)
def on_cpu():
    device = paddle.get_device()
    paddle.set_device("cpu")
    yield
    paddle.set_device(device)


@pytest.fixture
def exact_averages(monkeypatch):
    """Paddle's average pooling divides the gradient by a float32, in float64 too: 4e-9 of it for a window of 9."""

    def forward(self, x):
        height, width = self.geometry.kernel_size
        kernel = paddle.full([x.shape[1], 1, height, width], 1 / (height * width), x.dtype)
        return F.conv2d(x, kernel, None, list(self.geometry.stride), groups=x.shape[1])

    monkeypatch.setattr(dbb.Average, "forward", forward)


def trained(layer: DBB2D, forward, x: np.ndarray) -> dict[str, np.ndarray]:
    """Return the output of a training step, its gradients, and the state after it."""
    x = paddle.to_tensor(x, stop_gradient=False)
    y = forward(x)
    (y * paddle.to_tensor(np.random.default_rng(1).standard_normal(y.shape)).astype(x.dtype)).sum().backward()
    gradients = {f"gradient of {n}": p.grad for n, p in layer.named_parameters() if not p.stop_gradient}
    found = {"output": y, "gradient of x": x.grad, **gradients, **layer.state_dict()}
    return {name: as_array(value) for name, value in found.items()}


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    largest = max(np.abs(v).max() for k, v in expected.items() if k.startswith("gradient of d"))
    for name, value in expected.items():
        # Some gradients are small or zero by nature, of what a BN behind takes away again, and hold what rounding left.
        scale = max(np.abs(value).max(), 1e-2 * largest if name.startswith("gradient") else 0.0)
        assert np.abs(actual[name] - value).max() <= tolerance * scale, name


@pytest.mark.parametrize(("pixels", "largest"), RULES)
@pytest.mark.parametrize(("case", "batch", "height", "width"), MERGED, ids=str)
def test_merged_branches_train_as_the_branches_do(
    monkeypatch, exact_averages, case, batch, height, width, pixels, largest
):
    monkeypatch.setattr(dbb_training, "PIXELS_A_CHANNEL", pixels)
    monkeypatch.setattr(dbb_training, "SMALL_MAP", largest)
    merged = randomise(build(DBB2D, case))
    merged.train()
    apart = copy.deepcopy(merged)
    x = 3 + np.random.default_rng(0).standard_normal([batch, case.inputs, height, width])
    assert dbb_training.can_merge(merged, paddle.to_tensor(x))
    expected = trained(apart, apart.forward_branches, x)
    before = {n: as_array(v) for n, v in build(DBB2D, case).state_dict().items()}
    moved = [n for n in before if n.endswith(("_mean", "_variance")) and (before[n] != expected[n]).all()]
    assert len(moved) == 12
    # A tiny map leaves a BN little to divide by, and that divides what rounding left as well.
    assert_close(trained(merged, merged, x), expected, 1e-12 if height * width > 4 else 1e-9)


def test_internal_channels_of_their_own_are_merged_too(exact_averages):
    layer = DBB2D.from_conv(Case(4, 6, 3, SAME).conv(), internal_channels=10)
    randomise(layer).train()
    assert layer.dbb_1x1_kxk.conv1.weight.shape == [10, 4, 1, 1]
    apart, x = copy.deepcopy(layer), np.random.default_rng(0).standard_normal([4, 4, 9, 8])
    assert_close(trained(layer, layer, x), trained(apart, apart.forward_branches, x), 1e-12)


def test_merged_statistics_are_right_far_from_zero():
    """Statistics of x w are those of x, with nothing lost where the mean is a thousand deviations."""
    layer = randomise(build(DBB2D, Case(8, 8, 3, {"padding": 0}), "float32"))
    layer.train()
    exact = copy.deepcopy(layer)
    exact.to(dtype="float64")
    x = (1000 + np.random.default_rng(0).standard_normal([4, 8, 12, 12])).astype("float32")
    expected = trained(exact, exact.forward_branches, x.astype("float64"))
    actual = trained(layer, layer, x)
    for name in ("dbb_1x1_kxk.bn1.bn._variance", "dbb_avg.bn.bn._variance"):
        assert relative_error(actual[name], expected[name]) < 1e-4


def test_an_input_and_weights_that_are_frozen_get_no_gradient(exact_averages):
    layer = randomise(build(DBB2D, Case(4, 6, 3, SAME)))
    layer.train()
    apart = copy.deepcopy(layer)
    frozen = ["dbb_origin.conv.weight", "dbb_avg.conv.weight", "dbb_1x1_kxk.conv2.weight"]
    x = paddle.randn([4, 4, 9, 8], dtype="float64")
    for each in (layer, apart):
        named = dict(each.named_parameters())
        for name in frozen:
            named[name].stop_gradient = True
    layer(x).pow(3).sum().backward()
    apart.forward_branches(x).pow(3).sum().backward()
    for (name, p), other in zip(layer.named_parameters(), apart.parameters()):
        assert (p.grad is None) == p.stop_gradient == (other.grad is None), name
        if not p.stop_gradient:
            assert relative_error(p.grad, other.grad) < 1e-9, name
    with paddle.no_grad():
        assert relative_error(layer(x), apart.forward_branches(x)) < 1e-12


def test_what_cannot_be_merged_is_computed_as_published():
    def layer_of(case=Case(4, 6, 3, SAME), dtype="float64"):  # noqa: B008
        layer = build(DBB2D, case, dtype)
        layer.train()
        return layer, paddle.randn([2, case.inputs, 6, 6], dtype="float64").astype(dtype)

    assert dbb_training.can_merge(*layer_of())
    for case in (
        Case(4, 6, 3, {"padding": 1, "groups": 2}), Case(6, 6, 3, {"padding": 1, "groups": 6}),
        Case(4, 6, 3, {"padding": 2, "dilation": 2}), Case(4, 6, 3, {"padding": 1, "padding_mode": "reflect"}),
    ):  # fmt: skip
        assert not dbb_training.can_merge(*layer_of(case)), case
    layer, x = layer_of()
    assert not dbb_training.can_merge(layer, x.astype("float32"))
    layer.dbb_avg.bn.bn.eval()
    assert not dbb_training.can_merge(layer, x)
    layer, x = layer_of()
    layer.dbb_origin.bn._use_global_stats = True
    assert not dbb_training.can_merge(layer, x)
    layer, x = layer_of()
    layer.dbb_1x1_kxk.bn2 = nn.SyncBatchNorm(6)
    assert not dbb_training.can_merge(layer, x)
    layer, x = layer_of()
    seen = []
    hook = layer.dbb_1x1.conv.register_forward_post_hook(lambda *given: seen.append(1))
    layer(x)
    assert seen
    hook.remove()
    assert dbb_training.can_merge(layer, x)
    layer.eval()
    assert not dbb_training.can_merge(layer, x)


def test_one_value_a_channel_is_left_to_paddle():
    """Its BN then returns what it gets, and a variance of zero would make other numbers of it."""
    layer = randomise(DBB2D.from_conv(Case(1, 2, 3, {"padding": 3}).conv()))
    layer.train()
    apart, x = copy.deepcopy(layer), np.full([1, 1, 1, 1], 0.7)
    assert relative_error(layer(paddle.to_tensor(x)), apart.forward_branches(paddle.to_tensor(x))) < 1e-12


def test_a_traced_training_step_pads_as_an_untraced_one():
    layer = randomise(build(DBB2D, Case(4, 6, 3, SAME), "float32"))
    layer.train()
    apart, x = copy.deepcopy(layer), paddle.randn([3, 4, 6, 5])
    spec = [paddle.static.InputSpec([None, 4, None, None], "float32")]
    traced = paddle.jit.to_static(copy.deepcopy(layer), input_spec=spec, full_graph=True)
    assert relative_error(traced(x), apart.forward_branches(x)) < 1e-5
    for name, value in traced.state_dict().items():
        assert relative_error(value, apart.state_dict()[name]) < 1e-5, name


def test_convolutions_and_averages_as_products(monkeypatch):
    monkeypatch.setattr(dbb_training, "SMALL_MAP", 10**9)
    generator = np.random.default_rng(0)
    for size, stride, padding, shape in (
        ((3, 3), (1, 1), (1, 1, 1, 1), (3, 4, 1, 1)), ((3, 5), (2, 1), (0, 1, 3, 2), (2, 3, 5, 4)),
        ((3, 3), (2, 2), (1, 1, 1, 1), (2, 3, 2, 2)), ((1, 1), (2, 2), (0, 0, 0, 0), (2, 3, 4, 5)),
        ((3, 3), (1, 1), (4, 2, 4, 2), (2, 3, 2, 2)), ((5, 5), (1, 1), (2, 2, 2, 2), (2, 3, 2, 1)),
    ):  # fmt: skip
        x = paddle.to_tensor(generator.standard_normal(shape))
        weight = paddle.to_tensor(generator.standard_normal([4, shape[1], *size]))
        top, bottom, left, right = padding
        padded = F.pad(x, [left, right, top, bottom])
        expected = F.conv2d(padded, weight, None, list(stride))
        assert relative_error(dbb_training.convolve(x, weight, stride, padding), expected) < 1e-12
        mean = F.avg_pool2d(padded, list(size), list(stride), exclusive=False)
        assert relative_error(dbb_training.averages(x, size, stride, padding), mean) < 1e-12


REFUSED = {
    "1x1": Case(4, 6, 1), "an even kernel": Case(4, 6, 4, {"padding": 1}),
    "SAME": Case(4, 6, 3, {"padding": "SAME", "stride": 2}),
}  # fmt: skip


@pytest.mark.parametrize("cls", [ACB2D, DBB2D])
def test_what_has_no_middle_is_refused(cls):
    for reason, case in {**REFUSED, **({"1x": Case(4, 6, (1, 3))} if cls is ACB2D else {})}.items():
        with pytest.raises(UnsupportedConv, match=cls.__name__) as error:
            cls.from_conv(case.conv())
        assert reason.split()[-1] in str(error.value)


def test_wrong_options_are_refused():
    conv = Case(4, 6, 3, {"padding": 1, "groups": 2}).conv()
    with pytest.raises(UnsupportedConv, match="groups do not divide internal_channels=5"):
        DBB2D.from_conv(conv, internal_channels=5)
    for options in ({"init": "reduced"}, {"internal_channels": 0}):
        with pytest.raises(ReparamError, match="DBB2D has no"):
            DBB2D.from_conv(conv, **options)
    with pytest.raises(ReparamError, match="ACB2D has no init='single'"):
        ACB2D.from_conv(conv, init="single")


def test_how_weights_start():
    conv = Case(4, 6, 3, SAME).conv()
    thirds = ACB2D.from_conv(conv, init="reduced")
    for bn in (thirds.square_bn, thirds.ver_bn, thirds.hor_bn):
        assert relative_error(bn.weight, np.full(6, 1 / 3)) < 1e-12
    layer = DBB2D.from_conv(conv)
    assert not np.any(layer.dbb_1x1_kxk.idconv1.weight.numpy())
    bounds = {"dbb_1x1.conv": 0.5, "dbb_1x1_kxk.conv2": 1 / 6, "dbb_avg.conv": 0.5}
    named = dict(layer.named_parameters())
    for name, bound in bounds.items():
        assert 0.8 * bound < np.abs(named[f"{name}.weight"].numpy()).max() <= bound
    assert "idconv1" not in DBB2D.from_conv(Case(6, 6, 3, {"groups": 6}).conv()).dbb_1x1_kxk._sub_layers
