"""ONNX files in form and in numbers: each operator as Paddle computes it, in onnxruntime and in OpenVINO."""

import importlib.util

import paddle
import paddle.nn.functional as F
import pytest
from helpers import missing_for_onnx, randomise_batch_norms, relative_error
from paddle import nn

from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.onnx_export import OPSET, export_onnx
from paddle_reparam.deploy.programs import FORMATS
from paddle_reparam.deploy.runtimes.onnx_runtime import OnnxModel, need
from paddle_reparam.errors import ReparamError

pytestmark = pytest.mark.skipif(bool(missing_for_onnx()), reason=missing_for_onnx() or "all there")
HAS_OPENVINO = importlib.util.find_spec("openvino") is not None
SHAPE = [None, 4, 13, 11]


def away_from_start(layer):
    """Give a layer's parameters numbers that hide nothing."""
    for parameter in layer.parameters():
        parameter.set_value(paddle.uniform(parameter.shape, min=0.3, max=1.5))
    return layer


def of(layer):
    return away_from_start(layer), lambda x, layer: layer(x)


def does(function):
    return None, lambda x, _: function(x)


#: What converts, with other numbers than the defaults. Of a .pdmodel all but `ONLY_IN_JSON`.
OPERATORS = {
    **{f"leaky relu {slope}": does(lambda x, slope=slope: F.leaky_relu(x, slope)) for slope in (0.01, 0.2)},
    "hard tanh": does(lambda x: F.hardtanh(x, -0.3, 0.7)),
    "clip": does(lambda x: paddle.clip(x, -0.2, 0.3)),
    "elu": does(lambda x: F.elu(x, 0.3)),
    "gelu": does(F.gelu),
    "gelu by tanh": does(lambda x: F.gelu(3 * x, approximate=True)),
    "hard sigmoid": does(lambda x: F.hardsigmoid(x, slope=0.2, offset=0.4)),
    "hard swish": does(F.hardswish),
    "silu": does(F.silu),
    "mish": does(F.mish),
    "softmax of channels": does(lambda x: F.softmax(x, 1)),
    "scale": does(lambda x: paddle.scale(x, 2.5, bias=1.5, bias_after_scale=False)),
    "padding": does(lambda x: F.pad(x, [1, 0, 2, 1], value=-2.0)),
    "padding of all axes": does(lambda x: F.pad(x, [0, 0, 0, 0, 0, 1, 1, 0], value=3.0)),
    "padding by the edge": does(lambda x: F.pad(x, [1, 0, 2, 1], mode="replicate")),
    "padding by reflection": does(lambda x: F.pad(x, [1, 0, 2, 1], mode="reflect")),
    "padding by the other end": does(lambda x: F.pad(x, [1, 0, 2, 3], mode="circular")),
    "convolution, grouped": of(nn.Conv2D(4, 8, 3, padding=[1, 0, 2, 1], groups=2)),
    "convolution, same": of(nn.Conv2D(4, 8, 3, stride=2, padding="SAME")),
    "convolution, circular": of(nn.Conv2D(4, 8, 3, padding=1, padding_mode="circular")),
    "transposed, padded": of(nn.Conv2DTranspose(4, 6, 3, stride=2, padding=1, output_padding=1)),
    "transposed, grouped": of(nn.Conv2DTranspose(4, 6, 3, stride=3, output_padding=[2, 0], groups=2)),
    "mean, padding not counted": of(nn.AvgPool2D(3, 2, 1)),
    "mean, padding counted": of(nn.AvgPool2D(3, 2, 1, exclusive=False)),
    "mean, sizes rounded up": of(nn.AvgPool2D(3, 2, 1, ceil_mode=True)),
    "maximum, sizes rounded up": of(nn.MaxPool2D(3, 2, 1, ceil_mode=True)),
    **{f"means to {size}": of(nn.AdaptiveAvgPool2D(size)) for size in (1, 4, [None, 1], [2, 3], [16, 11])},
    **{f"maxima to {size}": of(nn.AdaptiveMaxPool2D(size)) for size in (1, 4, [13, 20])},
    "means to 7 of one axis": does(lambda x: F.adaptive_avg_pool1d(x.flatten(2), 7)),
    "maxima to 7 of one axis": does(lambda x: F.adaptive_max_pool1d(x.flatten(2), 7)),
    **{
        f"{mode} to {size}": does(lambda x, mode=mode, size=size: F.interpolate(x, size, mode=mode))
        for mode in ("nearest", "bilinear", "bicubic", "area") for size in ([26, 22], [6, 20])
    },
    "bilinear, corners": does(lambda x: F.interpolate(x, [20, 5], mode="bilinear", align_corners=True)),
    **{
        f"{mode} by {factor}": does(lambda x, mode=mode, factor=factor: F.interpolate(x, None, factor, mode=mode))
        for mode in ("nearest", "bilinear") for factor in (2, 1.5)
    },
    "pixel shuffle": does(lambda x: F.pixel_shuffle(x, 2)),
    "unfolding": does(lambda x: F.unfold(x, [3, 2], 2, [1, 0, 1, 0], 1)),
    "choice from the end": does(lambda x: paddle.gather(x, paddle.to_tensor([-1, 2]), axis=1)),
    "slices from the end": does(lambda x: x[:, -1, :, -5:-1]),
    "every second row": does(lambda x: x[:, :, ::2, 1::2]),
    "group norm": of(nn.GroupNorm(2, 4, epsilon=0.3)),
    "group norm without numbers": of(nn.GroupNorm(2, 4, epsilon=0.3, weight_attr=False, bias_attr=False)),
    "instance norm": of(nn.InstanceNorm2D(4, epsilon=0.3)),
    "layer norm": of(nn.LayerNorm(11, epsilon=1e-3)),
    "layer norm of three axes": of(nn.LayerNorm([4, 13, 11])),
    "prelu": of(nn.PReLU(4)),
    "softplus": does(F.softplus),
    "roll": does(lambda x: paddle.roll(x, [2, -1], [2, 3])),
    "expand as": does(lambda x: x.mean(1, keepdim=True).expand_as(x)),
    "normalize": does(lambda x: F.normalize(x, axis=1, epsilon=1e-3)),
}  # fmt: skip
#: Paddle cannot write these into a .pdmodel.
ONLY_IN_JSON = {"normalize"}


class Probe(nn.Layer):
    """Every operator on one map, each with an output of its own."""

    def __init__(self, names):
        super().__init__()
        self.functions = [OPERATORS[name][1] for name in names]
        self.layers = nn.LayerList([OPERATORS[name][0] or nn.Identity() for name in names])
        self.eval()

    def forward(self, x):
        return [function(x, layer) for function, layer in zip(self.functions, self.layers)]


@pytest.mark.parametrize("file_format", FORMATS)
def test_each_operator_is_what_paddle_computes(tmp_path, file_format):
    paddle.seed(0)
    names = [name for name in OPERATORS if file_format == "json" or name not in ONLY_IN_JSON]
    probe = Probe(names)
    export_inference(probe, tmp_path, [SHAPE], options=ExportOptions(file_format))
    path = export_onnx(tmp_path)
    x = paddle.randn([2, *SHAPE[1:]])
    expected = dict(zip(names, probe(x)))
    found = {"onnxruntime": OnnxModel(path).run(x.numpy())}
    if HAS_OPENVINO:
        import openvino

        found["OpenVINO"] = list(
            openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy()).values()
        )
    wrong = []
    for runtime, outputs in found.items():
        for name, actual in zip(names, outputs):
            if list(actual.shape) != expected[name].shape or not relative_error(actual, expected[name]) < 1e-5:
                wrong.append(f"{name}, {runtime}")
    assert not wrong


#: Operators of a `.pdmodel` that OpenVINO takes for others, without a message, and those that it refuses.
MISREAD_BY_OPENVINO = {
    "transposed, padded", "transposed, grouped", "means to [None, 1]", "means to 7 of one axis",
    "maxima to 7 of one axis",
}  # fmt: skip
OTHER_PIXELS_BY_OPENVINO = {"nearest to [6, 20]"}
REFUSED_BY_OPENVINO = {
    "hard tanh", "mish", "instance norm", "padding of all axes", "padding by the other end", "convolution, circular",
    "pixel shuffle", "unfolding",
}  # fmt: skip


def by_openvino(names, folder):
    """Return, for a map, what OpenVINO makes of each operator of a `.pdmodel`, and what Paddle does."""
    import openvino

    paddle.seed(0)
    probe = Probe(names)
    export_inference(probe, folder, [SHAPE], options=ExportOptions("pdmodel"))
    x = paddle.randn([2, *SHAPE[1:]])
    model = openvino.compile_model(folder / "inference.pdmodel", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(zip(names, model(x.numpy()).values(), probe(x)))


@pytest.mark.skipif(not HAS_OPENVINO, reason="needs pip install 'paddle-reparam[openvino]'")
def test_openvino_reads_a_program_of_paddle_but_for_these(tmp_path):
    """Compared like docs/serving.md says: what it does not read rightly is in the ONNX file."""
    misread = MISREAD_BY_OPENVINO | OTHER_PIXELS_BY_OPENVINO
    read = sorted(set(OPERATORS) - ONLY_IN_JSON - misread - REFUSED_BY_OPENVINO)
    wrong = [
        name
        for name, actual, expected in by_openvino(read, tmp_path / "read")
        if list(actual.shape) != expected.shape or not relative_error(actual, expected) < 1e-5
    ]
    assert not wrong
    for name, actual, expected in by_openvino(sorted(misread), tmp_path / "misread"):
        of_other_shape = list(actual.shape) != expected.shape
        assert of_other_shape == (name in MISREAD_BY_OPENVINO), name
        assert of_other_shape or relative_error(actual, expected) > 0.1
    for name in sorted(REFUSED_BY_OPENVINO):
        with pytest.raises(Exception, match="OpConversionFailure|convert pad3d|No creator found"):
            by_openvino([name], tmp_path / name)


class Small(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2D(4, 8, 3, padding=1), nn.BatchNorm2D(8), nn.Hardswish(), nn.Conv2D(8, 8, 1), nn.Flatten(2),
            nn.LayerNorm(13 * 11), nn.GELU(),
        )  # fmt: skip
        randomise_batch_norms(self)
        self.eval()


def test_a_file_is_one_that_others_can_use(tmp_path):
    onnx = need("onnx")
    network = Small()
    export_inference(network, tmp_path, [SHAPE])
    path = export_onnx(tmp_path, {"said": "of itself"})
    model = onnx.load(str(path))
    kinds = [node.op_type for node in model.graph.node]
    # The norm is in the convolution before it, and the rest is in the forms that runtimes know as one operator.
    assert kinds == ["Conv", "HardSwish", "Conv", "Reshape", "LayerNormalization", "Div", "Erf", "Add", "Mul", "Mul"]
    assert not {"Constant", "Identity", "Cast", "BatchNormalization"} & set(kinds)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert model.ir_version == 8
    read = {name for node in model.graph.node for name in node.input}
    made = {name for node in model.graph.node for name in node.output} | {each.name for each in model.graph.initializer}
    assert made - read == {"output"}
    [x], [output] = model.graph.input, model.graph.output
    axes = [[d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim] for each in (x, output)]
    assert axes == [["batch", 4, 13, 11], ["batch", 8, 143]]
    assert {each.key: each.value for each in model.metadata_props} == {"said": "of itself"}
    # ONNX' own evaluator, which shares nothing with the other two.
    x = paddle.randn([2, *SHAPE[1:]])
    [actual] = need("onnx.reference").ReferenceEvaluator(model).run(None, {"x": x.numpy()})
    assert relative_error(actual, network(x)) < 1e-5


class TwoMaps(nn.Layer):
    """Two inputs of two sizes, and outputs of which one has samples along no axis."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2D(3, 4, 3)
        self.eval()

    def forward(self, one, other):
        mean = self.conv(one).mean([2, 3]) + self.conv(other).mean([2, 3])
        return {"mean": mean, "parts": mean.reshape([-1, 2])}


def test_several_inputs_of_every_size_have_named_axes(tmp_path):
    network = TwoMaps()
    shapes = [[None, 3, 16, 16], [None, 3, 24, 16]]
    export_inference(network, tmp_path, shapes, options=ExportOptions(dynamic_size=True))
    graph = need("onnx").load(str(export_onnx(tmp_path))).graph
    axes = {
        each.name: [d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim]
        for each in (*graph.input, *graph.output)
    }
    assert axes["x0"] == ["batch", 3, "x0_height", "x0_width"]
    assert axes["x1"] == ["batch", 3, "x1_height", "x1_width"]
    assert axes["output0"] == ["batch", 4]
    assert axes["output1"][0] != "batch"
    assert axes["output1"][1] == 2
    inputs = [paddle.randn([2, *shape[1:]]) for shape in ([0, 3, 9, 30], [0, 3, 20, 7])]
    for actual, expected in zip(OnnxModel(tmp_path / "inference.onnx")(*inputs), network(*inputs).values()):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (
            lambda x: F.pixel_unshuffle(x[:, :, :12, :10], 2),
            r"paddle2onnx does not know the operator pixel_unshuffle \(",
        ),
        (lambda x: F.adaptive_avg_pool3d(x.unsqueeze(2), [1, 4, 4]), r"the operator pool3d \(.*\): it pools"),
        (lambda x: F.avg_pool2d(x, 2, data_format="NHWC"), "NHWC"),
    ],
)
def test_what_cannot_be_written_is_named(tmp_path, function, sentence):
    class Alone(nn.Layer):
        def forward(self, x):
            return function(x)

    alone = Alone()
    alone.eval()
    export_inference(alone, tmp_path, [SHAPE])
    with pytest.raises(ReparamError, match=f"it cannot be converted to ONNX: .*{sentence}") as error:
        export_onnx(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "inference.onnx").exists()
