"""SLaK and ConvNeXt: the kernels' forms, the blocks, the networks as large as published, and published weights."""

from __future__ import annotations

import math

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from helpers import as_array, randomise_batch_norms, relative_error
from network_contract import (
    check_exports,
    check_fused_is_the_same_function,
    check_one_step_changes_every_parameter,
    count,
    macs,
)
from paddle import nn

from paddle_reparam import models  # noqa: F401 - registers them
from paddle_reparam.arithmetic.geometry import ConvGeometry
from paddle_reparam.arithmetic.kernels import crop_to_map
from paddle_reparam.errors import CheckpointError, ReparamError, UnsupportedConv
from paddle_reparam.layers.replknet import ReparamLargeKernelConv2D
from paddle_reparam.layers.slak import DecomposedLargeKernelConv2D, DecomposedLargeKernelConv2DFused
from paddle_reparam.models.convnext import ConvNeXt, ConvNeXtBlock, FusedBlock
from paddle_reparam.models.slak import SLaK, SLaKBlock
from paddle_reparam.registry import create_model
from paddle_reparam.surgery.flops import measure
from paddle_reparam.surgery.rewrite import reparameterize, replace
from paddle_reparam.weights.checkpoints import form_of
from paddle_reparam.weights.published import convert_state

MAPS = [(14, 14), (9, 16), (16, 3), (1, 5), (1, 1)]


def large_kernel(kernel_size: int = 13, small_kernel: int = 5, **options) -> DecomposedLargeKernelConv2D:
    layer = DecomposedLargeKernelConv2D(4, kernel_size, small_kernel, **options)
    layer.to(dtype="float64")
    randomise_batch_norms(layer)
    layer.eval()
    return layer


def scale_up(model: nn.Layer) -> nn.Layer:
    """Let the blocks matter: layer scales of either sign between 0.1 and 1, and every vector away from its start."""
    generator = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            value = generator.uniform(0.1, 1.0, parameter.shape) * generator.choice([-1.0, 1.0], parameter.shape)
        elif not parameter.stop_gradient and parameter.ndim == 1:
            value = as_array(parameter) + 0.3 * generator.standard_normal(parameter.shape)
        elif not parameter.stop_gradient:
            fan_in = parameter.shape[0] if parameter.ndim == 2 else math.prod(parameter.shape[1:])
            value = generator.standard_normal(parameter.shape) / math.sqrt(fan_in)
        else:
            continue
        parameter.set_value(paddle.to_tensor(value).astype(parameter.dtype))
    return model


def tiny_slak(**options) -> SLaK:
    arguments = {"kernel_size": [13, 11, 9, 7, 5], "class_num": 7, **options}
    return scale_up(SLaK((1, 1, 2, 1), (8, 12, 16, 20), **arguments))


def tiny_convnext(**options) -> ConvNeXt:
    return scale_up(ConvNeXt((1, 1, 2, 1), (8, 12, 16, 20), class_num=7, **options))


# --- The large kernel ---------------------------------------------------------------------------------------------


def formula(layer: DecomposedLargeKernelConv2D, x: np.ndarray) -> np.ndarray:
    """The sum over the branches, tap by tap, in numpy."""
    total = 0.0
    for branch in layer.children():
        kernel = as_array(branch.conv.weight)
        height, width = kernel.shape[2:]
        padded = np.pad(x, [(0, 0), (0, 0), (height // 2, height // 2), (width // 2, width // 2)])
        rows, columns = x.shape[2:]
        y = sum(
            padded[:, :, i : i + rows, j : j + columns] * kernel[None, :, 0, i, j, None, None]
            for i in range(height)
            for j in range(width)
        )
        if hasattr(branch, "bn"):
            mean, variance, weight, bias = (
                as_array(t)[:, None, None]
                for t in (branch.bn._mean, branch.bn._variance, branch.bn.weight, branch.bn.bias)
            )
            y = (y - mean) / np.sqrt(variance + 1e-5) * weight + bias
        total = total + y
    return total


@pytest.mark.parametrize(
    ("kernel_size", "small_kernel", "bn"), [(13, 5, True), (51, 5, True), (7, 3, False), (5, 5, True), (3, 7, True)]
)
def test_every_form_is_the_formula(kernel_size, small_kernel, bn):
    layer = large_kernel(kernel_size, small_kernel, bn=bn)
    fused = layer.reparameterize()
    cross = fused.cross()
    assert type(cross) is nn.Conv2D
    assert cross.weight.shape == [4, 1, *[max(kernel_size, small_kernel)] * 2]
    for size in MAPS:
        x = np.random.randn(2, 4, *size)
        expected = formula(layer, x)
        fitted = fused.for_size(*size) or fused
        for form in (layer, fused, cross, fitted, fitted.cross()):
            assert relative_error(form(paddle.to_tensor(x)), expected) < 1e-10, (size, form)


def test_there_is_no_small_kernel_that_is_not_smaller():
    assert [name for name, _ in large_kernel(13, 5).named_children()] == ["LoRA1", "LoRA2", "small_conv"]
    assert [name for name, _ in large_kernel(5, 5).named_children()] == ["LoRA1", "LoRA2"]


@pytest.mark.parametrize(
    ("size", "tall", "wide"),
    [((26, 26), None, None), ((7, 7), (13, 5), (5, 13)), ((7, 26), (13, 5), None), ((26, 2), (51, 3), (5, 3))],
)
def test_kernels_are_cropped_to_what_a_map_meets(size, tall, wide):
    fitted = large_kernel(51, 5).reparameterize().for_size(*size)
    if tall is None:
        assert fitted is None
    else:
        assert isinstance(fitted, DecomposedLargeKernelConv2DFused)
        assert tuple(fitted.tall._kernel_size) == tall
        assert tuple(fitted.wide._kernel_size) == (wide or (5, 51))


def test_cropped_kernels_refuse_larger_maps():
    layer = large_kernel(13, 5)
    fitted = layer.reparameterize().for_size(5, 6)
    smaller = paddle.randn([1, 4, 5, 4], dtype="float64")
    assert relative_error(fitted(smaller), layer(smaller)) < 1e-10
    with pytest.raises(ReparamError, match="cropped for maps of 5x6, and this one is 5x7; fuse again"):
        fitted(paddle.randn([1, 4, 5, 7], dtype="float64"))
    with pytest.raises(ReparamError, match="cropped for maps of 5x6, and this one is 6x6; fuse again"):
        fitted(paddle.randn([1, 4, 6, 6], dtype="float64"))
    spec = [paddle.static.InputSpec([None, 4, None, 6], "float64")]
    with pytest.raises(Exception, match=r"cropped for maps of 5x6, and this one is \?x6"):
        paddle.jit.to_static(fitted, input_spec=spec, full_graph=True).forward.concrete_program  # noqa: B018


def test_an_affine_goes_into_a_cropped_form():
    fitted = large_kernel(13, 5).reparameterize().for_size(5, 6)
    x = paddle.randn([2, 4, 5, 6], dtype="float64")
    scale, shift = np.array([1.5, -0.7, 0.0, 1e-3]), np.array([1.0, -2.0, 0.5, 0.0])
    expected = as_array(fitted(x)) * scale[:, None, None] + shift[:, None, None]
    fitted.absorb_affine(scale, shift)
    assert relative_error(fitted(x), expected) < 1e-10


def test_crop_to_map():
    kernel = np.arange(35.0).reshape(1, 1, 5, 7)
    np.testing.assert_array_equal(crop_to_map(kernel, 2, 3), kernel[:, :, 1:4, 1:6])
    np.testing.assert_array_equal(crop_to_map(kernel, 9, 1), kernel[:, :, :, 3:4])
    with pytest.raises(ReparamError, match="4x3 has no middle tap"):
        crop_to_map(np.ones((1, 1, 4, 3)), 2, 2)


@pytest.mark.parametrize(
    ("conv", "options", "reason"),
    [
        (nn.Conv2D(6, 6, 7, padding=3), {}, "depthwise convolutions only, this one is 6->6, 7x7"),
        (nn.Conv2D(6, 12, 7, padding=3, groups=6), {}, "depthwise convolutions only, this one is 6->12"),
        (nn.Conv2D(6, 6, 7, 2, 3, groups=6), {}, r"stride 1 and no dilation.*stride=\(2, 2\)"),
        (nn.Conv2D(6, 6, 7, 1, 6, 2, groups=6), {}, r"stride 1 and no dilation.*dilation=\(2, 2\)"),
        (nn.Conv2D(6, 6, (7, 9), 1, (3, 4), groups=6), {}, "odd square kernels only, this one is 6->6, 7x9"),
        (nn.Conv2D(6, 6, 8, 1, "SAME", groups=6), {}, "odd square kernels only, this one is 6->6, 8x8"),
        (nn.Conv2D(6, 6, 7, 1, 2, groups=6), {}, r"half its kernel \(3\).*padding \(2, 2, 2, 2\) in mode 'zeros'"),
        (nn.Conv2D(6, 6, 7, 1, 3, groups=6, padding_mode="reflect"), {}, "in mode 'reflect'"),
        (nn.Conv2D(6, 6, 7, 1, 3, groups=6, data_format="NHWC"), {}, "takes NCHW, this one takes NHWC"),
        (nn.Conv2D(6, 6, 5, 1, 2, groups=6), {}, "5x5 is not larger than small_kernel=5, so there is nothing to"),
        (nn.Conv2D(6, 6, 7, 1, 3, groups=6), {"kernel_size": 50}, "odd kernels, which keep.*kernel_size=50"),
        (nn.Conv2D(6, 6, 7, 1, 3, groups=6), {"small_kernel": 4}, "odd kernels, which keep.*small_kernel=4"),
    ],
)
def test_convolutions_that_are_refused(conv, options, reason):
    with pytest.raises(UnsupportedConv, match=reason):
        DecomposedLargeKernelConv2D.build(ConvGeometry.of(conv), **options)


def test_square_kernels_without_bns_take_no_bias():
    conv = nn.Conv2D(6, 6, 7, padding=3, groups=6)
    with pytest.raises(UnsupportedConv, match="no place for this convolution's bias"):
        ReparamLargeKernelConv2D.from_conv(conv, bn=False)
    with pytest.raises(ReparamError, match="starts as zero by its BNs"):
        ReparamLargeKernelConv2D.from_conv(conv, bn=False, init="zero")


# --- The blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_scale_init_value", [0.5, 0.0])
@pytest.mark.parametrize(
    "make",
    [
        lambda **o: SLaKBlock(6, 9, 5, **o),
        lambda **o: SLaKBlock(6, 9, 5, decomposed=False, **o),
        lambda **o: SLaKBlock(6, 9, 5, decomposed=False, bn=False, **o),
        lambda **o: ConvNeXtBlock(6, **o),
    ],
    ids=["decomposed", "square", "square without BNs", "ConvNeXt"],
)
def test_a_block_fuses(make, layer_scale_init_value):
    block = make(layer_scale_init_value=layer_scale_init_value, drop_path=0.5)
    assert (block.gamma is None) == (layer_scale_init_value == 0.0)
    scale_up(block)
    block.to(dtype="float64")
    randomise_batch_norms(block)
    block.eval()
    x = paddle.randn([2, 6, 7, 8], dtype="float64")
    before = {name: as_array(value).copy() for name, value in block.state_dict().items()}
    y, fused = block(x), block.reparameterize()
    assert isinstance(fused, FusedBlock)
    assert relative_error(fused(x), y) < 1e-10
    model = nn.Sequential(block)
    model.eval()
    folded, report = reparameterize(model, fold_bn=True, input_spec=[[None, 6, 7, 8]])
    assert relative_error(folded(x), y) < 1e-10
    assert folded[0].norm.weight is None, report
    assert not any(name.endswith(("gamma", "norm.weight", "norm.bias")) for name in folded.state_dict())
    for name, value in block.state_dict().items():
        np.testing.assert_array_equal(as_array(value), before[name], err_msg=name)
    block.re_parameterize()
    assert relative_error(block(x), y) < 1e-10


def test_a_block_is_its_formula():
    block = scale_up(ConvNeXtBlock(6))
    block.to(dtype="float64")
    block.eval()
    x = paddle.randn([2, 6, 7, 8], dtype="float64")
    state = {name: as_array(value) for name, value in block.state_dict().items()}
    y = as_array(block.dwconv(x)).transpose(0, 2, 3, 1)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = (y * state["norm.weight"] + state["norm.bias"]) @ state["pwconv1.weight"] + state["pwconv1.bias"]
    y = y * 0.5 * (1.0 + np.vectorize(math.erf)(y / math.sqrt(2.0)))
    y = (y @ state["pwconv2.weight"] + state["pwconv2.bias"]) * state["gamma"]
    assert relative_error(block(x), as_array(x) + y.transpose(0, 3, 1, 2)) < 1e-7  # epsilon is a float32 in Paddle


def test_drop_path_leaves_whole_samples_out():
    block = scale_up(ConvNeXtBlock(4, drop_path=0.25))
    x = paddle.randn([2000, 4, 2, 2])
    block.eval()
    branch = as_array(block(x)) - as_array(x)
    block.train()
    added = as_array(block(x)) - as_array(x)
    dropped = np.abs(added).max(axis=(1, 2, 3)) == 0.0
    assert 0.21 < dropped.mean() < 0.29
    assert relative_error(added[~dropped], branch[~dropped] / 0.75) < 1e-5
    again = np.abs(as_array(block(x)) - as_array(x)).max(axis=(1, 2, 3)) == 0.0
    assert 0 < (again != dropped).mean() < 0.5


def test_drop_path_grows_evenly_over_the_blocks():
    rates = [block.drop_path.p for stage in tiny_slak(drop_path_rate=0.4).stages for block in stage]
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.2, 0.3, 0.4], 1e-12)


# --- The networks -------------------------------------------------------------------------------------------------


@pytest.fixture
def cheap_weights(monkeypatch):
    """Constants instead of random weights: a hundred million random numbers take seconds."""
    for random in (nn.initializer.Normal, nn.initializer.Uniform, nn.initializer.XavierUniform):
        start = nn.initializer.Constant(0.5)
        monkeypatch.setattr(random, "__call__", lambda self, param, block=None, start=start: start(param, block))


# Millions of parameters, of those that masks may hold (two or four axes), and of multiply-adds at 224x224, counted with
# the published code.
SIZES = [
    ("SLaK_tiny", {}, 50.704, 50.577, 8705),
    ("SLaK_tiny", {"kernel_size": [31, 29, 27, 13, 5]}, 49.582, None, 8178),
    ("SLaK_tiny", {"kernel_size": [61, 59, 57, 13]}, 51.265, None, 8968),
    ("SLaK_tiny", {"kernel_size": [7, 7, 7, 7, 100], "width_factor": 1.0}, 28.596, None, 4456),
    ("SLaK_small", {}, 91.132, 90.879, 16604),
    ("SLaK_base", {}, 157.951, 157.614, 28509),
    ("ConvNeXt_T", {}, 28.589, None, 4456),
    ("ConvNeXt_S", {}, 50.224, None, 8684),
    ("ConvNeXt_B", {}, 88.591, None, 15355),
]


@pytest.mark.parametrize(("name", "options", "parameters", "maskable", "multiply_adds"), SIZES, ids=str)
def test_as_large_as_published(cheap_weights, name, options, parameters, maskable, multiply_adds):
    model = create_model(name, **options)
    assert round(count(model) / 1e6, 3) == parameters
    if maskable is not None:
        shapes = [p.shape for p in model.parameters() if not p.stop_gradient and len(p.shape) in (2, 4)]
        assert round(sum(map(math.prod, shapes)) / 1e6, 3) == maskable
    # At 224x224 every map has 49 times as many pixels; the classifier stays as it is.
    last = math.prod(model.head.weight.shape)
    assert round(((macs(model, 32) - last) * 49 + last) / 1e6) == multiply_adds


def test_where_the_multiply_adds_are(cheap_weights):
    """Of SLaK-T's, 1.384 G are in the large kernels and 7.009 G in the fully connected layers of the blocks."""
    model = create_model("SLaK_tiny")
    model.eval()
    large = pointwise = 0
    for stage, side in zip(model.stages, (56, 28, 14, 7)):
        block, dim = stage[0], stage[0].pwconv1.weight.shape[0]
        kernel = measure(block.large_kernel, [[None, dim, side, side]]).macs_per_image
        whole = measure(block, [[None, dim, side, side]]).macs_per_image
        large, pointwise = large + len(stage) * kernel, pointwise + len(stage) * (whole - kernel)
    assert round(large / 1e9, 3) == 1.384
    assert round(pointwise / 1e9, 3) == 7.009


def test_non_zero_parameters_are_counted():
    model = tiny_slak(bn=False)
    model.eval()
    total = count(model)
    assert measure(model, [[None, 3, 32, 32]]).nonzero_parameters == total
    weight = model.stages[0][0].large_kernel.LoRA1.conv.weight
    mask = paddle.arange(weight.size).reshape(weight.shape) % 5 < 2
    weight.set_value(weight * mask.astype(weight.dtype))
    size = measure(model, [[None, 3, 32, 32]])
    assert size.nonzero_parameters == total - weight.size * 3 // 5
    assert size.parameters == total


def test_weights_start_from_a_normal_distribution():
    model = SLaK((1, 1, 1, 1), (32, 48, 64, 80), 50, (13, 11, 9, 7), head_init_scale=3.0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            # A truncation at two standard deviations would make it 0.88 of this.
            expected = 0.06 if name == "head.weight" else 0.02
            assert abs(float(parameter.std()) / expected - 1) < 4 / math.sqrt(2 * parameter.size), name
        elif name.endswith("gamma"):
            np.testing.assert_allclose(parameter.numpy(), 1e-6)
        elif name.endswith("bias"):
            assert not parameter.any()


@pytest.mark.parametrize(
    ("make", "kernel"),
    [
        (tiny_slak, DecomposedLargeKernelConv2D),
        (lambda: tiny_slak(decomposed=False), ReparamLargeKernelConv2D),
        (lambda: tiny_slak(bn=False), DecomposedLargeKernelConv2D),
        (lambda: tiny_slak(decomposed=False, bn=False, kernel_size=[9, 9, 7, 3]), ReparamLargeKernelConv2D),
        (lambda: tiny_slak(kernel_size=[7, 7, 7, 7, 100]), ReparamLargeKernelConv2D),
        (lambda: tiny_slak(kernel_size=[31, 29, 27, 13]), DecomposedLargeKernelConv2D),
        (tiny_convnext, nn.Conv2D),
    ],
    ids=["SLaK", "square", "without BNs", "square, without BNs", "without small kernels", "31", "ConvNeXt"],
)
def test_all_forms_are_the_same_network(make, kernel):
    model = make()
    assert all(isinstance(next(block.children()), kernel) for stage in model.stages for block in stage)
    fused = check_fused_is_the_same_function(model, [None, 3, 64, 64], [None, 3, 71, 38])
    # What is left of the norms in the blocks and before the head has no weights of its own.
    assert fused.norm.weight is None
    assert not any(name.startswith("stages") and "norm" in name for name in fused.state_dict())


def test_fused_for_one_size_the_kernels_are_smaller():
    model = tiny_slak()
    model.eval()
    fused, report = reparameterize(model, fold_bn=True, input_spec=[[None, 3, 64, 96]], fixed_size=True)
    sizes = [tuple(fused.stages[i][0].large_kernel.tall._kernel_size) for i in range(4)]
    assert sizes == [(13, 5), (11, 5), (7, 5), (3, 5)]
    fitted = dict(report.touched)["stages.3.0.large_kernel"]
    assert fitted == "for maps of 2x3: DecomposedLargeKernelConv2DFused(3x5, 3x5)"
    with pytest.raises(ReparamError, match="cropped for maps of 4x6, and this one is 6x6"):
        fused(paddle.randn([1, 3, 96, 96]))


def test_exports(tmp_path):
    check_exports(tiny_slak(), [None, 3, 64, 64], tmp_path)


@pytest.mark.parametrize(
    "make", [lambda *args: SLaK(*args, (13, 11, 9, 7), drop_path_rate=0.9), ConvNeXt], ids=["SLaK", "ConvNeXt"]
)
def test_one_step_changes_every_parameter(make):
    """As they start: with layer scales of 1e-6."""
    check_one_step_changes_every_parameter(make((1, 1, 2, 1), (8, 12, 16, 20), 7), [None, 3, 64, 64])


def test_large_kernels_in_the_place_of_small_ones():
    model = tiny_convnext()
    report = replace(model, "DecomposedLargeKernelConv2D", where="stages.*", kernel_size=51)
    assert [path for path, _ in report.touched] == [
        f"stages.{i}.{j}.dwconv" for i in range(4) for j in range(1 + (i == 2))
    ]
    assert model.stages[0][0].dwconv.LoRA1.conv.weight.shape == [8, 1, 51, 5]
    check_fused_is_the_same_function(model, [None, 3, 64, 64])
    with pytest.raises(ReparamError, match="it is part of a DecomposedLargeKernelConv2D"):
        replace(model, "RefConv2D", where="stages.*")
    model = tiny_convnext()
    model.eval()
    fused, _ = reparameterize(model)
    replace(model, "RefConv2D", where="stages.*", init="zero")
    x = paddle.randn([1, 3, 64, 64])
    assert relative_error(reparameterize(model)[0](x), fused(x)) < 1e-5
    model.stages[0][0].re_parameterize()
    with pytest.raises(ReparamError, match="it is part of a ConvNeXtBlock"):
        replace(model, "DecomposedLargeKernelConv2D", where="stages.0.*")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 51}, "kernel_size=51: SLaK needs one kernel size for each of its four stages"),
        ({"kernel_size": [51, 49, 47]}, r"kernel_size=\[51, 49, 47\]: SLaK needs one kernel size"),
        ({"kernel_size": [51, 49, 47, 12]}, "kernel_size=12 with small_kernel=5"),
        ({"kernel_size": [51, 49, 47, 13, 6]}, "kernel_size=51 with small_kernel=6"),
        ({"width_factor": 0.001}, r"width_factor=0.001 leaves a stage without channels: \[0, 0, 0, 0\]"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0 is no share of samples"),
        ({"drop_path_rate": -0.1}, "drop_path_rate=-0.1 is no share of samples"),
    ],
)
def test_options_that_make_no_network(options, message):
    with pytest.raises(ReparamError, match=message):
        tiny_slak(**options)


# --- Published weights --------------------------------------------------------------------------------------------


def published_state(spatial: dict[str, tuple], norms: list[str], class_num: int) -> dict[str, np.ndarray]:
    """Return arrays under the published names of a T network: those of the blocks' kernels are given."""
    shapes: dict[str, tuple] = {}

    def norm(path: str, size: int) -> None:
        shapes.update({f"{path}.weight": (size,), f"{path}.bias": (size,)})

    def dense(path: str, *shape: int) -> None:
        shapes.update({f"{path}.weight": shape, f"{path}.bias": shape[:1]})

    dims = [12, 24, 49, 99] if norms else [96, 192, 384, 768]
    dense("downsample_layers.0.0", dims[0], 3, 4, 4)
    norm("downsample_layers.0.1", dims[0])
    for i in range(1, 4):
        norm(f"downsample_layers.{i}.0", dims[i - 1])
        dense(f"downsample_layers.{i}.1", dims[i], dims[i - 1], 2, 2)
    for stage, (dim, depth) in enumerate(zip(dims, [3, 3, 9, 3])):
        for block in range(depth):
            path = f"stages.{stage}.{block}"
            shapes[f"{path}.gamma"] = (dim,)
            for name, shape in spatial.items():
                shapes[f"{path}.{name}"] = (dim, *shape)
            for name in norms:
                norm(f"{path}.{name}", dim)
                shapes.update({f"{path}.{name}.running_mean": (dim,), f"{path}.{name}.running_var": (dim,)})
                shapes[f"{path}.{name}.num_batches_tracked"] = ()
            norm(f"{path}.norm", dim)
            dense(f"{path}.pwconv1", 4 * dim, dim)
            dense(f"{path}.pwconv2", dim, 4 * dim)
    norm("norm", dims[-1])
    dense("head", class_num, dims[-1])
    generator = np.random.default_rng(0)
    return {name: generator.random(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("parallel", [False, True])
def test_published_weights_of_slak(parallel):
    kernels = {"LoRA1": (1, 9, 5), "LoRA2": (1, 5, 9), "small_conv": (1, 5, 5)}
    spatial = {f"large_kernel.{name}.conv.weight": shape for name, shape in kernels.items()}
    state = published_state(spatial, [f"large_kernel.{name}.bn" for name in kernels], 5)
    options = {"kernel_size": [9, 9, 9, 9, 5], "width_factor": 0.13, "class_num": 5}
    given = {f"module.{key}": value for key, value in state.items()} if parallel else state
    converted = convert_state("SLaK_tiny", given, **options)
    assert form_of(converted) == "train"
    model = create_model("SLaK_tiny", **options)
    missing, unexpected = model.set_state_dict(converted)
    assert not missing
    assert not unexpected
    block, path = model.stages[2][7], "stages.2.7"
    for tensor, key in (
        (block.large_kernel.LoRA2.conv.weight, "large_kernel.LoRA2.conv.weight"),
        (block.large_kernel.LoRA2.bn._variance, "large_kernel.LoRA2.bn.running_var"),
        (block.gamma, "gamma"),
        (block.pwconv1.bias, "pwconv1.bias"),
        (block.pwconv1.weight.T, "pwconv1.weight"),
    ):
        np.testing.assert_array_equal(tensor.numpy(), state[f"{path}.{key}"], err_msg=key)
    np.testing.assert_array_equal(model.head.weight.numpy(), state["head.weight"].T)
    with pytest.raises(CheckpointError, match="not those of SLaK_tiny"):
        convert_state("SLaK_tiny", state, **{**options, "decomposed": False})


def test_published_weights_of_convnext(cheap_weights):
    state = published_state({"dwconv.weight": (1, 7, 7), "dwconv.bias": ()}, [], 5)
    model = create_model("ConvNeXt_T", class_num=5)
    missing, unexpected = model.set_state_dict(convert_state("ConvNeXt_T", state, class_num=5))
    assert not missing
    assert not unexpected
    block = model.stages[2][7]
    np.testing.assert_array_equal(block.dwconv.bias.numpy(), state["stages.2.7.dwconv.bias"])
    np.testing.assert_array_equal(block.pwconv2.weight.numpy(), state["stages.2.7.pwconv2.weight"].T)


@pytest.mark.parametrize("learns", ["all", "weights", "biases", "none"])
def test_the_fully_connected_layers_of_a_block_are_those_of_paddle(learns):
    block = ConvNeXtBlock(6, layer_scale_init_value=0.5)
    block.to(dtype="float64")
    for bias in (block.pwconv1.bias, block.pwconv2.bias):
        bias.set_value(paddle.randn(bias.shape, dtype="float64"))
    for parameter in block.parameters():
        parameter.stop_gradient = {"all": False, "none": True}.get(
            learns, (parameter.ndim > 1) != (learns == "weights")
        )
    x = paddle.randn([2, 6, 5, 4], dtype="float64")
    x.stop_gradient = False
    y = block.norm(block.dwconv(x).transpose([0, 2, 3, 1]))
    y = F.linear(
        F.gelu(F.linear(y, block.pwconv1.weight, block.pwconv1.bias)), block.pwconv2.weight, block.pwconv2.bias
    )
    outputs = block(x), x + (block.gamma * y).transpose([0, 3, 1, 2])
    assert relative_error(*outputs) <= 1e-14
    wanted = [x, *(parameter for parameter in block.parameters() if not parameter.stop_gradient)]
    co_vector = paddle.randn(x.shape, dtype="float64")
    alone = [paddle.grad(outputs[0], [each], co_vector, retain_graph=True)[0] for each in wanted]
    ours, theirs = (paddle.grad(y, wanted, co_vector) for y in outputs)
    for actual, by_itself, expected in zip(ours, alone, theirs):
        assert relative_error(actual, expected) <= 1e-13
        assert relative_error(by_itself, expected) <= 1e-13
