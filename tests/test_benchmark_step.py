"""tools/benchmark_step.py measures what it says, and the pages show what it wrote."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from paddle_reparam.errors import UnknownName
from paddle_reparam.layers.toeplitz import DepthwiseConv2D
from paddle_reparam.measure import timing
from paddle_reparam.measure.timing import Timing

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import benchmark_step  # noqa: E402

SMALL = ["step", "--model", "SLaK_micro", "--size", "32", "--rounds", "5"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the command sets for the processes that it starts is gone after the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(benchmark_step, "in_new_process", lambda function, *arguments: function(*arguments))


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    benchmark_step.add_step(parser.add_subparsers(dest="command", required=True))
    return parser.parse_args([*SMALL, *arguments])


def test_a_step_is_measured_in_all_variants(tmp_path, capsys, in_this_process):
    output = tmp_path / "new" / "step.json"
    variants = ["plain", "native", "sparse"]
    given = parsed("--threads", "1", "--variants", *variants, "--output", str(output))
    assert benchmark_step.run_step(given) == 0
    assert os.environ["OMP_NUM_THREADS"] == "1"
    result = json.loads(output.read_text())
    assert list(result["variants"]) == variants
    command = result["command"].split()
    assert command[:3] == ["python", "tools/benchmark.py", "step"]
    assert vars(parsed(*command[3:])) == vars(given)
    assert result["machine"]["paddle"]
    for each in result["variants"].values():
        assert 0 < each["low"] <= each["median"] <= each["high"]
        assert each["ratio"] == each["median"] / result["variants"]["plain"]["median"]
        assert each["peak memory, GB"] > 0.1
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*variants, *benchmark_step.COLUMNS])


def test_a_mask_update_is_spread_over_its_steps(monkeypatch):
    def timed(functions, rounds, warm_up):
        for run in functions.values():
            run()
        seconds = {"plain": 2.0, "sparse": 3.0 if len(functions) > 1 else 50.0}
        return {name: Timing(seconds[name], seconds[name] - 1, seconds[name] + 1, rounds) for name in functions}

    monkeypatch.setattr(timing, "alternate", timed)
    given = parsed("--variants", "plain", "sparse", "--update-frequency", "100")
    sparse = benchmark_step.measure(given)["variants"]["sparse"]
    assert sparse["mask update"] == 50.0
    assert [sparse[key] for key in ("low", "median", "high", "ratio")] == [2.5, 3.5, 4.5, 1.75]


def test_the_native_variant_has_no_products_and_the_others_follow_the_rule(monkeypatch):
    seen = []
    original = DepthwiseConv2D._is_product
    monkeypatch.setattr(DepthwiseConv2D, "_is_product", lambda *given: seen.append(original(*given)) or seen[-1])
    given = parsed("--size", "64", "--batch", "64")
    for variant, products in [("native", False), ("plain", True), ("sparse", True)]:
        seen.clear()
        benchmark_step.make_step(given, variant).run()
        assert any(seen) == products, variant


def test_memory_is_that_of_a_process_of_its_own():
    memory = benchmark_step.in_new_process(benchmark_step.memory_of_two_steps, parsed("--batch", "1"), "plain")
    assert 0.1 < memory < 4


def test_a_network_of_paddle_with_a_layer_in_it():
    given = parsed("--variants", "replaced", "--layer", "RefConv2D")
    given.model = "shufflenet_v2_x0_25"
    benchmark_step.make_step(given, "replaced").run()


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--threads", "-1"], ["--variants", "other"], ["--pages"]])
def test_wrong_usage(wrong):
    with pytest.raises(SystemExit, match="2"):
        parsed(*wrong)


@pytest.mark.parametrize("wrong", [["--variants", "replaced"], ["--layer", "RefConv2D"]])
def test_a_layer_goes_with_its_variant(wrong, capsys):
    assert benchmark_step.run_step(parsed(*wrong)) == 2
    assert "--layer" in capsys.readouterr().err


def test_what_is_wrong_in_the_new_process_is_wrong_here():
    given = parsed()
    given.model = "SLaK_tinny"
    with pytest.raises(UnknownName, match="SLaK_tiny"):
        benchmark_step.run_step(given)


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def test_the_pages_show_what_was_measured(tmp_path):
    for page in (ROOT / "docs").glob("*.md"):
        shutil.copy(page, tmp_path)
    shutil.copytree(ROOT / "docs" / "measured", tmp_path / "measured")
    pages = benchmark_step.write_pages(tmp_path)
    assert pages
    for name in pages:
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), (
            "run tools/benchmark.py step --pages"
        )
    texts = "".join((ROOT / "docs" / name).read_text() for name in pages)
    for file in (ROOT / "docs" / "measured").glob("step_*.json"):
        result = json.loads(file.read_text())
        assert benchmark_step.to_markdown(result) in texts, f"no page shows {file.name}"
        assert result["command"].endswith(f"--output docs/measured/{file.name}")


def test_a_table_is_written_between_its_lines(tmp_path):
    machine = {"processor": "C", "cores": 2, "load": 0.5, "paddle": "3", "device": "cpu", "MKL_DEBUG_CPU_TYPE": "5"}
    result = {
        "command": "python x",
        "machine": machine,
        "settings": {"rounds": 3, "threads": 1},
        "variants": {"plain": {"median": 2.0, "low": 1.5, "high": 2.5, "ratio": 1.0, "peak memory, GB": 0.5}},
    }
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "step_a.json").write_text(json.dumps(result))
    (tmp_path / "page.md").write_text("before\n<!-- measured/step_a.json -->\nold\n<!-- end -->\nafter\n")
    (tmp_path / "other.md").write_text("nothing\n")
    assert benchmark_step.write_pages(tmp_path) == ["page.md"]
    before, table, after = (tmp_path / "page.md").read_text().split("<!-- ")
    assert before == "before\n"
    assert "| plain | 2.000 | 1.500 to 2.500 | 1.000 | 0.50 |" in table
    assert "MKL_DEBUG_CPU_TYPE=5" in table
    assert "old" not in table
    assert after == "end -->\nafter\n"


def test_kernels_are_measured_and_shown(monkeypatch, capsys, in_this_process, tmp_path):
    """The rule's own table: each kernel on each map, with a star where the rule takes the product."""
    monkeypatch.setattr(benchmark_step, "KERNELS", ((3, 3), (13, 5)))
    monkeypatch.setattr(benchmark_step, "MAPS", {7: 16, 14: 8})
    output = tmp_path / "kernels.json"
    parser = argparse.ArgumentParser()
    benchmark_step.add_step(parser.add_subparsers(dest="command", required=True))
    words = ["step", "--kernels", "--batch", "64", "--threads", "1", "--rounds", "5", "--output", str(output)]
    assert benchmark_step.run_step(parser.parse_args(words)) == 0
    assert "13x5" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["command"] == " ".join(["python", "tools/benchmark.py", *words])
    pays = {kernel: [each["pays"] for each in row.values()] for kernel, row in result["kernels"].items()}
    assert pays == {"3x3": [False, False], "13x5": [True, True]}
    assert all(each["ratio"] > 0 for row in result["kernels"].values() for each in row.values())
    result["kernels"]["13x5"]["14"]["ratio"] = 2.04
    heads, _, _, last = [line for line in benchmark_step.to_markdown(result).splitlines() if line.startswith("|")]
    assert heads == "| kernel | 7x7 | 14x14 |"
    assert last.endswith("| 2.0 * |")
