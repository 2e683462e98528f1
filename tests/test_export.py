"""Exports that are checked after they are written."""

import gc
import json
import os
import pickle
import re
import tempfile
import types
import weakref

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from helpers import as_array, missing_for_onnx, randomise_batch_norms, relative_error
from paddle import nn

from paddle_reparam import check_release, release, save
from paddle_reparam.deploy import export, runtimes
from paddle_reparam.deploy.checks import check_export
from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.nncf_int8 import quantize_openvino
from paddle_reparam.deploy.old_programs import HAS_NEW_PROGRAMS
from paddle_reparam.deploy.onnx_export import export_onnx
from paddle_reparam.deploy.outputs import OutputSpec
from paddle_reparam.deploy.programs import FORMATS, WEIGHTS_SUFFIX, program_file
from paddle_reparam.deploy.quantization import quantize_onnx
from paddle_reparam.deploy.runtimes.base import PRECISIONS
from paddle_reparam.deploy.runtimes.executor import LoadedProgram
from paddle_reparam.deploy.runtimes.onnx_runtime import INT8_ONNX_FILE, ONNX_FILE
from paddle_reparam.deploy.runtimes.openvino import INT8_OPENVINO_FILE
from paddle_reparam.deploy.runtimes.paddle_inference import LoadedPredictor
from paddle_reparam.errors import NothingProven, ReparamError
from paddle_reparam.surgery.flops import measure
from paddle_reparam.surgery.rewrite import reparameterize, replace
from paddle_reparam.surgery.tracing import flatten_outputs
from paddle_reparam.surgery.verify import verify

SPEC = [[None, 3, 16, 16]]

#: File of a folder -> what makes it of the ONNX file of float32, and of images.
MADE_OF_ONNX = {
    ONNX_FILE: lambda *_: None,
    INT8_ONNX_FILE: quantize_onnx,
    INT8_OPENVINO_FILE: quantize_openvino,
}


def small_net(classes=5):
    net = nn.Sequential(
        nn.Conv2D(3, 8, 3, stride=2, padding=1, bias_attr=False), nn.BatchNorm2D(8), nn.ReLU(),
        nn.Conv2D(8, 8, 3, padding=1, groups=8, bias_attr=False), nn.BatchNorm2D(8), nn.ReLU(),
        nn.AdaptiveAvgPool2D(2), nn.Flatten(), nn.Linear(32, classes),
    )  # fmt: skip
    randomise_batch_norms(net)
    net.eval()
    return net


class Segmenter(nn.Layer):
    """A network of maps with transposed convolutions and BNs behind them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2D(3, 8, 3, stride=2, padding=1, bias_attr=False)
        self.norm = nn.BatchNorm2D(8)
        self.up = nn.Conv2DTranspose(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2, bias_attr=False)
        self.up_norm = nn.BatchNorm2D(6)
        self.wide = nn.Conv2DTranspose(6, 4, 3, padding=2, dilation=2)
        self.wide_norm = nn.BatchNorm2D(4)

    def forward(self, x):
        x = F.relu(self.up_norm(self.up(F.relu(self.norm(self.stem(x))))))
        return self.wide_norm(self.wide(x))


def flip_a_weight(folder, tensor):
    """Change the sign of the first number of a tensor in an export's weights."""
    path = program_file(folder).with_suffix(WEIGHTS_SUFFIX)
    data = bytearray(path.read_bytes())
    place = data.index(tensor.numpy().tobytes())
    data[place + 3] ^= 0x80
    path.write_bytes(bytes(data))


# ---------------------------------------------------------------------------------------------------------------------
# Exports


def test_transposed_convolutions_are_folded_and_exported(tmp_path):
    net = Segmenter()
    replace(net, "RefConv2D")
    randomise_batch_norms(net)
    net.eval()
    fused, report = reparameterize(net, fold_bn=True, input_spec=SPEC)
    assert report.left_over == {}
    assert [what for _, what in report.touched[1:]] == ["folded into stem", "folded into up", "folded into wide"]
    assert verify(net, fused, SPEC).passed
    export_inference(fused, tmp_path / "out", SPEC)
    reports = check_export(tmp_path / "out", net, SPEC)
    assert [name for name, report in reports.items() if not report.passed] == []


@pytest.mark.parametrize("activation", [None, "softmax", "sigmoid"])
def test_an_export_computes_what_the_model_does(tmp_path, activation):
    net = small_net()
    output = OutputSpec(activation)
    files = export_inference(net, tmp_path / "out", SPEC, output)
    assert {path.name for path in files} == {path.name for path in (tmp_path / "out").iterdir()}

    reports = check_export(tmp_path / "out", net, SPEC, output)
    assert [name for name, report in reports.items() if not report.passed] == []
    assert len(reports) == 6
    assert max(report.relative_error for report in reports.values()) < 1e-5

    x = paddle.randn([4, 3, 16, 16])
    expected = net(x) if activation is None else getattr(F, activation)(net(x))
    for onednn in (True, False):
        (actual,) = LoadedPredictor(tmp_path / "out", onednn=onednn, threads=2).run(x.numpy())
        assert relative_error(actual, expected) < 1e-5


class Gate(nn.Layer):
    """A layer that is no layer of Paddle's own: tracing rewrites such ones."""

    def forward(self, x):
        if x.shape[1] > 4:
            x = x * F.sigmoid(x)
        return x


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    net = nn.Sequential(small_net(), Gate())
    net.eval()
    layers = net.sublayers(include_self=True)
    before = [dict(vars(layer)) for layer in layers]
    weights = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}
    export_inference(net, tmp_path, SPEC)
    assert [vars(layer) for layer in layers] == before
    assert all((tensor.numpy() == weights[name]).all() for name, tensor in net.state_dict().items())


class SecondRuntime:
    """A runtime as somebody might add one."""

    name, title = "second", "the second one"
    precision, file_name, proves = "float32", None, True

    def __init__(self):
        self.alive, self.together = weakref.WeakSet(), []

    def version(self):
        return "second 1.0"

    def require(self):
        pass

    def file(self, folder):
        return program_file(folder)

    def load(self, folder, threads=1, keep_shapes=True):
        self.together.append(len(self.alive))
        model = LoadedPredictor(folder)
        self.alive.add(model)
        return model


def test_a_runtime_is_known_to_checks_by_its_place_in_the_list(tmp_path, monkeypatch):
    """Those loaded hold the weights: together they would be the peak of a release, so each goes before the next."""
    net, runtime = small_net(), SecondRuntime()
    net.eval()
    export_inference(net, tmp_path, SPEC)
    monkeypatch.setattr(runtimes, "RUNTIMES", (*runtimes.RUNTIMES, runtime, runtime))
    reports = check_export(tmp_path, net, SPEC)
    assert len(reports) == 8
    assert {"the second one, batch 1", "the second one, batch 3"} <= set(reports)
    assert runtime.together == [0, 0]

    def require():
        raise ReparamError("the second one is not installed")

    runtime.require = require
    assert len(check_export(tmp_path, net, SPEC)) == 6


def test_a_folder_in_which_nothing_can_be_run_proves_nothing(tmp_path):
    with pytest.raises(NothingProven, match="holds nothing that was exported"):
        check_export(tmp_path, small_net(), SPEC)


@pytest.mark.parametrize("runtime", runtimes.RUNTIMES, ids=lambda runtime: runtime.name)
def test_every_runtime_keeps_the_protocol(runtime, tmp_path):
    if runtime.file_name is not None and missing_for_onnx():
        pytest.skip(missing_for_onnx())
    net = small_net()
    net.eval()
    export_inference(net, tmp_path, SPEC)
    try:
        runtime.require()
    except ReparamError as lacking:
        reason = str(lacking)
        assert reason.startswith(("Paddle finds no GPU here", "this processor does not multiply in bfloat16"))
        return
    assert re.fullmatch(r"[a-z]+ \d+[\w.]+", runtime.version())
    assert runtimes.get_runtime(runtime.name) is runtime
    assert runtime.precision in PRECISIONS
    assert runtime.precision in ("float32", *runtime.name.split("-"))
    assert runtime.file(tmp_path / "elsewhere") is None
    x = np.random.default_rng(0).standard_normal([2, *SPEC[0][1:]]).astype("float32")
    if runtime.file_name is not None:
        assert runtime.file(tmp_path) is None
        export_onnx(tmp_path)
        MADE_OF_ONNX[runtime.file_name](tmp_path / ONNX_FILE, tmp_path / runtime.file_name, x)
    assert runtime.file(tmp_path).is_file()
    model = runtime.load(tmp_path, threads=2, keep_shapes=False)
    [output] = model.run(x)
    assert (
        relative_error(net(paddle.to_tensor(x)), output)
        < {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.1}[runtime.precision]
    )
    with pytest.raises(ReparamError, match="it takes 1 inputs"):
        model.run(x, x)


def test_outputs_are_picked_as_paddleclas_does(tmp_path):
    class Student(nn.Layer):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return {"Teacher": x, "Student": {"features": self.net[:8](x), "logits": self.net(x)}}

    net = Student()
    net.eval()
    x = paddle.randn([2, 3, 16, 16])
    for name, output, expected in [
        ("logits", OutputSpec("softmax", ("Student",)), F.softmax(net.net(x))),
        ("features", OutputSpec(None, ("Student", "features")), net.net[:8](x)),
    ]:
        export_inference(net, tmp_path / name, SPEC, output)
        assert relative_error(LoadedProgram(tmp_path / name)(x)[0], expected) < 1e-5


@pytest.mark.parametrize("file_format", FORMATS if HAS_NEW_PROGRAMS else ["pdmodel"])
def test_nothing_is_unpickled_and_no_thread_stays(tmp_path, monkeypatch, file_format):
    net = small_net()
    export_inference(net, tmp_path, SPEC, options=ExportOptions(file_format))
    assert not list(tmp_path.glob("*.info"))
    # Such a file lies beside exports that others wrote.
    (tmp_path / f"inference{WEIGHTS_SUFFIX}.info").write_bytes(b"no pickle")
    monkeypatch.setattr(pickle, "load", lambda *arguments, **named: pytest.fail("a pickle was read"))
    x = paddle.randn([2, 3, 16, 16])

    def threads():
        assert relative_error(LoadedProgram(tmp_path)(x)[0], net(x)) < 1e-5
        gc.collect()
        return len(os.listdir("/proc/self/task"))

    threads()
    before = threads()
    assert max(threads() for _ in range(4)) <= before
    assert paddle.in_dynamic_mode()


@pytest.mark.parametrize("file_format", FORMATS if HAS_NEW_PROGRAMS else ["pdmodel"])
def test_a_program_that_does_more_than_compute_is_not_run(tmp_path, monkeypatch, file_format):
    export_inference(small_net(), tmp_path, SPEC, options=ExportOptions(file_format))
    # A harmless operator stands for those that act.
    monkeypatch.setattr("paddle_reparam.deploy.programs.ACTING_OPERATORS", {"relu"})
    for load in (LoadedProgram, LoadedPredictor):
        with pytest.raises(ReparamError, match="it holds the operator relu, which does not only compute"):
            load(tmp_path)


def test_a_changed_weight_is_noticed_in_every_way_of_loading(tmp_path):
    net = small_net()
    export_inference(net, tmp_path, SPEC, OutputSpec("softmax"))
    flip_a_weight(tmp_path, net[-1].weight)
    reports = check_export(tmp_path, net, SPEC, OutputSpec("softmax"))
    assert [name for name, report in reports.items() if report.passed] == []


def test_a_fault_in_an_unlikely_class_is_noticed_behind_softmax(tmp_path):
    net = small_net()
    net[-1].bias.set_value(paddle.to_tensor([20.0, 0.0, 0.0, 0.0, 0.0]))
    output = OutputSpec("softmax")
    export_inference(net, tmp_path, SPEC, output)
    assert all(report.passed for report in check_export(tmp_path, net, SPEC, output).values())
    net[-1].bias.set_value(paddle.to_tensor([20.0, 0.0, 0.1, 0.0, 0.0]))
    x = paddle.randn([4, 3, 16, 16])
    assert relative_error(LoadedProgram(tmp_path)(x)[0], F.softmax(net(x))) < 1e-6
    assert not any(report.passed for report in check_export(tmp_path, net, SPEC, output).values())


def test_a_damaged_export_is_never_taken_for_a_good_one(tmp_path):
    net = small_net()
    export_inference(net, tmp_path, SPEC)
    program = program_file(tmp_path)
    weights = program.with_suffix(WEIGHTS_SUFFIX)
    # Paddle 3.3 loads the rest of such a file without a word.
    weights.write_bytes(weights.read_bytes()[:-700])
    try:
        reports = check_export(tmp_path, net, SPEC)
    except ReparamError as error:
        assert "cannot load it" in str(error)  # noqa: PT017  (either way of noticing will do)
    else:
        assert not all(report.passed for report in reports.values())
    program.write_text("{}")
    with pytest.raises(ReparamError, match="cannot load it") as error:
        check_export(tmp_path, net, SPEC)
    assert "\n" not in str(error.value)
    program.unlink()
    with pytest.raises(ReparamError, match=r"inference.json or inference.pdmodel\), it holds 0"):
        LoadedPredictor(tmp_path)


class Breaks(nn.Layer):
    def forward(self, x):
        raise RuntimeError("out of order")


def broken():
    net = Breaks()
    net.eval()
    return net


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, folder: export_inference(net.train() or net, folder, SPEC), r"call model.eval\(\)"),
        (lambda net, folder: export_inference(net, folder, SPEC * 2), "cannot be exported: .* positional"),
        (lambda net, folder: export_inference(broken(), folder, SPEC), "Breaks cannot be exported: .*out of order"),
        (lambda net, folder: OutputSpec("tanh"), "softmax, argmax, sigmoid, l2, identity or None"),
        (lambda net, folder: measure(net.train() or net, SPEC), r"call model.eval\(\)"),
    ],
)
def test_wrong_use_is_refused(tmp_path, call, message):
    with pytest.raises(ReparamError, match=message):
        call(small_net(), tmp_path)


def test_the_predictor_says_how_many_inputs_it_takes(tmp_path):
    export_inference(small_net(), tmp_path, SPEC)
    x = paddle.randn([1, 3, 16, 16]).numpy()
    with pytest.raises(ReparamError, match="it takes 1 inputs"):
        LoadedPredictor(tmp_path).run(x, x)


# ---------------------------------------------------------------------------------------------------------------------
# What checks and programs need in special cases


def test_probabilities_that_are_all_alike_are_checked_by_their_logits(tmp_path):
    paddle.seed(0)
    model = small_net()
    model[2] = nn.Sigmoid()
    model[8].weight.set_value(model[8].weight * 1e-7)
    spec, softmax = [[None, 3, 8, 8]], OutputSpec("softmax")
    export_inference(model, tmp_path, spec, softmax)
    with pytest.raises(NothingProven, match="hardly depends on its input"):
        check_export(tmp_path, model, spec, softmax)
    assert all(r.passed for r in check_export(tmp_path, model, spec, softmax, must_depend=False).values())

    save(model.state_dict(), tmp_path / "weights.pdparams")
    report = release(model, tmp_path / "weights.pdparams", tmp_path / "out", spec, output=softmax, progress=print)
    assert {name.endswith("logits") for name in report.checks} == {True, False}
    assert all(check.passed for check in report.checks.values())
    assert not list((tmp_path / "out").glob("*logits*"))


def test_a_bias_is_added_where_onednn_takes_it_into_the_convolution(tmp_path):
    net = small_net()
    fused, _ = reparameterize(net, fold_bn=True, input_spec=SPEC)
    export_inference(fused, tmp_path, SPEC)
    program = program_file(tmp_path)
    if program.suffix == ".pdmodel":
        paddle.enable_static()
        ops = paddle.static.Program.parse_from_string(program.read_bytes()).global_block().ops
        paddle.disable_static()
        assert [op.attr("axis") for op in ops if op.type == "elementwise_add"][:2] == [1, 1]
        assert "reshape2" not in [op.type for op in ops]
    else:
        assert ".reshape" not in program.read_text(encoding="utf-8")
    assert all(report.passed for report in check_export(tmp_path, net, SPEC).values())


def test_a_network_is_exported_twice_and_one_beside_it_that_has_its_names(tmp_path):
    """Biases get names in an export, and Paddle takes a name once."""
    nets = []
    for _ in range(2):
        with paddle.utils.unique_name.guard():
            nets.append(nn.Sequential(nn.Conv2D(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2D(3, 4, 3)))
    assert nets[0][0].bias.name == nets[1][0].bias.name
    x = paddle.randn([2, *SPEC[0][1:]])
    for number, net in enumerate([*nets, nets[0]]):
        net.eval()
        export_inference(net, tmp_path / str(number), SPEC)
        assert relative_error(LoadedPredictor(tmp_path / str(number)).run(x.numpy())[0], net(x)) < 1e-5


@pytest.mark.skipif(not HAS_NEW_PROGRAMS, reason="only the programs of Paddle 3 are fused by the order of a sum")
def test_the_bias_of_a_large_depthwise_kernel_stays_apart_from_it(tmp_path):
    """oneDNN has no fast kernel in bfloat16 for such a convolution with a bias."""
    convs = [nn.Conv2D(4, 4, k, padding=[v // 2 for v in k], groups=4) for k in [(3, 3), (5, 27), (51, 5), (31, 31)]]
    net = nn.Sequential(*convs, nn.Conv2D(4, 4, 1))
    for conv in convs:
        conv.bias.set_value(paddle.randn([4]))
    net.eval()
    export_inference(net, tmp_path, [[None, 4, 16, 16]])
    program = json.loads(program_file(tmp_path).read_text(encoding="utf-8"))
    operators = program["program"]["regions"][0]["blocks"][0]["ops"]
    parameters = {op["O"]["%"] for op in operators if op["#"] == "p"}
    sums = [op["I"] for op in operators if op["#"].endswith(".add")]
    assert [first["%"] in parameters for first, _ in sums] == [False, True, True, True, False]
    assert all(report.passed for report in check_export(tmp_path, net, [[None, 4, 16, 16]]).values())


# ---------------------------------------------------------------------------------------------------------------------
# What a network takes and puts out


class Maps(nn.Layer):
    """Two maps and a score, as a list, a tuple or a dict of them."""

    def __init__(self, form):
        super().__init__()
        self.conv, self.other, self.form = nn.Conv2D(3, 4, 3), nn.Conv2D(3, 5, 3), form

    def forward(self, x):
        a, b = self.conv(x), self.other(x)
        score = a.mean([2, 3])
        return {"list": [a, b, score], "tuple": (a, (b, score)), "dict": {"z": a, "b": [b, score]}}[self.form]


def checked_release(net, folder, spec, **options):
    net.eval()
    with tempfile.TemporaryDirectory() as place:
        save(net.state_dict(), f"{place}/weights.pdparams")
        report = release(net, f"{place}/weights.pdparams", folder, spec, progress=lambda line: None, **options)
    check_release(folder)
    return report


class Fused(nn.Layer):
    """A network with something to fuse in front."""

    def __init__(self, net):
        super().__init__()
        self.first, self.bn, self.net = nn.Conv2D(3, 3, 1), nn.BatchNorm2D(3), net

    def forward(self, x):
        return self.net(self.bn(self.first(x)))


@pytest.mark.parametrize("form", ["list", "tuple", "dict"])
@pytest.mark.parametrize("file_format", FORMATS)
def test_all_that_a_network_puts_out_is_exported(tmp_path, form, file_format):
    if file_format == "json" and not HAS_NEW_PROGRAMS:
        pytest.skip("Paddle 2 writes .pdmodel only")
    net = Fused(Maps(form))
    report = checked_release(net, tmp_path / "out", SPEC, options=ExportOptions(file_format))
    assert report.manifest["output"]["left_out"] == []
    x = paddle.randn([2, 3, 16, 16])
    outputs = LoadedPredictor(tmp_path / "out").run(x.numpy())
    expected = flatten_outputs(net(x))
    assert len(outputs) == len(expected) == 3
    assert max(relative_error(a, b) for a, b in zip(outputs, expected)) < 1e-5


class PutsOut(nn.Layer):
    """Puts out what a function makes of its map and of its input."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.bn, self.function = nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4), function

    def forward(self, x):
        return self.function(self.bn(self.conv(x)), x)


@pytest.mark.parametrize(
    ("function", "output", "count"),
    [
        (lambda y, x: [y, y, y], OutputSpec(), 3),
        (lambda y, x: {"a": x, "b": [y, x]}, OutputSpec(), 3),
        (lambda y, x: [y, y.mean(), (2 * y).astype("int32"), y > 0], OutputSpec(), 4),
        (lambda y, x: {"logits": [y.mean([2, 3]), x]}, OutputSpec("softmax"), 1),
        (lambda y, x: [{"a": [{"b": y}, x]}], OutputSpec("sigmoid", ("a", "b")), 1),
    ],
)
@pytest.mark.parametrize("file_format", FORMATS)
def test_outputs_that_are_one_tensor_or_an_input(tmp_path, function, output, count, file_format):
    if file_format == "json" and not HAS_NEW_PROGRAMS:
        pytest.skip("Paddle 2 writes .pdmodel only")
    checked_release(PutsOut(function), tmp_path / "out", SPEC, output=output, options=ExportOptions(file_format))
    assert len(LoadedPredictor(tmp_path / "out").run(np.zeros([2, 3, 16, 16], "float32"))) == count


def test_an_input_that_is_not_used_is_said(tmp_path):
    class Ignores(PutsOut):
        def forward(self, x, size):
            return self.bn(self.conv(x))

    net = Ignores(lambda y, x: y)
    with pytest.raises(ReparamError, match=r"does not depend on all of its inputs \(x0, x1\)"):
        checked_release(net, tmp_path / "out", [*SPEC, [None, 2]])


def test_what_is_left_out_is_said(tmp_path):
    net = Fused(Maps("list"))
    report = checked_release(net, tmp_path / "out", SPEC, output=OutputSpec("softmax"))
    assert report.manifest["output"]["left_out"] == ["1", "2"]
    assert "put out by the network, but not by the export: 1, 2" in str(report)
    (maps,) = LoadedPredictor(tmp_path / "out").run(np.zeros([1, 3, 16, 16], "float32"))
    assert relative_error(maps.sum(1), np.ones([1, 14, 14])) < 1e-5


def test_an_export_that_lacks_an_output_is_noticed(tmp_path):
    net = Maps("list")
    net.eval()
    export_inference(net, tmp_path, SPEC, OutputSpec("identity"))
    with pytest.raises(ReparamError, match="puts out 3 tensors, the second 1"):
        check_export(tmp_path, net, SPEC)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_classes_are_axis_1(tmp_path, activation):
    net = Fused(nn.Conv2D(3, 4, 3))
    checked_release(net, tmp_path / "out", SPEC, output=OutputSpec(activation))
    x = paddle.randn([2, 3, 16, 16])
    (actual,) = LoadedPredictor(tmp_path / "out").run(x.numpy())
    scores = as_array(net(x))
    powers = np.exp(scores)
    expected = powers / powers.sum(1, keepdims=True) if activation == "softmax" else 1 / (1 + np.exp(-scores))
    assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("wrong", [lambda x, axis: F.softmax(x, axis=-1), lambda x, axis: F.softmax(2 * x, axis=axis)])
def test_another_activation_than_the_exported_one_is_noticed(tmp_path, monkeypatch, wrong):
    """The reference is not built by the code that it checks."""
    net = nn.Sequential(nn.Conv2D(3, 4, 3))
    net.eval()
    softmax = OutputSpec("softmax")
    monkeypatch.setattr(export, "F", types.SimpleNamespace(softmax=wrong, sigmoid=F.sigmoid))
    export_inference(net, tmp_path, SPEC, softmax)
    assert not any(report.passed for report in check_export(tmp_path, net, SPEC, softmax).values())


class TwoInputs(nn.Layer):
    """Takes an image and two numbers, as two arguments or in a dict."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4), nn.Linear(2, 4)

    def forward(self, image, scale=None):
        if isinstance(image, dict):
            image, scale = image["image"], image["scale"]
        return self.bn(self.conv(image)).mean([2, 3]) - self.linear(scale)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ([[None, 3, 16, 16], [None, 2]], ["x0", "x1"]),
        ({"scale": [None, 2], "image": [None, 3, 16, 16]}, ["image", "scale"]),
    ],
)
@pytest.mark.parametrize("file_format", FORMATS)
def test_networks_with_several_inputs(tmp_path, spec, names, file_format):
    if file_format == "json" and not HAS_NEW_PROGRAMS:
        pytest.skip("Paddle 2 writes .pdmodel only")
    net = TwoInputs()
    report = checked_release(net, tmp_path / "out", spec, options=ExportOptions(file_format))
    assert report.manifest["input"]["names"] == (names if isinstance(spec, dict) else None)
    model = LoadedPredictor(tmp_path / "out")
    assert model.inputs == names
    image, scale = paddle.randn([2, 3, 16, 16]), paddle.randn([2, 2])
    assert relative_error(model.run(image.numpy(), scale.numpy())[0], net(image, scale)) < 1e-5


@pytest.mark.skipif(bool(missing_for_onnx()), reason=missing_for_onnx() or "nothing is missing")
@pytest.mark.parametrize("spec", [[[None, 3, 16, 16], [None, 2]], {"scale": [None, 2], "image": [None, 3, 16, 16]}])
def test_onnx_files_with_several_inputs(tmp_path, spec):
    report = checked_release(TwoInputs(), tmp_path / "out", spec, options=ExportOptions(onnx=True))
    assert report.checks["onnxruntime, batch 3"].passed


@pytest.mark.parametrize(
    ("net", "output", "message"),
    [
        (Maps("dict"), OutputSpec("softmax"), "has no 'logits'; it has z, b"),
        (Maps("dict"), OutputSpec(None, ("features",)), "has no 'features'; it has z, b"),
        (Maps("list"), OutputSpec(None, ("features",)), "no dict from which 'features'"),
        (nn.Sequential(nn.Flatten(0)), OutputSpec("softmax"), "follows one tensor of numbers"),
    ],
)
def test_outputs_that_cannot_be_picked(tmp_path, net, output, message):
    with pytest.raises(ReparamError, match=message):
        checked_release(Fused(net), tmp_path / "out", SPEC, output=output)
    assert not (tmp_path / "out").exists()
