"""tools/benchmark.py: what is timed is the same function, ratios are those of the times, the page is what was run."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import benchmark as tool
import benchmark_pages as page
import numpy as np
import paddle
import pytest
from paddle import nn
from PIL import Image
from test_onnx import needs_onnx

from paddle_reparam import release, save
from paddle_reparam.deploy.export import ExportOptions, export_inference
from paddle_reparam.deploy.outputs import Normalization
from paddle_reparam.deploy.programs import program_file
from paddle_reparam.deploy.runtimes import get_runtime
from paddle_reparam.errors import ReparamError
from paddle_reparam.measure import benchmark
from paddle_reparam.measure.charts import draw_bars, draw_curves
from paddle_reparam.measure.sweeps import name_of, points_of
from paddle_reparam.ppcls.contenders import contenders_of, images_of
from paddle_reparam.style import DIGEST, digest_of

ROOT = Path(__file__).resolve().parents[1]

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
    assert all(c["peak_mib"]["onednn"] > 50 for c in written["contenders"])
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
    written = json.loads(output.read_text())
    assert [r["runtime"] for r in written["results"]] == ["onednn", "onnxruntime"]
    # Each in a process of its own: the one that makes no plans for oneDNN holds less.
    peaks = written["contenders"][0]["peak_mib"]
    assert 50 < peaks["onnxruntime"] < peaks["onednn"]


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
    points = points_of(written)["MobileNetV1_x0_25"]
    assert [point["median"] for point in points] == [each["median"] / each["batch"] for each in written["results"]]
    assert chart.is_file()


def test_a_larger_kernel_is_more_work(tmp_path):
    output = tmp_path / "sweep.json"
    arguments = ["sweep", "SLaK_micro", "--of", "kernel_size", "--values", "7", "13", *SMALL, "--output", str(output)]
    assert tool.main(arguments) == 0
    small, large = json.loads(output.read_text())["contenders"]
    assert small["macs"] < large["macs"]


def test_a_dense_and_a_decomposed_kernel_grow_side_by_side(tmp_path):
    output = tmp_path / "new" / "sweep.json"
    layers = ["ReparamLargeKernelConv2D", "DecomposedLargeKernelConv2D"]
    arguments = ["sweep", *layers, "--of", "kernel_size", "--values", "7", "31", "--channels", "4", *SMALL]
    assert tool.main([*arguments, "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    pixels = 4 * 32 * 32
    assert [each["macs"] for each in written["contenders"]] == [
        49 * pixels, 31 * 31 * pixels, 2 * 7 * 5 * pixels, 2 * 31 * 5 * pixels,
    ]  # fmt: skip
    assert {target: len(points) for target, points in points_of(written).items()} == dict.fromkeys(layers, 2)
    assert all(each["peak_mib"] == {} for each in written["contenders"])


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
    assert benchmark.peak_memory(tmp_path, np.zeros([1, 3, 32, 32], "float32")) < held.nbytes


def test_a_release_of_pixels_is_timed_with_its_sizes(tmp_path):
    network = small_network()
    save(network.state_dict(), tmp_path / "weights.pdparams")
    options = ExportOptions(normalization=Normalization((0.5,) * 3, (0.25,) * 3, 1 / 255))
    spec = [[None, 3, 16, 16]]
    release(network, tmp_path / "weights.pdparams", tmp_path / "shipped", spec, options=options)
    output = tmp_path / "times.json"
    again = ["--rounds", "5", "--threads", "1", "--output", str(output)]
    assert tool.main(["infer", str(tmp_path / "shipped"), *again]) == 0
    [written] = json.loads(output.read_text())["contenders"]
    assert written["shape"] == [3, 16, 16]
    assert written["parameters"] == 3 * 8 * 9 + 8 + 8 * 4 + 4
    [contender] = contenders_of(str(tmp_path / "shipped"), tmp_path, (3, 16, 16))
    images = contender.images(2)
    assert (images.shape, images.dtype) == ((2, 3, 16, 16), np.uint8)
    assert images.min() < 16 < 240 < images.max()
    program = program_file(tmp_path / "shipped")
    program.write_bytes(program.read_bytes() + b" ")
    assert tool.main(["infer", str(tmp_path / "shipped"), *again]) != 0


def test_times_on_images_of_two_sizes_are_not_compared(tmp_path, capsys, monkeypatch):
    network = small_network()
    save(network.state_dict(), tmp_path / "weights.pdparams")
    places = {}
    for side in (16, 32):
        places[side] = str(tmp_path / str(side))
        release(network, tmp_path / "weights.pdparams", places[side], [[None, 3, side, side]])
    monkeypatch.chdir(ROOT)
    for command in ("infer", "profile"):
        for targets, message in [
            (
                ["MobileNetV1_x0_25", places[16], "--size", "32"],
                "3x16x16, and --size 32 asks for 3x32x32",
            ),
            ([places[16], places[32]], "32 takes images of 3x32x32, and "),
            (["ppcls_configs/digits/spconv/ResNet20_SPConv.yaml", places[16]], "16 takes images of 3x16x16, and "),
        ]:
            assert tool.main([command, *targets]) == 2
            assert message in capsys.readouterr().err
    assert images_of(["MobileNetV1_x0_25", places[16]], None) == (3, 16, 16)
    assert images_of(["MobileNetV1_x0_25"], None) == (3, 224, 224)
    assert images_of(["MobileNetV1_x0_25", places[16]], 16) == (3, 16, 16)


def test_a_profile_is_printed_and_written(tmp_path, capsys):
    output = tmp_path / "profile.json"
    arguments = ["profile", "MobileNetV1_x0_25", "--form", "fused", "train form", "--batch", "2", *SMALL]
    assert tool.main([*arguments, "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert [each["batch"] for each in written["profiles"]] == [2, 2]
    fused = {share["kind"]: share["calls"] for share in written["profiles"][0]["shares"]}
    assert fused["convolution 3x3, depthwise"] == 13
    assert "its operations at MobileNetV1_x0_25's rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infer", "ResNet51"], "there is no Arch named 'ResNet51'; did you mean"),
        (["infer", "no/such.yaml"], "the config no/such.yaml cannot be read"),
        (["infer", str(ROOT / "docs")], "docs: it must hold one exported program"),
        (["infer", "ResNet50", "--output", "README.md/a.json"], "--output README.md/a.json: its folder cannot be made"),
        (["sweep", "ResNet50", "--of", "size", "--values", "32", "--chart", "docs"], "--chart docs is a folder"),
        (["profile", "ResNet50", "--output", "docs"], "--output docs is a folder"),
        (["sweep", "ResNet50", "--of", "kernel_size", "--values", "7"], "ResNet50: no kernel size can be chosen"),
        (["sweep", "DecomposedLargeKernelConv2D", "--of", "kernel_size", "--values", "8"], "with a kernel of 8"),
        (["sweep", "DecomposedLargeKernelConv2D", "--of", "size", "--values", "8"], "there is no Arch named"),
        (["profile", "ResNet51"], "there is no Arch named 'ResNet51'; did you mean"),
    ],
)
def test_wrong_usage_is_told(capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    assert tool.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["infer", "ResNet50", "--batch", "0"],
        ["infer", "ResNet50", "--rounds", "4"],
        ["infer", "ResNet50", "--runtime", "tpu"],
        ["sweep", "ResNet50", "--of", "time", "--values", "1"],
    ],
)
def test_arguments_that_no_command_takes(arguments):
    with pytest.raises(SystemExit) as stopped:
        tool.main(arguments)
    assert stopped.value.code == 2


@pytest.mark.skipif(paddle.is_compiled_with_cuda(), reason="this Paddle may find a GPU")
def test_a_gpu_that_is_not_there(capsys, tmp_path):
    assert tool.main(["infer", "MobileNetV1_x0_25", "--runtime", "onednn", "gpu", *SMALL]) == 2
    assert "error: --runtime gpu: Paddle finds no GPU here" in capsys.readouterr().err
    network = small_network()
    network.eval()
    export_inference(network, tmp_path, [[None, 3, 32, 32]])
    with pytest.raises(ReparamError, match="Paddle finds no GPU here"):
        get_runtime("gpu").load(tmp_path)


@pytest.mark.parametrize(("name", "size"), [("RepMLP_CIFAR", 40), ("RepMLPNet_micro", 9)])
def test_a_size_that_a_network_does_not_take(capsys, name, size):
    assert tool.main(["infer", name, "--size", str(size), "--rounds", "5"]) == 2
    assert f"{name} cannot be run on images of 3x{size}x{size}: " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# docs/benchmarks.md


def measured(times: dict[str, float], macs: dict[str, int] | None = None) -> dict:
    """Return what a run would have written, with these milliseconds at batch 1 and eight times those at batch 8."""
    names = dict.fromkeys([*(plain for _, plain, _ in page.TARGETS), *(Path(t).stem for t, _, _ in page.TARGETS)])
    shares = [{"kind": "matmul", "calls": 3, "milliseconds": 6.0}, {"kind": "reorder", "calls": 2, "milliseconds": 2.0},
              {"kind": "pooling", "calls": 1, "milliseconds": 0.01}]  # fmt: skip
    plain_shares = [{"kind": "matmul", "calls": 1, "milliseconds": 4.0}, {"kind": "sum", "calls": 1, "milliseconds": 1}]
    plain_names = {plain for _, plain, _ in page.TARGETS}
    return {
        "machine": {"processor": "P"},
        "settings": {"threads": 2, "rounds": 30},
        "contenders": [{"name": name, "macs": (macs or {}).get(name, 100)} for name in names],
        "results": [
            {"name": name, "form": "fused", "batch": batch, "median": batch * times.get(name, 10.0), "low": 9.0,
             "high": 11.0}
            for batch in (1, 8) for name in names
        ],
        "memory_rate": 2.0 * 2**30,
        "profiles": [
            {"name": name, "batch": 1, "weights_bytes": 100 * 2**20, "whole": 11.0, "without_log": 10.5,
             "shares": plain_shares if name in plain_names else shares}
            for name in names
        ],
    }  # fmt: skip


def test_rows_are_ratios_to_the_plain_network_beside():
    rows = {row.network: row for row in page.rows_of(measured({"SLaK_tiny": 25.0, "MobileNetV2": 5.0}))}
    assert (rows["SLaK_tiny"].ratio, rows["SLaK_tiny"].ratio_of_eight) == (2.5, 2.5)
    assert rows["MobileNetV2_x1_0_DCD"].ratio == 2.0
    assert rows["ResNet50_RefConv"].by_operations == 1.0
    text = page.page_of(measured({"SLaK_tiny": 25.0}), {})
    assert "| SLaK_tiny | ResNet50 | 2.500 | 3.00 | 2.500 | 1.00 | 25.0 (9.0 to 11.0) |" in text


def test_a_missed_target_has_its_limits_and_its_profile():
    reached = {name: 1.0 for name in (Path(target).stem for target, _, _ in page.TARGETS)}
    assert "Where a target is missed" not in page.page_of(measured(reached), {})
    text = page.page_of(measured({**reached, "SLaK_tiny": 40.0}, {"SLaK_tiny": 250}), {})
    missed = text.partition("## Where a target is missed")[2]
    # 250 multiply-adds at the 10 a millisecond of ResNet50, and 100 MiB at 2 GiB/s.
    assert "| SLaK_tiny | 40.0 | 30.0 | 25.0 | 100 | 48.8 |" in missed
    assert "Reading from memory: 2.1 GB/s" in missed
    header = "| SLaK_tiny | calls | ms | calls, ResNet50 | ms, ResNet50 |\n"
    table = re.split(r"\n\n|\n<!--", missed.partition(header)[2])[0].splitlines()[1:]
    assert table == [
        "| matmul | 3 | 6.00 | 1 | 4.00 |",
        "| reorder | 2 | 2.00 | 0 | 0.00 |",
        "| sum | 0 | 0.00 | 1 | 1.00 |",
        "| other primitives | 1 | 0.01 | 0 | 0.00 |",
        "| all primitives | 6 | 8.01 | 2 | 5.00 |",
        "| the rest |  | 2.99 |  | 6.00 |",
        "| the run |  | 11.00 |  | 11.00 |",
        "| without the log |  | 10.50 |  | 10.50 |",
    ]
    assert "MobileNetV2_x1_0_DCD | calls" not in missed


def test_what_every_size_costs_is_beside_one_size_and_in_no_other_row():
    run = measured({"SLaK_tiny": 25.0})
    rows = page.rows_of(run)
    assert "every size" not in page.page_of(run, {})
    run["results"] += [
        {"name": "SLaK_tiny", "form": "dynamic size", "batch": batch, "median": ms, "low": ms, "high": ms}
        for batch, ms in ((1, 50.0), (8, 100.0))
    ]
    assert "| SLaK_tiny | 2.000 | 0.500 |" in page.page_of(run, {})
    assert page.rows_of(run) == rows


def test_a_missed_target_without_a_profile_makes_no_page():
    without = measured({"SLaK_tiny": 40.0})
    without["profiles"] = [each for each in without["profiles"] if each["name"] != "SLaK_tiny"]
    with pytest.raises(KeyError, match="SLaK_tiny"):
        page.page_of(without, {})


def sweep(of: str) -> dict:
    """Return what `sweep` would have written of two networks at two values."""
    names = [(name_of(target, of, value), value if of == "batch" else 1, 4.0 * value * factor)
             for target, factor in (("a", 1), ("b", 3)) for value in (2, 4)]  # fmt: skip
    return {
        "machine": {"processor": "P"},
        "settings": {"threads": 2, "rounds": 30, "of": of, "targets": ["a", "b"], "values": [2, 4]},
        "results": [
            {"name": name, "batch": batch, "median": ms, "low": ms - 1, "high": ms + 1} for name, batch, ms in names
        ],
    }


def test_a_sweep_is_shown_by_image():
    text = page.page_of(measured({}), {"sweep_size": sweep("size"), "sweep_batch": sweep("batch")})
    assert "| side of the images | a | b | ratio, b |" in text
    assert "| 4 | 16.00 (15.00 to 17.00) | 48.00 (47.00 to 49.00) | 3.000 |" in text
    assert "| 4 | 4.00 (3.75 to 4.25) | 12.00 (11.75 to 12.25) | 3.000 |" in text
    assert "`python tools/benchmark.py sweep ResNet50 ResNet50_SPConv --of size" in text
    figure = draw_curves([sweep("size"), sweep("batch")])
    drawn = [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert drawn == [[[8.0, 16.0], [24.0, 48.0]], [[4.0, 4.0], [12.0, 12.0]]]


def test_charts_have_names_of_folders_in_every_script(monkeypatch, tmp_path):
    monkeypatch.setattr("paddle_reparam.fonts._installed", lambda: iter([]))
    name, drawn = "猫/$a_{b}$", r"\u732b/$a_{b}$"
    bars = benchmark.InferenceReport({}, {}, results=[benchmark.Result(name, "fused", "onnxruntime", 1, 2, 1, 3, 1)])
    run = sweep("batch")
    run["settings"]["targets"] = [name, "b"]
    run["results"] = [{**each, "name": each["name"].replace("a", name, 1)} for each in run["results"]]
    figures = [draw_bars(bars), draw_curves([run])]
    texts = [figures[0].axes[0].get_yticklabels()[0], figures[1].axes[0].get_legend().get_texts()[0]]
    assert [text.get_text().split(", ")[0] for text in texts] == [drawn, drawn]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for figure in figures:
            figure.savefig(tmp_path / "chart.png")
    assert not any(text.get_parse_math() for text in texts)


def test_the_page_and_its_picture_are_what_was_measured():
    networks, sweeps = page.read_measured()
    assert page.PAGE.read_text(encoding="utf-8") == page.page_of(networks, sweeps), "run docs/make/benchmark_pages.py"
    with Image.open(page.PICTURE) as picture:
        assert picture.info[DIGEST] == digest_of(sweeps), "run docs/make/benchmark_pages.py"
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize("stem", page.SWEEPS)
def test_a_sweep_is_of_the_command_that_the_page_names(stem):
    given = vars(tool.parser_of().parse_args(page.command_of(stem).split()[2:]))
    settings = page.read_measured()[1][stem]["settings"]
    assert {key: settings[key] for key in ("of", "values", "size", "channels")} == {
        key: given[key] for key in ("of", "values", "size", "channels")
    }
    assert settings["targets"] == given["target"]


def test_one_command_measures_and_writes_everything(tmp_path, monkeypatch, capsys):
    small = "ResNet20_SPConv"
    for name, value in {
        "ROOT": tmp_path, "MEASURED": tmp_path, "PAGE": tmp_path / "benchmarks.md",
        "PICTURE": tmp_path / "benchmarks.png", "FOR_EVERY_SIZE": [small], "THREADS": 1, "ROUNDS": 5,
        "IMAGES": (3, 32, 32), "TARGETS": [(small, "MobileNetV1_x0_25", 0.001)],
        "SWEEPS": {"sweep_size": {"targets": ["MobileNetV1_x0_25"], "of": "size", "values": [32, 64]}},
    }.items():  # fmt: skip
        monkeypatch.setattr(page, name, value)
    # A process for each network, which other tests start.
    monkeypatch.setattr(benchmark, "peak_memory", lambda *_: 2**20)
    assert page.main(["--measure"]) == 1
    assert f"missed: {small}" in capsys.readouterr().out
    text = page.PAGE.read_text(encoding="utf-8")
    assert f"| {small} | calls | ms | calls, MobileNetV1_x0_25 |" in text
    assert "| side of the images | MobileNetV1_x0_25 |" in text
    assert re.search(rf"\| {small} \| [0-9.]+ \| [0-9.]+ \|", text.partition("## One size, or every size")[2])
    picture = page.PICTURE.read_bytes()
    page.PAGE.unlink()
    page.PICTURE.unlink()
    measured = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    assert page.main([]) == 1
    assert page.PAGE.read_text(encoding="utf-8") == text
    assert page.PICTURE.read_bytes() == picture
    assert measured == {path: path.read_bytes() for path in tmp_path.glob("*.json")}
