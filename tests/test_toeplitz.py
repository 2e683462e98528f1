"""A depthwise convolution as a matrix product is Paddle's convolution, and is chosen by one rule."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import test_golden
from helpers import as_array, relative_error
from paddle import nn

from paddle_reparam import create_model
from paddle_reparam.arithmetic.geometry import ConvGeometry
from paddle_reparam.errors import ReparamError
from paddle_reparam.layers import toeplitz
from paddle_reparam.layers.slak import DecomposedLargeKernelConv2D
from paddle_reparam.layers.toeplitz import DepthwiseConv2D, formulation, product_pays
from paddle_reparam.surgery.flops import measure
from paddle_reparam.training.sparsity import SparseTraining, add_masks

TOLERANCES = {"float64": 1e-14, "float32": 2e-6}
#: (images, channels, height, width), (kernel's height, width)
CASES = [
    ((2, 3, 9, 7), (5, 3)), ((2, 4, 7, 11), (3, 5)), ((1, 2, 5, 6), (13, 5)), ((3, 2, 6, 5), (5, 13)),
    ((2, 3, 8, 8), (5, 5)), ((2, 2, 1, 1), (3, 3)), ((2, 5, 4, 9), (1, 7)), ((2, 3, 9, 4), (7, 1)),
    ((1, 2, 31, 30), (31, 31)), ((2, 9, 14, 14), (51, 5)), ((2, 9, 14, 13), (5, 51)),
]  # fmt: skip


def random(*shape: int, dtype: str = "float64") -> paddle.Tensor:
    tensor = paddle.randn(shape, dtype=dtype)
    tensor.stop_gradient = False
    return tensor


def native(x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    return F.conv2d(x, weight, padding=[size // 2 for size in weight.shape[2:]], groups=weight.shape[0])


def product(x: paddle.Tensor, weight: paddle.Tensor) -> paddle.Tensor:
    [y] = toeplitz.depthwise_conv2d(x, [weight])
    return y


# ---------------------------------------------------------------------------------------------------------------------
# The function


@pytest.mark.parametrize("block_bytes", [1, 1 << 16, 4 << 20])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("shape", "kernel"), CASES)
def test_it_is_the_convolution_with_its_gradients(shape, kernel, dtype, block_bytes, monkeypatch):
    monkeypatch.setattr(toeplitz, "BLOCK_BYTES", block_bytes)
    x, weight = random(*shape, dtype=dtype), random(shape[1], 1, *kernel, dtype=dtype)
    y, expected = product(x, weight), native(x, weight)
    assert y.dtype == expected.dtype
    assert relative_error(y, expected) <= TOLERANCES[dtype]
    co_vector = paddle.randn(y.shape, dtype=dtype)
    actual, expected = (paddle.grad(out, [x, weight], co_vector) for out in (y, expected))
    for ours, theirs in zip(actual, expected):
        assert relative_error(ours, theirs) <= TOLERANCES[dtype]


def test_taps_that_meet_only_the_padding_get_a_gradient_of_zero():
    x, weight = random(2, 3, 4, 4), random(3, 1, 13, 5)
    [gradient] = paddle.grad(product(x, weight).sum(), [weight])
    rows = as_array(gradient).any(axis=(0, 1, 3))
    assert rows.tolist() == [3 <= row <= 9 for row in range(13)]


@pytest.mark.parametrize("wanted", [0, 1])
def test_each_gradient_can_be_had_alone(wanted):
    tensors = [random(2, 3, 6, 6), random(3, 1, 5, 5)]
    expected = paddle.grad(native(*tensors).square().sum(), [tensors[wanted]])[0]
    actual = paddle.grad(product(*tensors).square().sum(), [tensors[wanted]])[0]
    assert relative_error(actual, expected) <= 1e-13
    tensors[1 - wanted].stop_gradient = True
    product(*tensors).square().sum().backward()
    assert relative_error(tensors[wanted].grad, expected) <= 1e-13
    assert tensors[1 - wanted].grad is None


def test_without_gradients_nothing_is_kept():
    x, weight = random(1, 2, 6, 6), random(2, 1, 5, 5)
    with paddle.no_grad():
        assert product(x, weight).stop_gradient
    x.stop_gradient = weight.stop_gradient = True
    assert product(x, weight).stop_gradient


@pytest.mark.parametrize("block_bytes", [1, 4 << 20])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kernels", [[(13, 5), (5, 5)], [(5, 13), (5, 5), (5, 3)], [(5, 5), (5, 17)]])
def test_several_kernels_share_one_map(kernels, dtype, block_bytes, monkeypatch):
    monkeypatch.setattr(toeplitz, "BLOCK_BYTES", block_bytes)
    x, weights = random(2, 3, 9, 8, dtype=dtype), [random(3, 1, *kernel, dtype=dtype) for kernel in kernels]
    outputs, expected = toeplitz.depthwise_conv2d(x, weights), [native(x, weight) for weight in weights]
    co_vectors = [paddle.randn(y.shape, dtype=dtype) for y in expected]
    outputs += paddle.grad(outputs, [x, *weights], co_vectors)
    expected += paddle.grad(expected, [x, *weights], co_vectors)
    assert len(outputs) == len(expected) == 2 * len(kernels) + 1
    for ours, theirs in zip(outputs, expected):
        assert relative_error(ours, theirs) <= TOLERANCES[dtype]


def test_of_several_kernels_each_gradient_can_be_had_alone():
    x, weights = random(2, 3, 6, 6), [random(3, 1, 9, 5), random(3, 1, 5, 5)]
    for wanted in (x, *weights):
        actual, expected = (
            paddle.grad([y.square() for y in outputs], [wanted])[0]
            for outputs in (toeplitz.depthwise_conv2d(x, weights), [native(x, weight) for weight in weights])
        )
        assert relative_error(actual, expected) <= 1e-13
    frozen = random(3, 1, 9, 5).detach()
    sum(toeplitz.depthwise_conv2d(x, [frozen, weights[1]])).sum().backward()
    assert weights[1].grad is not None
    assert frozen.grad is None


def test_blocks_keep_to_their_size():
    def blocks_of(shape: tuple[int, ...], copies: int) -> list[slice]:
        return toeplitz.Shifts(np.zeros(shape, "float32"), copies, tall=False).blocks()

    blocks = blocks_of((2, 124, 56, 56), 5)
    sizes = [block.stop - block.start for block in blocks]
    assert [block.start for block in blocks] == [sum(sizes[:number]) for number in range(len(sizes))]
    assert sum(sizes) == 124
    assert max(sizes) == toeplitz.BLOCK_BYTES // (5 * 2 * 56 * 56 * 4) == 33
    assert blocks_of((64, 3, 56, 56), 31) == [slice(0, 1), slice(1, 2), slice(2, 3)]


def test_a_map_and_a_gradient_may_lie_in_memory_in_any_order():
    x, weights = random(9, 8, 3, 2).transpose([3, 2, 0, 1]), [random(3, 1, 5, 3), random(3, 1, 3, 5)]
    co_vector = paddle.randn([8, 9, 2, 3], dtype="float64").transpose([2, 3, 1, 0])
    ours, theirs = (
        [*outputs, *paddle.grad(outputs, [x, *weights], [co_vector, co_vector])]
        for outputs in (toeplitz.depthwise_conv2d(x, weights), [native(x, weight) for weight in weights])
    )
    for actual, expected in zip(ours, theirs):
        assert relative_error(actual, expected) <= 1e-14


@pytest.mark.parametrize("frozen", ["x", "weights"])
def test_what_is_frozen_costs_nothing_in_the_backward_pass(frozen, monkeypatch):
    calls = []
    for name in ("product", "gradient"):
        original = getattr(toeplitz.Shifts, name)
        monkeypatch.setattr(
            toeplitz.Shifts, name, lambda *given, name=name, original=original: calls.append(name) or original(*given)
        )
    x, weight = random(2, 3, 6, 6), random(3, 1, 5, 5)
    (x if frozen == "x" else weight).stop_gradient = True
    y = product(x, weight)
    calls.clear()
    y.sum().backward()
    assert calls == ["gradient" if frozen == "x" else "product"]


def test_what_a_graph_keeps_is_not_written_to_by_later_blocks_and_calls(monkeypatch):
    monkeypatch.setattr(toeplitz, "BLOCK_BYTES", 1)
    x, weights = random(2, 3, 6, 6), [random(3, 1, 7, 5), random(3, 1, 5, 7)]
    first = toeplitz.depthwise_conv2d(x, weights)
    kept = [as_array(y).copy() for y in first]
    gradients = [as_array(each) for each in paddle.grad(first, [x, *weights], retain_graph=True)]
    toeplitz.depthwise_conv2d(random(2, 3, 6, 6), weights)
    again = [as_array(each) for each in paddle.grad(first, [x, *weights])]
    for before, after in zip([*kept, *gradients], [*map(as_array, first), *again]):
        np.testing.assert_array_equal(before, after)


# ---------------------------------------------------------------------------------------------------------------------
# The rule and the layer


def test_the_rule():
    def pays(kernel: tuple[int, int], height: int, width: int, images: int = 2, device: str = "cpu") -> bool:
        return product_pays(kernel, [images, 100, height, width], device)

    for kernel, size in [
        ((51, 5), 56),
        ((5, 51), 56),
        ((47, 5), 14),
        ((31, 31), 56),
        ((51, 5), 200),
        ((7, 7), 14),
        ((7, 7), 112),
    ]:
        assert pays(kernel, size, size), (kernel, size)
    for kernel, size in [((5, 5), 14), ((7, 7), 113), ((9, 9), 145), ((1, 51), 817), ((13, 5), 209)]:
        assert not pays(kernel, size, size), (kernel, size)
    # The axis with less to multiply is the one that counts.
    assert pays((51, 5), 56, 1000)
    assert not pays((51, 5), 1000, 56)
    assert pays((13, 5), 14, 14, images=1)
    assert not pays((13, 5), 7, 7, images=1), "hardly any work"
    assert not pays((51, 5), 56, 56, device="gpu:0"), "untested there"


class Counter:
    """Counts calls of `depthwise_conv2d`, and keeps which kernels each had."""

    def __init__(self, monkeypatch) -> None:
        self.calls, self.kernels = 0, []
        original = toeplitz.depthwise_conv2d

        def counted(x, weights):
            self.calls += 1
            self.kernels.append([tuple(weight.shape[2:]) for weight in weights])
            return original(x, weights)

        monkeypatch.setattr(toeplitz, "depthwise_conv2d", counted)


def make(kernel: tuple[int, int] = (13, 5), **options) -> DepthwiseConv2D:
    options = {"padding": [size // 2 for size in kernel], "groups": 4, **options}
    return DepthwiseConv2D(4, 4, list(kernel), **options)


def test_the_layer_follows_the_rule_unless_told(monkeypatch):
    counter, layer, x = Counter(monkeypatch), make(), paddle.randn([32, 4, 12, 12])
    outputs = {}
    for name, calls in [("auto", 1), ("product", 1), ("native", 0)]:
        before = counter.calls
        with formulation(name):
            outputs[name] = layer(x)
        assert counter.calls - before == calls, name
    assert relative_error(outputs["product"], outputs["native"]) <= 2e-6
    np.testing.assert_array_equal(outputs["auto"].numpy(), outputs["product"].numpy())
    counter.calls = 0
    layer(paddle.randn([2, 4, 216, 216]))
    assert counter.calls == 0, "a map that is too large for the rule"
    with formulation("product"), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    layer(paddle.randn([2, 4, 216, 216]))
    assert counter.calls == 0, "an error leaves the formulation as it was"
    with pytest.raises(ReparamError, match="no formulation 'gemm'"), formulation("gemm"):
        pass


@pytest.mark.parametrize(
    "layer",
    [
        make(stride=2), make(dilation=2, padding=[12, 4]), make(padding=0), make((4, 4), padding=2), make(groups=2),
        make(padding_mode="circular", padding=2), DepthwiseConv2D(4, 8, 5, padding=2, groups=4),
    ],
    ids=["stride", "dilation", "padding", "even", "groups", "mode", "multiplier"],
)  # fmt: skip
def test_what_is_no_product_stays_native(layer, monkeypatch):
    counter = Counter(monkeypatch)
    x = paddle.randn([1, 4, 20, 20])
    with formulation("product"):
        np.testing.assert_array_equal(layer(x).numpy(), nn.Conv2D.forward(layer, x).numpy())
    assert counter.calls == 0


def test_a_bias_is_added():
    layer = make()
    layer.bias.set_value(paddle.randn([4]))
    outputs = {}
    for name in ("product", "native"):
        with formulation(name):
            outputs[name] = layer(paddle.ones([2, 4, 12, 12]))
    assert relative_error(outputs["product"], outputs["native"]) <= 2e-6


SHARED, APART = [[(13, 5), (5, 13), (5, 5)]], [[(13, 5)], [(5, 13)]]


@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("auto", (32, 4, 14, 14), SHARED),
        ("native", (32, 4, 14, 14), []),
        ("auto", (2, 4, 216, 216), []),
        ("product", (2, 4, 14, 15), SHARED),
        # The matrices of the tall kernel lie along the width, which asks for 13 copies; the others have 5.
        ("product", (2, 4, 42, 14), SHARED),
        # By the rule the wide kernel is no product on a map so wide.
        ("auto", (2, 4, 14, 210), [[(13, 5), (5, 5)]]),
    ],
)
def test_the_kernels_share_what_they_need(name, shape, expected, bn, monkeypatch):
    layer, x = DecomposedLargeKernelConv2D(4, 13, bn=bn), paddle.randn(shape)
    counter = Counter(monkeypatch)
    with formulation(name):
        y = layer(x)
    assert counter.kernels == expected
    with formulation("native"):
        assert relative_error(y, layer(x)) <= 5e-6


@pytest.mark.parametrize("place", ["LoRA1", "small_conv", "LoRA1.conv", "small_conv.conv"])
@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_layer_with_a_hook_is_called(place, kind, monkeypatch):
    layer, x, seen = DecomposedLargeKernelConv2D(4, 13), paddle.randn([32, 4, 14, 14]), []
    hooked = dict(layer.named_sublayers())[place]
    counter = Counter(monkeypatch)
    getattr(hooked, f"register_forward_{kind}_hook")(lambda *_: seen.append(place))
    layer(x)
    assert seen == [place]
    assert counter.kernels == APART


def test_both_biases_are_added():
    first, second, x = make(), make((5, 5)), paddle.randn([2, 4, 14, 14])
    for layer in (first, second):
        layer.bias.set_value(paddle.randn([4]))
    with formulation("product"):
        together = toeplitz.forward_all([first, second], x)
    for y, layer in zip(together, (first, second)):
        assert relative_error(y, nn.Conv2D.forward(layer, x)) <= 2e-6


def test_what_cannot_share_is_computed_on_its_own(monkeypatch):
    first, x, counter = make(), paddle.randn([32, 4, 14, 14]), Counter(monkeypatch)
    for other, together in ((make((5, 5)), True), (make((3, 3)), False), (make((5, 5), stride=2), False)):
        counter.kernels.clear()
        outputs = toeplitz.forward_all([first, other], x)
        assert counter.kernels == [[(13, 5), (5, 5)] if together else [(13, 5)]]
        for y, layer in zip(outputs, (first, other)):
            assert relative_error(y, nn.Conv2D.forward(layer, x)) <= 2e-6
    assert toeplitz.forward_all([make((3, 3)), make((5, 5))], x) is None


def test_it_counts_and_fuses_as_a_convolution():
    layer = make()
    assert ConvGeometry.of(layer).kernel_size == (13, 5)
    assert type(ConvGeometry.of(layer).make_conv(as_array(layer.weight), None)) is nn.Conv2D
    layer.eval()
    assert measure(layer, [[None, 4, 12, 12]]).macs_per_image == 4 * 12 * 12 * 65


def test_traced_it_is_the_native_convolution_for_any_size(tmp_path, monkeypatch):
    counter, layer = Counter(monkeypatch), nn.Sequential(make())
    layer.eval()
    traced = paddle.jit.to_static(copy.deepcopy(layer), input_spec=[paddle.static.InputSpec([None, 4, None, None])])
    with formulation("product"):
        paddle.jit.save(traced, str(tmp_path / "layer"))
    assert counter.calls == 0
    loaded = paddle.jit.load(str(tmp_path / "layer"))
    for size in ((12, 9), (3, 20)):
        x = paddle.randn([2, 4, *size])
        assert relative_error(loaded(x), layer(x)) <= 2e-6


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def of_large_kernels(path: Path) -> bool:
    return any(word in path.stem for word in ("slak", "replk"))


@pytest.mark.parametrize("name", ["product", "native"])
@pytest.mark.parametrize("path", filter(of_large_kernels, test_golden.REGISTERED), ids=lambda path: path.stem)
def test_both_formulations_compute_what_the_published_modules_do(path, name):
    with formulation(name):
        test_golden.check(test_golden.load(path))


def gradients(model: nn.Layer, x: paddle.Tensor, name: str) -> dict[str, np.ndarray]:
    with formulation(name):
        model(x).square().sum().backward()
    found = {path: as_array(p.grad) for path, p in model.named_parameters() if not p.stop_gradient}
    model.clear_gradients()
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
def test_a_network_has_the_same_gradients(dtype, tolerance):
    model = create_model("SLaK_micro")
    model.to(dtype=dtype)
    x = paddle.randn([4, 3, 32, 32], dtype=dtype)
    product, expected = (gradients(model, x, name) for name in ("product", "native"))
    for path, gradient in expected.items():
        assert relative_error(product[path], gradient) <= tolerance, path


def test_sparse_training_masks_the_gradients_of_a_product():
    model = create_model("SLaK_micro", kernel_size=[15, 7, 7, 7, 5])
    add_masks(model, 0.5, where=["*LoRA*"])
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=model.parameters())
    training = SparseTraining(model, optimizer, total_steps=4, update_frequency=2)
    for _ in range(3):
        with formulation("product"):
            model(paddle.randn([2, 3, 32, 32])).square().sum().backward()
        optimizer.step()
        optimizer.clear_grad()
    for place in training.places:
        assert not as_array(place.parameter)[~place.read_mask()].any()
        assert as_array(place.parameter).any()
