"""Charts of what a benchmark measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from ..style import BLUE, GREEN, GREY, ORANGE, plain_axes
from .benchmark import InferenceReport
from .sweeps import GROWS, points_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_bars(report: InferenceReport) -> Figure:
    """Draw a bar for each network, form, runtime and batch, with the quartiles."""
    figure = _figure(9, 1.4 + 0.32 * len(report.results))
    axes = figure.subplots()
    labels = [f"{r.name}, {r.form}, {r.runtime}, batch {r.batch}" for r in report.results]
    medians = np.array([r.median for r in report.results])
    spread = np.array([[r.median - r.low, r.high - r.median] for r in report.results]).T
    colors = [ORANGE if r.form == "train form" else BLUE for r in report.results]
    axes.barh(np.arange(len(labels)), medians, xerr=spread, color=colors, ecolor=GREY, capsize=2)
    axes.set_yticks(np.arange(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    plain_axes(axes, "median of a batch, and its quartiles", x="milliseconds")
    return figure


def draw_curves(sweeps: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw a panel for each sweep, with a curve for each target and its quartiles."""
    figure = _figure(max(6, 4.2 * len(sweeps)), 3.6)
    for axes, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps):
        settings = sweep["settings"]
        for color, (target, points) in zip(cycle((BLUE, ORANGE, GREEN, GREY)), points_of(sweep).items()):
            low, median, high = ([point[key] for point in points] for key in ("low", "median", "high"))
            axes.plot(settings["values"], median, "o-", color=color, lw=1.5, ms=4, label=target)
            axes.fill_between(settings["values"], low, high, color=color, alpha=0.2)
        plain_axes(axes, "milliseconds an image", x=GROWS[settings["of"]])
        axes.set_ylim(0, None)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white", layout="constrained")
