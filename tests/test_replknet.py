"""RepLKNet and its large-kernel layer: sizes, starting points, and published weight files, merged or not."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from helpers import as_array, relative_error
from network_contract import (
    check_exports,
    check_fused_is_the_same_function,
    check_one_step_changes_every_parameter,
    count,
    macs,
)
from paddle import nn

from paddle_reparam import registry
from paddle_reparam.arithmetic.geometry import ConvGeometry
from paddle_reparam.errors import CheckpointError, ReparamError, UnknownName, UnsupportedConv
from paddle_reparam.layers.replknet import ReparamLargeKernelConv2D
from paddle_reparam.models import replknet as networks
from paddle_reparam.models.replknet import _RepLKNet
from paddle_reparam.registry import create_model, get_model
from paddle_reparam.surgery.rewrite import reparameterize, replace
from paddle_reparam.weights.published import convert_state

# --- The layer ---------------------------------------------------------------------------------------------------


def test_a_small_kernel_that_is_not_smaller_is_left_out():
    for small_kernel in (None, 7, 100):
        assert "small_conv" not in ReparamLargeKernelConv2D(4, 7, small_kernel)._sub_layers
    assert ReparamLargeKernelConv2D(4, 7, 5).small_conv.conv.weight.shape == [4, 1, 5, 5]


def test_what_it_cannot_be_is_said():
    for sizes in ((8, 5), (7, 4), (7, 0)):
        with pytest.raises(UnsupportedConv, match=f"odd kernels.*kernel_size={sizes[0]} with small_kernel={sizes[1]}"):
            ReparamLargeKernelConv2D(4, *sizes)
    with pytest.raises(ReparamError, match="no init='zeros'; choose one of random, zero"):
        ReparamLargeKernelConv2D(4, 7, init="zeros")
    geometry = ConvGeometry.of(nn.Conv2D(4, 4, 5, padding=2, groups=4))
    with pytest.raises(UnsupportedConv, match="5x5 is not larger than small_kernel=5; choose a smaller"):
        ReparamLargeKernelConv2D.build(geometry, small_kernel=5)


@pytest.mark.parametrize(("kernel_size", "small"), [(3, 1), (5, 3), (7, 5), (31, 5)])
def test_in_a_network_the_small_kernel_is_five_or_less(kernel_size, small):
    model = nn.Sequential(nn.Conv2D(3, 4, 1), nn.Conv2D(4, 4, kernel_size, padding=kernel_size // 2, groups=4))
    report = replace(model, "ReparamLargeKernelConv2D")
    assert [path for path, _ in report.touched] == ["1"]
    assert model[1].small_conv.conv.weight.shape[2:] == [small, small]


def test_weights_start_within_the_published_bounds():
    layer = ReparamLargeKernelConv2D(64, 9)
    for conv, bound in ((layer.lkb_origin.conv, 1 / 9), (layer.small_conv.conv, 1 / 5)):
        largest = np.abs(as_array(conv.weight)).max()
        assert 0.95 * bound < largest <= bound
    head = _tiny().head
    assert 0.9 / math.sqrt(32) < np.abs(as_array(head.weight)).max() <= 1 / math.sqrt(32)
    assert 0 < np.abs(as_array(head.bias)).max() <= 1 / math.sqrt(32)


# --- The networks ------------------------------------------------------------------------------------------------


def _tiny(inner_ratio: float = 1.0, small_kernel: int | None = 5, **options) -> nn.Layer:
    options = {"drop_path_rate": 0.0, "class_num": 10, "kernel_sizes": (13, 11, 9, 7), **options}
    return _RepLKNet(channels=(4, 8, 16, 32), small_kernel=small_kernel, inner_ratio=inner_ratio, **options)


@pytest.fixture
def quick_start(monkeypatch):
    """Let networks start from zeros: drawing 335 million numbers takes long."""
    monkeypatch.setattr(nn.initializer, "Uniform", lambda low, high: nn.initializer.Constant(0.0))


# Parameters in millions, in train form and with the small kernels merged, counted with the published code;
# side of the image, and published multiply-adds (merged) in billions.
PUBLISHED = {
    "RepLKNet_31B": (79.864168, 79.527272, {224: 15.3, 384: 45.1}),
    "RepLKNet_31L": (172.671016, 172.165672, {384: 96.0}),
    "RepLKNet_XL": (335.435752, 335.399656, {320: 128.7}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_large_as_published(name, quick_start):
    train, merged, billions = PUBLISHED[name]
    model = create_model(name)
    assert count(model) / 1e6 == train
    layers = [layer for layer in model.sublayers() if isinstance(layer, ReparamLargeKernelConv2D)]
    assert len(layers) == 24
    # Merging gives every large convolution a bias and takes its branches' BNs and the small kernels away.
    branches = sum(count(layer) for layer in layers)
    model.eval()
    plain = sum(count(layer.reparameterize()) for layer in layers)
    assert (count(model) - branches + plain) / 1e6 == merged
    for size, published in billions.items():
        assert macs(model, size) / 1e9 == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(("inner_ratio", "small_kernel"), [(1.0, 5), (1.5, None)])
def test_fused_it_is_the_same_function(inner_ratio, small_kernel):
    model = _tiny(inner_ratio, small_kernel)
    fused = check_fused_is_the_same_function(model, [None, 3, 64, 64], [None, 3, 45, 70])
    left = [path for path, layer in fused.named_sublayers() if isinstance(layer, nn.BatchNorm2D)]
    # The mean over the map lies between the last BN and its reader.
    assert left == ["norm"]


def test_exports(tmp_path, monkeypatch):
    # Compiling and running the eight programs of all 48 blocks takes a minute.
    monkeypatch.setattr(networks, "_BLOCKS", (1, 1, 2, 1))
    # Of smaller images the last maps have so few values that their BNs make rounding large.
    check_exports(_tiny(), [None, 3, 96, 96], tmp_path)


def test_one_step_changes_every_parameter():
    check_one_step_changes_every_parameter(_tiny(), [None, 3, 64, 64])


def test_whole_samples_lose_a_block():
    model = _tiny(drop_path_rate=0.5)
    block = model.stages[3].blocks[2]
    assert block.drop_path.p == 0.5
    assert model.stages[0].blocks[0].drop_path.p == 0.0
    block.train()
    block.prelkb_bn.eval()
    x = paddle.randn([64, 32, 2, 2])
    change = as_array(block(x) - x).reshape(64, -1)
    kept = np.abs(change).max(axis=1) > 0
    assert 10 < kept.sum() < 54
    block.drop_path.p = 0.0
    undropped = as_array(block(x) - x).reshape(64, -1)
    assert relative_error(change[kept], 2 * undropped[kept]) < 1e-5
    block.eval()
    assert (np.abs(as_array(block(x) - x)).reshape(64, -1).max(axis=1) > 0).all()


def test_arguments_are_strict():
    with pytest.raises(ReparamError, match="no weights of RepLKNet_31B are published in Paddle's format; give"):
        create_model("RepLKNet_31B", pretrained=True)
    with pytest.raises(UnknownName, match="RepLKNet_XL has no argument 'depth'; it takes .*drop_path_rate"):
        create_model("RepLKNet_XL", depth=3)


# --- Published weight files --------------------------------------------------------------------------------------


def published_shapes(channels, kernels, small, ratio=1.0, classes=1000) -> dict[str, tuple]:
    """Return the keys and shapes of a published state dict."""
    shapes: dict[str, tuple] = {}

    def bn(path, width):
        shapes.update({f"{path}.{last}": (width,) for last in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{path}.num_batches_tracked"] = ()

    def conv_bn(path, *kernel):
        shapes[f"{path}.conv.weight"] = kernel
        bn(f"{path}.bn", kernel[0])

    width = channels[0]
    for i, kernel in enumerate([(width, 3, 3, 3), (width, 1, 3, 3), (width, width, 1, 1), (width, 1, 3, 3)]):
        conv_bn(f"stem.{i}", *kernel)
    for i, (width, size, depth) in enumerate(zip(channels, kernels, [2, 2, 18, 2])):
        inner = int(width * ratio)
        for j in range(depth):
            block = f"stages.{i}.blocks.{2 * j}"
            bn(f"{block}.prelkb_bn", width)
            conv_bn(f"{block}.pw1", inner, width, 1, 1)
            conv_bn(f"{block}.large_kernel.lkb_origin", inner, 1, size, size)
            if small:
                conv_bn(f"{block}.large_kernel.small_conv", inner, 1, small, small)
            conv_bn(f"{block}.pw2", width, inner, 1, 1)
            block = f"stages.{i}.blocks.{2 * j + 1}"
            bn(f"{block}.preffn_bn", width)
            conv_bn(f"{block}.pw1", 4 * width, width, 1, 1)
            conv_bn(f"{block}.pw2", width, 4 * width, 1, 1)
        if i < 3:
            conv_bn(f"transitions.{i}.0", channels[i + 1], width, 1, 1)
            conv_bn(f"transitions.{i}.1", channels[i + 1], 1, 3, 3)
    bn("norm", channels[-1])
    shapes["head.weight"], shapes["head.bias"] = (classes, channels[-1]), (classes,)
    return shapes


SIZES = {
    "RepLKNet_31B": ([128, 256, 512, 1024], [31, 29, 27, 13], 5),
    "RepLKNet_31L": ([192, 384, 768, 1536], [31, 29, 27, 13], 5),
    "RepLKNet_XL": ([256, 512, 1024, 2048], [27, 27, 27, 13], None, 1.5),
}


@pytest.mark.parametrize("name", ["RepLKNet_31B", "RepLKNet_XL"])
def test_the_published_keys_are_those_of_the_network(name, quick_start):
    shapes = published_shapes(*SIZES[name])
    state = {f"module.{key}": np.broadcast_to(np.float32(1), shape) for key, shape in shapes.items()}
    converted = convert_state(name, state)
    assert len(converted) == sum(not key.endswith("num_batches_tracked") for key in shapes)
    inner = {"RepLKNet_31B": 1024, "RepLKNet_XL": 3072}[name]
    assert converted["stages.3.blocks.2.large_kernel.lkb_origin.bn._variance"].shape == (inner,)


@pytest.fixture(params=[5, None], ids=["with small kernels", "without"])
def published(request, monkeypatch):
    """Return (a registered tiny network's name, its published state)."""
    small = request.param
    rename = get_model("RepLKNet_31B" if small else "RepLKNet_XL").rename
    entry = registry.ModelEntry(lambda **options: _tiny(1.5, small, **options), (), rename)
    monkeypatch.setitem(registry._models._entries, "Tiny", entry)
    generator = np.random.default_rng(0)
    state = {}
    for key, shape in published_shapes([4, 8, 16, 32], [13, 11, 9, 7], small, 1.5, 10).items():
        fan = math.prod(shape[1:]) if len(shape) > 1 else 4
        value = generator.uniform(0.5, 1.5, shape) if "var" in key else generator.standard_normal(shape) / fan**0.5
        state[key] = np.asarray(value, "float32")
    return "Tiny", state


def run(name, state, x):
    model = create_model(name)
    missing, unexpected = model.set_state_dict(convert_state(name, state))
    assert not missing
    assert not unexpected
    model.eval()
    return model, model(x)


def folded(state, path):
    """Return (kernel, bias) of a published convolution with its BN, and take both out of the state."""
    weight = state.pop(f"{path}.conv.weight").astype(np.float64)
    gamma, beta, mean, variance = (
        state.pop(f"{path}.bn.{last}").astype(np.float64) for last in ("weight", "bias", "running_mean", "running_var")
    )
    del state[f"{path}.bn.num_batches_tracked"]
    factor = gamma / np.sqrt(variance + 1e-5)
    return weight * factor[:, None, None, None], beta - mean * factor


@pytest.mark.parametrize("deep", [False, True], ids=["merged", "merged, BNs folded"])
def test_a_merged_file_becomes_a_train_form_that_computes_the_same(published, deep):
    name, state = published
    x = paddle.randn([2, 3, 64, 64])
    _, expected = run(name, state, x)
    merged = dict(state)
    for path in [key[: -len(".lkb_origin.conv.weight")] for key in state if "lkb_origin.conv" in key]:
        kernel, bias = folded(merged, f"{path}.lkb_origin")
        if f"{path}.small_conv.conv.weight" in merged:
            small, more_bias = folded(merged, f"{path}.small_conv")
            edge = (kernel.shape[-1] - 5) // 2
            kernel[:, :, edge:-edge, edge:-edge] += small
            bias = bias + more_bias
        merged[f"{path}.lkb_reparam.weight"], merged[f"{path}.lkb_reparam.bias"] = (
            a.astype("float32") for a in (kernel, bias)
        )
    for path in [key[: -len(".conv.weight")] for key in list(merged) if key.endswith(".conv.weight")] if deep else []:
        merged[f"{path}.conv.weight"], merged[f"{path}.conv.bias"] = (a.astype("float32") for a in folded(merged, path))
    before = {key: value.copy() for key, value in merged.items()}
    converted = convert_state(name, merged)
    # A BN divides by sqrt(1 + epsilon), so with this weight it leaves the convolution's output as it is.
    identity = converted["stages.0.blocks.0.large_kernel.lkb_origin.bn.weight"]
    np.testing.assert_allclose(identity / np.sqrt(1 + 1e-5), np.ones_like(identity), rtol=1e-7)
    model, actual = run(name, merged, x)
    assert relative_error(actual, expected) < 1e-5
    assert merged.keys() == before.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(merged[key], value, err_msg=f"converting changed {key}")
    # Every branch can still learn.
    assert all(np.abs(as_array(layer.weight)).max() > 0 for layer in model.sublayers() if isinstance(layer, nn.Conv2D))
    fused, _ = reparameterize(model)
    assert relative_error(fused(x), expected) < 1e-5


def test_what_is_missing_or_left_over_is_listed(published):
    name, state = published
    state = {**state, "more.weight": np.zeros(3, "float32")}
    del state["stem.0.bn.running_mean"]
    with pytest.raises(CheckpointError, match=r"(?s)1 missing: stem.0.bn._mean\n.*1 left over: more.weight"):
        convert_state(name, state)
