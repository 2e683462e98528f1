"""Verification finds what differs, says where, and refuses to compare what proves nothing."""

import copy

import numpy as np
import paddle
import pytest
from helpers import as_array, randomise_batch_norms
from paddle import nn
from paddle.vision.models import mobilenet_v2

from paddle_reparam.deploy.export import export_inference
from paddle_reparam.errors import NothingProven, ReparamError
from paddle_reparam.surgery.flops import measure
from paddle_reparam.surgery.rewrite import reparameterize
from paddle_reparam.surgery.verify import compare_outputs, relative_error, settle_batch_norms, verify

SPEC = [[None, 3, 32, 32]]


@pytest.fixture(scope="module")
def network():
    paddle.seed(0)
    model = mobilenet_v2(scale=0.25, num_classes=10)
    randomise_batch_norms(model, 0)
    model.eval()
    return model


def test_a_fused_network_is_the_same_function(network):
    fused, report = reparameterize(network, fold_bn=True, input_spec=SPEC)
    assert len(report.touched) == 52
    assert report.skipped == []
    result = verify(network, fused, SPEC)
    assert result.passed
    assert 0 < result.relative_error < 1e-5
    assert result.top1_agreement == 1.0
    assert result.layers > 100
    assert "yes" in str(result)
    result.raise_if_failed("anything")


@pytest.mark.parametrize(
    ("conv", "bn"), [("features.0.0", "features.0.1"), ("features.5.conv.1.0", "features.5.conv.1.1")]
)
def test_a_seeded_fault_is_found_where_it_is(network, conv, bn):
    fused, _ = reparameterize(network, fold_bn=True, input_spec=SPEC)
    layer = dict(fused.named_sublayers())[conv]
    layer.weight.set_value(layer.weight * 1.01)
    result = verify(network, fused, SPEC)
    assert not result.passed
    # The conv's BN was folded into it, so the first place where both must agree is the BN's.
    assert result.first_difference == bn
    with pytest.raises(ReparamError, match=f"the export is not the same function: .*first at layer '{bn}'"):
        result.raise_if_failed("the export")


def test_a_fault_in_the_last_layer_and_in_what_is_returned(network):
    fused, _ = reparameterize(network, fold_bn=True, input_spec=SPEC)
    fused.classifier[1].bias.set_value(fused.classifier[1].bias + 1.0)
    result = verify(network, fused, SPEC)
    assert result.first_difference == "classifier.1"
    assert "NO" in str(result)
    with pytest.raises(ReparamError, match="the first network puts out 1 tensors, the second 2"):
        verify(network, lambda x: [network(x), network(x)], SPEC, must_depend=False)


def test_rounding_that_the_network_makes_grow_is_allowed_and_a_fault_is_not():
    class Cancelling(nn.Layer):
        """Two paths whose outputs cancel but for 1/1000 of them: rounding shows a thousand times as large."""

        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv2D(3, 4, 3), nn.Conv2D(3, 4, 3)
            self.other.set_state_dict(self.conv.state_dict())
            self.other.weight.set_value(self.conv.weight * 0.999)

        def forward(self, x):
            return self.conv(x) - self.other(x)

    model, rounded, broken = (Cancelling() for _ in range(3))
    for network in (model, rounded, broken):
        network.set_state_dict(model.state_dict())
        network.eval()
    rounded.conv.weight.set_value(rounded.conv.weight * (1 + 1e-6))
    broken.conv.weight.set_value(broken.conv.weight * (1 + 1e-5))
    report = verify(model, rounded, SPEC)
    assert report.passed
    assert report.relative_error > 1e-4
    assert report.tolerance > report.relative_error
    assert not verify(model, broken, SPEC).passed


def test_rounding_inside_that_no_change_of_the_input_shows_is_allowed():
    class Cancelling(nn.Layer):
        """What two layers make of a constant cancels but for 1/1000 of it; the input is added behind that."""

        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(4, 5), nn.Linear(4, 5)
            self.other.set_state_dict(self.one.state_dict())
            self.other.weight.set_value(self.one.weight * 0.999)
            self.register_buffer("constant", paddle.ones([1, 4]))

        def forward(self, x):
            return self.one(self.constant) - self.other(self.constant) + 1e-3 * x.mean([1, 2, 3]).unsqueeze(1)

    model, rounded, broken = (Cancelling() for _ in range(3))
    for network, change in ((rounded, 1 + 5e-7), (broken, 1 + 2e-5), (model, 1)):
        network.set_state_dict(model.state_dict())
        network.one.weight.set_value(model.one.weight * change)
        network.eval()
    report = verify(model, rounded, SPEC)
    assert report.relative_error > 1e-4
    assert report.passed
    assert not verify(model, broken, SPEC).passed


def test_what_is_not_finite_is_named(network):
    def build():
        model = nn.Sequential(nn.Conv2D(3, 4, 3), nn.Conv2D(4, 4, 3), nn.ReLU())
        model.eval()
        return model

    broken, overflowing, good = build(), build(), build()
    kernel = as_array(broken[0].weight).astype("float32")
    kernel[0, 0, 0, 0] = float("nan")
    broken[0].weight.set_value(kernel)
    overflowing[1].weight.set_value(overflowing[1].weight * 1e38)
    for pair, name in (((broken, good), "first"), ((good, broken), "second")):
        with pytest.raises(ReparamError, match=f"the {name} network .*: 0.weight holds 1 of 108 numbers that are not"):
            verify(*pair, SPEC)
    for pair, name in (((overflowing, good), "first"), ((good, overflowing), "second")):
        with pytest.raises(ReparamError, match=f"the {name} network's output is not finite .* starts at layer '1'"):
            verify(*pair, SPEC)
    with pytest.raises(ReparamError, match="the second network's output is not finite"):
        verify(good, lambda x: good(x) / 0.0, SPEC, must_depend=False)


@pytest.mark.parametrize(
    "options", [{"batches": 0}, {"batch_size": 0}, {"tolerance": 0.0}, {"tolerance": float("nan")}, {"batches": -1}]
)
def test_a_comparison_of_nothing_proves_nothing(network, options):
    with pytest.raises(NothingProven, match="compare nothing"):
        verify(network, network, SPEC, **options)


def test_outputs_without_numbers_prove_nothing():
    class Nothing(nn.Layer):
        def forward(self, x):
            return []

    class Empty(nn.Layer):
        def forward(self, x):
            return x[:, :0]

    for model in (Nothing(), Empty()):
        model.eval()
        with pytest.raises(NothingProven, match="no numbers"):
            verify(model, model, SPEC)


@pytest.mark.parametrize(
    "spec",
    [[None, 3, 8, 8], "image", None, [], {}, [[]], [[None, 3, 0, 8]], [[None, 3, -2, 8]], [[None, 3, 8.0, 8]],
     [[None, 3, 10**9, 10**9]], [[None, 3, None, 8]], 3, [None], {"image": 3}, [[3, 32, 32]], [[1, 3, 32, 32]],
     [[None, 4, 32, 32]], [[None, 3, 32, 32]] * 2, [[None, 3]]],
)  # fmt: skip
def test_shapes_that_are_none_are_one_sentence(network, spec):
    calls = [
        lambda: verify(network, network, spec),
        lambda: measure(network, spec),
        lambda: reparameterize(network, fold_bn=True, input_spec="of ImageNet" if spec is None else spec),
        lambda: settle_batch_norms(copy.deepcopy(network), spec),
    ]
    for call in calls:
        with pytest.raises(ReparamError, match="input") as caught:
            call()
        assert "\n" not in str(caught.value)


class AddsInPlace(nn.Layer):
    """As ReXNet of PaddleClas does: a part of what a layer put out is changed afterwards."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.pass_on = nn.Conv2D(4, 8, 1), nn.BatchNorm2D(8), nn.Identity()

    def forward(self, x):
        y = self.bn(self.conv(x))
        y[:, 0:4] += x
        return self.pass_on(y)


def halved(net, x):
    x.scale_(0.5)
    return net.bn(net.conv(x))


def a_view_changed_before(net, x):
    y = net.conv(x)
    y[:, :4].add_(x)
    return net.bn(y)


def a_view_changed_afterwards(net, x):
    y = net.bn(net.conv(x))
    y[:, :4].add_(x)
    return y


def rectified_in_place(net, x):
    return nn.functional.relu_(net.bn(net.conv(x)))


def input_changed_after_it_was_read(net, x):
    y = net.conv(x)
    z = net.bn(y)
    y.add_(paddle.ones_like(y))
    return z


def detached(net, x):
    y = net.conv(x)
    return net.bn(y) + y.detach()


def compared(net, x):
    y = net.conv(x)
    return net.bn(y) * (y > 0).astype("float32")


def read_without_gradients(net, x):
    with paddle.no_grad():
        y = net.conv(x)
        return net.bn(y) + paddle.tanh(y)


def of_no_gradient(net, x):
    y = net.conv(x)
    z = net.bn(net.mix(y))
    y.add_(paddle.ones_like(y))
    return z + y


def in_numpy(net, x):
    y = net.conv(x)
    return net.bn(y) + paddle.to_tensor(y.numpy())


@pytest.mark.parametrize(
    ("function", "folds"),
    [
        (halved, True),
        (a_view_changed_before, False),
        (a_view_changed_afterwards, True),
        (rectified_in_place, True),
        (input_changed_after_it_was_read, False),
        (detached, False),
        (compared, False),
        (read_without_gradients, False),
        (of_no_gradient, False),
        (in_numpy, False),
    ],
)
def test_a_bn_is_folded_where_nobody_else_reads_what_it_reads(function, folds):
    """Whatever is changed in place, and however the other reader reads it."""

    class Net(nn.Layer):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.mix = nn.Conv2D(4, 8, 1), nn.BatchNorm2D(8), nn.Conv2D(8, 8, 1)
            self.last, self.last_bn = nn.Conv2D(8, 4, 3), nn.BatchNorm2D(4)

        def forward(self, x):
            return self.last_bn(self.last(nn.functional.softplus(function(self, x))))

    model = Net()
    randomise_batch_norms(model)
    model.eval()
    spec = [[None, 4, 8, 8]]
    fused, report = reparameterize(model, fold_bn=True, input_spec=spec)
    assert ("bn" in dict(report.touched)) is folds
    assert "last_bn" in dict(report.touched)
    assert verify(model, fused, spec).passed


def test_what_is_added_in_place_is_no_difference():
    model = AddsInPlace()
    randomise_batch_norms(model)
    model.eval()
    spec = [[None, 4, 8, 8]]
    fused, report = reparameterize(model, fold_bn=True, input_spec=spec)
    assert report.touched == [("bn", "folded into conv")]
    assert verify(model, fused, spec).passed
    fused.conv.bias.set_value(fused.conv.bias + 1.0)
    assert verify(model, fused, spec).first_difference == "bn"


class Keeps(nn.Layer):
    """Keeps its input as an attribute, as the networks of PaddleDetection do."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4)
        self.seen = []

    def forward(self, inputs):
        self.inputs = inputs["image"] if isinstance(inputs, dict) else inputs
        self.seen.append(self.inputs)
        return self.bn(self.conv(self.inputs))


def test_networks_are_afterwards_as_they_were():
    model = Keeps()
    model.eval()
    before, state = attributes(model), paddle.get_rng_state()
    draws = paddle.rand([4]).tolist(), np.random.get_state()[1].tolist()
    paddle.set_rng_state(state)
    fused, _ = reparameterize(model, fold_bn=True, input_spec=SPEC)
    assert attributes(model) == before
    of_fused = attributes(fused)
    verify(model, fused, SPEC)
    measure(model, SPEC)
    assert attributes(model) == before
    assert attributes(fused) == of_fused
    assert (paddle.rand([4]).tolist(), np.random.get_state()[1].tolist()) == draws
    model.inputs = None


def attributes(model):
    return {
        path: {
            name: list(value) if isinstance(value, (dict, set, list)) else value for name, value in vars(layer).items()
        }
        for path, layer in model.named_sublayers(include_self=True)
    }


def test_networks_that_take_a_dict_of_tensors():
    model = Keeps()
    randomise_batch_norms(model)
    model.eval()
    spec = {"image": [None, 3, 16, 16], "scale": [None, 2]}
    fused, report = reparameterize(model, fold_bn=True, input_spec=spec)
    assert report.touched == [("bn", "folded into conv")]
    result = verify(model, fused, spec)
    assert result.passed
    assert result.layers == 2
    assert measure(fused, spec).macs_per_image == 3 * 4 * 9 * 14 * 14


def test_a_layer_inside_in_training_mode_is_refused(network, tmp_path):
    fused, _ = reparameterize(network, fold_bn=True, input_spec=SPEC)
    other = copy.deepcopy(network)
    other.features[0][1].train()
    before = as_array(other.features[0][1]._mean)
    calls = [
        lambda: verify(other, fused, SPEC),
        lambda: verify(fused, other, SPEC),
        lambda: measure(other, SPEC),
        lambda: reparameterize(other),
        lambda: export_inference(other, tmp_path, SPEC),
    ]
    for call in calls:
        with pytest.raises(ReparamError, match="features.0.1: BatchNorm2D is in training mode"):
            call()
    assert (as_array(other.features[0][1]._mean) == before).all()


def test_settling_puts_back_what_it_changed_where_the_network_fails():
    model = nn.Sequential(nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4))
    with pytest.raises(ReparamError, match="Sequential cannot be run on inputs .*8, 5, 16, 16"):
        settle_batch_norms(model, [[None, 5, 16, 16]])
    assert model[1]._momentum == 0.9
    assert not model[1].training


def test_a_network_that_overflows_passes_at_no_other_scale():
    model = nn.Sequential(nn.Conv2D(3, 4, 3))
    model.eval()
    model[0].weight.set_value(model[0].weight * 1e38)
    with pytest.raises(ReparamError, match="the first network's output is not finite .* starts at layer '0'"):
        verify(model, lambda x: model(x), SPEC)


@pytest.mark.parametrize("expected", [[], [np.zeros([2, 0], "float32")]])
def test_outputs_without_numbers_are_not_the_same(expected):
    assert compare_outputs(expected, expected, 1e-4) == (float("inf"), None)


def test_imaginary_parts_are_compared():
    assert relative_error(np.array([1.0 + 1.0j]), np.array([1.0 - 1.0j])) > 1.0


def test_numbers_of_16_bits_are_compared_as_numbers():
    class Short(nn.Layer):
        def forward(self, x):
            return x.astype("bfloat16")

    model = Short()
    model.eval()
    report = verify(model, lambda x: x.astype("bfloat16").astype("float32") * 1.5, SPEC)
    assert abs(report.relative_error - 0.5) < 1e-6


def test_training_mode_is_refused(network):
    other = nn.Conv2D(3, 3, 3)
    with pytest.raises(ReparamError, match="second network is in training mode"):
        verify(network, other, SPEC)
    with pytest.raises(ReparamError, match="first network is in training mode"):
        verify(other, network, SPEC)


def test_an_output_that_hardly_depends_on_the_input_proves_nothing():
    model = nn.Sequential(nn.Conv2D(3, 4, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(4, 5))
    model[4].weight.set_value(model[4].weight * 1e-6)
    model[4].bias.set_value(paddle.randn([5]))
    model.eval()
    with pytest.raises(NothingProven, match="hardly depends on its input"):
        verify(model, lambda x: model(x), SPEC)
    assert verify(model, lambda x: model(x), SPEC, must_depend=False).passed
    # Two networks are compared layer by layer, which does prove it.
    assert verify(model, model, SPEC).passed


def test_inputs_are_scaled_until_the_output_depends_on_them():
    model = nn.Sequential(nn.Conv2D(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(4, 5))
    model[4].weight.set_value(model[4].weight * 1e3)
    model = nn.Sequential(*model, nn.Softmax())
    model.eval()

    def wrong(x):
        return nn.functional.softmax(model[4](model[3](model[2](model[1](model[0](x * 1.01))))))

    # One class has all the probability at this scale, and a network that is wrong by 1 percent the same.
    assert verify(model, wrong, SPEC, must_depend=False).passed
    report = verify(model, lambda x: model(x), SPEC)
    assert report.passed
    assert report.input_scale < 1
    assert not verify(model, wrong, SPEC).passed


def test_an_open_size_is_refused(network):
    with pytest.raises(ReparamError, match=r"\[None, 3, None, 32\] leaves more than the batch open"):
        verify(network, network, [[None, 3, None, 32]])


def test_networks_that_return_dicts_and_lists():
    class Many(nn.Layer):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2D(3, 2, 3)

        def forward(self, x):
            y = self.conv(x)
            return {"b": [y, y * 2], "a": y.mean([2, 3])}

    model = Many()
    model.eval()
    assert verify(model, model, [[None, 3, 5, 5]]).top1_agreement == 1.0
    assert verify(model, lambda x: {**model(x), "a": model(x)["a"] * 2}, [[None, 3, 5, 5]]).relative_error > 0.4


def test_relative_error():
    a = as_array([1.0, -2.0])
    assert relative_error(a, a) == 0.0
    assert relative_error(a, as_array([1.0, -2.5])) == 0.25
    assert relative_error(a, as_array([1.0])) == float("inf")
    assert relative_error(a, as_array([1.0, float("nan")])) == float("inf")
    assert relative_error(a * 0, a) == float("inf")
    assert relative_error(a * 0, a * 0) == 0.0


def test_top1_counts_ties_as_agreement_and_nothing_else():
    logits = as_array([[1.0, 1.00001, 0.0], [3.0, 1.0, 0.0]])
    swapped = as_array([[1.00001, 1.0, 0.0], [1.0, 3.0, 0.0]])
    assert compare_outputs([logits], [swapped], 1e-4)[1].tolist() == [True, False]
    assert compare_outputs([logits], [swapped], 1e-7)[1].tolist() == [False, False]
