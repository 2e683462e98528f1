"""A released folder that is checked again later: every file, and what each form computes."""

import hashlib
import importlib
import json
import shutil
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from helpers import randomise_batch_norms, relative_error
from paddle import nn

from paddle_reparam import InferenceModel, check_release, release, replace
from paddle_reparam.deploy.export import ExportOptions
from paddle_reparam.deploy.outputs import Normalization, OutputSpec
from paddle_reparam.deploy.predict import ImageClassifier, preprocess
from paddle_reparam.deploy.programs import program_file
from paddle_reparam.deploy.quantization import KernelRange, QuantizationReport
from paddle_reparam.deploy.released import (
    MANIFEST,
    PLAIN_WEIGHTS,
    PROBE,
    manifest_of_onnx,
    probe_inputs,
    read_manifest,
    sealed,
    write_manifest,
)
from paddle_reparam.deploy.runtimes.paddle_inference import LoadedPredictor
from paddle_reparam.errors import ReparamError, one_sentence
from paddle_reparam.files import digest
from paddle_reparam.surgery.flops import ModelSize
from paddle_reparam.weights import checkpoints

SPEC = [[None, 3, 16, 16]]
PIXELS = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1 / 255)
PADDLE_3 = hasattr(getattr(paddle, "pir_utils", None), "DygraphOldIrGuard")


class Net(nn.Sequential):
    def __init__(self, pool=None):
        super().__init__(
            nn.Conv2D(3, 8, 3, stride=2, padding=1, bias_attr=False), nn.BatchNorm2D(8), nn.ReLU(),
            nn.Conv2D(8, 8, 3, padding=1, bias_attr=False), nn.BatchNorm2D(8), nn.ReLU(),
            pool or nn.AdaptiveAvgPool2D(2), nn.Flatten(), nn.Linear(32 if pool is None else 512, 5),
        )  # fmt: skip
        self.eval()


def released(folder, seed=0, pool=None, options=None, stock=True):
    """Release a small refocused network and return it as it was trained."""
    paddle.seed(seed)
    net = Net(pool)
    replace(net, "RefConv2D")
    randomise_batch_norms(net, seed)
    net.eval()
    weights = folder.with_name(f"{folder.name}.pdparams")
    checkpoints.save(net.state_dict(), weights)
    more = {} if options is None else {"options": options}
    release(
        net, weights, folder, SPEC, output=OutputSpec("softmax"), stock=Net(pool) if stock else None,
        progress=lambda line: None, **more,
    )  # fmt: skip
    return net


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("releases") / "out"
    released(folder)
    return folder


@pytest.fixture
def copied(original, tmp_path):
    return shutil.copytree(original, tmp_path / "out")


def seal_again(folder, *names):
    """Give changed files new hashes in the manifest, as one would who means to deceive."""
    manifest = read_manifest(folder)
    manifest["files"].update({name: digest(folder / name) for name in names})
    write_manifest(folder, manifest)


def test_a_whole_folder_passes_and_says_what_was_run(copied):
    report = check_release(copied, Net())
    assert set(report.files) == {path.name for path in copied.iterdir()} - {MANIFEST}
    ways = {"Executor", "Predictor, oneDNN", "Predictor, no oneDNN", PLAIN_WEIGHTS}
    assert set(report.errors) == ways
    assert max(report.errors.values()) < 1e-5
    assert "as they were written" in str(report)
    assert set(check_release(copied).not_run) == {PLAIN_WEIGHTS}


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_changed_bit_of_any_file_is_noticed(copied, where):
    for path in sorted(copied.iterdir()):
        good = path.read_bytes()
        place = {"first": 0, "middle": len(good) // 2, "last": len(good) - 1}[where]
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bytes(bad))
        with pytest.raises(ReparamError, match=path.name) as error:
            check_release(copied, Net())
        assert "\n" not in str(error.value)
        path.write_bytes(good)
    check_release(copied, Net())


def test_every_bit_of_the_manifest_counts(copied):
    path = copied / MANIFEST
    good = path.read_bytes()
    for place in np.linspace(0, len(good) - 1, 100).astype(int):
        for bit in (0, 5):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            path.write_bytes(bytes(bad))
            with pytest.raises(ReparamError, match=r"manifest.json is not as it was written"):
                read_manifest(copied)


def test_missing_and_foreign_files_are_named(copied):
    for path in sorted(copied.iterdir()):
        path.rename(copied.parent / "aside")
        with pytest.raises(ReparamError, match=f"{path.name}( is missing|$)"):
            check_release(copied)
        (copied.parent / "aside").rename(path)
    (copied / "notes.txt").write_text("")
    with pytest.raises(ReparamError, match="notes.txt does not belong to the release"):
        check_release(copied)
    with pytest.raises(ReparamError, match="is no release"):
        check_release(copied.parent / "nowhere")


@pytest.mark.parametrize("part", ["program", "plain", "probe"])
def test_another_networks_files_with_hashes_that_fit_are_noticed(copied, tmp_path, part):
    released(tmp_path / "other", seed=1)
    program = program_file(copied)
    exported = sorted(path.name for path in copied.glob("inference.*"))
    names = {"program": exported, "plain": [PLAIN_WEIGHTS], "probe": [PROBE]}[part]
    for name in names:
        shutil.copy(tmp_path / "other" / name, copied / name)
    seal_again(copied, *names)
    at_fault = PLAIN_WEIGHTS if part == "plain" else program.name
    with pytest.raises(ReparamError, match=f"{at_fault} computes something else than"):
        check_release(copied, Net())


def test_a_probe_that_cannot_be_made_again_is_noticed(copied):
    manifest = read_manifest(copied)
    manifest["probe"]["scale"] *= 2
    write_manifest(copied, manifest)
    with pytest.raises(ReparamError, match="probe's input is not what it was"):
        check_release(copied)


# ---------------------------------------------------------------------------------------------------------------------
# Formats, sizes, pixels


@pytest.mark.parametrize("file_format", ["json", "pdmodel"])
def test_both_formats_are_written_and_run(tmp_path, file_format):
    if file_format == "json" and not PADDLE_3:
        with pytest.raises(ReparamError, match=r"cannot write .json programs"):
            ExportOptions(file_format)
        return
    net = released(tmp_path / "out", options=ExportOptions(file_format))
    assert program_file(tmp_path / "out").name == f"inference.{file_format}"
    assert check_release(tmp_path / "out", Net()).errors["Executor"] < 1e-5
    x = paddle.randn([4, 3, 16, 16])
    assert relative_error(InferenceModel(tmp_path / "out").run(x.numpy())[0], nn.functional.softmax(net(x))) < 1e-5
    assert paddle.in_dynamic_mode()


def test_one_size_or_every_size(tmp_path, original):
    assert read_manifest(original)["input"]["size"] == "fixed"
    net = released(tmp_path / "out", options=ExportOptions(dynamic_size=True))
    manifest = read_manifest(tmp_path / "out")
    assert manifest["input"]["size"] == "dynamic"
    assert "Predictor, oneDNN, batch 2, 48x80" in manifest["checks"]
    x = paddle.randn([2, 3, 24, 40])
    assert relative_error(InferenceModel(tmp_path / "out").run(x.numpy())[0], nn.functional.softmax(net(x))) < 1e-5
    with pytest.raises(ReparamError, match="could not compare at a second size, 48x80"):
        released(tmp_path / "never", pool=nn.Identity(), options=ExportOptions(dynamic_size=True))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_pixels_are_normalised_inside(tmp_path, dtype):
    options = ExportOptions(normalization=Normalization(PIXELS.mean, PIXELS.std, PIXELS.scale, dtype))
    net = released(tmp_path / "out", options=options)
    pixels = np.random.default_rng(0).integers(0, 256, [3, 3, 16, 16]).astype(dtype)
    mean, std = (np.float32(v).reshape(1, 3, 1, 1) for v in (PIXELS.mean, PIXELS.std))
    expected = nn.functional.softmax(net(paddle.to_tensor((pixels.astype("float32") / 255 - mean) / std)))
    for onednn in (True, False):
        assert relative_error(LoadedPredictor(tmp_path / "out", onednn).run(pixels)[0], expected) < 1e-5
    manifest = read_manifest(tmp_path / "out")
    assert manifest["input"]["dtype"] == dtype
    assert manifest["input"]["normalization"]["std"] == [0.229, 0.224, 0.225]
    assert set(check_release(tmp_path / "out", Net()).errors) >= {PLAIN_WEIGHTS}


def test_a_wrong_normalisation_does_not_pass(tmp_path, monkeypatch):
    affine = Normalization.affine
    monkeypatch.setattr(Normalization, "affine", lambda self: (affine(self)[0], affine(self)[1] + 0.01))
    with pytest.raises(ReparamError, match="is not the same function"):
        released(tmp_path / "out", options=ExportOptions(normalization=PIXELS), stock=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExportOptions("onnx"), "json or pdmodel: onnx"),
        (lambda: Normalization((0.5,), (0.5, 0.5), 1.0), "for each channel"),
        (lambda: Normalization((0.5,), (0.0,), 1.0), "cannot be divided by"),
        (lambda: Normalization((0.5,), (0.5,), 1.0, "int8"), "uint8 or float32: int8"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ReparamError, match=message):
        make()


def test_the_manifest_is_json_for_others(original):
    assert json.loads((original / MANIFEST).read_text())["files"].keys() >= {PROBE, PLAIN_WEIGHTS}


# ---------------------------------------------------------------------------------------------------------------------
# Manifests that were sealed again


ODD = (
    None, True, -1, 0, 0.5, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../x", "/", "\x1b[2J", "\ud800",
    [], [None], [[]], {}, {"name": "x"},
)  # fmt: skip


def places_of(value, path=()):
    """Yield the path of every value inside a nested one."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places_of(inner, (*path, key))


def changed(manifest, path, value):
    """Return a copy with another value at a path; without it where that is `...`."""
    manifest = json.loads(json.dumps(manifest))
    parent = manifest
    for key in path[:-1]:
        parent = parent[key]
    if value is ...:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return manifest


def seal(folder, manifest):
    """Write any manifest with the seal that fits it, as anybody can."""
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    manifest = {**manifest, "seal": hashlib.sha256(text.encode()).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def use(folder, manifest):
    """Use a release as the commands do, but for running its network."""
    ImageClassifier(folder)
    if "quantization" in manifest:
        QuantizationReport([KernelRange(**kernel) for kernel in manifest["quantization"]["kernels"]]).worst(5)
    str(ModelSize(**manifest["size"]["fused"]))
    np.empty([1, *manifest["input"]["shape"][0][1:]], manifest["input"]["dtype"])
    OutputSpec(manifest["output"]["activation"], tuple(manifest["output"]["keys"]))
    Normalization.from_dict(manifest["input"]["normalization"])
    probe_inputs(manifest["input"], manifest["probe"]["scale"])


def test_a_manifest_of_another_form_is_one_sentence_whatever_it_says(copied, monkeypatch):
    monkeypatch.setattr("paddle_reparam.deploy.predict.InferenceModel", lambda *_, **__: None)
    steps = [{"ResizeImage": {"size": [8, 8]}}, {"CropImage": {"size": 8}}, {"ToCHWImage": {}},
             {"NormalizeImage": {"mean": [0.0] * 3, "std": [1.0] * 3, "scale": 1.0, "order": ""}}]  # fmt: skip
    good = read_manifest(copied)
    good["input"].update(preprocessing=steps, normalization={**asdict(PIXELS), "mean": list(PIXELS.mean)})
    good["labels"] = ["a", None]
    write_manifest(copied, good)
    good = read_manifest(copied)
    image = np.zeros([9, 9, 3], np.uint8)
    sentences = []
    generator = np.random.default_rng(0)
    for path in places_of(good):
        for value in (..., *generator.choice(np.array(ODD, object), 4, replace=False)):
            seal(copied, changed(good, path, value))
            try:
                manifest = read_manifest(copied)
                use(copied, manifest)
                with one_sentence("as `predict` does"):
                    preprocess(image, manifest["input"]["preprocessing"])
            except ReparamError as error:
                sentences.append(str(error))
    assert len(sentences) > 300
    assert not [sentence for sentence in sentences if "\n" in sentence]


def test_an_onnx_file_holds_the_manifest_of_its_release(copied):
    manifest = read_manifest(copied)
    text = sealed(manifest)
    assert text == (copied / MANIFEST).read_text(encoding="utf-8")

    def read(metadata):
        return manifest_of_onnx(SimpleNamespace(name="int8.onnx", metadata=metadata))

    assert read({MANIFEST: text, "onnx.infer": "onnxruntime.quant"}) == manifest
    changed_shape = text.replace('"dtype": "float32"', '"dtype": "float64"')
    assert changed_shape != text
    for wrong in (changed_shape, text + " ", "", "[]", "[" * 100000):
        with pytest.raises(ReparamError, match="int8.onnx: the manifest in it is not as it was .*; release again"):
            read({MANIFEST: wrong})
    with pytest.raises(ReparamError, match="int8.onnx: it does not say what its input and its labels are"):
        read({})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("files",), []),
        (("files", "../plain.pdparams"), {"bytes": 1, "sha256": "0" * 64}),
        (("files", "/etc/hostname"), {"bytes": 1, "sha256": "0" * 64}),
        (("files", "a\\b"), {"bytes": 1, "sha256": "0" * 64}),
        (("input", "shape"), [[None, 3, 2**15, 2**15]]),
        (("input", "shape"), [3, 16, 16]),
        (("input", "dtype"), "object"),
        (("input", "normalization"), {**asdict(PIXELS), "mean": [0.5], "std": [0.5]}),
        (("input", "preprocessing"), [{"ResizeImage": {"size": 10**6}}]),
        (("labels",), "cat"),
        (("output", "activation"), "relu"),
        (("probe", "tolerance"), 1.0),
        (("probe", "tolerance"), float("inf")),
        (("probe", "scale"), 0.0),
        (("quantization",), ...),
    ],
)  # fmt: skip
def test_what_a_manifest_cannot_say_is_refused_before_anything_is_read(copied, monkeypatch, path, value):
    manifest = changed(read_manifest(copied), path, value)
    with pytest.raises(ReparamError, match=r"is nothing that a manifest can hold"):
        write_manifest(copied, manifest)
    seal(copied, manifest)
    monkeypatch.setattr(importlib.import_module("paddle_reparam.deploy.released"), "digest", None)
    for read in (check_release, ImageClassifier):
        with pytest.raises(ReparamError, match=rf"is not as it was written, or of an older version .*\({path[0]}"):
            read(copied)


def test_links_are_refused_before_anything_is_read(copied, monkeypatch):
    outside = copied.parent / "outside"
    (copied / PROBE).rename(outside)
    (copied / PROBE).symlink_to(outside)
    monkeypatch.setattr(importlib.import_module("paddle_reparam.deploy.released"), "digest", None)
    with pytest.raises(ReparamError, match=rf"{PROBE} is a link"):
        check_release(copied)
    (copied / PROBE).unlink()
    (copied / MANIFEST).rename(outside)
    (copied / MANIFEST).symlink_to(outside)
    with pytest.raises(ReparamError, match="is no release"):
        check_release(copied)


def test_a_probe_that_would_grow_when_it_is_read_is_refused(copied):
    np.savez_compressed(copied / PROBE, np.zeros([2, 5], "float32"))
    seal_again(copied, PROBE)
    with pytest.raises(ReparamError, match="it is no probe that a release wrote"):
        check_release(copied)
