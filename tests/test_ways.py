"""tools/benchmark.py table: every way beside an earlier export, and what may be called the best of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import baseline_exports
import benchmark as tool
import pytest
from paddle import nn
from test_benchmark import small_network
from test_onnx import needs_onnx

from paddle_reparam.deploy.runtimes import get_runtime
from paddle_reparam.errors import NothingProven, ReparamError
from paddle_reparam.layers.base import InferenceForm
from paddle_reparam.measure import benchmark, timing, ways
from paddle_reparam.measure.timing import time_beside
from paddle_reparam.measure.ways import Network, Way, WaysReport
from paddle_reparam.ppcls import contenders

NAME = "small"


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """What a process of its own would do is done in this one; test_timing.py starts one that dies."""
    monkeypatch.setattr(ways, "in_new_process", lambda function, *arguments, seconds: function(*arguments))
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    monkeypatch.setattr(contenders, "contenders_of", lambda _name, place, *_, bounded: exports(place, bounded))


def exports(folder: Path, bounded: Sequence[str] = (), seed: int = 0) -> list[benchmark.Contender]:
    network = small_network()
    for parameter in network.parameters():
        parameter.set_value(parameter * (1 + seed))
    return list(benchmark.prepare(NAME, network, folder, (3, 32, 32), ["every form"], bounded=bounded))


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """An export of the network with other weights."""
    folder = tmp_path_factory.mktemp("baseline")
    [contender] = exports(folder, seed=1)
    contender.folder.rename(folder / NAME)
    return folder


def table(baseline: Path, output: Path, *arguments: str) -> int:
    small = ["--size", "32", "--rounds", "5", "--threads", "1", "--seconds", "1", "--batch", "1", "2"]
    return tool.main(["table", NAME, "--baseline", str(baseline), *small, "--output", str(output), *arguments])


@needs_onnx
def test_every_way_is_timed_and_compared(baseline, tmp_path, capsys, monkeypatch):
    output = tmp_path / "ways.json"
    assert table(baseline, output, "--runtime", "onnxruntime", "onnxruntime-int8") == 0
    written = json.loads(output.read_text())
    [network] = WaysReport.from_dict(written).networks
    assert [way.title for way in network.ways] == ["onednn", "onnxruntime", "onnxruntime-int8"]
    for way in network.ways:
        assert way.why_not is None
        assert set(way.times) == {"1", "2"}
        for times in way.times.values():
            assert 0 < times["low"] <= times["ratio"] <= times["high"]
    # The reference is the float32 export of the same weights, and not the baseline, which has others.
    assert [way.error < limit for way, limit in zip(network.ways, (1e-9, 1e-4, 1.0))] == [True] * 3
    assert network.ways[1].error > 0
    assert network.ways[2].error > 1e-3
    assert written["versions"]["onnxruntime"].startswith("onnxruntime ")
    assert f"{NAME}  " in capsys.readouterr().out

    # It is not measured again but where something else is asked for.
    def measured_again(*_):
        raise ReparamError("it is measured again")

    monkeypatch.setattr(contenders, "time_ways", measured_again)
    before = output.read_bytes()
    assert table(baseline, output, "--runtime", "onnxruntime", "onnxruntime-int8") == 0
    assert output.read_bytes() == before
    assert table(baseline, output, "--runtime", "onnxruntime") == 1
    assert output.read_bytes() == before
    output.write_text("[1]")
    assert table(baseline, output) == 2
    assert "holds no table of an earlier run" in capsys.readouterr().err


def test_a_baseline_that_is_not_there_is_told_before_anything_is_measured(tmp_path, capsys):
    assert table(tmp_path, tmp_path / "ways.json") == 2
    assert f"--baseline {tmp_path}, for {NAME}: " in capsys.readouterr().err


class Broken:
    """A runtime that gives another answer, or ends the process."""

    precision, file_name = "bfloat16", None

    def __init__(self, name: str, load) -> None:
        self.name, self.load = name, load

    def require(self) -> None:
        pass


def test_what_dies_and_what_is_wrong_says_so_and_the_others_go_on(baseline, tmp_path, monkeypatch):
    right = get_runtime("onednn")

    class Wrong:
        def __init__(self, folder, threads):
            self.network = right.load(folder, threads)

        def run(self, images):
            return [output[:, ::-1] for output in self.network.run(images)]

    def dies(*_):
        raise ReparamError("the process that was to run it ended before it had")

    runtimes = {"onednn": right, "dies": Broken("dies", dies), "wrong": Broken("wrong", Wrong)}
    runtimes["like it"] = Broken("like it", right.load)
    monkeypatch.setattr(ways, "get_runtime", runtimes.get)
    forms = exports(tmp_path, ["bfloat16"])
    assert 1e-3 < forms[0].bounds["bfloat16"] < 0.1
    settings = {"batches": [1], "threads": 1, "rounds": 5, "seconds": 1}
    found = ways.time_ways(forms, baseline / NAME, list(runtimes), settings)
    assert [way.why_not is None for way in found] == [True, False, False, True]
    assert "ended before it had" in found[1].why_not
    assert "off by" in found[2].why_not
    assert Network(NAME, {}, found).best(1, lambda way: way.precision == "bfloat16").runtime == "like it"
    # In int8 the form that is fastest without it is tried, and no other.
    runtimes["int8"] = Broken("int8", dies)
    runtimes["int8"].precision = "int8"
    shapes = [forms[0], dataclasses.replace(forms[0], form="other")]
    with monkeypatch.context() as patched:
        patched.setattr(Network, "best", lambda network, batch: network.ways[-1])
        again = ways.time_ways(shapes, baseline / NAME, ["like it", "int8"], settings)
    assert [(way.runtime, way.form) for way in again][-2:] == [("like it", "other"), ("int8", "other")]
    assert len(again) == 5
    runtimes["onednn"] = runtimes["dies"]
    with pytest.raises(ReparamError, match=f"{NAME} can be timed in no way: dies: the process"):
        ways.time_ways(forms, baseline / NAME, ["dies"], settings)


@pytest.mark.parametrize("bound", [benchmark.LARGEST_BOUND, NothingProven("what the network puts out is not finite")])
def test_where_rounding_changes_everything_there_is_no_bound(tmp_path, monkeypatch, bound):
    def rounding_bound(*_):
        if isinstance(bound, Exception):
            raise bound
        return bound

    monkeypatch.setattr(benchmark, "rounding_bound", rounding_bound)
    [contender] = exports(tmp_path, ["bfloat16"])
    assert contender.bounds == {}


class Named(InferenceForm):
    """A layer with a form for another runtime."""

    forms = ("doubled",)

    def __init__(self, conv: nn.Conv2D) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)

    def for_size(self, height, width, form=None):
        if form == "doubled":
            return nn.Sequential(self.conv, nn.Identity())
        return self.conv


def test_every_form_that_layers_have_a_name_for_is_exported(tmp_path):
    conv = nn.Conv2D(3, 4, 3, padding=1)
    network = nn.Sequential(conv, nn.BatchNorm2D(4), Named(nn.Conv2D(4, 4, 1)), nn.AdaptiveAvgPool2D(1), nn.Flatten())
    network.eval()
    exported = list(benchmark.prepare("named", network, tmp_path, (3, 8, 8), ["every form"]))
    assert [each.form for each in exported] == ["fused", "doubled"]
    assert all(each.folder.is_dir() for each in exported)
    [again] = benchmark.prepare("named", network, tmp_path / "again", (3, 8, 8), ["doubled"])
    assert again.form == "doubled"


# ---------------------------------------------------------------------------------------------------------------------
# Which is the best


def way(runtime: str, precision: str, one: float, eight: float, **more) -> Way:
    times = {str(batch): {"ratio": ratio, "low": ratio - 0.01, "high": ratio + 0.01, "milliseconds": 1.0,
                          "milliseconds_of_first": 1.0} for batch, ratio in ((1, one), (8, eight))}  # fmt: skip
    return Way(runtime, precision, **{"form": "fused", "times": times, "error": 1e-3, **more})


def report() -> WaysReport:
    found = [
        way("onednn", "float32", 0.9, 0.8),
        way("onednn-bfloat16", "bfloat16", 0.4, 0.5),
        way("openvino", "float32", 0.7, 0.85, form="products"),
        way("openvino-bfloat16", "bfloat16", 0.3, 0.2),
        way("openvino-int8", "int8", 0.2, 0.25),
        way("onnxruntime-int8", "int8", 0.1, 0.1, why_not="off by 2.0e+00"),
        Way("onnxruntime", "float32", "fused", why_not="it cannot be converted to ONNX"),
    ]
    settings = {"batches": [1, 8], "threads": 2, "rounds": 30, "seconds": 120, "size": 224}
    return WaysReport({"processor": "P"}, settings, {"openvino": "openvino 1.0"}, [Network("a", {}, found)], "command")


def test_the_best_is_the_fastest_that_counts():
    [row] = report().rows()
    assert row == [
        "a", "0.20 (0.19 to 0.21) openvino-int8", "0.20 (0.19 to 0.21) openvino-bfloat16",
        "0.30 (0.29 to 0.31) openvino-bfloat16", "0.40 (0.39 to 0.41) onednn-bfloat16",
        "0.70 (0.69 to 0.71) openvino, products",
    ]  # fmt: skip
    assert len(row) == len(report().columns())


def test_all_ways_and_what_failed_are_shown():
    text = str(report())
    assert "onnxruntime: it cannot be converted to ONNX (all networks)" in text
    page = report().to_markdown()
    assert "| openvino-int8 | 0.20 / 0.25, 1e-03 |" in page
    assert "| onnxruntime-int8 | (0.10 / 0.10, 1e-03) |" in page
    assert "| onnxruntime |" not in page
    assert "onnxruntime: it cannot be converted to ONNX (all networks)" in page
    assert "processor: P" in page
    assert WaysReport.from_dict(json.loads(report().to_json())) == report()


def test_nothing_that_counts_is_a_dash():
    empty = report()
    empty.networks[0].ways = [way("onednn", "float32", 1.0, 1.0, why_not="it stopped")]
    assert empty.rows() == [["a", "-", "-", "-", "-", "-"]]


def test_ratios_are_those_of_the_rounds_and_threads_of_the_other_sleep(monkeypatch):
    # In every round the machine is twice as slow as in the one before. The second function takes three times as long;
    # the threads of the first disturb it for 0.2 seconds, and its own first call after a pause takes longer.
    now, took, last, awake = [0.0], {"first": 0.001, "other": 0.003}, [""], [0.0]
    called = []

    def sleep(seconds):
        now[0] += seconds

    def call(name):
        slow = 2.0 ** (len(called) // 8)
        disturbed = name == "other" and now[0] < awake[0]
        cold = 2.0 if last[0] != name else 1.0
        called.append(name)
        now[0] += took[name] * slow * cold * (1.7 if disturbed else 1.0)
        last[0] = name
        if name == "first":
            awake[0] = now[0] + 0.2

    monkeypatch.setattr(timing, "PAUSE", 0.25)
    monkeypatch.setattr(timing.time, "sleep", sleep)
    times = time_beside(lambda: call("first"), lambda: call("other"), rounds=6, clock=lambda: now[0])
    assert [round(times[key], 9) for key in ("low", "ratio", "high")] == [3.0, 3.0, 3.0]
    assert times["milliseconds"] == pytest.approx(3 * times["milliseconds_of_first"])


# ---------------------------------------------------------------------------------------------------------------------
# The exports of the earlier commit


def test_the_exports_are_in_the_cache_of_the_user(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert ways.baseline_folder() == Path("/there/paddle_reparam/exports_of_39bb01d")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert ways.baseline_folder() == Path.home() / ".cache" / "paddle_reparam" / "exports_of_39bb01d"
    assert all((tool_root() / target).is_file() for target in ways.NETWORKS if "/" in target)


def tool_root() -> Path:
    return Path(tool.__file__).resolve().parents[1]


def test_a_checkout_without_the_commit_says_so(tmp_path, monkeypatch, capsys):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(baseline_exports, "ROOT", tmp_path)
    assert baseline_exports.main([NAME, "--folder", str(tmp_path / "exports")]) == 1
    assert "error: git worktree add: " in capsys.readouterr().err
    assert not (tmp_path / "exports").exists()
