"""Fewer than 32 bits: what rounding may do, and what it costs on images."""

import shutil

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from helpers import draw_by_fan_in, missing_for_onnx, relative_error
from paddle import nn
from paddle.nn.functional import upsample
from test_export import MADE_OF_ONNX

from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.old_programs import HAS_NEW_PROGRAMS
from paddle_reparam.deploy.onnx_export import export_onnx
from paddle_reparam.deploy.outputs import Normalization, OutputSpec
from paddle_reparam.deploy.precision import FACTOR, LARGEST_BOUND, ROUNDED, agreement, rounding_bound
from paddle_reparam.deploy.programs import FORMATS, program_file
from paddle_reparam.deploy.replacements import replaced_operators
from paddle_reparam.deploy.runtimes import RUNTIMES, get_runtime
from paddle_reparam.deploy.runtimes.onnx_runtime import ONNX_FILE
from paddle_reparam.deploy.runtimes.paddle_inference import LoadedPredictor
from paddle_reparam.errors import NothingProven, ReparamError, UsageError

# ---------------------------------------------------------------------------------------------------------------------
# What it costs on images


def scores(answers, classes=4):
    """Return `[N, classes]` with the largest score at each answer."""
    return np.eye(classes, dtype="float32")[answers] + np.float32(0.5)


def test_what_is_lost_is_counted_in_points():
    labels = np.arange(400) % 4
    reference, given = labels.copy(), labels.copy()
    reference[:100] = (reference[:100] + 1) % 4
    given[:102] = (given[:102] + 2) % 4
    report = agreement(scores(reference), scores(given), labels, largest_drop=0.5)
    assert (report.measure, report.images) == ("top-1", 400)
    assert (report.reference_accuracy, report.accuracy) == (0.75, 0.745)
    assert (report.drop, report.change, report.agreement) == (0.5, -0.5, 0.745)
    assert report.relative_error == pytest.approx(1 / 1.5)
    assert report.passed
    assert not agreement(scores(reference), scores(given), labels, largest_drop=0.499).passed
    assert "75.00% -> 74.50% (-0.50 points) on 400 images, the same answer for 74.50%" in str(report)
    gained = agreement(scores(given), scores(reference), labels, largest_drop=0.5)
    assert (gained.drop, gained.change, gained.passed) == (0.0, 0.5, True)


def test_several_labels_an_image_are_counted_label_by_label():
    labels = np.tile([[1, 0, -1, 1]], [100, 1])
    reference = np.tile(np.float32([[0.9, 0.1, 0.9, 0.8]]), [100, 1])
    given = reference.copy()
    given[:30, 3] = 0.2
    given[:, 2] = 0.1  # nobody knows
    report = agreement(reference, given, labels, largest_drop=10)
    assert (report.measure, report.reference_accuracy, report.accuracy) == ("label accuracy", 1.0, 0.9)
    assert (report.drop, report.passed) == (10.0, True)


@pytest.mark.parametrize(
    ("images", "largest_drop", "message"),
    [
        (0, 1.0, "0 images cannot show a drop of 1 points: give 100 images or more$"),
        (1, 1.0, r"1 images cannot show a drop of 1 points: give 100 images or more, or allow 100 points"),
        (199, 0.5, r"give 200 images or more, or allow 0.51 points$"),
        (99, 0.0, "99 images cannot show a drop of 0 points: give 100 images or more"),
    ],
)
def test_too_few_images_are_a_sentence(images, largest_drop, message):
    labels = np.arange(images) % 4
    with pytest.raises(NothingProven, match=message):
        agreement(scores(labels), scores(labels), labels, largest_drop)


def test_features_are_compared_by_their_error_alone():
    features = np.random.default_rng(0).standard_normal([3, 8]).astype("float32")
    report = agreement(features, features * np.float32(1.01), None, largest_drop=1.0)
    assert report.passed
    assert report.relative_error == pytest.approx(0.01, rel=1e-3)
    assert "features of 3 images, off by 1.0e-02" in str(report)


def test_what_cannot_be_compared_is_a_sentence():
    labels = np.arange(100) % 4
    with pytest.raises(ReparamError, match=r"the outputs have the shape \[100, 3\], the reference \[100, 4\]"):
        agreement(scores(labels), scores(labels)[:, :3], labels, 1.0)
    with pytest.raises(ReparamError, match=r"the network puts out \[100, 4\] for labels \[99\]"):
        agreement(scores(labels), scores(labels), labels[1:], 1.0)
    with pytest.raises(NothingProven, match="no label of the 100 images is known"):
        agreement(scores(labels), scores(labels), np.full(100, -1), 1.0)
    with pytest.raises(UsageError, match="what may be lost is nan percentage points"):
        agreement(scores(labels), scores(labels), labels, float("nan"))


# ---------------------------------------------------------------------------------------------------------------------
# What rounding may do


class OfFunctions(nn.Layer):
    """A network whose kernels are parameters of its own, multiplied by functions and operators: no layer holds them."""

    def __init__(self):
        super().__init__()
        generator = np.random.default_rng(0)
        self.register_buffer("order", paddle.arange(16))
        self.kernel, self.matrix, self.head = (
            self.create_parameter(
                shape, default_initializer=nn.initializer.Assign(generator.standard_normal(shape) / np.sqrt(fan_in))
            )
            for shape, fan_in in (([16, 3, 3, 3], 27), ([16, 16], 16), ([16, 5], 16))
        )

    def forward(self, x):
        y = F.relu(F.conv2d(x, self.kernel, padding=1)).flatten(2)
        y = F.relu(paddle.matmul(self.matrix, y)).mean(2).index_select(self.order, 1)
        return y @ self.head


def of_layers():
    """Return a network of layers, with weights of about the same size everywhere."""
    paddle.seed(0)
    net = nn.Sequential(
        nn.Conv2D(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2D(16, 32, 3, stride=2, padding=1), nn.Hardswish(),
        nn.Conv2D(32, 32, 3, padding=1, groups=32), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    draw_by_fan_in(net)
    net.eval()
    return net


SPEC = [[None, 3, 16, 16]]


def images(count=4):
    return np.random.default_rng(1).standard_normal([count, *SPEC[0][1:]]).astype("float32")


def rounded_to_bfloat16(array):
    """Return the nearest numbers of 8 significant bits, the even one of two."""
    bits = np.asarray(array, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def test_what_is_multiplied_without_a_layer_is_rounded_too():
    net, x = OfFunctions(), images()
    net.eval()
    exact = net(paddle.to_tensor(x))
    rounded = OfFunctions()
    for name, parameter in rounded.named_parameters():
        parameter.set_value(rounded_to_bfloat16(dict(net.named_parameters())[name].numpy()))
    of_weights_alone = relative_error(rounded(paddle.to_tensor(x)), exact)
    assert of_weights_alone > 5e-4
    bound = rounding_bound(net, [x], "bfloat16")
    assert of_weights_alone < bound < 10 * FACTOR * of_weights_alone
    assert bound < rounding_bound(net, [x], "int8") < 0.5


def test_what_the_precision_can_hold_is_not_changed():
    net = nn.Sequential(nn.Conv2D(3, 4, 1, bias_attr=False), nn.ReLU(), nn.Flatten())
    one_each = np.float32([[0.5, 0, 0], [0, -2, 0], [0, 0, 1], [0, 0, 0]])
    net[0].weight.set_value(one_each[:, :, None, None])
    net.eval()
    x = rounded_to_bfloat16(images())
    assert rounding_bound(net, [x], "bfloat16") == 0
    assert rounding_bound(net, [images() + np.float32(1 / 3)], "bfloat16") > FACTOR * 2**-9 / 4


def test_the_network_stays_as_it_was():
    net = of_layers()
    state = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    exact = net(paddle.to_tensor(images()))
    first = rounding_bound(net, [images()], "int8")
    assert rounding_bound(net, [images()], "int8") == first, "the bound is drawn anew each time"
    assert all(np.array_equal(tensor.numpy(), state[name]) for name, tensor in net.state_dict().items())
    assert np.array_equal(net(paddle.to_tensor(images())).numpy(), exact.numpy())
    with pytest.raises(UsageError, match="there is no bound for 'float16'; choose one of bfloat16, int8"):
        rounding_bound(net, [images()], "float16")


@pytest.mark.parametrize("precision", ROUNDED)
def test_large_weights_are_rounded_part_by_part_as_they_are_at_once(monkeypatch, precision):
    net, x = of_layers(), [images()]
    at_once = rounding_bound(net, x, precision)
    monkeypatch.setattr("paddle_reparam.deploy.precision._LARGE", 24)
    assert rounding_bound(net, x, precision) == pytest.approx(at_once, rel=1e-9)
    assert all(weight.dtype == paddle.float32 for weight in net.parameters())


def test_large_numbers_that_no_product_reads_are_in_float64_too(monkeypatch):
    class AddsItsOwn(nn.Layer):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2D(3, 8, 1), nn.LayerNorm([8, 16, 16])
            self.places = self.create_parameter([1, 8, 16, 16])

        def forward(self, x):
            return self.norm(self.conv(x) + self.places).mean([2, 3])

    paddle.seed(0)
    net = AddsItsOwn()
    net.eval()
    at_once = rounding_bound(net, [images()], "bfloat16")
    monkeypatch.setattr("paddle_reparam.deploy.precision._LARGE", 8)
    assert rounding_bound(net, [images()], "bfloat16") == pytest.approx(at_once, rel=1e-9)


def test_what_is_off_by_half_is_wrong_whatever_rounding_does():
    class Chaotic(nn.Layer):
        def forward(self, x):
            return paddle.sin(1e4 * x.flatten(1))

    net = nn.Sequential(of_layers(), Chaotic())
    net.eval()
    assert rounding_bound(net, [images()], "bfloat16") == LARGEST_BOUND < 1
    net[0][7].bias.set_value(net[0][7].bias / 0)
    with pytest.raises(NothingProven, match="what the network puts out is not finite when it is rounded to int8"):
        rounding_bound(net[0], [images()], "int8")


def test_the_bound_is_that_of_what_is_exported():
    """Behind a normalisation and a softmax, whose logarithms count as well, as where an export is compared."""
    net = of_layers()
    pixels = np.random.default_rng(2).integers(0, 256, [2, 3, 16, 16]).astype("uint8")
    normalization = Normalization((0.5,) * 3, (0.25,) * 3, 1 / 255)
    softmax = rounding_bound(net, [pixels], "bfloat16", output=OutputSpec("softmax"), normalization=normalization)
    logits = rounding_bound(net, [pixels], "bfloat16", normalization=normalization)
    assert 0.1 * logits < softmax < 10 * logits
    assert logits < 0.1


def test_networks_that_take_one_dict_have_a_bound():
    class TakesDict(nn.Layer):
        def __init__(self):
            super().__init__()
            self.net = of_layers()

        def forward(self, inputs):
            return {"logits": self.net(inputs["image"]) * inputs["scale"]}

    scale = np.ones([4, 1], "float32")
    net = TakesDict()
    net.eval()
    bound = rounding_bound(net, [images(), scale], "bfloat16", names=["image", "scale"])
    assert bound == pytest.approx(rounding_bound(net.net, [images()], "bfloat16"), rel=0.5)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Return name -> export of `of_layers`, with an ONNX file where one can be made: right, and with a wrong scale."""
    folders, net = {}, of_layers()
    for name in ("right", "scale"):
        folders[name] = tmp_path_factory.mktemp(name)
        if name == "scale":
            factors = np.where(np.arange(32) == 3, 16.0, 1.0).astype("float32")
            net[2].weight.set_value(net[2].weight * paddle.to_tensor(factors).reshape([-1, 1, 1, 1]))
        export_inference(net, folders[name], SPEC)
        if not missing_for_onnx():
            export_onnx(folders[name])
    return folders


@pytest.mark.parametrize(
    "runtime", [runtime for runtime in RUNTIMES if runtime.precision in ROUNDED], ids=lambda runtime: runtime.name
)
def test_right_conversions_lie_under_the_bound_and_broken_ones_above(runtime, exports, tmp_path):
    if runtime.file_name is not None and missing_for_onnx():
        pytest.skip(missing_for_onnx())
    try:
        runtime.require()
    except ReparamError as lacking:
        pytest.skip(str(lacking))
    net, x = of_layers(), images()
    exact = net(paddle.to_tensor(x))
    bound = rounding_bound(net, [x], runtime.precision)

    def error(export, calibration):
        folder = exports[export]
        if runtime.file_name is not None:
            folder = tmp_path
            shutil.copy(exports[export] / ONNX_FILE, folder)
            MADE_OF_ONNX[runtime.file_name](folder / ONNX_FILE, folder / runtime.file_name, calibration)
        [output] = runtime.load(folder).run(x)
        return relative_error(output, exact)

    assert bound / (5 * FACTOR) < error("right", images(16)) < bound / 1.5, "what rounding does was not foreseen"
    assert error("scale", images(16)) > bound
    if runtime.precision == "int8":
        assert error("right", images(16) * np.float32(0.1)) > bound, "a wrong calibration"


# ---------------------------------------------------------------------------------------------------------------------
# Operators that Paddle Inference runs wrongly, and what stands for them


class Behind(nn.Layer):
    """A function or layer behind a convolution, and one more convolution behind that."""

    def __init__(self, function):
        super().__init__()
        self.first, self.function, self.last = nn.Conv2D(3, 16, 3, padding=1), function, nn.Conv2D(16, 8, 1)

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class AsLargeAs(nn.Layer):
    """Maps that are made smaller, and as large again as they were, where the program finds out how large that is."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return F.interpolate(F.avg_pool2d(x, self.factor), paddle.shape(x)[2:], mode="bilinear")


class TokensAndBack(nn.Layer):
    """Maps as tokens, and maps again."""

    def forward(self, x):
        tokens = x.flatten(2).transpose([0, 2, 1])
        return tokens.transpose([0, 2, 1]).reshape([-1, *x.shape[1:]])


class PooledTokens(nn.Layer):
    """The mean of all tokens, as maps of one pixel."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1D(1)

    def forward(self, x):
        tokens = F.relu(x.flatten(2).transpose([0, 2, 1]))
        return self.pool(tokens.transpose([0, 2, 1])).unsqueeze(3)


class ProductOfMaps(nn.Layer):
    """Products of maps and a matrix: of maps as they are, and behind what changes their numbers."""

    def __init__(self):
        super().__init__()
        self.matrix = self.create_parameter([16, 16])

    def forward(self, x):
        return paddle.matmul(self.matrix, x) + F.relu(2.0 * x) @ self.matrix


REPLACED = {
    "leaky ReLU": lambda: nn.LeakyReLU(0.1),
    "PReLU, one slope": lambda: nn.PReLU(1, 0.3),
    "PReLU, a slope for each channel": lambda: nn.PReLU(16, 0.3),
    "windows of one size": lambda: nn.AdaptiveAvgPool2D(5),
    "windows of several sizes": lambda: nn.AdaptiveAvgPool2D([6, 5]),
    "the largest of windows of several sizes": lambda: nn.AdaptiveMaxPool2D([6, None]),
    "more pixels than there were": lambda: nn.AdaptiveAvgPool2D(21),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "nearest, by a broken factor": lambda: nn.Upsample(size=[24, 10]),
    "bilinear": lambda: nn.Upsample(scale_factor=[2, 3], mode="bilinear"),
    "bilinear, corners aligned": lambda: nn.Upsample(size=[21, 11], mode="bilinear", align_corners=True),
    "bilinear, as large as another map": lambda: AsLargeAs(3),
    "two activations": lambda: nn.Sequential(nn.ReLU(), nn.Sigmoid()),
    "tokens to maps": TokensAndBack,
    "pooling of tokens": PooledTokens,
    "products of maps": ProductOfMaps,
}


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", REPLACED)
def test_what_paddle_inference_runs_wrongly_is_exported_as_something_else(name, file_format, tmp_path):
    if file_format == "json" and not HAS_NEW_PROGRAMS:
        pytest.skip("Paddle 2 writes .pdmodel only")
    paddle.seed(0)
    net = Behind(REPLACED[name]())
    net.eval()
    x = images()
    expected = net(paddle.to_tensor(x))
    export_inference(net, tmp_path, SPEC, options=ExportOptions(file_format))
    # A .pdmodel names all operators that Paddle knows. What kills the process is not run.
    program = program_file(tmp_path).read_bytes() if file_format == "json" else b""
    assert not any(operator in program for operator in (b"leaky_relu", b"prelu"))
    for onednn in (True, False):
        assert relative_error(LoadedPredictor(tmp_path, onednn=onednn).run(x)[0], expected) < 2e-6
    runtime = get_runtime("onednn-bfloat16")
    try:
        runtime.require()
    except ReparamError:
        return
    if file_format == "pdmodel" and isinstance(net.function, (nn.Upsample, AsLargeAs)):
        with pytest.raises(ReparamError, match="no kernels which are registered in the dequantize operator"):
            runtime.load(tmp_path).run(x)
        return
    assert relative_error(runtime.load(tmp_path).run(x)[0], expected) < rounding_bound(net, [x], "bfloat16")


@pytest.mark.parametrize("size", [(8, 3), (7, 2), (7, 3), (12, 5), (5, 7), (9, 6)])
def test_what_is_replaced_is_the_same_function(size):
    side, out = size
    x = paddle.randn([2, 3, side, side + 1])
    for name in ("adaptive_avg_pool2d", "adaptive_max_pool2d"):
        expected = getattr(F, name)(x, out)
        with replaced_operators():
            assert relative_error(getattr(F, name)(x, out), expected) < 1e-6
    plain, corners, mode_1 = {}, {"align_corners": True}, {"align_mode": 1}
    for mode, how in [("nearest", plain), ("bilinear", plain), ("bilinear", corners), ("bilinear", mode_1)]:
        for wanted in (
            {"size": [out, out]},
            {"size": [2 * side, 5]},
            {"scale_factor": [2, 1.5]},
            {"scale_factor": 0.5},
        ):
            expected = F.interpolate(x, mode=mode, **wanted, **how)
            with replaced_operators():
                assert relative_error(F.interpolate(x, mode=mode, **wanted, **how), expected) < 1e-5
    mask = F.adaptive_max_pool2d(x, out, return_mask=True)[1]
    with replaced_operators():
        assert np.array_equal(F.adaptive_max_pool2d(x, out, return_mask=True)[1].numpy(), mask.numpy())
        assert F.adaptive_avg_pool2d(x, out, data_format="NHWC").shape == [2, out, out, side + 1]


def test_what_a_module_imported_by_itself_is_replaced_too():
    assert upsample is F.upsample
    with replaced_operators():
        assert upsample.__module__ == replaced_operators.__module__
    assert upsample is F.upsample
