"""CondConv and DY-Conv: kernels of single images worked out in numpy, the forms, exports, the temperature, networks."""

from __future__ import annotations

import copy

import contract
import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from helpers import as_array, check_in_bfloat16, missing_for_onnx, relative_error
from network_contract import check_fused_is_the_same_function, check_one_step_changes_every_parameter, count
from paddle import nn

from paddle_reparam import models  # noqa: F401 - registers them
from paddle_reparam.arithmetic.geometry import ConvGeometry
from paddle_reparam.deploy.export import export_inference
from paddle_reparam.deploy.onnx_export import export_onnx
from paddle_reparam.deploy.runtimes import get_runtime, proving
from paddle_reparam.errors import ReparamError
from paddle_reparam.layers import CondConv2D, DYConv2D
from paddle_reparam.layers.experts_fused import AddedConv2D, MixedConv2D
from paddle_reparam.registry import create_model
from paddle_reparam.surgery.rewrite import forms_of, reparameterize, replace
from paddle_reparam.training.epochs import start_epoch

BOTH = pytest.mark.parametrize("cls", [CondConv2D, DYConv2D])


def ready(layer: nn.Layer, dtype: str = "float64") -> nn.Layer:
    """Return a layer in eval mode with weights that make its shares differ from image to image."""
    contract.randomise(layer).eval()
    for part in layer.sublayers():
        if isinstance(part, CondConv2D):
            part.routing_fn.weight.set_value(3.0 * part.routing_fn.weight)
        elif isinstance(part, DYConv2D):
            part.attention.fc1.weight.set_value(part.attention.fc1.weight.abs())
            part.attention.fc2.weight.set_value(60.0 * part.attention.fc2.weight)
    layer.to(dtype=dtype)
    return layer


# --- Kernels of single images -------------------------------------------------------------------------------------


def shares_of(state: dict[str, np.ndarray], averages: np.ndarray) -> np.ndarray:
    if "routing_fn.weight" in state:
        return 1 / (1 + np.exp(-(averages @ state["routing_fn.weight"] + state["routing_fn.bias"])))
    hidden = np.maximum(state["attention.fc1.weight"][:, :, 0, 0] @ averages, 0.0)
    logits = state["attention.fc2.weight"][:, :, 0, 0] @ hidden + state["attention.fc2.bias"]
    powers = np.exp(logits / state["attention.temperature"])
    return powers / powers.sum()


def image_by_image(layer: nn.Layer, x: np.ndarray) -> np.ndarray:
    """Return the layer's output, worked out with one kernel for each image."""
    state = {name: as_array(value) for name, value in layer.state_dict().items()}
    geometry, outputs, kernels = layer.geometry, [], []
    for image in x:
        averages = image.mean((0, 1) if geometry.data_format == "NHWC" else (1, 2))
        shares = shares_of(state, averages)
        weight = state[layer.holders["weight"]]
        kernels.append(np.einsum("e,ew->w", shares, weight.reshape(len(shares), -1)).reshape(geometry.weight_shape))
        bias = state.get(layer.holders["bias"])
        bias = None if bias is None else paddle.to_tensor(shares @ bias)
        outputs.append(geometry.convolve(paddle.to_tensor(image[None]), paddle.to_tensor(kernels[-1]), bias).numpy())
    assert relative_error(kernels[1], kernels[0]) > 1e-2, "the kernels do not depend on the image"
    return np.concatenate(outputs)


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((8, 6, 1), {}),
        ((8, 6, 1), {"stride": 2, "bias_attr": False}),
        ((8, 6, 3), {"padding": 1, "stride": 2}),
        ((8, 6, (3, 4)), {"padding": [0, 1, 2, 1], "dilation": (1, 2)}),
        ((8, 4, 3), {"padding": 1, "groups": 4}),
        ((6, 12, 5), {"padding": 2, "groups": 6, "stride": 2}),
        ((3, 6, 3), {"padding": 1, "padding_mode": "reflect"}),
        ((8, 6, 3), {"padding": "SAME", "stride": 2}),
        ((8, 6, 3), {"padding": 1, "data_format": "NHWC"}),
    ],
    ids=str,
)
@BOTH
def test_against_one_kernel_for_each_image(cls, args, options):
    layer = ready(nn.Sequential(cls.from_conv(nn.Conv2D(*args, **options), experts=3)))[0]
    x = np.random.default_rng(0).standard_normal([3, args[0], 7, 8])
    x[1] += 1.0
    if options.get("data_format") == "NHWC":
        x = x.transpose(0, 2, 3, 1)
    expected = image_by_image(layer, x)
    axes = [-1] if options.get("data_format") == "NHWC" else [-1, 1, 1]
    x = paddle.to_tensor(x)
    assert relative_error(layer(x), expected) < 1e-10
    scale, shift = np.linspace(-1.0, 2.0, args[1]), np.linspace(1.0, 0.5, args[1])
    forms = set()
    for form in (None, "added", "mixed"):
        fused = layer.reparameterize()
        fused = fused.for_size(7, 8, form) or fused
        forms.add(type(fused))
        for _ in range(2):
            assert relative_error(fused(x), expected) < 1e-10
            assert relative_error(fused(x[:1]), expected[:1]) < 1e-10
            fused.absorb_affine(scale, shift)
            expected = expected * scale.reshape(axes) + shift.reshape(axes)
        assert relative_error(fused(x), expected) < 1e-10
        expected = image_by_image(layer, x.numpy())
    cannot_be_mixed = options.get("padding") == "SAME" or "data_format" in options
    assert forms == ({AddedConv2D} if cannot_be_mixed else {AddedConv2D, MixedConv2D})


def test_the_form_that_ships():
    forms = {
        MixedConv2D: [(8, 8, 1), (8, 8, 3, 1, 1, 1, 2)],
        AddedConv2D: [(8, 8, 3), (8, 8, 3, 1, 1, 1, 8), (8, 16, 1, 1, 0, 1, 8)],
    }
    for form, convolutions in forms.items():
        for each in convolutions:
            layer = DYConv2D(*each)
            layer.eval()
            assert type(layer.reparameterize()) is form, each
    pointwise = DYConv2D(8, 8, 1)
    pointwise.eval()
    fused = pointwise.reparameterize()
    assert fused.for_size(7, 7) is None
    alone = fused.for_size(1, 1)
    assert type(alone) is AddedConv2D
    alone.routing.excite.bias.set_value(alone.routing.excite.bias + 1.0)
    assert relative_error(fused.routing.excite.bias + 1.0, alone.routing.excite.bias) < 1e-7, "shared weights"


# --- Exports ------------------------------------------------------------------------------------------------------


class _EveryForm(nn.Layer):
    """Layers of both kinds and of every form between convolutions, and one as a classifier of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2D(3, 8, 3, padding=1), CondConv2D(8, 12, 1, experts=3), DYConv2D(12, 8, 3, 2, 1),
            CondConv2D(8, 8, 3, 1, 1, groups=8), DYConv2D(8, 8, 3, 1, 1, groups=2),
            nn.Sequential(DYConv2D(8, 16, 1), nn.BatchNorm2D(16)),
            nn.Sequential(CondConv2D(16, 16, 3), nn.BatchNorm2D(16)),
        )  # fmt: skip
        self.classifier = CondConv2D(16, 10, 1)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        for layer in self.features:
            x = F.relu(layer(x))
        return self.classifier(F.adaptive_avg_pool2d(x, 1)).flatten(1)


@pytest.fixture(scope="module")
def every_form():
    return ready(_EveryForm(), "float32")


@pytest.mark.parametrize("form", [None, "mixed"])
def test_exports_take_any_batch(form, every_form, tmp_path):
    shape = [None, 3, 14, 14]
    fused, report = reparameterize(every_form, fold_bn=True, input_spec=[shape], fixed_size=True, form=form)
    assert forms_of(fused) == ["added", "mixed"]
    assert "BNs" not in report.left_over
    export_inference(fused, tmp_path, [shape])
    if not missing_for_onnx():
        export_onnx(tmp_path)
    runtimes = [each for each in proving(tmp_path) if each.name in ("onednn", "openvino", "onnxruntime")]
    assert get_runtime("onednn") in runtimes
    networks = {runtime.name: runtime.load(tmp_path) for runtime in runtimes}
    generator = np.random.default_rng(0)
    # The second batch of one comes last: what was kept of the first image must not be used for it.
    for batch in (1, 3, 1):
        x = generator.standard_normal([batch, 3, 14, 14]).astype("float32")
        expected = every_form(paddle.to_tensor(x))
        for name, network in networks.items():
            error = relative_error(network.run(x)[0], expected)
            assert error < 1e-5, f"{name}, {batch} images: {error:.1e}"


def test_exports_take_any_size_and_bfloat16(every_form, tmp_path):
    fused, _ = reparameterize(every_form, fold_bn=True, input_spec=[[None, 3, 14, 14]])
    traced = paddle.jit.to_static(
        copy.deepcopy(fused), input_spec=[paddle.static.InputSpec([None, 3, None, None])], full_graph=True
    )
    for shape in ([1, 3, 9, 12], [3, 3, 14, 14]):
        x = paddle.randn(shape)
        with paddle.no_grad():
            assert relative_error(traced(x), every_form(x)) < 1e-5
    fused, _ = reparameterize(every_form, fold_bn=True, input_spec=[[None, 3, 14, 14]], fixed_size=True)
    check_in_bfloat16(fused, [3, 14, 14], tmp_path)


# --- Starting from a convolution ----------------------------------------------------------------------------------


@BOTH
def test_a_layer_that_starts_as_the_convolution_learns_everything(cls):
    model = nn.Sequential(nn.Conv2D(3, 8, 1), nn.BatchNorm2D(8), nn.Conv2D(8, 8, 3, padding=1))
    x = paddle.randn([4, 3, 6, 5])
    before, kernel = model(x), model[2].weight
    replace(model, cls.__name__, where="2")
    assert relative_error(model(x), before) < 1e-6
    experts = as_array(model[2].experts()[0]).reshape(-1, *kernel.shape)
    assert relative_error(experts.mean(0), kernel) < 1e-6
    assert 0.3 < (experts - as_array(kernel)).std() / as_array(kernel).std() < 0.6, "the kernels are not apart"
    start = contract.state_of(model)
    optimizer = paddle.optimizer.Adam(0.01, parameters=model.parameters())
    for _ in range(3):
        (model(x) * paddle.randn([4, 8, 6, 5])).mean().backward()
        optimizer.step()
        optimizer.clear_grad()
    same = [n for n, p in model.named_parameters() if np.array_equal(as_array(p), start[n])]
    assert not same, f"unchanged after three steps: {same}"


@pytest.mark.parametrize(
    ("cls", "option", "allowed"),
    [
        (CondConv2D, {"experts": 1}, "a whole number of 2 or more"),
        (DYConv2D, {"experts": 2.0}, "a whole number of 2 or more"),
        (DYConv2D, {"ratio": 1.5}, "a number between 0 and 1"),
        (DYConv2D, {"temperature": 0}, "a number above 0"),
        (DYConv2D, {"temperature_epochs": 0}, "a whole number of 1 or more"),
    ],
)
def test_options_that_are_refused(cls, option, allowed):
    with pytest.raises(ReparamError, match=f"{cls.__name__} has no .*; choose {allowed}"):
        cls(8, 8, 3, **option)


def test_widths_of_the_attention():
    widths = {channels: DYConv2D(channels, 4, 1).attention.fc1.weight.shape[0] for channels in (2, 3, 8, 10, 64)}
    assert widths == {2: 1, 3: 4, 8: 3, 10: 3, 64: 17}


# --- The temperature ----------------------------------------------------------------------------------------------


def temperature_of(layer: DYConv2D) -> float:
    return float(layer.state_dict()["attention.temperature"])


def test_the_temperature_falls_linearly_and_never_rises():
    model = nn.Sequential(CondConv2D(4, 4, 1), nn.Sequential(DYConv2D(4, 4, 1)), nn.Conv2D(4, 4, 1))
    layer = model[1][0]
    assert temperature_of(layer) == 30.0
    seen = []
    for epoch in range(1, 14):
        start_epoch(model, epoch)
        seen.append(temperature_of(layer))
    assert seen == pytest.approx([30 - 2.9 * min(epoch, 10) for epoch in range(13)], rel=1e-6)
    start_epoch(model, 1)
    assert temperature_of(layer) == 1.0, "a trained layer that is trained further"
    quick = DYConv2D(4, 4, 1, temperature=5.0, temperature_epochs=2)
    start_epoch(quick, 2)
    assert temperature_of(quick) == 3.0


def test_what_was_trained_is_what_ships():
    """The temperature of the state dict is evaluated and fused, and an epoch changes no fused layer."""
    layer = ready(nn.Sequential(DYConv2D(8, 6, 1)))[0]
    start_epoch(layer, 5)
    other = DYConv2D(8, 6, 1)
    other.to(dtype="float64")
    other.set_state_dict({name: value.numpy() for name, value in layer.state_dict().items()})
    other.eval()
    x = paddle.randn([3, 8, 5, 5], dtype="float64")
    fused = other.reparameterize()
    assert relative_error(other(x), layer(x)) == 0
    assert relative_error(fused(x), layer(x)) < 1e-12
    layer.attention.temperature.set_value(paddle.ones([1], "float64"))
    assert relative_error(layer(x), fused(x)) > 1e-3
    before = other(x)
    other.re_parameterize()
    start_epoch(other, 11)
    assert relative_error(other(x), before) < 1e-12


def test_its_convolutions_know_their_geometry():
    assert str(ConvGeometry.of(nn.Conv2D(8, 6, 3, 2, 1))) in repr(DYConv2D(8, 6, 3, 2, 1))


# --- The networks -------------------------------------------------------------------------------------------------

#: Which convolutions are dynamic: how many, the first, and the last.
DYNAMIC = {
    "MobileNetV2_x1_0_CondConv": (19, "features.12.conv.0.0", "classifier.1.conv"),
    "MobileNetV2_x1_0_DYConv": (51, "features.1.conv.0.0", "features.18.0"),
    "ResNet10_CondConv": (7, "layer2.0.conv1", "classifier.1.conv"),
    "ResNet10_DYConv": (11, "layer1.0.conv1", "layer4.0.downsample.0"),
    "ResNet18_DYConv": (19, "layer1.0.conv1", "layer4.1.conv2"),
}
#: Parameters of the static networks. ResNet-10 is ResNet-18 with one block less in each stage.
STATIC = {"MobileNetV2_x1_0": 3_504_872, "ResNet10": 5_418_792, "ResNet18": 11_689_512}


def routing_parameters(layer: nn.Layer, experts: int) -> int:
    channels = layer.geometry.in_channels
    if isinstance(layer, CondConv2D):
        return (channels + 1) * experts
    hidden = channels // 4 + 1
    return channels * hidden + (hidden + 1) * experts


@pytest.mark.parametrize("name", DYNAMIC)
def test_the_dynamic_convolutions_of_a_network_and_its_size(name):
    model = create_model(name)
    layers = {path: layer for path, layer in model.named_sublayers() if isinstance(layer, (CondConv2D, DYConv2D))}
    assert (len(layers), *[list(layers)[i] for i in (0, -1)]) == DYNAMIC[name]
    experts = 8 if name.endswith("CondConv") else 4
    expected = STATIC[name.rpartition("_")[0]]
    for layer in layers.values():
        of_one = np.prod(layer.geometry.weight_shape) + (layer.geometry.out_channels if layer.geometry.bias else 0)
        expected += (experts - 1) * int(of_one) + routing_parameters(layer, experts)
    assert count(model) == expected
    if name == "ResNet18_DYConv":
        assert round(expected / 1e6, 1) == 45.5, "what others published"


def test_a_network_fuses_and_learns():
    shape = [None, 3, 32, 32]
    model = create_model("MobileNetV2_x0_5_CondConv", class_num=10, experts=2)
    check_one_step_changes_every_parameter(model, shape)
    check_fused_is_the_same_function(model, shape)
