"""Networks whose weights Paddle's `weight_norm` and `spectral_norm` compute before each pass."""

import copy

import numpy as np
import paddle
import pytest
from helpers import as_array, randomise_batch_norms, relative_error
from paddle import nn
from paddle.nn.utils import spectral_norm, weight_norm

from paddle_reparam import release, reparameterize, replace, save
from paddle_reparam.errors import CheckpointError, NothingToFuse, ReparamError, UnsupportedConv
from paddle_reparam.layers.refconv import RefConv2D
from paddle_reparam.weights.checkpoints import load_into

SPEC = [[None, 3, 8, 8]]


def network(norm=weight_norm, seed=0, **options):
    """Return a network in eval mode whose first convolution and fully connected layer are under a norm."""
    paddle.seed(seed)
    net = nn.Sequential(
        norm(nn.Conv2D(3, 6, 3, padding=1), **options), nn.BatchNorm2D(6), nn.ReLU(),
        nn.Conv2D(6, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2D(1), nn.Flatten(), norm(nn.Linear(8, 5)),
    )  # fmt: skip
    randomise_batch_norms(net, seed)
    for parameter in net.parameters():
        parameter.set_value(parameter + 0.3 * paddle.rand(parameter.shape))
    net.eval()
    return net


def loaded(folder, norm=weight_norm, **options):
    """Return a network that was given the weights of another one and has not computed anything since."""
    trained = network(norm, seed=1, **options)
    save(trained.state_dict(), folder / "weights.pdparams")
    net = network(norm, seed=2, **options)
    load_into(net, folder / "weights.pdparams")
    return net, trained


@pytest.mark.parametrize(
    ("norm", "options"),
    [
        (weight_norm, {}), (weight_norm, {"dim": 1}), (weight_norm, {"dim": 3}), (weight_norm, {"dim": None}),
        (spectral_norm, {}), (spectral_norm, {"dim": 1, "n_power_iterations": 3}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fold_bn", [False, True])
def test_what_was_loaded_is_fused(tmp_path, norm, options, fold_bn):
    """The weight that stands in the layer is that of the last pass, with the weights that were drawn."""
    net, trained = loaded(tmp_path, norm, **options)
    hooked = {name: len(layer._forward_pre_hooks) for name, layer in net.named_sublayers()}
    before = {name: value.numpy().copy() for name, value in net.state_dict().items()}
    fused, report = reparameterize(net, fold_bn=fold_bn, input_spec=SPEC)
    x = paddle.randn([2, 3, 8, 8])
    assert relative_error(fused(x), trained(x)) < 1e-5
    kind = {weight_norm: "WeightNorm", spectral_norm: "SpectralNorm"}[norm]
    assert [what for what in report.touched if kind in what[1]] == [
        (path, f"{kind} of weight -> a parameter") for path in ("0", "7")
    ]
    names = {name for name in fused.state_dict() if name.startswith(("0.", "7."))}
    assert names == {"0.weight", "0.bias", "7.weight", "7.bias"}
    assert not any(layer._forward_pre_hooks for layer in fused.sublayers())
    assert {name: len(layer._forward_pre_hooks) for name, layer in net.named_sublayers()} == hooked
    for name, value in net.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name], err_msg=name)
    # Once fused it goes on as any network does.
    fused.train()
    fused(x).square().sum().backward()
    assert all(float(fused[place].weight.grad.abs().max()) > 0 for place in (0, 7))


def test_the_weight_is_computed_in_float64():
    net = network()
    v, g = as_array(net[0].weight_v), as_array(net[0].weight_g)
    expected = g[:, None, None, None] * v / np.sqrt((v**2).sum(axis=(1, 2, 3), keepdims=True))
    np.testing.assert_array_equal(reparameterize(net)[0][0].weight.numpy(), expected.astype("float32"))
    net = network(spectral_norm)
    weight, u, v = (as_array(getattr(net[0], f"weight_{part}")) for part in ("orig", "u", "v"))
    expected = weight / (u @ weight.reshape(6, -1) @ v)
    np.testing.assert_array_equal(reparameterize(net)[0][0].weight.numpy(), expected.astype("float32"))


def test_it_has_the_dtype_of_what_it_is_computed_from():
    net = network()
    net.to(dtype="float64")
    assert reparameterize(net)[0][0].weight.dtype == paddle.float64


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_after_loading_the_weight_is_that_of_what_was_loaded(tmp_path, norm):
    """So that what reads it without a pass, as Paddle's own export does, gets the right one."""
    net, trained = loaded(tmp_path, norm)
    trained(paddle.randn([1, 3, 8, 8]))
    for ours, theirs in ((net[0], trained[0]), (net[7], trained[7])):
        assert relative_error(ours.weight, theirs.weight) < 1e-6
    assert "0.weight" not in net.state_dict()


def test_a_file_of_the_other_kind_is_named(tmp_path):
    plain = network(lambda layer: layer)
    save(plain.state_dict(), tmp_path / "plain.pdparams")
    net, _ = loaded(tmp_path)
    with pytest.raises(CheckpointError, match="a weight file in train form and the model is fused or plain"):
        load_into(plain, tmp_path / "weights.pdparams")
    with pytest.raises(CheckpointError, match="of a fused or plain model and the model is in train form"):
        load_into(net, tmp_path / "plain.pdparams")
    load_into(plain, reparameterize(net)[0].state_dict())
    x = paddle.randn([2, 3, 8, 8])
    assert relative_error(plain(x), net(x)) < 1e-5


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_a_layer_stands_in_for_such_a_convolution_after_reparameterize(tmp_path, norm):
    net, trained = loaded(tmp_path, norm)
    kind = {weight_norm: "WeightNorm", spectral_norm: "SpectralNorm"}[norm]
    message = rf"before each pass by a hook \({kind}\), which a new layer would lose; take the network that reparam"
    report = replace(copy.deepcopy(net), "RefConv2D", init="zero")
    assert [path for path, _ in report.touched] == ["3"]
    assert [path for path, _ in report.skipped] == ["0"]
    with pytest.raises(UnsupportedConv, match=message):
        RefConv2D.from_conv(net[0])
    with pytest.raises(ReparamError, match=message):
        replace(net, "RefConv2D", where="0")
    plain, _ = reparameterize(net)
    assert [path for path, _ in replace(plain, "RefConv2D", init="zero").touched] == ["0", "3"]
    x = paddle.randn([2, 3, 8, 8])
    assert relative_error(plain(x), trained(x)) < 1e-5


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_such_a_network_is_released(tmp_path, norm):
    net, trained = loaded(tmp_path, norm)
    stock = network(lambda layer: layer)
    net = network(norm, seed=3)
    released = release(net, tmp_path / "weights.pdparams", tmp_path / "out", SPEC, stock=stock, progress=len)
    assert released is not None
    load_into(stock, tmp_path / "out" / "plain.pdparams")
    x = paddle.randn([2, 3, 8, 8])
    assert relative_error(stock(x), trained(x)) < 1e-5


def test_other_hooks_are_left():
    net = network(lambda layer: layer)
    net[3].register_forward_pre_hook(lambda layer, inputs: None)
    with pytest.raises(NothingToFuse):
        reparameterize(net)
    with pytest.raises(ReparamError, match="it has forward hooks, which would be lost"):
        replace(net, "RefConv2D", where="3")
