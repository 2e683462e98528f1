"""A comparison as pictures: what accuracy costs to train, and how each method came to its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..fonts import drawable
from ..style import BLUE, GREY, ORANGE, plain_axes
from .comparison import PLAIN, ComparisonReport

#: Columns of a method's name.
_LONGEST = 40
#: Where a name may stand, in points from its point: right, right above and below, left of it.
_PLACES = [(8, 0, "left"), (8, 9, "left"), (8, -9, "left"), (-8, 0, "right"), (-8, 9, "right"), (-8, -9, "right")]


def draw_cost(report: ComparisonReport) -> Figure:
    """Draw the accuracy of each method, with the standard deviation over seeds, over the cost of its training step.

    Hollow: it takes two trainings. Methods of which either is not known are left out.
    """
    figure = Figure(figsize=(9, 5.4), facecolor="white", layout="constrained")
    axes = figure.subplots()
    known = [each for each in report.methods if each.mean is not None and each.step is not None]
    names, text = drawable([each.method for each in known], _LONGEST)
    for each in known:
        color = GREY if each.method == PLAIN else BLUE if each.at_no_cost else ORANGE
        filling = {} if each.trainings == 1 else {"markerfacecolor": "white"}
        axes.errorbar(
            each.step["ratio"], each.mean, yerr=each.deviation, fmt="o", ms=7, color=color, capsize=3, lw=1, **filling
        )
    plain_axes(
        axes,
        f"{report.network}: mean and standard deviation of {len(report.seeds)} seeds; hollow: two trainings\n"
        "blue ships at the plain network's cost, orange does not",
        "a training step, times the plain network's",
        f"{report.metric}, %",
    )
    axes.margins(x=0.15, y=0.12)
    _label(figure, axes, [(each.step["ratio"], each.mean) for each in known], names, text)
    return figure


def _label(figure: Figure, axes: Any, points: Sequence[Any], names: Sequence[str], text: Mapping[str, Any]) -> None:
    """Write each name beside its point, where it covers no name that is there already if there is such a place."""
    figure.draw_without_rendering()
    taken: list[Any] = []
    for point, name in zip(points, names):
        for x, y, side in _PLACES:
            label = axes.annotate(
                name, point, xytext=(x, y), textcoords="offset points", fontsize=8, ha=side, va="center", **text
            )
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken) or (x, y, side) == _PLACES[-1]:
                break
            label.remove()
        taken.append(box)


def draw_curves(report: ComparisonReport) -> Figure:
    """Draw the validation metric and the training loss by epoch: a thin line for each seed, a thick one for their mean.

    What is trained in a second training begins where the plain network ended.
    """
    figure = Figure(figsize=(11, 4.6), facecolor="white", layout="constrained")
    names, text = drawable([each.method for each in report.methods], _LONGEST)
    colors = colormaps["tab10" if len(names) <= 10 else "tab20"].colors
    metric = next((key for run in report.runs for point in run["curve"] for key in point if _is_metric(key)), "")
    for axes, key, scale, title in zip(
        figure.subplots(1, 2), (metric, "train_loss"), (100, 1), (f"validation {report.metric}, %", "training loss")
    ):
        plain_axes(axes, title, "epoch")
        for each, name, color in zip(report.methods, names, cycle(colors)):
            runs = [run for run in report.runs if run["method"] == each.method]
            before = report.epochs * (each.trainings - 1)
            curves = [_curve(run["curve"], key, report.epochs) * scale for run in runs]
            if not curves or np.isnan(curves).all():
                continue
            epochs = before + 1 + np.arange(report.epochs)
            for curve in curves if len(curves) > 1 else ():
                _plot(axes, epochs, curve, color=color, lw=0.5, alpha=0.5)
            _plot(axes, epochs, np.mean(curves, axis=0), color=color, lw=1.8, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for entry in figure.axes[0].legend(frameon=False, fontsize=7).get_texts():
        entry.set(**text)
    return figure


def _is_metric(key: str) -> bool:
    """Tell whether an average that was logged in an evaluation is no loss."""
    return key.startswith("eval_") and "loss" not in key.lower()


def _curve(points: Sequence[Mapping[str, Any]], key: str, epochs: int) -> np.ndarray:
    """Return a value of each epoch, `[epochs]`; NaN where it was not logged."""
    by_epoch = {point["epoch"]: point.get(key, np.nan) for point in points}
    return np.array([by_epoch.get(epoch, np.nan) for epoch in range(1, epochs + 1)], dtype=float)


def _plot(axes: Any, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    """Draw a line through what is there: not each epoch need be evaluated."""
    there = ~np.isnan(y)
    axes.plot(x[there], y[there], marker="o" if there.sum() == 1 else None, ms=3, **style)
