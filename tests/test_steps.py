"""Training steps are measured as their table says, and the pages show what was written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import benchmark as tool
import measured_tables
import pytest

from paddle_reparam.errors import UnknownName, UsageError
from paddle_reparam.layers import dbb
from paddle_reparam.layers.toeplitz import DepthwiseConv2D
from paddle_reparam.measure import steps, timing
from paddle_reparam.measure.steps import StepSettings
from paddle_reparam.measure.timing import Timing

ROOT = Path(__file__).resolve().parents[1]
SMALL = StepSettings("SLaK_micro", size=32)
OF_SMALL = ["step", "--model", "SLaK_micro", "--size", "32"]


@pytest.fixture
def in_this_process(monkeypatch):
    """What is to be a process of its own is this one; the list gets the threads that each of them is told."""
    told = []

    def run(function, *arguments):
        told.append(os.environ["OMP_NUM_THREADS"])
        return function(*arguments)

    monkeypatch.setattr(steps, "in_new_process", run)
    return told


def test_a_step_is_measured_in_all_variants(tmp_path, capsys, monkeypatch, in_this_process):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    output = tmp_path / "new" / "step.json"
    variants = ["plain", "native", "sparse"]
    arguments = [*OF_SMALL, "--threads", "1", "--variants", *variants, "--output", str(output)]
    assert tool.main(arguments) == 0
    assert in_this_process == ["1"] * 4
    assert os.environ["OMP_NUM_THREADS"] == "7"
    result = json.loads(output.read_text())
    assert [each["name"] for each in result["variants"]] == result["settings"]["variants"] == variants
    assert result["command"].split() == ["python", "tools/benchmark.py", *arguments]
    assert result["machine"]["paddle"]
    for each in result["variants"]:
        assert 0 < each["low"] <= each["median"] <= each["high"]
        assert each["ratio"] == each["median"] / result["variants"][0]["median"]
        assert each["peak_gb"] > 0.1
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*variants, "peak memory, GB"])


def test_a_mask_update_is_spread_over_its_steps(monkeypatch):
    def timed(functions, rounds, warm_up):
        for run in functions.values():
            run()
        seconds = {"plain": 2.0, "sparse": 3.0 if len(functions) > 1 else 50.0}
        return {name: Timing(seconds[name], seconds[name] - 1, seconds[name] + 1, rounds) for name in functions}

    monkeypatch.setattr(timing, "alternate", timed)
    settings = StepSettings("SLaK_micro", size=32, variants=["plain", "sparse"], update_frequency=100)
    _, sparse = steps.time_variants(settings).variants
    assert sparse["mask_update"] == 50.0
    assert [sparse[key] for key in ("low", "median", "high", "ratio")] == [2.5, 3.5, 4.5, 1.75]


def test_the_native_variant_has_no_products_and_the_others_follow_the_rule(monkeypatch):
    seen = []
    original = DepthwiseConv2D._is_product
    monkeypatch.setattr(DepthwiseConv2D, "_is_product", lambda *given: seen.append(original(*given)) or seen[-1])
    for variant, products in [("native", False), ("plain", True), ("sparse", True)]:
        seen.clear()
        steps.make_step(StepSettings("SLaK_micro", size=64, batch=64), variant).run()
        assert any(seen) == products, variant


def test_memory_is_that_of_a_process_of_its_own():
    settings = StepSettings("SLaK_micro", size=32, batch=1)
    assert 0.1 < steps.in_new_process(steps.memory_of_two_steps, settings, "plain") < 4


def test_a_network_of_paddle_with_a_layer_in_it():
    steps.make_step(StepSettings("shufflenet_v2_x0_25", size=32, layer="RefConv2D"), "replaced").run()


def test_branches_are_merged_where_they_are_not_asked_to_be_native(monkeypatch):
    merged = []
    monkeypatch.setattr(dbb, "forward_merged", lambda layer, x: merged.append(1) or layer.forward_branches(x))
    settings = StepSettings("ResNet20", size=8, layer="DBB2D")
    for variant, count in [("replaced_native", 0), ("replaced", 19)]:
        merged.clear()
        steps.make_step(settings, variant).run()
        assert len(merged) == count


@pytest.mark.parametrize(
    "wrong", [["--rounds", "0"], ["--rounds", "4"], ["--threads", "-1"], ["--variants", "other"], ["--kernels"]]
)
def test_wrong_usage(wrong):
    with pytest.raises(SystemExit, match="2"):
        tool.main([*OF_SMALL, *wrong])


@pytest.mark.parametrize(
    "wrong", [{"variants": ["replaced"]}, {"variants": ["plain", "replaced_native"]}, {"layer": "RefConv2D"}]
)
def test_a_layer_goes_with_its_variant(wrong):
    with pytest.raises(UsageError, match="give both, or neither"):
        steps.measure_steps(StepSettings("SLaK_micro", **wrong))


def test_what_is_wrong_in_the_new_process_is_wrong_here():
    with pytest.raises(UnknownName, match="SLaK_tiny"):
        steps.measure_steps(StepSettings("SLaK_tinny"))


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def test_the_pages_show_what_was_measured(tmp_path):
    for page in (ROOT / "docs").glob("*.md"):
        shutil.copy(page, tmp_path)
    shutil.copytree(ROOT / "docs" / "measured", tmp_path / "measured")
    pages = measured_tables.write_pages(tmp_path)
    assert pages
    for name in pages:
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), "run docs/make/measured_tables.py"
    texts = "".join((ROOT / "docs" / name).read_text() for name in pages)
    measured = ROOT / "docs" / "measured"
    for file in [*measured.glob("step_*.json"), *measured.glob("ways.json")]:
        assert measured_tables.to_markdown(file) in texts, f"no page shows {file.name}"
        command = json.loads(file.read_text())["command"].split()
        given = tool.parser_of().parse_args(command[2:])
        assert [*command[:2], given.output] == ["python", "tools/benchmark.py", f"docs/measured/{file.name}"]


def test_a_table_is_written_between_its_lines(tmp_path):
    machine = {"processor": "C", "cores": 2, "load": 0.5, "paddle": "3", "device": "cpu", "MKL_DEBUG_CPU_TYPE": "5"}
    result = {
        "command": "python x",
        "machine": machine,
        "settings": {"rounds": 3, "threads": 1},
        "variants": [{"name": "plain", "median": 2.0, "low": 1.5, "high": 2.5, "ratio": 1.0, "peak_gb": 0.5}],
    }
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "step_a.json").write_text(json.dumps(result))
    (tmp_path / "page.md").write_text("before\n<!-- measured/step_a.json -->\nold\n<!-- end -->\nafter\n")
    (tmp_path / "other.md").write_text("nothing\n")
    assert measured_tables.write_pages(tmp_path) == ["page.md"]
    before, table, after = (tmp_path / "page.md").read_text().split("<!-- ")
    assert before == "before\n"
    assert "| plain | 2.000 | 1.500 to 2.500 | 1.000 | 0.50 |" in table
    assert "MKL_DEBUG_CPU_TYPE=5" in table
    assert "old" not in table
    assert after == "end -->\nafter\n"


def test_layers_are_measured_and_shown(monkeypatch, capsys, in_this_process, tmp_path):
    """Each beside the plain network; of a layer whose branches are merged, the branches on their own too."""
    monkeypatch.setattr(steps, "LAYERS", (("ResNet20", 8, 2, "RefConv2D"), ("ResNet20", 8, 2, "DBB2D")))
    output = tmp_path / "step_layers.json"
    words = ["step", "--layers", "--threads", "1", "--rounds", "5", "--output", str(output)]
    assert tool.main(words) == 0
    assert "each branch alone" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["command"] == " ".join(["python", "tools/benchmark.py", *words])
    names = [[variant["name"] for variant in each["variants"]] for each in result["layers"]]
    assert names == [["plain", "replaced"], ["plain", "replaced", "replaced_native"]]
    result["layers"][1]["variants"] = [
        {"name": name, "median": median, "low": median - 0.5, "high": median + 0.5, "ratio": median / 2, "rounds": 5}
        for name, median in (("plain", 2.0), ("replaced", 3.0), ("replaced_native", 7.0))
    ]
    output.write_text(json.dumps(result))
    *_, last = [line for line in measured_tables.to_markdown(output).splitlines() if line.startswith("|")]
    assert last == "| ResNet20 | 2 of 8x8 | DBB2D | 2.000 | 1.50 | 1.25 to 1.75 | 3.50 |"


def test_kernels_are_measured_and_shown(monkeypatch, capsys, in_this_process, tmp_path):
    """The rule's own table: each kernel on each map, with a star where the rule takes the product."""
    monkeypatch.setattr(steps, "KERNELS", ((3, 3), (13, 5)))
    monkeypatch.setattr(steps, "MAPS", {7: 16, 14: 8})
    output = tmp_path / "step_kernels.json"
    words = ["step", "--kernels", "--batch", "64", "--threads", "1", "--rounds", "5", "--output", str(output)]
    assert tool.main(words) == 0
    assert "13x5" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["command"] == " ".join(["python", "tools/benchmark.py", *words])
    pays = {row["kernel"]: [each["pays"] for each in row["maps"]] for row in result["kernels"]}
    assert pays == {"3x3": [False, False], "13x5": [True, True]}
    assert all(each["ratio"] > 0 for row in result["kernels"] for each in row["maps"])
    result["kernels"][1]["maps"][1]["ratio"] = 2.04
    output.write_text(json.dumps(result))
    heads, _, _, last = [line for line in measured_tables.to_markdown(output).splitlines() if line.startswith("|")]
    assert heads == "| kernel | 7x7 | 14x14 |"
    assert last.endswith("| 2.0 * |")
