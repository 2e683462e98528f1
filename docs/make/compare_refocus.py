"""Compare runs of tools/refocus.py: one table, one picture and one file of all their accuracies, epoch by epoch."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddle_reparam.errors import ReparamError, exit_code, one_sentence
from paddle_reparam.files import atomic_write
from paddle_reparam.report import format_markdown
from paddle_reparam.style import BLUE, GREEN, GREY, ORANGE, digest_of, plain_axes, save_with_digest

BASELINE = "baseline"
#: In the order of the table; a variant that is not here has no colour.
COLOURS = {"refocus": ORANGE, "retrain": BLUE, "finetune": GREEN}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 with one sentence where runs cannot be read or compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a file of --json")
    parser.add_argument("--json", type=Path, help="write the accuracies of all runs to this file")
    parser.add_argument("--picture", type=Path, help="draw the curves into this PNG file")
    given = parser.parse_args(arguments)
    with exit_code() as result, one_sentence("the runs cannot be compared"):
        runs = [run for path in given.runs for run in read(path)]
        require_comparable(runs)
        if given.json:
            text = json.dumps({"runs": runs}, indent=1) + "\n"
            atomic_write(given.json, lambda path: path.write_text(text, encoding="utf-8"))
        if given.picture:
            atomic_write(given.picture, lambda path: save_with_digest(draw(runs), path, digest_of(runs)))
        print(table_of(runs))
    return result[0]


def read(path: Path) -> list[dict[str, Any]]:
    """Return the runs in a file of `--json`, or the one in a folder, without the places of its files."""
    file = path / "result.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if "runs" in found:
            return found["runs"]
        hashes = {name: {"sha256": weights["sha256"]} for name, weights in found["weights"].items()}
        return [{**found, "weights": hashes}]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReparamError(f"{file}: it is no result of tools/refocus.py ({error})") from error


def require_comparable(runs: list[dict[str, Any]]) -> None:
    """Raise `ReparamError` for runs of two configs, two runs of one variant and seed, and two baselines of one seed."""
    if len({run["source"]["config"]["sha256"] for run in runs}) != 1:
        raise ReparamError("the runs are not of the same config")
    seen: dict[tuple[str, Any], str] = {}
    for run in runs:
        for key, name in (((run["variant"], run["seed"]), "plain"), ((BASELINE, run["seed"]), BASELINE)):
            digest = run["weights"][name]["sha256"]
            if name == "plain" and key in seen:
                raise ReparamError(f"there are two runs of {run['variant']} with seed {run['seed']}")
            if seen.setdefault(key, digest) != digest:
                raise ReparamError(f"the runs with seed {run['seed']} do not start from the same baseline")


def by_variant(runs: list[dict[str, Any]]) -> dict[str, dict[Any, float]]:
    """Return variant -> seed -> accuracy in percent: the baseline, what has a colour, and the rest by name."""
    found: dict[str, dict[Any, float]] = {}
    for run in runs:
        for name, value in run["accuracy"].items():
            found.setdefault(name, {})[run["seed"]] = 100 * value
    order = [BASELINE, *COLOURS]
    return dict(sorted(found.items(), key=lambda item: (order.index(item[0]) if item[0] in order else 99, item[0])))


def table_of(runs: list[dict[str, Any]]) -> str:
    """Return the Markdown table: every seed, mean and standard deviation, and the differences seed by seed."""
    accuracies = by_variant(runs)
    seeds = sorted({run["seed"] for run in runs}, key=str)
    rows = [_row(name, values, seeds, "{:.2f}") for name, values in accuracies.items()]
    pairs = [(name, BASELINE) for name in accuracies if name != BASELINE]
    pairs += [("refocus", name) for name in accuracies if name not in ("refocus", BASELINE)]
    for first, second in pairs:
        both = {seed: value - accuracies[second][seed] for seed, value in accuracies.get(first, {}).items()
                if seed in accuracies[second]}  # fmt: skip
        if both:
            rows.append(_row(f"{first} - {second}", both, seeds, "{:+.2f}"))
    header = ["top-1, %", *(f"seed {seed}" for seed in seeds), "mean", "standard deviation"]
    return format_markdown(header, rows)


def _row(name: str, values: dict[Any, float], seeds: list[Any], form: str) -> list[str]:
    cells = [form.format(values[seed]) if seed in values else "" for seed in seeds]
    several = list(values.values())
    spread = f"{statistics.stdev(several):.2f}" if len(several) > 1 else ""
    return [name, *cells, form.format(statistics.mean(several)), spread]


def draw(runs: list[dict[str, Any]]) -> Figure:
    """Draw validation top-1 and training loss by epoch: a thin line for each seed, a thick one for their mean."""
    figure = Figure(figsize=(11, 4.2), facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    plain_axes(left, "validation top-1, %", "epoch")
    plain_axes(right, "training loss, mean of the epoch", "epoch")
    for axes, key, scale in ((left, "eval_top1", 100), (right, "train_loss", 1)):
        for name in by_variant(runs):
            curves = [[scale * point.get(key, np.nan) for point in run["curves"][name]]
                      for run in runs if name in run["curves"]]  # fmt: skip
            if not curves or name not in (BASELINE, *COLOURS):
                continue
            epochs = np.arange(len(curves[0])) + 1
            x = epochs if name == BASELINE else epochs + runs[0]["epochs"]
            colour = GREY if name == BASELINE else COLOURS[name]
            for curve in curves:
                axes.plot(x, curve, color=colour, lw=0.7, alpha=0.6)
            label = f"{name}, mean of {len(curves)}" if len(curves) > 1 else name
            axes.plot(x, np.mean(curves, axis=0), color=colour, lw=2.2, label=label)
        axes.axvline(runs[0]["epochs"] + 0.5, color=GREY, lw=0.8, ls=":")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
