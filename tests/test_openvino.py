"""OpenVINO, in float32, bfloat16 and int8: what Paddle computes for what it takes, and one sentence otherwise."""

import json
import sys

import numpy as np
import paddle
import pytest
from helpers import missing_for_onnx, relative_error
from paddle import nn

from paddle_reparam.deploy import nncf_int8
from paddle_reparam.deploy.export import export_inference
from paddle_reparam.deploy.nncf_int8 import quantize_openvino
from paddle_reparam.deploy.onnx_export import export_onnx
from paddle_reparam.deploy.released import MANIFEST
from paddle_reparam.deploy.runtimes import get_runtime, openvino
from paddle_reparam.deploy.runtimes.onnx_runtime import ONNX_FILE
from paddle_reparam.deploy.runtimes.openvino import INT8_OPENVINO_FILE, OpenVinoModel
from paddle_reparam.errors import ReparamError
from paddle_reparam.measure import processors

needs_onnx = pytest.mark.skipif(bool(missing_for_onnx()), reason=missing_for_onnx() or "all there")
GENERATOR = np.random.default_rng(0)
#: What a file says of itself, with all that a file of XML writes in another way.
FACTS = {MANIFEST: '{\n  "é<": "&\'\\t"\n}\n'}


class Net(nn.Layer):
    """Kernels of three kinds, one of them grouped, and a sum over whatever size the maps have."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2D(3, 8, 3, stride=2, padding=1), nn.Hardswish(),
            nn.Conv2D(8, 8, 5, padding=2, groups=8), nn.ReLU(), nn.Conv2D(8, 16, 1),
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(x).mean([2, 3]))


def images(count, size=16):
    return GENERATOR.standard_normal([count, 3, size, size]).astype("float32")


CALIBRATION = images(16)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export for every size, with an ONNX file and one of int8."""
    folder = tmp_path_factory.mktemp("exported")
    paddle.seed(0)
    net = Net()
    net.eval()
    export_inference(net, folder, [[None, 3, None, None]])
    export_onnx(folder)
    quantize_openvino(folder / ONNX_FILE, folder / INT8_OPENVINO_FILE, CALIBRATION, FACTS)
    return folder, net


@needs_onnx
def test_float32_is_named_and_every_shape_is_right(exported):
    folder, net = exported
    for keep_shapes in (True, False):
        model = OpenVinoModel(folder / ONNX_FILE, keep_shapes=keep_shapes)
        # More shapes than are compiled for themselves, and the first one again.
        for batch, size in [(2, 16), (1, 16), (3, 24), (1, 33), (2, 40), (1, 17), (2, 16)]:
            x = images(batch, size)
            assert relative_error(model.run(x)[0], net(paddle.to_tensor(x))) < 1e-5
        assert len(model._compiled) == (5 if keep_shapes else 1)


@needs_onnx
def test_outputs_are_copies(exported):
    model = OpenVinoModel(exported[0] / ONNX_FILE)
    [first] = model.run(images(2))
    before = first.copy()
    [second] = model.run(images(2))
    assert not np.shares_memory(first, second)
    assert (first == before).all()
    assert first.flags.owndata
    assert relative_error(first, second) > 1e-3


@needs_onnx
@pytest.mark.parametrize(("name", "largest"), [("openvino-bfloat16", 0.02), ("openvino-int8", 0.1)])
def test_fewer_bits_round_and_do_no_more(exported, name, largest):
    folder, net = exported
    runtime = get_runtime(name)
    try:
        runtime.require()
    except ReparamError as lacking:
        pytest.skip(str(lacking))
    x = images(8)
    [output] = runtime.load(folder).run(x)
    # Where it is no farther away than float32, nothing has been rounded.
    assert 1e-5 < relative_error(output, net(paddle.to_tensor(x))) < largest


def kernels_of_int8(file):
    """Return the shapes of the kernels that a file holds in eight bits."""
    constants = [op for op in openvino.read_model(file).get_ops() if op.get_type_name() == "Constant"]
    return sorted(list(op.shape) for op in constants if op.get_element_type().size == 1 and len(op.shape) > 1)


@needs_onnx
def test_the_int8_file_says_what_it_was_told_and_has_int8_in_every_layer(exported):
    folder, _ = exported
    model = get_runtime("openvino-int8").load(folder)
    assert FACTS.items() <= model.metadata.items()
    # The second is of a grouped convolution.
    assert kernels_of_int8(folder / INT8_OPENVINO_FILE) == [[5, 16], [8, 1, 1, 5, 5], [8, 3, 3, 3], [16, 8, 1, 1]]


@needs_onnx
def test_layers_stay_in_float32_while_too_much_is_lost(exported, tmp_path):
    folder, _ = exported
    target, lost = tmp_path / "some.xml", [2.0, 1.0, 0.2]

    def drop(file):
        assert file != target
        return lost.pop(0)

    settings = quantize_openvino(folder / ONNX_FILE, target, images(8), drop=drop, largest_drop=0.5)
    assert len(settings["float_layers"]) == 2
    assert json.loads(json.dumps(settings))["ranges"] in ("largest", "mean")
    assert len(kernels_of_int8(target)) == 2
    assert lost == []


@needs_onnx
@pytest.mark.parametrize(("most", "tried"), [(0, 0), (128, 1)])
def test_biases_of_networks_of_many_layers_are_left_alone(exported, tmp_path, monkeypatch, most, tried):
    settings = []
    quantized = nncf_int8._Network.quantized

    def watched(network, given, batches=None):
        settings.append(given)
        return quantized(network, given, batches)

    monkeypatch.setattr(nncf_int8._Network, "quantized", watched)
    monkeypatch.setattr(nncf_int8, "_MOST_CORRECTED", most)
    quantize_openvino(exported[0] / ONNX_FILE, tmp_path / INT8_OPENVINO_FILE, CALIBRATION)
    assert sum(each.corrected for each in settings[:-1]) == tried, "the last ones are those that were chosen"


@needs_onnx
def test_the_int8_file_is_the_same_each_time(exported, tmp_path, capfd):
    folder, _ = exported
    again = tmp_path / INT8_OPENVINO_FILE
    quantize_openvino(folder / ONNX_FILE, again, CALIBRATION, FACTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{again.stem}.bin", again.name]
    for name in (f"{again.stem}.bin", again.name):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert capfd.readouterr() == ("", "")


@needs_onnx
def test_what_it_does_not_take_is_one_sentence(tmp_path):
    net = Net()
    net.eval()
    export_inference(net, tmp_path, [[None, 3, 16, 16]])
    model = OpenVinoModel(export_onnx(tmp_path))
    # OpenVINO would give a network of one size another one, and an answer.
    with pytest.raises(ReparamError, match=r"inference.onnx: it takes \[\?,3,16,16\], not \[1, 3, 24, 24\]"):
        model.run(images(1, 24))
    with pytest.raises(ReparamError, match="it takes float32, not float64"):
        model.run(images(1).astype("float64"))
    with pytest.raises(ReparamError, match="the ranges of the activations are measured on images"):
        quantize_openvino(tmp_path / ONNX_FILE, tmp_path / INT8_OPENVINO_FILE, images(0))


@needs_onnx
def test_a_damaged_or_foreign_file_is_one_sentence_and_nothing_else(exported, tmp_path, capfd):
    folder, _ = exported
    network, weights = ((folder / INT8_OPENVINO_FILE).with_suffix(suffix).read_bytes() for suffix in (".xml", ".bin"))
    onnx = (folder / ONNX_FILE).read_bytes()
    for name, content, its_weights in [
        ("text.onnx", b"no network", None),
        ("empty.onnx", b"", None),
        ("half.onnx", onnx[: len(onnx) // 2], None),
        ("text.xml", b"no network", None),
        ("foreign.xml", b"<html><body/></html>", None),
        ("half.xml", network[: len(network) // 2], weights),
        ("alone.xml", network, None),
        ("short.xml", network, weights[: len(weights) // 2]),
    ]:
        (tmp_path / name).write_bytes(content)
        if its_weights is not None:
            (tmp_path / name).with_suffix(".bin").write_bytes(its_weights)
        with pytest.raises(ReparamError, match=f"{name}: OpenVINO cannot load it: ") as error:
            OpenVinoModel(tmp_path / name)
        assert "\n" not in str(error.value)
    # Left to itself OpenVINO tries the readers of all formats on such a file, which write to the terminal.
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("openvino", lambda folder: OpenVinoModel(folder / ONNX_FILE)),
        ("openvino", lambda _: get_runtime("openvino").require()),
        ("nncf", lambda folder: quantize_openvino(folder / ONNX_FILE, folder / INT8_OPENVINO_FILE, images(1))),
    ],
)
def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch, package, use):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ReparamError, match=rf"needs the package {package}.*paddle-reparam\[openvino\]") as error:
        use(tmp_path)
    assert "\n" not in str(error.value)


def test_a_processor_says_whether_it_multiplies_in_bfloat16(tmp_path, monkeypatch):
    facts = tmp_path / "cpuinfo"
    facts.write_text("flags\t\t: fpu avx512_bf16 amx_tile\n")
    processors.require_bfloat16(processor_facts=facts)
    facts.write_text("flags\t\t: fpu avx512f\n")
    for otherwise, place in [(lambda: True, facts), (lambda: False, tmp_path / "none")]:
        with pytest.raises(ReparamError, match="this processor does not multiply in bfloat16"):
            processors.require_bfloat16(otherwise, place)
    processors.require_bfloat16(lambda: True, tmp_path / "none")

    def refuse(*_):
        raise ReparamError("no bfloat16")

    monkeypatch.setattr(openvino, "require_bfloat16", refuse)
    with pytest.raises(ReparamError, match="no bfloat16"):
        get_runtime("openvino-bfloat16").require()
    get_runtime("openvino").require()
    assert [get_runtime(name)._hint() for name in ("openvino", "openvino-int8")] == ["f32", "f32"]


def test_nothing_is_reported_over_the_net():
    openvino.need_openvino("nncf")
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
