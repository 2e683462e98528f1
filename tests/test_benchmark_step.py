"""tools/benchmark_step.py measures what it says, and the pages show what it wrote."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from paddle_reparam.timing import Timing

from paddle_reparam import timing
from paddle_reparam.layers.toeplitz import DepthwiseConv2D

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import benchmark_step as benchmark  # noqa: E402

SMALL = ["--model", "SLaK_micro", "--size", "32", "--rounds", "5"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the command sets for the processes that it starts is gone after the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setattr(benchmark, "peak_memory", lambda given, variant: 1.5)


def test_a_step_is_measured_in_all_variants(tmp_path, capsys, no_memory):
    output = tmp_path / "new" / "step.json"
    variants = ["plain", "native", "sparse"]
    assert benchmark.main([*SMALL, "--variants", *variants, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert list(result["variants"]) == variants
    assert result["command"].startswith("python tools/benchmark_step.py --model SLaK_micro --size 32 ")
    assert result["machine"]["paddle"]
    for each in result["variants"].values():
        assert 0 < each["low"] <= each["median"] <= each["high"]
        assert each["ratio"] == each["median"] / result["variants"]["plain"]["median"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*variants, *benchmark.COLUMNS, "1.50"])


def test_a_mask_update_is_spread_over_its_steps(monkeypatch, no_memory):
    def timed(functions, rounds, warm_up):
        for run in functions.values():
            run()
        seconds = {"plain": 2.0, "sparse": 3.0 if len(functions) > 1 else 50.0}
        return {name: Timing(seconds[name], seconds[name] - 1, seconds[name] + 1, rounds) for name in functions}

    monkeypatch.setattr(timing, "alternate", timed)
    arguments = ["--variants", "plain", "sparse", "--update-frequency", "100", "--batch", "2"]
    sparse = benchmark.measure(parsed(*arguments))["variants"]["sparse"]
    assert sparse["mask update"] == 50.0
    assert [sparse[key] for key in ("low", "median", "high", "ratio")] == [2.5, 3.5, 4.5, 1.75]


def parsed(*arguments: str):
    """Return what `main` makes of its arguments."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "run", lambda given, command: found.append(given))
        assert benchmark.main([*SMALL, *arguments]) == 0
    return found[0]


def test_the_native_variant_has_no_products_and_the_others_follow_the_rule(monkeypatch):
    seen = []
    original = DepthwiseConv2D._is_product
    monkeypatch.setattr(DepthwiseConv2D, "_is_product", lambda *given: seen.append(original(*given)) or seen[-1])
    given = parsed("--size", "64", "--batch", "64")
    for variant, products in [("native", False), ("plain", True), ("sparse", True)]:
        seen.clear()
        benchmark.make_step(given, variant).run()
        assert any(seen) == products, variant


def test_memory_is_that_of_a_process_of_its_own():
    assert 0.1 < benchmark.peak_memory(parsed("--batch", "1"), "plain") < 4


def test_a_network_of_paddle_with_a_layer_in_it():
    given = parsed("--variants", "replaced", "--layer", "RefConv2D")
    given.model = "shufflenet_v2_x0_25"
    benchmark.make_step(given, "replaced").run()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--variants", "replaced"], ["--layer", "RefConv2D"], ["--rounds", "0"], ["--threads", "0"],
        ["--variants", "plain", "plain"], ["--variants", "other"],
    ],
)  # fmt: skip
def test_wrong_usage(wrong):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main([*SMALL, *wrong])


def test_what_does_not_exist(capsys):
    assert benchmark.main(["--model", "SLaK_tinny"]) == 2
    assert "SLaK_tiny" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Pages


def test_the_pages_show_what_was_measured(tmp_path):
    for page in (ROOT / "docs").glob("*.md"):
        shutil.copy(page, tmp_path)
    shutil.copytree(ROOT / "docs" / "measured", tmp_path / "measured")
    pages = benchmark.write_pages(tmp_path)
    assert pages
    for name in pages:
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), (
            "python tools/benchmark_step.py --pages"
        )
    texts = "".join((ROOT / "docs" / name).read_text() for name in pages)
    for file in (ROOT / "docs" / "measured").glob("step_*.json"):
        result = json.loads(file.read_text())
        assert benchmark.to_markdown(result) in texts, f"no page shows {file.name}"
        assert result["command"].endswith(f"--output docs/measured/{file.name}")


def test_a_table_is_written_between_its_lines(tmp_path):
    result = {
        "command": "python x",
        "machine": {
            "processor": "C",
            "cores": 2,
            "load": 0.5,
            "paddle": "3",
            "device": "cpu",
            "MKL_DEBUG_CPU_TYPE": "5",
        },
        "settings": {"rounds": 3, "threads": 1},
        "variants": {"plain": {"median": 2.0, "low": 1.5, "high": 2.5, "ratio": 1.0, "peak memory, GB": 0.5}},
    }
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "step_a.json").write_text(json.dumps(result))
    (tmp_path / "page.md").write_text("before\n<!-- measured/step_a.json -->\nold\n<!-- end -->\nafter\n")
    (tmp_path / "other.md").write_text("nothing\n")
    assert benchmark.write_pages(tmp_path) == ["page.md"]
    before, table, after = (tmp_path / "page.md").read_text().split("<!-- ")
    assert before == "before\n"
    assert "| plain | 2.000 | 1.500 to 2.500 | 1.000 | 0.50 |" in table
    assert "MKL_DEBUG_CPU_TYPE=5" in table
    assert "old" not in table
    assert after == "end -->\nafter\n"
