"""Tuning: every way of running a network is timed beside the float32 export, checked on images, and used, or not."""

import json
import time
from dataclasses import replace as changed

import numpy as np
import paddle
import pytest
from helpers import missing_for_onnx, randomise_batch_norms, relative_error
from paddle import nn

from paddle_reparam import InferenceModel, check_release, release, replace
from paddle_reparam.deploy import runtimes, tuning
from paddle_reparam.deploy.outputs import OutputSpec
from paddle_reparam.deploy.released import MANIFEST, read_manifest
from paddle_reparam.deploy.runtimes.base import LoadedNetwork
from paddle_reparam.deploy.runtimes.onnx_runtime import INT8_ONNX_FILE, ONNX_FILE
from paddle_reparam.deploy.runtimes.paddle_inference import SERVING as PADDLE
from paddle_reparam.deploy.tuning import Tuning, count_images
from paddle_reparam.errors import NothingProven, ReparamError
from paddle_reparam.layers.base import InferenceForm
from paddle_reparam.measure import timing
from paddle_reparam.measure.processors import require_bfloat16
from paddle_reparam.weights import checkpoints

SPEC = [[None, 3, 16, 16]]
SOFTMAX = OutputSpec("softmax")


def has_bfloat16():
    try:
        require_bfloat16()
    except ReparamError:
        return False
    return True


def make():
    paddle.seed(0)
    net = nn.Sequential(
        nn.Conv2D(3, 8, 3, stride=2, padding=1), nn.BatchNorm2D(8), nn.ReLU(),
        nn.Conv2D(8, 16, 3, padding=1), nn.BatchNorm2D(16), nn.ReLU(),
        nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    replace(net, "RefConv2D", where="3")
    randomise_batch_norms(net)
    net.eval()
    return net


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).standard_normal([120, *SPEC[0][1:]]).astype("float32")


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Return a network that is right about all images, their labels, and its weight file."""
    net, file = make(), tmp_path_factory.mktemp("weights") / "trained.pdparams"
    checkpoints.save(net.state_dict(), file)
    return net, net(paddle.to_tensor(images)).numpy().argmax(1), file


@pytest.fixture
def here(monkeypatch):
    """Try ways in this process, without pauses: another Python for each would take seconds."""
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    monkeypatch.setattr(tuning, "in_new_process", lambda function, *arguments, seconds: function(*arguments))


def tuning_on(images, labels, **options):
    return Tuning(lambda most: (images[:most], labels[:most]), lambda most: images[:most], **options)


def tuned(trained, images, folder, **options):
    net, labels, file = trained
    asked = options.pop("tuning", None) or tuning_on(images, labels, **options)
    return release(net, file, folder, SPEC, output=SOFTMAX, tuning=asked, progress=lambda line: None)


def serve(monkeypatch, *served):
    """Let these be all that a release can be used in."""
    monkeypatch.setattr(runtimes, "SERVING", served)
    monkeypatch.setattr(tuning, "SERVING", served)
    names = runtimes._by_name._entries
    monkeypatch.setattr(runtimes._by_name, "_entries", {**names, **{each.name: each for each in served}})


class Other:
    """Paddle Inference under another name; what it computes can be changed, and what it needs can be missing."""

    title, precision, file_name, proves = "the other one", "bfloat16", None, True

    def __init__(self, name="other", change=lambda arrays: arrays, missing=None, seconds=0.0):
        self.name, self.change, self.missing, self.seconds = name, change, missing, seconds

    def version(self):
        return "other 1.0"

    def require(self):
        if self.missing:
            raise ReparamError(self.missing)

    def file(self, folder):
        return PADDLE[0].file(folder)

    def load(self, folder, threads=1, keep_shapes=True):
        other, network = self, PADDLE[0].load(folder, threads)

        class Loaded(LoadedNetwork):
            runtime = "the other one"

            def outputs_of(self, inputs):
                time.sleep(other.seconds)
                return other.change(network.outputs_of(inputs))

        return Loaded("other", network.inputs)


def test_the_fastest_that_holds_ships_and_the_manifest_has_the_whole_table(trained, images, tmp_path, here):
    report = tuned(trained, images, tmp_path / "out", batches=(1, 3))
    manifest = read_manifest(tmp_path / "out")
    ways = manifest["tuning"]["ways"]
    # Behind the baseline, what is most often the fastest comes first: the time may be used up before the last.
    assert [way["runtime"] for way in ways] == [
        "onednn", "openvino-bfloat16", "onednn-bfloat16", "openvino-int8", "onnxruntime-int8", "openvino",
        "onnxruntime", "gpu",
    ]  # fmt: skip
    assert {way["runtime"] for way in ways} == {runtime.name for runtime in runtimes.SERVING}
    assert manifest["tuning"]["images"] == len(images)
    assert manifest["tuning"]["machine"]["processor"]
    assert manifest["tuning"]["threads"] == 1
    for way in ways:
        if way["why_not"] is None:
            assert set(way["times"]) == {"1", "3"}
            assert way["times"]["1"]["low"] <= way["times"]["1"]["ratio"] <= way["times"]["1"]["high"]
            assert manifest["tuning"]["versions"][way["runtime"]]
        if way["answers"] is not None and way["why_not"] is None:
            assert way["error"] <= way["bound"]
            assert way["answers"]["agreement"] > 0.9
    tried = {way["runtime"]: way["why_not"] for way in ways}
    assert tried["onednn"] is None
    assert (tried["onednn-bfloat16"] is None) == has_bfloat16()
    fastest = min((way for way in report.tuned.ways if way.why_not is None), key=lambda way: way.ratio)
    serving = [entry["runtime"] for entry in manifest["serving"]]
    assert serving[0] == fastest.runtime
    assert "onednn" in serving
    assert InferenceModel(tmp_path / "out").runtime == runtimes.get_runtime(fastest.runtime).title
    checked = check_release(tmp_path / "out")
    assert {runtimes.get_runtime(name).title for name in serving} <= set(checked.errors)
    assert "ships" in str(report)
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["tuning"]["form"] is None


def test_what_is_faster_and_wrong_does_not_ship(trained, images, tmp_path, here, monkeypatch):
    def half_wrong(arrays):
        return [np.concatenate([each[:1], each[1:, ::-1]]) for each in arrays]

    wrong = [
        Other("off", lambda arrays: [each + np.float32(0.1) for each in arrays]),
        Other("swapped", half_wrong),
        Other("stops", lambda arrays: 1 / 0),
        Other("other", missing="the other one is not installed"),
    ]
    serve(monkeypatch, PADDLE[0], *wrong)
    report = tuned(trained, images, tmp_path / "out")
    why = {way.runtime: way.why_not for way in report.tuned.ways}
    assert why["onednn"] is None
    assert why["off"].startswith("fails: it is off by ")
    assert why["swapped"].startswith("fails: it is off by ")
    assert "other: the other one cannot run it" in why["stops"]
    assert why["other"] == "not tried: the other one is not installed"
    assert [entry["runtime"] for entry in read_manifest(tmp_path / "out")["serving"]] == ["onednn"]


def test_more_than_the_largest_drop_does_not_ship(trained, images, tmp_path, here, monkeypatch):
    """The images whose error is bounded are few: an answer that another image loses is counted."""

    def wrong_about_the_last(arrays):
        return [each[:, ::-1].copy() if len(each) == 8 else each for each in arrays]

    serve(monkeypatch, PADDLE[0], Other(change=wrong_about_the_last))
    for allowed, holds in ((1.0, False), (50.0, True)):
        report = tuned(trained, images, tmp_path / f"{allowed}", largest_drop=allowed, timed=False)
        [way] = [way for way in report.tuned.ways if way.runtime == "other"]
        assert way.answers.drop > 1.0
        assert (way.why_not is None) == holds
        if not holds:
            assert way.why_not == f"fails: it loses {way.answers.drop:.2f} points, 1 are allowed"


def test_too_few_images_are_a_sentence(trained, images, tmp_path, here):
    with pytest.raises(NothingProven, match="80 images cannot show a drop of 1 points: give 100 images or more"):
        tuned(trained, images[:80], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    few, many = tuning_on(images, None), tuning_on(images, None, largest_drop=0.1)
    assert count_images(few, 10**12) == 112
    assert count_images(few, 4 * 10**9) == 192
    assert count_images(few, 10**6) == 1024
    assert count_images(many, 10**12) == 1008


def test_a_precision_that_was_asked_for_ships_or_nothing_does(trained, images, tmp_path, here, monkeypatch):
    slow = Other(seconds=0.01)
    serve(monkeypatch, PADDLE[0], slow)
    tuned(trained, images, tmp_path / "first", precisions=("bfloat16",), timed=False)
    manifest = read_manifest(tmp_path / "first")
    assert [entry["runtime"] for entry in manifest["serving"]] == ["other", "onednn"]
    assert all(not way["times"] for way in manifest["tuning"]["ways"])
    slow.missing = "the other one is not installed"
    with pytest.raises(ReparamError, match="nothing holds in bfloat16: other: not tried: the other one is not inst"):
        tuned(trained, images, tmp_path / "second", precisions=("bfloat16",))
    with pytest.raises(ReparamError, match="nothing holds in int8: no runtime has it"):
        tuned(trained, images, tmp_path / "second", precisions=("int8",))
    assert not (tmp_path / "second").exists()
    # Used where it is missing, a release says so and takes the next.
    with pytest.warns(UserWarning, match="fastest by the other one, which is passed over: the other one is not"):
        model = InferenceModel(tmp_path / "first")
    assert model.runtime == "Predictor, oneDNN"
    assert model.passed_over == {"the other one": "the other one is not installed"}
    assert check_release(tmp_path / "first").not_run == {"the other one": "the other one is not installed"}
    monkeypatch.setattr(runtimes._by_name, "_entries", {"onednn": PADDLE[0]})
    with pytest.warns(UserWarning, match="this version of the library does not know it"):
        assert InferenceModel(tmp_path / "first").runtime == "Predictor, oneDNN"


def test_a_network_with_nothing_to_fuse_ships_in_what_is_faster(images, tmp_path, here, monkeypatch):
    serve(monkeypatch, PADDLE[0], Other())
    paddle.seed(0)
    net = nn.Sequential(nn.Conv2D(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(8, 5))
    net.eval()
    file = tmp_path / "plain.pdparams"
    checkpoints.save(net.state_dict(), file)
    plain = net, net(paddle.to_tensor(images)).numpy().argmax(1), file
    with pytest.raises(ReparamError, match=r"has nothing to fuse.*may be faster: .*--tune or --precision\)$"):
        release(net, file, tmp_path / "fused", SPEC, progress=lambda line: None)
    report = tuned(plain, images, tmp_path / "tuned")
    assert {way.runtime for way in report.tuned.serving} == {"onednn", "other"}
    assert not check_release(tmp_path / "tuned").not_run


def test_no_second_way_is_begun_when_the_time_is_used_up(trained, images, tmp_path, here, monkeypatch):
    serve(monkeypatch, *PADDLE)
    report = tuned(trained, images, tmp_path / "out", seconds=0.001)
    baseline, first, *others = report.tuned.ways
    assert (baseline.runtime, first.error is not None) == ("onednn", True)
    assert {way.why_not for way in others} == {"not tried: the 0.001 seconds are used up"}


class TwoForms(InferenceForm):
    """A convolution that can also be two of half the weights, or a wrong one."""

    forms = ("halves",)

    def __init__(self, conv, parts=1):
        super().__init__()
        self.parts = nn.LayerList([conv] * parts)

    def forward(self, x):
        return sum(part(x) for part in self.parts) / len(self.parts)

    def for_size(self, height, width, form=None):
        if form is None:
            return None
        assert form == "halves"
        return TwoForms(self.parts[0], 2)


def test_each_form_is_tried_and_the_best_one_ships(images, tmp_path, here, monkeypatch):
    net = make()
    net = nn.Sequential(TwoForms(nn.Conv2D(3, 3, 3, padding=1)), *net)
    net.eval()
    labels = net(paddle.to_tensor(images)).numpy().argmax(1)
    checkpoints.save(net.state_dict(), tmp_path / "trained.pdparams")

    def slow_unless_halved(function, name, folder, *rest, seconds):
        outputs, _, version = function(name, folder, *rest)
        share = 0.5 if folder.name == "form1" else 1.0
        return outputs, {1: {"ratio": share, "low": share, "high": share, "milliseconds": 1.0}}, version

    monkeypatch.setattr(tuning, "in_new_process", slow_unless_halved)
    serve(monkeypatch, *PADDLE[:1], Other())
    report = release(
        net, tmp_path / "trained.pdparams", tmp_path / "out", SPEC, output=SOFTMAX,
        tuning=tuning_on(images, labels), progress=lambda line: None,
    )  # fmt: skip
    assert [(way.form, way.runtime) for way in report.tuned.ways] == [
        (None, "onednn"), (None, "other"), ("halves", "other"), ("halves", "onednn"),
    ]  # fmt: skip
    manifest = read_manifest(tmp_path / "out")
    assert manifest["tuning"]["form"] == "halves"
    assert [entry["runtime"] for entry in manifest["serving"]] == ["other", "onednn"]
    assert "fused network, halves" in report.checks
    expected = nn.functional.softmax(net(paddle.to_tensor(images[:4])))
    assert relative_error(InferenceModel(tmp_path / "out").run(images[:4])[0], expected) < 1e-5


@pytest.mark.skipif(bool(missing_for_onnx()), reason=missing_for_onnx() or "")
def test_only_the_files_of_the_best_way_ship(trained, images, tmp_path, here, monkeypatch):
    onnx, int8 = (runtimes.get_runtime(name) for name in ("onnxruntime", "onnxruntime-int8"))

    def first(best):
        def run(function, name, *rest, seconds):
            if function is not tuning._tried:
                return function(name, *rest)
            outputs, _, version = function(name, *rest)
            share = 0.1 if name == best else 1.0
            return outputs, {1: {"ratio": share, "low": share, "high": share, "milliseconds": 1.0}}, version

        return run

    monkeypatch.setattr(tuning, "agreement", lambda *given: tuning.Agreement("top-1", 120, 0.0, 1.0, 1.0, 1.0, 1.0))
    monkeypatch.setattr(tuning, "compare_outputs", lambda *given: (0.0, None))
    serve(monkeypatch, PADDLE[0], onnx, int8)
    for best, files in (
        ("onednn", set()), ("onnxruntime", {ONNX_FILE}), ("onnxruntime-int8", {INT8_ONNX_FILE}),
    ):  # fmt: skip
        monkeypatch.setattr(tuning, "in_new_process", first(best))
        tuned(trained, images, tmp_path / best)
        found = {path.name for path in (tmp_path / best).iterdir()}
        assert found & {ONNX_FILE, INT8_ONNX_FILE} == files
        assert next(iter(read_manifest(tmp_path / best)["serving"]))["runtime"] == best


def test_a_drop_that_is_none_is_refused(trained, images):
    with pytest.raises(ReparamError, match="what may be lost is -1 percentage points"):
        count_images(changed(tuning_on(images, None), largest_drop=-1.0), 10**9)
