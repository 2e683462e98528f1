"""A released folder that is checked again later: every file, and what each form computes."""

import json
import shutil

import numpy as np
import paddle
import pytest
from helpers import randomise_batch_norms, relative_error
from paddle import nn

from paddle_reparam import check_release, checkpoints, release, replace
from paddle_reparam.errors import ReparamError
from paddle_reparam.export import ExportOptions, InferenceModel, Normalization, OutputSpec, program_file
from paddle_reparam.released import MANIFEST, PLAIN_WEIGHTS, PROBE, digest, read_manifest, write_manifest

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
    ways = {"paddle.jit.load", "Predictor, oneDNN", "Predictor, no oneDNN", PLAIN_WEIGHTS}
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
    assert check_release(tmp_path / "out", Net()).errors["paddle.jit.load"] < 1e-5
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
        assert relative_error(InferenceModel(tmp_path / "out", onednn).run(pixels)[0], expected) < 1e-5
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
