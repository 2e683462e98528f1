"""RepMLPNet: the paper's formula in numpy, the published order, sizes, other resolutions, published weight files."""

from __future__ import annotations

import copy

import numpy as np
import paddle
import pytest
from helpers import as_array, check_in_bfloat16, randomise_batch_norms, relative_error
from network_contract import (
    check_exports,
    check_fused_is_the_same_function,
    check_one_step_changes_every_parameter,
    count,
    macs,
)
from paddle import nn

from paddle_reparam.arithmetic.geometry import ConvGeometry
from paddle_reparam.errors import CheckpointError, ReparamError, UnknownName, UnsupportedConv
from paddle_reparam.layers.repmlpnet import RepMLPBlock, RepMLPBlockFitted, RepMLPBlockFused, RepMLPNetUnit
from paddle_reparam.models.repmlpnet import RepMLPNet, change_resolution
from paddle_reparam.registry import create_model, get_model
from paddle_reparam.surgery.rewrite import reparameterize, replace
from paddle_reparam.weights.checkpoints import load_into, save
from paddle_reparam.weights.published import convert_state


def make(channels: int, h: int, w: int, dtype: str = "float64", **options) -> RepMLPBlock:
    layer = RepMLPBlock(channels, channels, h, w, **options)
    randomise_batch_norms(layer)
    layer.to(dtype=dtype)
    layer.eval()
    return layer


def outputs(layer: nn.Layer, x: np.ndarray) -> np.ndarray:
    with paddle.no_grad():
        return as_array(layer(paddle.to_tensor(x)))


# --- The paper's formula ------------------------------------------------------------------------------------------


def state_of(layer: nn.Layer) -> dict[str, np.ndarray]:
    return {name: as_array(value) for name, value in layer.state_dict().items()}


def affine(state: dict[str, np.ndarray], bn: str, s: int) -> tuple[float, float]:
    scale = state[f"{bn}.weight"][s] / np.sqrt(state[f"{bn}._variance"][s] + np.float64(np.float32(1e-5)))
    return scale, state[f"{bn}.bias"][s] - state[f"{bn}._mean"][s] * scale


def gate_of(state: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    pooled = x.mean(axis=(2, 3))
    inner = np.maximum(pooled @ state["gp.fc1.weight"][:, :, 0, 0].T + state["gp.fc1.bias"], 0)
    return 1 / (1 + np.exp(-(inner @ state["gp.fc2.weight"][:, :, 0, 0].T + state["gp.fc2.bias"])))[:, :, None, None]


def of_one_partition(state: dict[str, np.ndarray], part: np.ndarray, s: int) -> np.ndarray:
    """BN(FC3_s(part)) + sum of BN(conv_s(part)), `[h, w]` in and out."""
    h, w = part.shape
    scale, shift = affine(state, "fc3_bn", s)
    weight = state["fc3.weight"][s * h * w : (s + 1) * h * w, :, 0, 0]
    result = scale * (weight @ part.reshape(-1)).reshape(h, w) + shift
    for name in sorted({key.split(".")[0] for key in state if key.startswith("repconv")}):
        kernel = state[f"{name}.conv.weight"][s, 0]
        reach = len(kernel) // 2
        padded = np.pad(part, reach)
        scale, shift = affine(state, f"{name}.bn", s)
        for i in range(h):
            for j in range(w):
                window = padded[i : i + len(kernel), j : j + len(kernel)]
                result[i, j] += scale * (window * kernel).sum() + shift
    return result


def formula(layer: RepMLPBlock, x: np.ndarray, set_of=lambda channel, channels, sets: channel % sets) -> np.ndarray:
    state, (h, w) = state_of(layer), layer.partition
    height, width = x.shape[2:]
    padded = np.pad(x, [(0, 0), (0, 0), (0, -height % h), (0, -width % w)])
    y = np.empty_like(padded)
    for n, c in np.ndindex(*x.shape[:2]):
        for i in range(0, padded.shape[2], h):
            for j in range(0, padded.shape[3], w):
                s = set_of(c, x.shape[1], layer.num_sharesets)
                y[n, c, i : i + h, j : j + w] = of_one_partition(state, padded[n, c, i : i + h, j : j + w], s)
    return y[:, :, :height, :width] * gate_of(state, x)


OPTIONS = [
    {"num_sharesets": 2, "reparam_conv_k": (1, 3)},
    {"num_sharesets": 6, "reparam_conv_k": (3,), "globalperceptron_reduce": 2},
    {"num_sharesets": 1, "reparam_conv_k": (1, 3, 7)},
    {"num_sharesets": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_formula(options):
    layer = make(6, 3, 4, published_order=False, **options)
    fused = layer.reparameterize()
    assert isinstance(fused, RepMLPBlockFused)
    for size in [(3, 4), (6, 8), (5, 4), (7, 9), (2, 3), (1, 1)]:
        x = np.random.randn(2, 6, *size)
        expected = formula(layer, x)
        assert relative_error(outputs(layer, x), expected) < 1e-10, size
        assert relative_error(outputs(fused, x), expected) < 1e-10, size


def test_the_form_for_whole_maps():
    layer = make(6, 3, 4, num_sharesets=1, reparam_conv_k=(1, 3))
    fused = layer.reparameterize()
    fitted = fused.for_size(3, 4)
    assert isinstance(fitted, RepMLPBlockFitted)
    x = np.random.randn(2, 6, 3, 4)
    assert relative_error(outputs(fitted, x), formula(layer, x)) < 1e-10
    assert fused.for_size(6, 8) is None
    assert make(6, 3, 4, num_sharesets=2).reparameterize().for_size(3, 4) is None
    with pytest.raises(ReparamError, match="fused for maps of 3x4 pixels and got maps of 4x3"):
        fitted(paddle.randn([1, 6, 4, 3], dtype="float64"))
    with pytest.raises(UnsupportedConv, match="shares its weights among channels"):
        fitted.absorb_affine(np.ones(6), np.zeros(6))


def test_channels_take_the_sets_in_turn():
    layer = make(6, 3, 3, num_sharesets=2, reparam_conv_k=(1, 3))
    x = np.random.randn(1, 6, 3, 3)
    contiguous = formula(layer, x, lambda channel, channels, sets: channel // (channels // sets))
    assert relative_error(outputs(layer, x), contiguous) > 0.1
    assert relative_error(outputs(layer.reparameterize(), x), contiguous) > 0.1


def in_published_order(y: np.ndarray, runs: int, sets: int, h: int, w: int) -> np.ndarray:
    """Move run r of partition p, number p * runs + r, to where r * partitions + p is that number; `y` without gate."""
    columns = y.shape[3] // w
    partitions = y.shape[2] // h * columns
    moved = np.empty_like(y)
    for number in range(partitions * runs):
        source, target = divmod(number, runs), divmod(number, partitions)[::-1]
        (p, r), (to_p, to_r) = source, target
        i, j, to_i, to_j = p // columns * h, p % columns * w, to_p // columns * h, to_p % columns * w
        part = y[:, r * sets : (r + 1) * sets, i : i + h, j : j + w]
        moved[:, to_r * sets : (to_r + 1) * sets, to_i : to_i + h, to_j : to_j + w] = part
    return moved


@pytest.mark.parametrize(("sets", "moves"), [(2, True), (6, False)])
def test_whole_partitions_come_back_in_the_published_order(sets, moves):
    layer = make(6, 2, 3, num_sharesets=sets, reparam_conv_k=(1, 3))
    x = np.random.randn(2, 6, 6, 6)
    gate = gate_of(state_of(layer), x)
    in_place = formula(layer, x)
    expected = in_published_order(in_place / gate, 6 // sets, sets, 2, 3) * gate
    assert (relative_error(in_place, expected) > 0.1) == moves
    for form in (layer, layer.reparameterize()):
        assert relative_error(outputs(form, x), expected) < 1e-10
        x_to_fill_up = np.random.randn(2, 6, 5, 6)
        assert relative_error(outputs(form, x_to_fill_up), formula(layer, x_to_fill_up)) < 1e-10


def test_traced_for_maps_of_any_size():
    layer = make(6, 2, 3, "float32", num_sharesets=2, reparam_conv_k=(1, 3))
    for form in (layer, layer.reparameterize()):
        spec = [paddle.static.InputSpec([None, 6, None, None], "float32")]
        traced = paddle.jit.to_static(copy.deepcopy(form), input_spec=spec, full_graph=True)
        for shape in ([1, 6, 2, 3], [3, 6, 6, 6], [2, 6, 5, 6], [2, 6, 4, 7]):
            x = np.random.randn(*shape).astype(np.float32)
            assert relative_error(outputs(traced, x), outputs(form, x)) < 1e-5, shape


# --- In the place of a convolution, and what is refused -----------------------------------------------------------


def test_in_the_place_of_depthwise_convolutions():
    model = nn.Sequential(
        nn.Conv2D(3, 8, 1), nn.Conv2D(8, 8, 5, padding=2, groups=8, bias_attr=False), nn.BatchNorm2D(8), nn.ReLU()
    )
    report = replace(model, "RepMLPBlock", partition=(4, 6), num_sharesets=4)
    assert [path for path, _ in report.touched] == ["1"]
    assert model[1].partition == (4, 6)
    assert model[1].fc3.weight.shape == [96, 24, 1, 1]
    randomise_batch_norms(model)
    model.eval()
    x = np.random.randn(2, 3, 8, 12).astype(np.float32)
    middle = outputs(model[0], x)
    assert relative_error(outputs(model[1], middle.astype(np.float32)), formula(model[1], middle)) < 1e-5
    fused, report = reparameterize(model, fold_bn=True, input_spec=[[None, 3, 8, 12]])
    assert relative_error(outputs(fused, x), outputs(model, x)) < 1e-5
    [(path, reason)] = report.skipped
    assert path == "2"
    assert "shares its weights among channels" in reason


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        ({}, "mixes no channels.*not for 8->8, 3x3$"),
        ({"groups": 4}, "not for 8->8, 3x3, groups=4"),
        ({"groups": 8, "stride": 2}, r"neither stride nor dilation.*stride=\(2, 2\)"),
        ({"groups": 8, "dilation": 2, "padding": 2}, r"neither stride nor dilation.*dilation=\(2, 2\)"),
        ({"groups": 8, "padding": 0}, r"keeps the size of the map.*padding \(0, 0, 0, 0\)"),
        ({"groups": 8, "padding_mode": "reflect"}, "keeps the size of the map.*in mode 'reflect'"),
        ({"groups": 8, "data_format": "NHWC"}, "takes NCHW, this one takes NHWC"),
    ],
)
def test_convolutions_that_are_refused(conv, reason):
    with pytest.raises(UnsupportedConv, match=reason):
        RepMLPBlock.build(ConvGeometry.of(nn.Conv2D(8, 8, 3, **{"padding": 1, **conv})))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((8, 4, 2, 2), "keeps the number of channels; 8 in and 4 out do not"),
        ((8, 8, 2, 2, (1, 3), 4, 3), "8 channels cannot share num_sharesets=3 sets"),
        ((8, 8, 2, 2, (1, 3), 4, 0), "cannot share num_sharesets=0 sets"),
        ((2, 2, 2, 2), "globalperceptron_reduce=4 leaves no neuron of 2 channels; choose 1 to 2"),
        ((8, 8, 2, 2, None, 0), "globalperceptron_reduce=0"),
        ((8, 8, 0, 2), "a partition of 0x2 has no pixels"),
        ((8, 8, 2, 2, (1, 2)), r"reparam_conv_k=\(1, 2\): these must be odd sizes"),
        ((8, 8, 2, 2, (3, 3)), r"reparam_conv_k=\(3, 3\): .*each of them once"),
    ],
)
def test_sizes_that_are_refused(arguments, reason):
    with pytest.raises(UnsupportedConv, match=reason):
        RepMLPBlock(*arguments)


# --- The unit and the network -------------------------------------------------------------------------------------


def test_what_of_a_unit_is_folded():
    unit = RepMLPNetUnit(8, 4, 4, (1, 3), 4, num_sharesets=2)
    randomise_batch_norms(unit)
    unit.eval()
    fused, report = reparameterize(unit, fold_bn=True, input_spec=[[None, 8, 4, 4]])
    folded = {path: what for path, what in report.touched if "folded" in what}
    assert folded == {
        "ffn_block.ffn_fc1.bn": "folded into ffn_block.ffn_fc1.conv",
        "ffn_block.ffn_fc2.bn": "folded into ffn_block.ffn_fc2.conv",
        "prebn2": "folded into ffn_block.ffn_fc1.conv, which reads it",
    }
    assert [path for path, _ in report.skipped] == ["prebn1"]
    x = np.random.randn(2, 8, 4, 4).astype(np.float32)
    assert relative_error(outputs(fused, x), outputs(unit, x)) < 1e-5


@pytest.mark.parametrize(("sets", "size"), [(1, 4), (4, 4), (4, 6)])
def test_a_unit_in_bfloat16(sets, size, tmp_path):
    unit = RepMLPNetUnit(8, 4, 4, (1, 3), 2, num_sharesets=sets)
    randomise_batch_norms(unit)
    unit.eval()
    fused, _ = reparameterize(unit, fold_bn=True, input_spec=[[None, 8, size, size]], fixed_size=True)
    check_in_bfloat16(fused, [8, size, size], tmp_path)


def small_network() -> RepMLPNet:
    """Made for images of 32 by 48 pixels."""
    return RepMLPNet((8, 12), (1, 2), (2, 4), (8, 4), (12, 6), class_num=5)


OWN_SIZE, PARTITIONS_MULTIPLIED, FILLED_UP = [None, 3, 32, 48], [None, 3, 64, 96], [None, 3, 44, 36]


def test_the_fused_network_is_the_same_function():
    fused = check_fused_is_the_same_function(small_network(), OWN_SIZE, PARTITIONS_MULTIPLIED, FILLED_UP)
    assert sum(isinstance(layer, nn.BatchNorm2D) for layer in fused.sublayers()) == 3 + 1  # prebn1, and head_norm


@pytest.mark.parametrize("shape", [OWN_SIZE, PARTITIONS_MULTIPLIED, FILLED_UP], ids=str)
def test_exports(shape, tmp_path):
    check_exports(small_network(), shape, tmp_path)


def test_one_step_changes_every_parameter():
    check_one_step_changes_every_parameter(small_network(), OWN_SIZE)


# Millions of parameters and billions of multiply-adds, in train form, counted with the published code.
PUBLISHED = {
    "T224": (38.294, 2.808),
    "T256": (58.688, 4.258),
    "B224": (68.243, 6.676),
    "B256": (96.448, 9.640),
    "D256": (86.888, 8.636),
    "L256": (117.642, 11.609),
}


@pytest.mark.parametrize("member", PUBLISHED)
def test_as_large_as_published(member):
    model = create_model(f"RepMLPNet_{member}")
    size = get_model(f"RepMLPNet_{member}").published[0].input_size
    assert size == int(member[1:])
    parameters, multiply_adds = PUBLISHED[member]
    assert round(count(model) / 1e6, 3) == parameters
    assert round(macs(model, size) / 1e9, 3) == multiply_adds


def test_as_large_as_published_when_fused():
    model = create_model("RepMLPNet_T224")
    model.eval()
    fused, _ = reparameterize(model)
    assert count(fused) == 38331720
    assert round(macs(fused, 224) / 1e9, 3) == 2.798


def test_arguments_are_strict(tmp_path):
    for member in PUBLISHED:
        with pytest.raises(UnknownName, match=rf"RepMLPNet_{member} has no argument 'ratio'.*image_size, published_or"):
            create_model(f"RepMLPNet_{member}", ratio=0.5)
    for size in (100, (32, 16), 0):
        with pytest.raises(ReparamError, match=r"built for images of \d+x\d+.*must be a multiple of 32"):
            create_model("RepMLPNet_T224", image_size=size)
    model = create_model("RepMLPNet_T224", image_size=(32, 64), class_num=3, published_order=False)
    blocks = [layer for layer in model.sublayers() if isinstance(layer, RepMLPBlock)]
    assert [b.partition for b in blocks] == [(8, 16)] * 2 + [(4, 8)] * 2 + [(2, 4)] * 6 + [(1, 2)] * 2
    assert not any(b.published_order for b in blocks)
    save(model.state_dict(), tmp_path / "weights.pdparams")
    with pytest.raises(CheckpointError, match="another shape.*fc3.weight"):
        create_model("RepMLPNet_T224", image_size=64, class_num=3, pretrained=str(tmp_path / "weights.pdparams"))


# --- Other resolutions --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> RepMLPNet:
    """RepMLPNet-T224 for images of 32x32, with random BNs."""
    paddle.seed(0)
    model = create_model("RepMLPNet_T224", class_num=3, image_size=32)
    randomise_batch_norms(model)
    model.eval()
    return model


def resized(state: dict, to_size, from_size=32) -> RepMLPNet:
    model = change_resolution("RepMLPNet_T224", state, to_size, from_size, class_num=3)
    model.eval()
    return model


def test_the_same_resolution_is_the_same_network(tiny):
    state = tiny.state_dict()
    for name, value in resized(state, 32).state_dict().items():
        np.testing.assert_array_equal(value.numpy(), state[name].numpy(), err_msg=name)


def test_convolutions_are_kept_as_they_are(tiny):
    state = {name: value * 0 if name.endswith("fc3.weight") else value for name, value in tiny.state_dict().items()}
    old, new = resized(state, 32), resized(state, (64, 96))
    x = np.random.randn(2, 256, 4, 6).astype(np.float32)
    for form in (lambda block: block, RepMLPBlock.reparameterize):
        small, large = (form(model.stages[2][0].repmlp_block) for model in (old, new))
        corner = x[:, :, :2, :2]
        in_corner = outputs(small, corner) / as_array(small.gp(paddle.to_tensor(corner)))
        in_whole = outputs(large, x) / as_array(large.gp(paddle.to_tensor(x)))
        # The first pixel sees the same from both: all others of the corner have neighbours that were cut off.
        assert relative_error(in_whole[:, :, 0, 0], in_corner[:, :, 0, 0]) < 1e-5
        assert relative_error(in_whole[:, :, :2, :2], in_corner) > 1e-3


def test_maps_without_details_are_treated_as_before(tiny):
    state = tiny.state_dict()
    for to_size, factors in ((64, (2, 2)), ((96, 32), (3, 1))):
        small, large = (m.stages[1][0].repmlp_block for m in (tiny, resized(state, to_size)))
        flat = np.ones([1, 128, 4, 4], np.float32) * np.random.randn(128, 1, 1).astype(np.float32)
        before = fc3_only(small, flat)
        after = fc3_only(large, np.kron(flat, np.ones([1, 1, *factors], np.float32)))
        # Interpolated: means of what was there, and in all the same mean.
        assert after.max() <= before.max() + 1e-5
        assert after.min() >= before.min() - 1e-5
        axes = after.mean(axis=(2, 3)), before.mean(axis=(2, 3))
        assert relative_error(*axes) < 1e-5
        assert relative_error(after[:, :, 0, 0], before[:, :, 0, 0]) < 1e-5


def fc3_only(block: RepMLPBlock, x: np.ndarray) -> np.ndarray:
    rows = x.reshape(-1, block.num_sharesets, x.shape[2] * x.shape[3])
    weight = as_array(block.fc3.weight).reshape(block.num_sharesets, rows.shape[2], -1)
    return np.einsum("spq,msq->msp", weight, rows).reshape(x.shape)


def test_resolutions_that_are_refused(tiny):
    state = tiny.state_dict()
    fused, _ = reparameterize(tiny)
    with pytest.raises(CheckpointError, match="is in fused form: its convolutions are inside FC3.*the train form"):
        resized(fused.state_dict(), 64)
    converted = {name: value * 0 if ".repconv" in name else value for name, value in state.items()}
    with pytest.raises(CheckpointError, match=r"stages.0.0.repmlp_block: all convolutions are zero.*converted deploy"):
        resized(converted, 64)
    with pytest.raises(CheckpointError, match="of another shape.*fc3.weight"):
        resized(state, 64, from_size=96)
    with pytest.raises(ReparamError, match="must be a multiple of 32"):
        resized(state, 50)
    with pytest.raises(ReparamError, match="'ResNet18_SPConv' cannot be changed; that of RepMLPNet_T224, RepMLPNet_T2"):
        change_resolution("ResNet18_SPConv", state, 64)


# --- Published weight files ---------------------------------------------------------------------------------------


def published_shapes(deploy: bool = False) -> dict[str, list[int]]:
    """Return the published keys and shapes of RepMLPNet-T224 for 3 classes and 32x32 images, by its code's names."""
    shapes = {}

    def bn(name, channels):
        shapes.update({f"{name}.{last}": [channels] for last in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = []

    def conv_bn(name, shape):
        shapes[f"{name}.conv.weight"] = shape
        bn(f"{name}.bn", shape[0])

    conv_bn("conv_embedding", [64, 3, 4, 4])
    for i, (c, units, sets, pixels) in enumerate([(64, 2, 1, 64), (128, 2, 4, 16), (256, 6, 16, 4), (512, 2, 128, 1)]):
        for j in range(units):
            block = f"stages.{i}.{j}.repmlp_block"
            shapes[f"{block}.gp.fc1.weight"], shapes[f"{block}.gp.fc1.bias"] = [c // 4, c, 1, 1], [c // 4]
            shapes[f"{block}.gp.fc2.weight"], shapes[f"{block}.gp.fc2.bias"] = [c, c // 4, 1, 1], [c]
            shapes[f"{block}.fc3.weight"] = [sets * pixels, pixels, 1, 1]
            if deploy:
                shapes[f"{block}.fc3.bias"] = [sets * pixels]
            else:
                bn(f"{block}.fc3_bn", sets)
                conv_bn(f"{block}.repconv1", [sets, 1, 1, 1])
                conv_bn(f"{block}.repconv3", [sets, 1, 3, 3])
            conv_bn(f"stages.{i}.{j}.ffn_block.ffn_fc1", [4 * c, c, 1, 1])
            conv_bn(f"stages.{i}.{j}.ffn_block.ffn_fc2", [c, 4 * c, 1, 1])
            bn(f"stages.{i}.{j}.prebn1", c)
            bn(f"stages.{i}.{j}.prebn2", c)
        if i < 3:
            conv_bn(f"embeds.{i}", [2 * c, c, 2, 2])
    bn("head_norm", 512)
    shapes["head.weight"], shapes["head.bias"] = [3, 512], [3]
    return shapes


def convert(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return convert_state("RepMLPNet_T224", state, class_num=3, image_size=32)


def test_a_published_file_in_train_form():
    state = {f"module.{key}": np.array(np.random.randn(*shape)) for key, shape in published_shapes().items()}
    converted = convert(state)
    for key, value in state.items():
        key = key[len("module.") :].replace("running_mean", "_mean").replace("running_var", "_variance")
        if not key.endswith("num_batches_tracked"):
            value = value.T if key == "head.weight" else value
            np.testing.assert_array_equal(converted[key], value.astype(np.float32), err_msg=key)


def deploy_form_of(model: RepMLPNet) -> dict[str, np.ndarray]:
    """Return what the published code would write for the model in deploy form."""
    fused = {name: value.numpy() for name, value in reparameterize(model)[0].state_dict().items()}
    state = {}
    for key, shape in published_shapes(deploy=True).items():
        ours = key.replace("running_mean", "_mean").replace("running_var", "_variance").replace("fc3.", "")
        if ours.endswith("num_batches_tracked"):
            value = np.array(7)
        elif key.endswith("fc3.weight"):
            value = fused[ours].transpose(0, 2, 1)
        else:
            value = fused[ours].T if key == "head.weight" else fused[ours]
        state[key] = value.reshape(shape)
    return state


def test_a_published_file_in_deploy_form(tiny):
    state = deploy_form_of(tiny)
    model = create_model("RepMLPNet_T224", class_num=3, image_size=32)
    load_into(model, convert(state))
    model.eval()
    x = np.random.randn(2, 3, 32, 32).astype(np.float32)
    expected = outputs(tiny, x)
    assert relative_error(outputs(model, x), expected) < 1e-5
    fused, _ = reparameterize(model)
    assert relative_error(outputs(fused, x), expected) < 1e-5
    for name, value in reparameterize(tiny)[0].state_dict().items():
        # The BN that does nothing must not even scale by its epsilon.
        assert relative_error(fused.state_dict()[name], value) < 3e-7, name


def test_files_that_are_refused(tiny):
    state = deploy_form_of(tiny)
    trained = dict(state)
    trained["stages.1.0.repmlp_block.fc3.bias"] = np.arange(64, dtype=np.float32)
    with pytest.raises(CheckpointError, match=r"stages.1.0.repmlp_block.fc3.bias: the bias differs between the pixels"):
        convert(trained)
    lacking = {key: value for key, value in state.items() if key != "stages.0.0.repmlp_block.fc3.weight"}
    with pytest.raises(CheckpointError, match=r"missing: stages.0.0.repmlp_block.fc3.weight"):
        convert(lacking)
    with pytest.raises(CheckpointError, match="of another shape: .*fc3.weight"):
        convert_state("RepMLPNet_T224", state, class_num=3, image_size=64)
    both = {**state, "stages.0.0.repmlp_block.fc3_bn.weight": np.ones(1, np.float32)}
    with pytest.raises(CheckpointError, match="left over: stages.0.0.repmlp_block.fc3.bias"):
        convert(both)
