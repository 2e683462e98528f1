"""Files that are broken while a release is made, so that no hash tells: each makes it fail, with what is broken."""

import os
import re
import shutil
import time

import numpy as np
import pytest
from helpers import missing_for_onnx
from test_tuning import SOFTMAX, SPEC, Other, here, images, serve, trained, tuning_on  # noqa: F401

from paddle_reparam import check_release, release
from paddle_reparam.deploy import steps, tuning
from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.old_programs import HAS_NEW_PROGRAMS
from paddle_reparam.deploy.onnx_export import export_onnx
from paddle_reparam.deploy.programs import FILE_NAME, WEIGHTS_SUFFIX, program_file
from paddle_reparam.deploy.released import read_manifest, write_manifest
from paddle_reparam.deploy.runtimes import RUNTIMES, get_runtime
from paddle_reparam.deploy.runtimes.onnx_runtime import ONNX_FILE, need
from paddle_reparam.deploy.tuning import INT8_FILES
from paddle_reparam.errors import ReparamError
from paddle_reparam.files import digest
from paddle_reparam.measure.timing import in_new_process
from paddle_reparam.surgery.rewrite import reparameterize

WEIGHTS = f"{FILE_NAME}{WEIGHTS_SUFFIX}"


# ---------------------------------------------------------------------------------------------------------------------
# What breaks a file


def kernel_of(net):
    """Return the kernel of the second convolution, as it ships."""
    return reparameterize(net, fold_bn=True, input_spec=SPEC)[0][3].weight.numpy()


def with_other_weights(path, old, new):
    """Write other float32 numbers into a file that holds these."""
    content = path.read_bytes()
    assert content.count(old.tobytes()) == 1, f"{path.name} does not hold this kernel"
    path.write_bytes(content.replace(old.tobytes(), new.astype("float32").tobytes()))


def flip_a_weight(path, net):
    """Flip a bit of one weight, the lowest of its exponent."""
    old = kernel_of(net)
    new = old.copy()
    new.view(np.uint32)[np.unravel_index(np.abs(old).argmax(), old.shape)] ^= 1 << 23
    with_other_weights(path, old, new)


def scale_a_channel(path, net):
    """Make the weights of one channel twice as large."""
    old = kernel_of(net)
    new = old.copy()
    new[np.abs(old).sum((1, 2, 3)).argmax()] *= 2
    with_other_weights(path, old, new)


def drop_the_padding(path, _net):
    """Let the second convolution not pad, whatever holds the network."""
    if path.suffix == ".onnx":
        model = onnx_of(path)
        node = [node for node in model.graph.node if node.op_type == "Conv"][1]
        [pads] = [each for each in node.attribute if each.name == "pads"]
        pads.ints[:] = [0, 0, 0, 0]
        path.write_bytes(model.SerializeToString())
        return
    text = path.read_text()
    pads = {
        ".json": r'("D":)1(},{"#":"0.a_i32","D":)1(}\]},"N":"paddings")',
        ".xml": r'(pads_begin=")1, 1(" pads_end=")1, 1(")',
    }[path.suffix]
    second = list(re.finditer(pads, text))[1]
    none = "0, 0" if path.suffix == ".xml" else "0"
    path.write_text(text[: second.start()] + none.join(second.groups()) + text[second.end() :])


def onnx_of(path):
    return need("onnx").load(str(path))


def constants_of(path):
    """Yield (shape, dtype, first byte) of the constants of an OpenVINO file, in order; they lie in its .bin."""
    pattern = r'type="Const"[^>]*>\s*<data element_type="(\w+)" shape="([\d, ]*)" offset="(\d+)"'
    for dtype, shape, offset in re.findall(pattern, path.read_text()):
        yield [int(size) for size in shape.split(",") if size.strip()], dtype, int(offset)


def halve_a_scale(path, net):
    """Let the weights of the second convolution be half as large, in an int8 file."""
    kernel = kernel_of(net)
    if path.suffix == ".xml":
        # The constant behind the kernel.
        constants = list(constants_of(path))
        [place] = [i for i, (shape, dtype, _) in enumerate(constants) if (shape, dtype) == (list(kernel.shape), "i8")]
        shape, dtype, start = constants[place + 1]
        assert (shape, dtype) == ([len(kernel), 1, 1, 1], "f32")
        content = bytearray(path.with_suffix(".bin").read_bytes())
        scales = np.frombuffer(content, np.float32, len(kernel), start) / 2
        content[start : start + scales.nbytes] = scales.tobytes()
        path.with_suffix(".bin").write_bytes(content)
        return
    model, helper = onnx_of(path), need("onnx").numpy_helper
    tensors = {each.name: each for each in model.graph.initializer}
    tensors.update({node.output[0]: node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"})
    made_by = {node.output[0]: node for node in model.graph.node}
    weight = [node for node in model.graph.node if node.op_type == "Conv"][1].input[1]
    scale = tensors[made_by[weight].input[1]]
    scale.CopyFrom(helper.from_array(helper.to_array(scale) / 2, scale.name))
    path.write_bytes(model.SerializeToString())


# ---------------------------------------------------------------------------------------------------------------------
# While a release is made


@pytest.fixture(scope="module")
def converted(trained, tmp_path_factory):  # noqa: F811
    """Return the ONNX file of the network; each release is to take a copy, as converting takes seconds."""
    if missing_for_onnx():
        return None
    folder = tmp_path_factory.mktemp("converted")
    export_inference(
        reparameterize(trained[0], fold_bn=True, input_spec=SPEC, fixed_size=True)[0], folder, SPEC, SOFTMAX
    )
    return export_onnx(folder)


@pytest.fixture
def quickly(converted, monkeypatch):
    """Let a release take the ONNX file that was made already."""
    monkeypatch.setattr(steps, "export_onnx", lambda folder, *_: shutil.copy(converted, folder / ONNX_FILE))


FLOAT_FILES = [
    (WEIGHTS, flip_a_weight, "Predictor, oneDNN"),
    (WEIGHTS, scale_a_channel, "Predictor, oneDNN"),
    (f"{FILE_NAME}.json", drop_the_padding, "Predictor, oneDNN"),
    (ONNX_FILE, flip_a_weight, "onnxruntime|OpenVINO"),
    (ONNX_FILE, scale_a_channel, "onnxruntime|OpenVINO"),
    (ONNX_FILE, drop_the_padding, "onnxruntime|OpenVINO"),
]


@pytest.mark.parametrize(("name", "break_it", "runtime"), FLOAT_FILES)
def test_a_file_of_float32_that_is_broken_while_it_is_written(
    name, break_it, runtime, trained, quickly, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    if (name == ONNX_FILE and missing_for_onnx()) or (name.endswith(".json") and not HAS_NEW_PROGRAMS):
        pytest.skip(missing_for_onnx() or "Paddle 2 writes .pdmodel only")
    net, _, file = trained
    writer = "export_onnx" if name == ONNX_FILE else "export_inference"
    write = getattr(steps, writer)

    def write_broken(*arguments, **options):
        write(*arguments, **options)
        break_it((arguments[0] if writer == "export_onnx" else arguments[1]) / name, net)

    monkeypatch.setattr(steps, writer, write_broken)
    options = ExportOptions(onnx=name == ONNX_FILE)
    with pytest.raises(ReparamError, match=rf"^({runtime}), batch \d is not the same function: relative error"):
        release(net, file, tmp_path / "out", SPEC, output=SOFTMAX, options=options, progress=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def int8_release(trained, images, folder):  # noqa: F811
    net, labels, file = trained
    asked = tuning_on(images, labels, precisions=("int8",), timed=False)
    return release(net, file, folder, SPEC, output=SOFTMAX, tuning=asked, progress=lambda line: None)


INT8 = [runtime for runtime in RUNTIMES if runtime.precision == "int8"]
of_int8 = pytest.mark.parametrize("runtime", INT8, ids=lambda runtime: runtime.name)


@pytest.fixture
def alone(runtime, quickly, here, monkeypatch):  # noqa: F811
    """Let a release have one runtime besides Paddle's."""
    if missing_for_onnx():
        pytest.skip(missing_for_onnx())
    try:
        runtime.require()
    except ReparamError as lacking:
        pytest.skip(str(lacking))
    serve(monkeypatch, get_runtime("onednn"), runtime)


@of_int8
@pytest.mark.parametrize("break_it", [halve_a_scale, drop_the_padding, "calibration"])
def test_a_file_of_int8_that_is_broken_while_it_is_written(
    runtime, break_it, trained, images, alone, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    quantize = INT8_FILES[runtime.file_name]

    def write_broken(source, target, calibration, **_):
        settings = quantize(source, target, calibration * np.float32(0.05 if break_it == "calibration" else 1.0))
        if break_it != "calibration":
            break_it(target, trained[0])
        return settings

    monkeypatch.setitem(INT8_FILES, runtime.file_name, write_broken)
    with pytest.raises(ReparamError, match=rf"^nothing holds in int8: .*{runtime.name}: fails: it "):
        int8_release(trained, images, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# In a folder that was released


@of_int8
def test_files_of_a_released_folder_that_were_broken(runtime, trained, images, alone, tmp_path):  # noqa: F811
    good = tmp_path / "good"
    int8_release(trained, images, good)
    assert runtime.title in check_release(good).errors
    program = program_file(good)
    breaks = [(program.with_suffix(WEIGHTS_SUFFIX), scale_a_channel), (good / runtime.file_name, halve_a_scale)]
    breaks += [(program, drop_the_padding)] if program.suffix == ".json" else []
    for number, (path, break_it) in enumerate(breaks):
        folder = shutil.copytree(good, tmp_path / f"broken{number}")
        break_it(folder / path.name, trained[0])
        with pytest.raises(ReparamError, match=rf"{path.stem}\.\w+ is not as it was written"):
            check_release(folder)
        # As if it had been released so.
        manifest = read_manifest(folder)
        manifest["files"] = {name: digest(folder / name) for name in manifest["files"]}
        write_manifest(folder, manifest)
        with pytest.raises(ReparamError, match=rf"{path.stem}\.\w+ computes something else than the network that was"):
            check_release(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Runtimes that end their process, or never come back


def ends_its_process(*_):
    """Stand for a runtime that meets an operator which it cannot bear."""
    os._exit(9)


def never_comes_back(*_):
    """Stand for a runtime that waits for ever."""
    time.sleep(600)


@pytest.mark.parametrize(
    ("does", "seconds", "message"),
    [
        (ends_its_process, 60, "the process that was to run it ended before it had"),
        (never_comes_back, 8, "it was stopped, as it took more than 8 seconds"),
    ],
)
def test_what_takes_its_process_along_is_survived(
    does, seconds, message, trained, images, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    net, labels, file = trained

    def in_process(function, name, *arguments, **_):
        if name == "other":
            return in_new_process(does, seconds=seconds)
        return function(name, *arguments)

    monkeypatch.setattr(tuning, "in_new_process", in_process)
    serve(monkeypatch, get_runtime("onednn"), Other())
    asked = tuning_on(images, labels, batches=(1,))
    report = release(net, file, tmp_path / "out", SPEC, output=SOFTMAX, tuning=asked, progress=lambda line: None)
    assert {way.runtime: way.why_not for way in report.tuned.ways} == {"onednn": None, "other": message}
    assert [entry["runtime"] for entry in report.manifest["serving"]] == ["onednn"]
    assert check_release(tmp_path / "out").errors
