"""What is said of methods by the accuracies of a few seeds, against published values of t and numbers by hand."""

import json
import math
import shlex

import comparison_table
import measured_tables
import numpy as np
import pytest
from PIL import Image

from paddle_reparam.analysis import comparison
from paddle_reparam.analysis.comparison import ComparisonReport, Difference, MethodResult, complete, difference
from paddle_reparam.analysis.comparison_figures import draw_cost, draw_curves
from paddle_reparam.style import DIGEST, digest_of


def result_of(method, accuracy, parameters=10, macs=100, step=1.0, latency=1.0, trainings=1):
    return MethodResult(
        method, trainings, accuracy, shipped_parameters=parameters, shipped_macs=macs, trainable_parameters=parameters,
        step={"ratio": step}, latency=None if latency is None else {"ratio": latency, "low": latency}, memory=1e9,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Student's t


@pytest.mark.parametrize(
    ("probability", "freedom", "t"),
    [
        (0.975, 1, 12.7062047362), (0.975, 2, 4.3026527297), (0.975, 4, 2.7764451052), (0.975, 9, 2.2621571628),
        (0.975, 30, 2.0422724563), (0.8, 1, 1.3763819205), (0.8, 2, 1.0606601718), (0.8, 10, 0.8790578286),
        (0.975, 999, 1.9623414611), (0.5, 3, 0.0),
    ],
)  # fmt: skip
def test_quantiles_are_those_of_the_tables(probability, freedom, t):
    assert comparison.t_quantile(probability, freedom) == pytest.approx(t, rel=1e-9, abs=1e-12)


def test_the_distribution_is_its_density_summed_up():
    steps = np.linspace(0, 2.5, 200001)
    for freedom in (1, 2, 3, 6, 11):
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        density = scale * (1 + steps**2 / freedom) ** (-(freedom + 1) / 2)
        area = float(((density[1:] + density[:-1]) / 2).sum() * (steps[1] - steps[0]))
        assert comparison.t_cumulative(2.5, freedom) == pytest.approx(0.5 + area, abs=1e-9)
        assert comparison.t_cumulative(-2.5, freedom) == pytest.approx(0.5 - area, abs=1e-9)


def test_so_many_intervals_hold_the_true_difference():
    """Of 1000 drawn with three seeds each, 95 %, give or take three standard errors."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(1000):
        first, second = ({seed: value for seed, value in enumerate(generator.normal(m, 1, 3))} for m in (0.7, 0.2))
        found = difference("plain", first, second)
        held += found.low <= 0.5 <= found.high
    assert abs(held / 1000 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 1000)


# ---------------------------------------------------------------------------------------------------------------------
# Differences


def test_a_difference_is_paired_by_seed():
    found = difference("plain", {0: 53.0, 1: 45.0, 2: 47.0, 7: 1.0}, {0: 50.0, 1: 40.0, 2: 48.0, 8: 99.0})
    assert (found.of, found.seeds, found.wins) == ("plain", 3, 2)
    # 3, 5 and -1: their mean is 7 / 3, the sum of squares around it 56 / 3.
    assert found.mean == pytest.approx(7 / 3)
    assert found.deviation == pytest.approx(math.sqrt(28 / 3))
    reach = 4.3026527297 * math.sqrt(28 / 9)
    assert (found.low, found.high) == pytest.approx((7 / 3 - reach, 7 / 3 + reach))
    assert str(found) == "+2.33 (-5.26 to +9.92)"
    assert not found.is_larger_than_the_spread


def test_one_seed_has_no_interval_and_no_seed_no_difference():
    found = difference("plain", {3: 53.0}, {3: 50.0})
    assert found == Difference("plain", 1, 3.0, None, None, None, 1, None)
    assert str(found) == "+3.00 (n/a)"
    assert not found.is_larger_than_the_spread
    assert difference("plain", {3: 53.0}, {4: 50.0}) is None


def test_equal_differences_are_larger_than_a_spread_of_nothing():
    found = difference("plain", {0: 53.0, 1: 45.0}, {0: 52.0, 1: 44.0})
    assert (found.low, found.high, found.seeds_needed) == (1.0, 1.0, 2)
    assert found.is_larger_than_the_spread
    same = difference("plain", {0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    assert not same.is_larger_than_the_spread
    assert same.wins == 0


@pytest.mark.parametrize(("mean", "deviation", "seeds"), [(1, 1, 10), (-1, 1, 10), (0.5, 1, 34), (0.2, 1, 199)])
def test_as_many_seeds_as_tables_of_power_say(mean, deviation, seeds):
    """The exact numbers of the paired t-test at 5 % and 80 %, which the formula meets within one."""
    assert abs(comparison.seeds_needed(mean, deviation) - seeds) <= 1


def test_seeds_that_nobody_trains_are_not_counted():
    assert comparison.seeds_needed(0.0, 1.0) is None
    assert comparison.seeds_needed(0.01, 1.0) is None
    assert comparison.seeds_needed(1.0, 0.0) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The table


@pytest.fixture
def results():
    return [
        result_of("plain", {0: 50.0, 1: 52.0}),
        result_of("retrain", {0: 54.0, 1: 55.0}, trainings=2),
        result_of("RefConv2D", {0: 53.0, 1: 54.0}, step=1.3, latency=1.4, trainings=2),
        result_of("Slower", {0: 60.0, 1: 62.5}, macs=99, latency=1.2),
        result_of("Smaller", {0: 40.0, 1: 41.0}, parameters=9, latency=1.02),
        result_of("Larger", {0: 61.0, 1: 62.0}, parameters=11, latency=0.5),
        MethodResult("Failed", 1, {}),
    ]


def test_what_ships_at_no_cost_is_first_and_then_accuracy_decides(results):
    ordered = complete(results, {"RefConv2D": "retrain"})
    assert [(each.method, each.at_no_cost) for each in ordered] == [
        ("retrain", True), ("RefConv2D", True), ("plain", True), ("Smaller", True), ("Larger", False),
        ("Slower", False), ("Failed", False),
    ]  # fmt: skip
    refconv = ordered[1]
    assert (refconv.mean, refconv.deviation) == pytest.approx((53.5, math.sqrt(0.5)))
    assert (refconv.to_plain.mean, refconv.to_plain.wins) == (2.5, 2)
    assert (refconv.to_control.of, refconv.to_control.mean, refconv.to_control.wins) == ("retrain", -1.0, 0)
    assert ordered[2].to_plain is None
    assert ordered[0].to_control is None
    assert ordered[-1].mean is None


@pytest.mark.parametrize(
    ("parameters", "macs", "latency", "free"),
    [
        (1010, 1000, 1.04, True),
        (1011, 1000, 0.5, False),
        (1000, 1011, 0.5, False),
        (1010, 1000, 1.06, False),
        (1000, 1000, 1.06, True),
        (500, 500, 1.06, False),
    ],
)
def test_a_few_biases_are_free_and_the_same_network_always_is(parameters, macs, latency, free):
    plain = result_of("plain", {0: 1.0}, 1000, 1000)
    other = result_of("Other", {0: 2.0}, parameters, macs, latency=latency)
    complete([plain, other], {})
    assert other.at_no_cost is free


def test_nothing_is_said_to_be_free_that_was_not_timed():
    plain, other = complete([result_of("plain", {0: 1.0}), result_of("Other", {0: 2.0}, latency=None)], {})
    assert (plain.method, other.at_no_cost) == ("plain", False)


def test_the_sentence_says_what_the_spread_allows(results):
    told = comparison.in_a_sentence(complete(results, {"RefConv2D": "retrain"}))
    # The differences: retrain 4 and 3, RefConv2D 3 and 2, to retrain -1 and -1, Smaller -10 and -11, Larger 11 and 10,
    # Slower 10 and 10.5; with two seeds an interval reaches 12.7 times the standard error.
    assert told.startswith(
        "Of 6 differences over 2 seeds, 4 are larger than the spread (the 95 % interval is without 0"
    )
    assert "chance alone would make of 0.3 of them)" in told
    assert "RefConv2D to retrain -1.00 (-1.00 to -1.00)" in told
    assert "Slower to plain +10.25 (+7.07 to +13.43)" in told
    # t(0.975, n - 1) + t(0.8, n - 1) of 3 and 4 seeds: 5.36 and 4.16, times 0.7071 / 2.5 are 1.52 and 1.18, squared
    # less than 3, and 1.5 and 1.2.
    assert told.endswith("so many seeds more would show it in 80 % of cases: retrain to plain 1, RefConv2D to plain 1.")


def test_the_sentence_of_one_seed_and_of_none():
    one = complete([result_of("plain", {0: 1.0}), result_of("Other", {0: 2.0})], {})
    assert comparison.in_a_sentence(one).startswith("One seed says nothing of the spread")
    none = complete([result_of("plain", {0: 1.0}), MethodResult("Other", 1, {})], {})
    assert comparison.in_a_sentence(none).startswith("Nothing can be compared")


def test_a_difference_that_no_number_of_seeds_shows():
    results = [result_of("plain", {0: 1.0, 1: 1.0}), result_of("Other", {0: 2.0, 1: 0.0})]
    assert comparison.in_a_sentence(complete(results, {})).endswith("Other to plain more than 1000.")


@pytest.fixture
def report(results):
    runs = [
        {"method": each.method, "seed": seed, "accuracy": value / 100, "curve": [
            {"epoch": 1, "train_loss": 2.0, "eval_loss": 2.0, "eval_CELoss": 2.0},
            {"epoch": 2, "train_loss": 1.0, "eval_loss": 1.0, "eval_top1": value / 100},
        ]}
        for each in results for seed, value in each.accuracy.items()
    ]  # fmt: skip
    ordered = complete(results, {"RefConv2D": "retrain"})
    failed = {"Failed, seed 0": "the training stopped"}
    return ComparisonReport("N", "top-1", [0, 1], 2, ordered, runs, failed, sentence=comparison.in_a_sentence(ordered))


def test_the_table_and_the_file(report):
    rows = report.markdown().splitlines()
    assert rows[0].startswith("| method | top-1, % | deviation | to plain, points (95 %) | wins |")
    [row] = [row for row in rows if row.startswith("| RefConv2D")]
    assert row == (
        "| RefConv2D | 53.50 | 0.71 | +2.50 (-3.85 to +8.85) | 2 of 2 | -1.00 (-1.00 to -1.00) | 0 of 2 | 2 | 10 | 10 "
        "| 1.30 | 1.40 | 1000 | yes |"
    )
    [row] = [row for row in rows if row.startswith("| Failed")]
    assert set(row.split(" | ")[1:-1]) == {"n/a", "-", "1"}
    assert report.sentence in str(report)
    assert report.sentence in report.markdown()
    written = json.loads(report.to_json())
    assert written["methods"][1]["to_control"]["of"] == "retrain"
    assert written["methods"][1]["accuracy"] == {"0": 53.0, "1": 54.0}
    assert ComparisonReport.from_dict(written) == report


def test_pictures(report, tmp_path):
    for draw in (draw_cost, draw_curves):
        figure = draw(report)
        texts = [text.get_text() for axes in figure.axes for text in axes.texts]
        texts += [
            text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()
        ]
        assert texts == [each.method for each in report.methods if each.accuracy], draw.__name__
        figure.savefig(tmp_path / "figure.png")
        with Image.open(tmp_path / "figure.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    left, right = draw_curves(report).axes
    # The second training begins behind the first one, and an accuracy that was not measured leaves no point.
    assert {tuple(line.get_xdata()) for line in right.lines} == {(1, 2), (3, 4)}
    assert {tuple(line.get_xdata()) for line in left.lines} == {(2,), (4,)}
    empty = ComparisonReport("N", "top-1", [0], 2, [MethodResult("plain", 1, {})], [], {})
    for draw in (draw_cost, draw_curves):
        draw(empty).savefig(tmp_path / "empty.png")


def test_the_pages_show_a_comparison_with_every_run(report, tmp_path, monkeypatch, capsys):
    result = tmp_path / "result.json"
    result.write_text(report.to_json())
    monkeypatch.setattr(comparison_table, "DOCS", tmp_path)
    assert comparison_table.main([str(result), "N"]) == 1
    assert "was not measured" in capsys.readouterr().err
    report.costs = {
        "threads": 1,
        "machine": {"processor": "P", "cores": 2, "load": 0.1, "paddle": "3", "device": "cpu"},
    }
    report.source = {"config": {"name": "a b.yaml", "overrides": ["Global.epochs=2"]}}
    result.write_text(report.to_json())
    (tmp_path / "measured").mkdir()
    (tmp_path / "images").mkdir()
    assert comparison_table.main([str(result), "N"]) == 0
    with Image.open(tmp_path / "images" / "compare_N.png") as picture:
        assert picture.info[DIGEST] == digest_of(report.to_dict())
    (tmp_path / "page.md").write_text("<!-- measured/compare_N.json -->\n<!-- end -->\n")
    assert measured_tables.write_pages(tmp_path) == ["page.md"]
    page = (tmp_path / "page.md").read_text()
    assert report.markdown() in page
    assert "| every run, % | seed 0 | seed 1 |" in page
    assert "| Slower | 60.00 | 62.50 |" in page
    assert "| Failed | failed | failed |" in page
    assert "\n* Failed, seed 0: the training stopped\n" in page
    [command] = [line.strip("`") for line in page.splitlines() if line.startswith("`python")]
    given = shlex.split(command)
    assert given[: given.index("--methods")] == [
        "python",
        "tools/compare.py",
        "-c",
        "a b.yaml",
        "-o",
        "Global.epochs=2",
    ]
    named = given[given.index("--methods") + 1 : given.index("--seeds")]
    assert named == [each.method for each in report.methods if each.method not in ("plain", "retrain")]
