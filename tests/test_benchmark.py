"""tools/benchmark.py: what is timed is the same function, ratios are those of the times, the page is what was run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle import nn
from test_onnx import needs_onnx

from paddle_reparam import benchmark
from paddle_reparam.errors import ReparamError
from paddle_reparam.export import export_inference, program_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import benchmark as tool  # noqa: E402

SMALL = ["--size", "32", "--rounds", "5", "--threads", "1"]


def small_network() -> nn.Layer:
    paddle.seed(0)
    layers = [nn.Conv2D(3, 8, 3, padding=1), nn.BatchNorm2D(8), nn.ReLU(), nn.AdaptiveAvgPool2D(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 4))


def test_both_forms_and_an_exported_folder_are_timed_in_one_run(tmp_path, capsys):
    folder = tmp_path / "shipped"
    network = small_network()
    network.eval()
    export_inference(network, folder, [[None, 3, 32, 32]])
    output, chart = tmp_path / "times.json", tmp_path / "times.png"
    arguments = ["infer", "MobileNetV1_x0_25", str(folder), "--form", "train form", "fused", "--batch", "1", "2"]
    assert tool.main([*arguments, *SMALL, "--output", str(output), "--chart", str(chart)]) == 0
    written = json.loads(output.read_text())
    assert [(c["name"], c["form"]) for c in written["contenders"]] == [
        ("MobileNetV1_x0_25", "train form"), ("MobileNetV1_x0_25", "fused"), ("shipped", "exported"),
    ]  # fmt: skip
    train, fused, exported = written["contenders"]
    assert fused["parameters"] < train["parameters"]
    assert 0 < fused["difference"] < 1e-4
    # Paddle 2.6 writes a third file, which is not needed.
    files = [program_file(folder), folder / "inference.pdiparams"]
    assert exported["bytes"] == sum(path.stat().st_size for path in files)
    assert exported["parameters"] is None
    assert all(c["peak_mib"] > 50 for c in written["contenders"])
    assert [r["batch"] for r in written["results"]] == [1, 1, 1, 2, 2, 2]
    for i, result in enumerate(written["results"]):
        first = written["results"][i - i % 3]
        assert result["ratio"] == pytest.approx(result["median"] / first["median"], rel=1e-12)
        assert 0 < result["low"] <= result["median"] <= result["high"]
    assert written["machine"]["paddle"] == paddle.__version__
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "MobileNetV1_x0_25  fused" in capsys.readouterr().out


@needs_onnx
def test_onnxruntime_is_timed_beside_it(tmp_path):
    output = tmp_path / "times.json"
    arguments = ["infer", "MobileNetV1_x0_25", "--runtime", "onednn", "onnxruntime", *SMALL, "--output", str(output)]
    assert tool.main(arguments) == 0
    assert [r["runtime"] for r in json.loads(output.read_text())["results"]] == ["onednn", "onnxruntime"]


@pytest.mark.parametrize(("of", "values"), [("size", ["32", "64"]), ("batch", ["1", "2"])])
def test_a_sweep_has_a_time_for_each_value(tmp_path, of, values):
    output, chart = tmp_path / "sweep.json", tmp_path / "sweep.png"
    arguments = ["sweep", "MobileNetV1_x0_25", "--of", of, "--values", *values, *SMALL]
    assert tool.main([*arguments, "--output", str(output), "--chart", str(chart)]) == 0
    written = json.loads(output.read_text())
    assert len(written["results"]) == len(values)
    assert written["settings"]["values"] == [int(value) for value in values]
    if of == "size":
        assert written["contenders"][1]["macs"] > 3 * written["contenders"][0]["macs"]
    assert chart.is_file()


def test_a_larger_kernel_is_more_work(tmp_path):
    output = tmp_path / "sweep.json"
    arguments = ["sweep", "SLaK_micro", "--of", "kernel_size", "--values", "7", "13", *SMALL, "--output", str(output)]
    assert tool.main(arguments) == 0
    small, large = json.loads(output.read_text())["contenders"]
    assert small["macs"] < large["macs"]


def test_an_export_that_is_another_function_is_not_timed(tmp_path, monkeypatch):
    fuse = benchmark.reparameterize

    def broken(*args, **kwargs):
        network, report = fuse(*args, **kwargs)
        conv = network[0]
        conv.weight.set_value(conv.weight * 1.5)
        return network, report

    monkeypatch.setattr(benchmark, "reparameterize", broken)
    with pytest.raises(ReparamError, match="small, fused: its export is not the same function"):
        list(benchmark.prepare("small", small_network(), tmp_path, (3, 32, 32)))


def test_the_peak_is_that_of_the_new_process(tmp_path):
    network = small_network()
    network.eval()
    export_inference(network, tmp_path, [[None, 3, 32, 32]])
    held = np.ones(2**27)  # a gibibyte, which the new process does not hold
    assert benchmark.peak_memory(tmp_path, [1, 3, 32, 32]) < held.nbytes


def test_wrong_usage_is_told(capsys):
    assert tool.main(["infer", "ResNet51"]) == 2
    assert "there is no Arch named 'ResNet51'; did you mean" in capsys.readouterr().err
    for arguments in (["infer", "ResNet50", "--batch", "0"], ["sweep", "ResNet50", "--of", "time", "--values", "1"]):
        with pytest.raises(SystemExit) as stopped:
            tool.main(arguments)
        assert stopped.value.code == 2


# ---------------------------------------------------------------------------------------------------------------------
# docs/benchmarks.md


def measured(times: dict[str, float]) -> dict:
    """Return what a run would have written, with these milliseconds at batch 1 and eight times those at batch 8."""
    names = dict.fromkeys([*(plain for _, plain, _ in tool.TARGETS), *(Path(t).stem for t, _, _ in tool.TARGETS)])
    return {
        "machine": {"processor": "P"},
        "settings": {"threads": 2, "rounds": 30},
        "contenders": [{"name": name, "macs": 100} for name in names],
        "results": [
            {"name": name, "batch": batch, "median": batch * times.get(name, 10.0), "low": 9.0, "high": 11.0}
            for batch in (1, 8) for name in names
        ],
    }  # fmt: skip


def test_rows_are_ratios_to_the_plain_network_beside():
    rows = {row.network: row for row in tool.rows_of(measured({"SLaK_tiny": 25.0, "MobileNetV2": 5.0}))}
    assert (rows["SLaK_tiny"].ratio, rows["SLaK_tiny"].ratio_of_eight) == (2.5, 2.5)
    assert rows["MobileNetV2_x1_0_DCD"].ratio == 2.0
    assert rows["ResNet50_RefConv"].by_operations == 1.0
    page = tool.page_of(measured({"SLaK_tiny": 25.0}))
    assert "| SLaK_tiny | ResNet50 | 2.500 | 3.00 | 2.500 | 1.00 | 25.0 (9.0 to 11.0) |" in page


def test_the_page_is_what_was_measured():
    content = json.loads(tool.MEASURED.read_text(encoding="utf-8"))
    assert tool.TABLE.read_text(encoding="utf-8") == tool.page_of(content), "run python tools/benchmark.py table"
