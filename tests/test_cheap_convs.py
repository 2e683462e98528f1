"""GhostConv2D, HetConv2D and OctConv2D: formulas in numpy, pairs and maps, odd sizes, exports, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paddle
import pytest
from contract import CASES, randomise
from helpers import as_array, check_in_bfloat16, missing_for_onnx, relative_error
from paddle import nn

from paddle_reparam.arithmetic.geometry import BATCH_NORMS, ConvGeometry
from paddle_reparam.deploy.export import export_inference
from paddle_reparam.deploy.onnx_export import export_onnx
from paddle_reparam.deploy.runtimes import get_runtime
from paddle_reparam.errors import ReparamError, UnsupportedConv
from paddle_reparam.layers.ghost import GhostConv2D
from paddle_reparam.layers.hetconv import HetConv2D
from paddle_reparam.layers.octconv import OctConv2D
from paddle_reparam.registry import get_layer
from paddle_reparam.surgery.flops import measure
from paddle_reparam.surgery.rewrite import reparameterize
from paddle_reparam.surgery.rewrite import replace as put_in

SIZES = [(8, 6), (7, 6), (8, 5), (7, 9)]


def geometry_of(*arguments, dtype: str = "float64", **options) -> ConvGeometry:
    return replace(ConvGeometry.of(nn.Conv2D(*arguments, **options)), dtype=dtype)


def convolve(x: np.ndarray, conv: nn.Conv2D) -> np.ndarray:
    """Run a convolution of `nn.Conv2D` with zero padding as sums over its taps; `x` [N, C, H, W]."""
    geometry, kernel = ConvGeometry.of(conv), as_array(conv.weight)
    top, bottom, left, right = geometry.padding
    x = np.pad(x, [(0, 0), (0, 0), (top, bottom), (left, right)])
    (k_h, k_w), (d_h, d_w), (s_h, s_w) = geometry.kernel_size, geometry.dilation, geometry.stride
    rows, columns = ((x.shape[2] - d_h * (k_h - 1) - 1) // s_h + 1, (x.shape[3] - d_w * (k_w - 1) - 1) // s_w + 1)
    y = np.zeros((len(x), geometry.out_channels, rows, columns))
    for i, j in np.ndindex(k_h, k_w):
        taps = x[:, :, i * d_h :: s_h, j * d_w :: s_w][:, :, :rows, :columns]
        parts = zip(np.split(taps, geometry.groups, 1), np.split(kernel[:, :, i, j], geometry.groups))
        y += np.concatenate([np.einsum("nchw,oc->nohw", t, k) for t, k in parts], axis=1)
    return y if conv.bias is None else y + as_array(conv.bias)[:, None, None]


def normalise(y: np.ndarray, bn: nn.BatchNorm2D) -> np.ndarray:
    mean, variance, weight, bias = (as_array(t)[:, None, None] for t in (bn._mean, bn._variance, bn.weight, bn.bias))
    return (y - mean) / np.sqrt(variance + 1e-5) * weight + bias


def test_they_cost_what_the_papers_say():
    """Multiply-adds of a 3x3 convolution of 16 to 32 channels at stride 1, as shares of it."""
    plain = nn.Conv2D(16, 32, 3, padding=1, bias_attr=False)
    plain.eval()
    costs = {}
    for name, options in (("GhostConv2D", {"ratio": 4}), ("HetConv2D", {"parts": 4}), ("OctConv2D", {})):
        layer = get_layer(name).layer.from_conv(plain, **options)
        for form in (layer, layer.reparameterize()):
            costs.setdefault(name, []).append(measure(form, [[None, 16, 8, 8]]).macs_per_image)
    whole = measure(plain, [[None, 16, 8, 8]]).macs_per_image
    assert costs["GhostConv2D"] == [(8 * 16 * 9 + 24 * 9) * 64] * 2
    assert costs["HetConv2D"] == [whole * (1 / 4 + 1 / 9), whole]
    assert costs["OctConv2D"] == [whole * (1 - 3 / 4 * 0.5 * (2 - 0.5))] * 2


# --- GhostConv2D --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ratio": 3, "dw_size": 5}, {"act": False}], ids=str)
def test_ghost_in_numpy(options):
    layer = randomise(GhostConv2D(geometry_of(4, 10, 3, 2, 1), **options))
    layer.eval()
    x = np.random.default_rng(0).standard_normal((2, 4, 7, 6))

    def activate(y):
        return np.maximum(y, 0.0) if options.get("act", True) else y

    primary = activate(normalise(convolve(x, layer.primary_conv[0]), layer.primary_conv[1]))
    ghost = activate(normalise(convolve(primary, layer.cheap_operation[0]), layer.cheap_operation[1]))
    expected = np.concatenate([primary, ghost], 1)[:, :10]
    assert (expected == 0.0).any() == options.get("act", True)
    for form in (layer, layer.reparameterize()):
        assert relative_error(form(paddle.to_tensor(x)), expected) < 1e-10


def test_ghost_computes_a_share_of_the_channels():
    layer = GhostConv2D(geometry_of(8, 10, 3, padding=1), ratio=4)
    assert layer.primary_conv[0].weight.shape == [3, 8, 3, 3]
    assert layer.cheap_operation[0].weight.shape == [9, 1, 3, 3]
    assert layer.extra_repr() == "8->10, 3x3, primary=3"


def test_a_bn_behind_ghost_stays_and_says_why():
    net = nn.Sequential(nn.Conv2D(3, 8, 3, padding=1), nn.BatchNorm2D(8))
    put_in(net, "GhostConv2D")
    net.eval()
    fused, report = reparameterize(net, fold_bn=True, input_spec=[[None, 3, 8, 8]])
    assert isinstance(fused[1], nn.BatchNorm2D)
    assert "a BN behind it stays" in dict(report.skipped)["1"]


# --- HetConv2D ----------------------------------------------------------------------------------------------------


def of_parts(layer: HetConv2D, parts: int) -> np.ndarray:
    """Return the dense kernel as the paper says it, filter by filter and channel by channel."""
    spatial, pointwise = as_array(layer.gwc.weight), as_array(layer.pwc.weight)[:, :, 0, 0]
    out_channels, group_in = pointwise.shape
    k_h, k_w = spatial.shape[2:]
    dense = np.zeros((out_channels, group_in, k_h, k_w))
    filters_of_a_part = out_channels // layer.groups // parts
    for j in range(out_channels):
        own = (j // filters_of_a_part) % parts
        for c in range(group_in):
            dense[j, c, k_h // 2, k_w // 2] = pointwise[j, c]
            if c // (group_in // parts) == own:
                dense[j, c] += spatial[j, c % (group_in // parts)]
    return dense


@pytest.mark.parametrize("case", CASES, ids=str)
def test_het_is_one_dense_convolution(case):
    """In parts of two, which most channels of these are: the kernel is the paper's, to the last bit of float64."""
    try:
        layer = HetConv2D.from_conv(case.conv(), parts=2)
    except UnsupportedConv:
        return
    randomise(layer).eval()
    fused = layer.reparameterize()
    np.testing.assert_array_equal(as_array(fused.weight), of_parts(layer, 2))
    for x in case.inputs_of_all_sizes("float64"):
        assert relative_error(fused(x), layer(x)) < 1e-10


def test_het_takes_most_convolutions():
    taken = 0
    for case in CASES:
        try:
            HetConv2D.from_conv(case.conv(), parts=2)
            taken += 1
        except UnsupportedConv:
            pass
    assert taken >= 20


def test_het_has_the_kernels_that_the_paper_counts():
    """M / P channels of each filter have kxk kernels, all others one number."""
    layer = randomise(HetConv2D(geometry_of(8, 16, 3, padding=1)))
    layer.eval()
    numbers = (as_array(layer.reparameterize().weight) != 0.0).sum(axis=(2, 3))
    assert sorted(set(numbers.reshape(-1))) == [1, 9]
    assert ((numbers == 9).sum(axis=1) == 8 // 4).all()
    assert ((numbers == 9).sum(axis=0) == 16 // 4).all()


def test_het_in_numpy_with_gradients_by_finite_differences():
    layer = randomise(HetConv2D(geometry_of(4, 4, 3, padding=1, stride=2), parts=2))
    generator = np.random.default_rng(1)
    x, r = generator.standard_normal((2, 4, 5, 6)), generator.standard_normal((2, 4, 3, 3))

    def loss(values: dict[str, np.ndarray]) -> float:
        for name, parameter in layer.named_parameters():
            parameter.set_value(paddle.to_tensor(values[name]))
        spatial = convolve(values["x"], layer.gwc)
        pointwise = np.einsum("nchw,oc->nohw", values["x"][:, :, ::2, ::2], values["pwc.weight"][:, :, 0, 0])
        return float(((spatial + pointwise) * r).sum())

    values = {"x": x, **{name: as_array(p).copy() for name, p in layer.named_parameters()}}
    given = paddle.to_tensor(x, stop_gradient=False)
    total = (layer(given) * paddle.to_tensor(r)).sum()
    assert abs(float(total) - loss(values)) < 1e-10 * abs(loss(values))
    total.backward()
    gradients = {"x": given.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    for name, gradient in gradients.items():
        gradient = as_array(gradient)
        for place in generator.choice(gradient.size, 4):
            ends = []
            for step in (1e-4, -1e-4):
                moved = {key: value.copy() for key, value in values.items()}
                moved[name].reshape(-1)[place] += step
                ends.append(loss(moved))
            assert abs((ends[0] - ends[1]) / 2e-4 - gradient.reshape(-1)[place]) < 1e-7 * np.abs(gradient).max()


# --- OctConv2D ----------------------------------------------------------------------------------------------------


def halve(x: np.ndarray) -> np.ndarray:
    """Average what is there of each 2x2 pixels."""
    y = np.zeros((*x.shape[:2], -(-x.shape[2] // 2), -(-x.shape[3] // 2)))
    for i, j in np.ndindex(*y.shape[2:]):
        y[:, :, i, j] = x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean(axis=(2, 3))
    return y


def double(x: np.ndarray, like: np.ndarray) -> np.ndarray:
    return x.repeat(2, axis=2).repeat(2, axis=3)[:, :, : like.shape[2], : like.shape[3]]


def octave(layer: OctConv2D, high: np.ndarray, low: np.ndarray | None) -> tuple:
    """The paper's formula."""
    given = low
    if layer.stride == 2:
        high, low = halve(high), None if low is None else halve(low)
    new_high = convolve(high, layer.conv_h2h)
    if layer.conv_l2h is not None:
        of_low = convolve(given, layer.conv_l2h)
        new_high = new_high + (of_low if layer.stride == 2 else double(of_low, new_high))
    of_high = 0.0 if layer.conv_h2l is None else convolve(halve(high), layer.conv_h2l)
    of_low = 0.0 if layer.conv_l2l is None else convolve(low, layer.conv_l2l)
    new_low = of_high + of_low if layer.out_channels[1] else None
    if layer.bn_h is not None:
        new_high = normalise(new_high, layer.bn_h)
    if layer.bn_l is not None:
        new_low = normalise(new_low, layer.bn_l)
    return new_high, new_low


OCTAVES = {
    "middle": (geometry_of(8, 6, 3, 1, 1), {}),
    "middle, stride 2, no bias": (geometry_of(8, 6, 3, 2, 1, bias_attr=False), {"bn": True}),
    "first": (geometry_of(3, 8, 3, 1, 1), {"alpha_in": 0.0, "alpha_out": 0.25, "bn": True}),
    "first, stride 2": (geometry_of(3, 8, 5, 2, 2), {"alpha_in": 0.0}),
    "last": (geometry_of(8, 6, 3, 1, 1), {"alpha_in": 0.75, "alpha_out": 0.0, "bn": True}),
    "last, stride 2": (geometry_of(8, 6, 3, 2, 1), {"alpha_out": 0.0}),
    "depthwise": (geometry_of(8, 16, 3, 1, 1, groups=8), {"alpha_in": 0.25, "alpha_out": 0.25, "bn": True}),
    "depthwise, stride 2": (geometry_of(6, 6, 5, 2, 4, 2, groups=6), {}),
    "1x1": (geometry_of(8, 6, 1), {"bn": True}),
    "rectangular and even": (geometry_of(8, 6, (4, 3), 1, [1, 2, 1, 1]), {}),
}


def make_octave(name: str, dtype: str = "float64") -> OctConv2D:
    geometry, options = OCTAVES[name]
    layer = randomise(OctConv2D(replace(geometry, dtype=dtype), **options))
    layer.eval()
    return layer


@pytest.mark.parametrize("name", OCTAVES)
def test_octaves_in_numpy(name):
    """Of pairs and of maps, in train form and fused, for even and odd sides."""
    layer = make_octave(name)
    high_in, low_in = layer.channels
    generator = np.random.default_rng(0)
    for form in (layer, layer.reparameterize()):
        for size in SIZES:
            x = generator.standard_normal((2, high_in + low_in, *size))
            high, low = x[:, :high_in], halve(x[:, high_in:]) if low_in else None
            expected = octave(layer, high, low)
            pair = form(tuple(None if part is None else paddle.to_tensor(part) for part in (high, low)))
            assert relative_error(pair[0], expected[0]) < 1e-10, size
            alone = expected[0]
            if layer.out_channels[1]:
                assert relative_error(pair[1], expected[1]) < 1e-10, size
                alone = np.concatenate([expected[0], double(expected[1], expected[0])], axis=1)
            else:
                assert pair[1] is None
            assert relative_error(form(paddle.to_tensor(x)), alone) < 1e-10, size


class OfPairs(nn.Layer):
    """Layers with BNs and activations between them, which hand pairs on."""

    def __init__(self, layers: list[OctConv2D]) -> None:
        super().__init__()
        self.layers = nn.LayerList(layers)

    def forward(self, x):
        pair = (x, None)
        for layer in self.layers:
            pair = tuple(None if maps is None else nn.functional.relu(maps) for maps in layer(pair))
        return pair[0]


def stack(bn: bool) -> list[OctConv2D]:
    shapes = [(3, 8, 1, 0.0, 0.5), (8, 12, 1, 0.5, 0.5), (12, 8, 2, 0.5, 0.25), (8, 6, 1, 0.25, 0.0)]
    return [
        OctConv2D(geometry_of(inputs, outputs, 3, stride, 1, bias_attr=False), *alphas, bn=bn)
        for inputs, outputs, stride, *alphas in shapes
    ]


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (10, 11)])
def test_layers_that_replace_convolutions_are_the_network_of_pairs(size):
    """A BN sees each channel of a low map four times over, and an activation acts by pixels: both ways are the same."""
    pairs = OfPairs([randomise(layer, seed) for seed, layer in enumerate(stack(bn=True))])
    alone = []
    for layer, of_pair in zip(stack(bn=False), pairs.layers):
        state = of_pair.state_dict()
        layer.set_state_dict({key: value for key, value in state.items() if key.startswith("conv")})
        norm = nn.BatchNorm2D(sum(layer.out_channels))
        norm.to(dtype="float64")
        for key in ("weight", "bias", "_mean", "_variance"):
            parts = [state[f"{part}.{key}"] for part in ("bn_h", "bn_l") if f"{part}.{key}" in state]
            getattr(norm, key).set_value(paddle.concat(parts))
        alone += [layer, norm, nn.ReLU()]
    alone = nn.Sequential(*alone)
    x = paddle.randn([2, 3, *size], dtype="float64")
    for network in (pairs, alone):
        network.eval()
    assert relative_error(alone(x), pairs(x)) < 1e-10
    for network in (pairs, alone):
        fused, _ = reparameterize(network, fold_bn=True, input_spec=[[None, 3, *size]])
        assert not any(isinstance(layer, BATCH_NORMS) for layer in fused.sublayers())
        assert relative_error(fused(x), pairs(x)) < 1e-10
    if all(side % 4 == 0 for side in size):
        for network in (pairs, alone):
            network.train()
        assert relative_error(alone(x), pairs(x)) < 1e-10


def test_the_channels_of_an_image_stay_together():
    assert OctConv2D.from_conv(nn.Conv2D(3, 8, 3, padding=1)).channels == (3, 0)
    assert OctConv2D.from_conv(nn.Conv2D(3, 8, 3, padding=1), alpha_in=0.5).channels == (2, 1)
    assert OctConv2D.from_conv(nn.Conv2D(4, 8, 3, padding=1)).channels == (2, 2)


def test_pairs_of_other_channels_are_refused():
    for form in (make_octave("middle"), make_octave("middle").reparameterize()):
        with pytest.raises(ReparamError, match="takes pairs of 4 high and 4 low channels, not of 4 and 0"):
            form((paddle.randn([1, 4, 8, 8], dtype="float64"), None))


# --- Exported -----------------------------------------------------------------------------------------------------


def exported_network() -> nn.Layer:
    """All of them, fused, between convolutions: Paddle Inference lays maps out in another way there."""
    geometries = {name: geometry_of(8, 8, 3, 1, 1, groups=groups, dtype="float32") for name, groups in GROUPS.items()}
    layers = [
        nn.Conv2D(3, 8, 3, padding=1),
        GhostConv2D(geometries["dense"], ratio=3),
        OctConv2D(geometries["dense"]),
        OctConv2D(geometries["depthwise"], 0.25, 0.25, bn=True),
        OctConv2D(replace(geometries["dense"], stride=(2, 2)), 0.25, 0.5),
        nn.Conv2D(8, 6, 1),
    ]
    network = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])
    randomise(network).eval()
    return reparameterize(network)[0]


GROUPS = {"dense": 1, "depthwise": 8}


def test_every_runtime_agrees(tmp_path):
    network = exported_network()
    runtimes = ["onednn", "no-onednn", "executor"]
    export_inference(network, tmp_path / "one", [[None, 3, 9, 10]])
    if not missing_for_onnx():
        export_onnx(tmp_path / "one")
        runtimes.append("onnxruntime")
    for batch in (1, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 3, 9, 10)).astype(np.float32)
        for runtime in runtimes:
            y = get_runtime(runtime).load(tmp_path / "one").run(x)[0]
            assert relative_error(y, network(paddle.to_tensor(x))) < 1e-5, (batch, runtime)
    check_in_bfloat16(network, [3, 9, 10], tmp_path / "bfloat16")


def test_an_export_of_every_size(tmp_path):
    network = exported_network()
    export_inference(network, tmp_path, [[None, 3, None, None]])
    for runtime in map(get_runtime, ("onednn", "no-onednn", "executor")):
        loaded = runtime.load(tmp_path)
        for size in SIZES:
            x = np.random.default_rng(0).standard_normal((2, 3, *size)).astype(np.float32)
            assert relative_error(loaded.run(x)[0], network(paddle.to_tensor(x))) < 1e-5, size


# --- What is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "conv", "options", "reason"),
    [
        (GhostConv2D, nn.Conv2D(6, 6, 3, groups=6), {}, "computes 3 of 6 channels with ratio=2, which are no 6 groups"),
        (GhostConv2D, nn.Conv2D(6, 1, 3), {}, "makes ratio=2 channels out of each.*1 in all: 6->1, 3x3"),
        (HetConv2D, nn.Conv2D(8, 8, 1), {}, "this one is 1x1 itself: 8->8, 1x1"),
        (HetConv2D, nn.Conv2D(8, 6, 3), {}, "in parts=4 for each group, in and out, and those of 8->6, 3x3"),
        (HetConv2D, nn.Conv2D(8, 8, 3, groups=8), {}, "in parts=4 for each group"),
        (HetConv2D, nn.Conv2D(8, 8, 4), {}, "an even kernel has none: 8->8, 4x4"),
        (OctConv2D, nn.Conv2D(8, 8, 3, 3, 1), {}, "stride 1 or 2 for height and width alike"),
        (OctConv2D, nn.Conv2D(8, 8, 3, (2, 1), 1), {}, r"alike, this one is 8->8, 3x3, stride=\(2, 1\)"),
        (OctConv2D, nn.Conv2D(8, 8, 3, 1, 1, groups=2), {}, "without groups and for depthwise ones"),
        (OctConv2D, nn.Conv2D(8, 8, 3), {}, r"a padding of 2 rows and 2 columns in all.*padding \(0, 0, 0, 0\)"),
        (OctConv2D, nn.Conv2D(8, 8, 3, data_format="NHWC", padding=1), {}, "takes NCHW, this one takes NHWC"),
        (OctConv2D, nn.Conv2D(8, 8, 1), {"alpha_in": 0, "alpha_out": 0.1}, "needs low channels, in or out; of 8->8"),
        (OctConv2D, nn.Conv2D(8, 8, 1, groups=8), {"alpha_in": 0.25}, "makes low channels out of low ones alone; of"),
    ],
)  # fmt: skip
def test_convolutions_that_are_refused(layer, conv, options, reason):
    with pytest.raises(UnsupportedConv, match=reason):
        layer.from_conv(conv, **options)
