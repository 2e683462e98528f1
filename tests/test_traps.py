"""What Paddle, its exports and their converters do where a good guess is wrong, met by a network of one's own."""

from pathlib import Path

import paddle
import paddle.nn.functional as F
import pytest
import yaml
from helpers import missing_for_onnx, randomise_batch_norms, relative_error
from paddle import nn
from paddle.nn.utils import spectral_norm, weight_norm

from paddle_reparam import list_layers, release, save
from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.old_programs import HAS_NEW_PROGRAMS
from paddle_reparam.deploy.onnx_export import export_onnx
from paddle_reparam.deploy.programs import FORMATS
from paddle_reparam.deploy.runtimes.executor import LoadedProgram
from paddle_reparam.deploy.runtimes.onnx_runtime import OnnxModel
from paddle_reparam.errors import ReparamError
from paddle_reparam.registry import get_layer
from paddle_reparam.weights import checkpoints

needs_onnx = pytest.mark.skipif(bool(missing_for_onnx()), reason=missing_for_onnx() or "all there")
needs_json = pytest.mark.skipif(not HAS_NEW_PROGRAMS, reason="Paddle 3 alone writes .json programs")
JSON = ExportOptions("json") if HAS_NEW_PROGRAMS else None
PDMODEL = ExportOptions("pdmodel")
SPEC = [[None, 3, 9, 9]]
every_format = pytest.mark.parametrize("file_format", FORMATS if HAS_NEW_PROGRAMS else FORMATS[1:])


class Function(nn.Layer):
    def __init__(self, function, **options):
        super().__init__()
        self.function, self.options = function, options

    def forward(self, x):
        return self.function(x, **self.options)


def around(*layers):
    """Return a network in eval mode of these layers, for 4 channels, behind a convolution and its BN."""
    net = nn.Sequential(nn.Conv2D(3, 4, 3, padding=1), nn.BatchNorm2D(4), *layers)
    randomise_batch_norms(net)
    net.eval()
    return net


@every_format
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_a_weight_that_is_computed_before_each_pass_is_exported_as_loaded(tmp_path, norm, file_format):
    """Tracing alone stores the weight of the last pass as a constant: the random one of before the loading."""
    trained = around(norm(nn.Conv2D(4, 4, 3)))
    x = paddle.randn([2, 3, 9, 9])
    expected = trained(x)
    save(trained.state_dict(), tmp_path / "weights.pdparams")
    model = around(norm(nn.Conv2D(4, 4, 3)))
    checkpoints.load_into(model, tmp_path / "weights.pdparams")
    names = list(model.state_dict())
    export_inference(model, tmp_path, SPEC, options=ExportOptions(file_format))
    assert relative_error(LoadedProgram(tmp_path)(x)[0], expected) < 1e-6
    assert relative_error(model(x), expected) < 1e-6
    assert list(model.state_dict()) == names


@needs_onnx
@every_format
def test_the_epsilon_of_a_group_norm_is_written_into_onnx(tmp_path, file_format):
    """paddle2onnx 2.1 writes whatever lies in memory there; that of an instance norm it writes itself."""
    norms = [nn.GroupNorm(2, 4, 0.3), nn.InstanceNorm2D(4, 0.0005)]
    model = around(*norms, nn.GroupNorm(4, 4, 0.7, weight_attr=False, bias_attr=False))
    export_inference(model, tmp_path, SPEC, options=ExportOptions(file_format))
    x = paddle.randn([2, 3, 9, 9])
    [actual] = OnnxModel(export_onnx(tmp_path))(x)
    assert relative_error(actual, model(x)) < 1e-5


def positive(x):
    return paddle.index_put(x, (x < 0,), paddle.zeros([1]))


CANNOT = "Paddle Inference cannot run it: NotImplementedError"
OTHER = "Predictor, oneDNN, batch 1 is not the same function"


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        pytest.param(Function(F.interpolate, size=[18, 18], mode="bilinear"), JSON, CANNOT, marks=needs_json),
        pytest.param(Function(F.interpolate, size=[18, 18]), JSON, CANNOT, marks=needs_json),
        (Function(F.interpolate, size=[4, 4]), PDMODEL, OTHER),
        (Function(F.avg_pool2d, kernel_size=2, stride=1, padding=[0, 1, 0, 1], exclusive=False), PDMODEL, OTHER),
        (nn.AvgPool2D(2, ceil_mode=True, exclusive=False), PDMODEL, OTHER),
        (nn.AvgPool2D(2, 1, padding="SAME", exclusive=False), PDMODEL, OTHER),
        pytest.param(Function(positive), PDMODEL, r"cannot be exported: TypeError: .*index_put\(\)", marks=needs_json),
    ],
)
def test_what_becomes_another_function_on_its_way_is_refused(tmp_path, layer, options, message):
    model = around(layer, nn.Conv2D(4, 4, 1))
    save(model.state_dict(), tmp_path / "weights.pdparams")
    with pytest.raises(ReparamError, match=message) as error:
        release(model, tmp_path / "weights.pdparams", tmp_path / "out", SPEC, options=options, progress=len)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pdparams"]


def test_what_sublayers_and_data_parallel_training_would_not_see():
    """Paddle calls no `train` or `eval` of sublayers, and gives other processes no buffer that is not persistable."""

    def classes(base):
        return {base}.union(*(classes(each) for each in base.__subclasses__()))

    own = [each for each in classes(nn.Layer) if each.__module__.startswith("paddle_reparam.")]
    assert len(own) > 30
    assert [each.__name__ for each in own if {"train", "eval"} & set(vars(each))] == []
    for name in list_layers():
        for conv in (nn.Conv2D(4, 8, 3, padding=1), nn.Conv2D(4, 4, 5, padding=2, groups=4)):
            try:
                layer = get_layer(name).layer.from_conv(conv)
            except ReparamError:
                continue
            for each in layer.sublayers(include_self=True):
                assert not each._non_persistable_buffer_names_set, name


def test_recipes_say_what_paddleclas_would_take_otherwise():
    """Its AdamW decays BNs and biases unless told, its CutMix draws from Beta(0.2, 0.2), and EPSILON is a share."""
    entries = []

    def collect(value):
        for name, options in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(options, (dict, list)):
                entries.append((name, options))
                collect(options)

    for path in sorted((Path(__file__).parents[1] / "ppcls_configs").rglob("*.yaml")):
        collect(yaml.safe_load(path.read_text(encoding="utf-8")))
    adam = [options for name, options in entries if name == "Optimizer" and options["name"] == "AdamW"]
    assert len(adam) > 5
    assert all(options["one_dim_param_no_weight_decay"] is True for options in adam)
    mixing = [options for name, options in entries if name in ("CutmixOperator", "MixupOperator")]
    assert mixing
    assert all("alpha" in options for options in mixing)
    assert {options["EPSILON"] for name, options in entries if name == "RandomErasing"} == {0.25}
