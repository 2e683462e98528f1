"""RepMLP (first paper): its formula in numpy, the fused form, and what is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import contract
import numpy as np
import paddle
import pytest
from helpers import as_array, check_in_bfloat16, relative_error
from paddle import nn

from paddle_reparam.deploy.export import export_inference
from paddle_reparam.deploy.runtimes.paddle_inference import LoadedPredictor
from paddle_reparam.errors import ReparamError, UnsupportedConv
from paddle_reparam.layers.repmlp import RepMLP, RepMLPFitted, RepMLPFused
from paddle_reparam.surgery.rewrite import reparameterize, replace
from paddle_reparam.weights.checkpoints import form_of

# H, W, h, w and the options of layers from 4 to 6 channels.
LAYERS = {
    "whole map": ((5, 5, 5, 5), {}),
    "groups": ((8, 8, 4, 4), {"fc3_groups": 2, "fc1_fc2_reduction": 2}),
    "rectangular": ((4, 9, 2, 3), {"reparam_conv_k": (1, 3)}),
    "kernels larger than a partition": ((4, 6, 2, 3), {"reparam_conv_k": (3, 7, 5), "fc3_groups": 2}),
    "not divisible": ((7, 9, 4, 5), {"fc3_groups": 2}),
    "not divisible, one side": ((4, 7, 2, 7), {"reparam_conv_k": (3,)}),
    "one partition that is not the map": ((4, 4, 3, 3), {"reparam_conv_k": (1,)}),
    "without local": ((4, 4, 2, 2), {"reparam_conv_k": ()}),
    "without global": ((4, 4, 2, 2), {"global_perceptron": False}),
    "FC3 as a convolution": ((8, 4, 4, 2), {"fc3_conv_k": 9, "fc3_groups": 2}),
    "FC3 as the only convolution": ((4, 4, 2, 2), {"fc3_conv_k": 3, "reparam_conv_k": ()}),
    "with ReLU": ((8, 12, 4, 6), {"relu": True, "fc3_groups": 2}),
}


def make(sizes, dtype="float64", in_channels=4, out_channels=6, **options) -> RepMLP:
    layer = RepMLP(in_channels, out_channels, *sizes, **options)
    layer.to(dtype=dtype)
    contract.randomise(layer).eval()
    return layer


# --- The paper's formula ------------------------------------------------------------------------------------------


def normalise(state: dict, bn: str, y: np.ndarray) -> np.ndarray:
    """Apply the BN to axis 1."""
    scale = state[f"{bn}.weight"] / np.sqrt(state[f"{bn}._variance"] + 1e-5)
    shift = state[f"{bn}.bias"] - state[f"{bn}._mean"] * scale
    axes = (1, -1) + (1,) * (y.ndim - 2)
    return y * scale.reshape(axes) + shift.reshape(axes)


def convolve(x: np.ndarray, kernel: np.ndarray, groups: int) -> np.ndarray:
    """`[P, C, h, w]` with zeros around each partition."""
    height, width = x.shape[2:]
    reach = kernel.shape[2] // 2
    x = np.pad(x, [(0, 0), (0, 0), (reach, reach), (reach, reach)])
    y = 0.0
    for i in range(kernel.shape[2]):
        for j in range(kernel.shape[3]):
            taps = x[:, :, i : i + height, j : j + width]
            parts = zip(np.split(taps, groups, axis=1), np.split(kernel[:, :, i, j], groups, axis=0))
            y = y + np.concatenate([np.einsum("nchw,oc->nohw", t, k) for t, k in parts], axis=1)
    return y


def formula(layer: RepMLP, x: np.ndarray, sizes, fc3_groups=1, fc3_conv_k=None, relu=False, **_) -> np.ndarray:
    """Go through the partitions one by one, as the paper describes them."""
    state = {name: as_array(value) for name, value in layer.state_dict().items()}
    H, W, h, w = sizes
    rows, columns = math.ceil(H / h), math.ceil(W / w)
    x = np.pad(x, [(0, 0), (0, 0), (0, rows * h - H), (0, columns * w - W)])
    batch, channels = x.shape[:2]
    x = x.copy()
    if "avg.bn.weight" in state:
        averages = x.reshape(batch, channels, rows, h, columns, w).mean(axis=(3, 5))
        v = normalise(state, "avg.bn", averages).reshape(batch, -1)
        v = np.maximum(v @ state["fc1_fc2.fc1.weight"] + state["fc1_fc2.fc1.bias"], 0.0)
        v = (v @ state["fc1_fc2.fc2.weight"] + state["fc1_fc2.fc2.bias"]).reshape(batch, channels, rows, columns)
        x += v.repeat(h, axis=2).repeat(w, axis=3)
    out = []
    for row in range(rows):
        line = []
        for column in range(columns):
            part = x[:, :, row * h : (row + 1) * h, column * w : (column + 1) * w]
            if fc3_conv_k is None:
                pieces = np.split(part.reshape(batch, -1), fc3_groups, axis=1)
                matrices = np.split(state["fc3.weight"][:, :, 0, 0], fc3_groups, axis=0)
                y = np.concatenate([p @ m.T for p, m in zip(pieces, matrices)], axis=1)
                y = normalise(state, "fc3_bn", y).reshape(batch, -1, h, w)
            else:
                y = normalise(state, "fc3_bn", convolve(part, state["fc3.weight"], fc3_groups))
            for k in layer.reparam_conv_k:
                branch = convolve(part, state[f"repconv{k}.conv.weight"], fc3_groups)
                y = y + normalise(state, f"repconv{k}.bn", branch)
            line.append(y)
        out.append(np.concatenate(line, axis=3))
    out = np.concatenate(out, axis=2)[:, :, :H, :W]
    return np.maximum(out, 0.0) if relu else out


@pytest.mark.parametrize("name", LAYERS)
def test_the_formula_and_the_fused_form(name):
    sizes, options = LAYERS[name]
    layer = make(sizes, **options)
    fused = layer.reparameterize()
    assert isinstance(fused, RepMLPFused)
    x = np.random.randn(3, 4, *sizes[:2])
    expected = formula(layer, x, sizes, **options)
    assert relative_error(layer(paddle.to_tensor(x)), expected) < 1e-10
    assert relative_error(fused(paddle.to_tensor(x)), expected) < 1e-10


# Groups of whole vectors: 2 groups of 2 x 16 inputs and 4 x 16 outputs in partitions of 4x4, and no group in 8x2.
FITTED = {
    "several partitions": ((8, 12, 4, 4), {"fc3_groups": 2, "fc1_fc2_reduction": 2}),
    "not divisible": ((7, 9, 4, 4), {"fc3_groups": 2}),
    "whole map": ((8, 2, 8, 2), {}),
    "without global": ((8, 8, 4, 4), {"global_perceptron": False}),
    "with ReLU": ((8, 8, 4, 4), {"relu": True}),
}


@pytest.mark.parametrize("name", FITTED)
def test_the_form_for_onednn(name, tmp_path):
    sizes, options = FITTED[name]
    layer = make(sizes, out_channels=8, **options)
    fitted = layer.reparameterize().for_size(*sizes[:2])
    assert isinstance(fitted, RepMLPFitted)
    x = np.random.randn(3, 4, *sizes[:2])
    expected = formula(layer, x, sizes, **options)
    assert relative_error(fitted(paddle.to_tensor(x)), expected) < 1e-10
    with pytest.raises(ReparamError, match="built for maps of"):
        fitted(paddle.randn([1, 4, 16, 16], dtype="float64"))
    scale, shift = np.random.randn(2, 8)
    if layer.relu:
        for form in (fitted, layer.reparameterize()):
            with pytest.raises(UnsupportedConv, match="a ReLU between"):
                form.absorb_affine(scale, shift)
    else:
        fitted.absorb_affine(scale, shift)
        expected = expected * scale[:, None, None] + shift[:, None, None]
    assert relative_error(fitted(paddle.to_tensor(x)), expected) < 1e-10
    fitted.to(dtype="float32")
    fitted.eval()
    export_inference(fitted, tmp_path, [[None, 4, *sizes[:2]]])
    for onednn in (True, False):
        model = LoadedPredictor(tmp_path, onednn=onednn)
        for batch in (1, 3):
            [y] = model.run(x[:batch].astype("float32"))
            assert relative_error(y, expected[:batch]) < 1e-5, (onednn, batch)


@pytest.mark.parametrize("name", ["several partitions", "not divisible", "with ReLU"])
def test_both_forms_in_bfloat16(name, tmp_path):
    sizes, options = FITTED[name]
    fused = make(sizes, "float32", out_channels=8, **options).reparameterize()
    for form in (fused, fused.for_size(*sizes[:2])):
        host = nn.Sequential(nn.Conv2D(4, 4, 1), form, nn.Conv2D(8, 4, 1))
        host.eval()
        check_in_bfloat16(host, [4, *sizes[:2]], tmp_path / type(form).__name__)


def test_groups_that_are_no_whole_vectors_stay_matrix_products():
    assert make((8, 8, 4, 4), out_channels=8).reparameterize().for_size(8, 8) is not None
    assert make((6, 6, 3, 3), out_channels=8).reparameterize().for_size(6, 6) is None
    assert make((8, 8, 2, 2), out_channels=5).reparameterize().for_size(8, 8) is None


def test_what_is_there():
    """The switches take away what they say, and the published names are there."""
    whole, options = LAYERS["whole map"]
    assert not any("fc1" in key or "avg" in key for key in make(whole, **options).state_dict())
    layer = make((8, 8, 4, 4), fc1_fc2_reduction=2)
    shapes = {key: list(value.shape) for key, value in layer.state_dict().items()}
    assert shapes["fc1_fc2.fc1.weight"] == [16, 8]
    assert shapes["fc1_fc2.fc2.weight"] == [8, 16]
    assert shapes["fc3.weight"] == [6 * 16, 4 * 16, 1, 1]
    assert shapes["fc3_bn._mean"] == [6 * 16]
    assert {f"repconv{k}.conv.weight" for k in (1, 3, 5)} < shapes.keys()
    assert not any("repconv" in key for key in make((4, 4, 2, 2), reparam_conv_k=()).state_dict())
    assert not any("fc1" in key or "avg" in key for key in make((4, 4, 2, 2), global_perceptron=False).state_dict())
    grouped = nn.Conv2D(4, 6, 3, padding=1, groups=2)
    assert RepMLP.from_conv(grouped, height=4, width=4, partition=(2, 2)).fc3.weight.shape == [24, 8, 1, 1]
    assert form_of(layer.state_dict()) == "train"
    fused = layer.reparameterize()
    assert form_of(fused.state_dict()) == "fused"
    assert {key: list(value.shape) for key, value in fused.state_dict().items()} == {
        "fc1.weight": [16, 8], "fc1.bias": [8], "fc2.weight": [8, 16], "fc2.bias": [16],
        "weight": [1, 4 * 16, 6 * 16], "bias": [1, 6 * 16],
    }  # fmt: skip


def test_fc3_starts_as_spread_as_an_orthogonal_matrix():
    weight = as_array(RepMLP(8, 8, 6, 6, 6, 6, fc3_groups=4).fc3.weight)
    assert weight.std() == pytest.approx(288**-0.5, rel=0.05)
    assert abs(weight.mean()) < 0.01


# --- The promises of every layer, for maps of one size -------------------------------------------------------------


@dataclass(frozen=True)
class OneSize(contract.Case):
    size: tuple = (8, 10)

    def inputs_of_all_sizes(self, dtype, batch=2):
        return [paddle.randn([batch, self.inputs, *self.size], dtype="float64").astype(dtype)]


class Divisible(RepMLP):
    SIZE, PARTITION = (8, 10), (4, 5)

    @classmethod
    def build(cls, geometry, **options):
        return super().build(geometry, *cls.SIZE, cls.PARTITION, **options)


class NotDivisible(Divisible):
    SIZE, PARTITION = (7, 9), (4, 5)


class WholeMap(Divisible):
    SIZE, PARTITION = (5, 4), (5, 4)


CONVS = [(4, 6, 3, {"padding": 1}), (4, 4, 1, {"groups": 2}), (4, 6, (3, 5), {"padding": (1, 2), "bias_attr": False})]


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("cls", [Divisible, NotDivisible, WholeMap], ids=lambda cls: cls.__name__)
def test_the_contract(cls, check):
    for inputs, outputs, kernel, options in CONVS:
        case = OneSize(inputs, outputs, kernel, options, size=cls.SIZE)
        assert contract.build(cls, case) is not None
        check(cls, case)


@pytest.mark.parametrize("sizes", [(8, 10, 4, 5), (7, 9, 4, 5), (4, 4, 4, 4)], ids=str)
def test_traces_with_an_open_batch(sizes):
    layer = make(sizes, dtype="float32", fc3_groups=2)
    spec = [paddle.static.InputSpec([None, 4, *sizes[:2]], "float32")]
    for form in (layer, layer.reparameterize()):
        traced = paddle.jit.to_static(copy.deepcopy(form), input_spec=spec, full_graph=True)
        for batch in (1, 3):
            x = paddle.randn([batch, 4, *sizes[:2]])
            with paddle.no_grad():
                assert relative_error(traced(x), form(x)) < 1e-5


# --- In the place of a convolution ----------------------------------------------------------------------------------


def test_replaces_convolutions_on_maps_of_known_size():
    convs = [nn.Conv2D(4, 8, 3, padding=1), nn.Conv2D(8, 8, 3, 2, padding=1), nn.Conv2D(8, 8, 3, padding=2, dilation=2)]
    model = nn.Sequential(*convs, nn.Conv2D(8, 8, 2), nn.Conv2D(8, 3, 3))
    report = replace(model, "RepMLP", height=8, width=8, partition=(4, 4), fc3_groups=4)
    assert [path for path, _ in report.touched] == ["0"]
    reasons = dict(report.skipped)
    assert "stride 1" in reasons["1"]
    assert "without dilation" in reasons["2"]
    assert "odd kernels" in reasons["3"]
    assert "gives maps of the size that it gets" in reasons["4"]
    assert model[0].fc3_groups == 4
    model.eval()
    assert reparameterize(model)[0](paddle.randn([2, 4, 8, 8])).shape == model(paddle.randn([2, 4, 8, 8])).shape
    with pytest.raises(ReparamError, match="give the options height and width"):
        RepMLP.from_conv(nn.Conv2D(4, 8, 3, padding=1), partition=(4, 4))
    with pytest.raises(UnsupportedConv, match="cannot both be split into 3 groups; choose fc3_groups"):
        RepMLP.from_conv(nn.Conv2D(4, 6, 3, padding=1), height=8, width=8, fc3_groups=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reparam_conv_k": (1, 2)}, r"kernels of sizes \[1, 2\].*must be odd"),
        ({"reparam_conv_k": (3, 3)}, r"kernels of sizes \[3, 3\].*none there twice"),
        ({"fc3_conv_k": 4, "reparam_conv_k": ()}, r"kernels of sizes \[4\].*must be odd"),
        ({"fc1_fc2_reduction": 17}, "fc1_fc2_reduction=17 leaves nothing of 16 averages"),
        ({"h": 9}, "partitions of 9x4 do not lie in a map of 8x8; choose smaller"),
        ({"w": 0}, "partitions of 4x0 do not lie in a map of 8x8"),
        ({"fc3_groups": 3}, "4 and 6 channels cannot both be split into 3 groups"),
    ],
)
def test_what_makes_no_layer_is_refused(options, words):
    with pytest.raises(ReparamError, match=words):
        RepMLP(4, 6, **{"H": 8, "W": 8, "h": 4, "w": 4, **options})


def test_maps_of_another_size_are_refused():
    """28x28 in the place of 14x14 has the numbers of four images: it must not pass for them."""
    layer = make((4, 4, 2, 2))
    for form in (layer, layer.reparameterize()):
        with pytest.raises(
            ReparamError, match="built for maps of 4x4 pixels and got maps of 8x8; build the network for"
        ):
            form(paddle.randn([1, 4, 8, 8], dtype="float64"))
        spec = [paddle.static.InputSpec([None, 4, None, 4], "float64")]
        traced = paddle.jit.to_static(copy.deepcopy(form), input_spec=spec, full_graph=True)
        with pytest.raises(ReparamError, match="4x4 pixels and got maps of openx4"):
            _ = traced.forward.concrete_program


@pytest.mark.parametrize("groups", [1, 4])
def test_kernels_start_as_large_as_their_inputs_ask_for(groups):
    """Whatever the groups: an output sees in_channels / groups channels."""
    layer = RepMLP(64, 64, 8, 8, 4, 4, fc3_groups=groups, reparam_conv_k=(3,))
    bound = (64 // groups * 9) ** -0.5
    weight = as_array(layer.repconv3.conv.weight)
    assert 0.9 * bound < np.abs(weight).max() <= bound
