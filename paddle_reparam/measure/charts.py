"""Charts of what a benchmark measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from ..fonts import drawable
from ..style import BLUE, GREEN, GREY, ORANGE, plain_axes
from .benchmark import InferenceReport
from .sweeps import GROWS, points_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Columns of a network's name.
_LONGEST = 60


def draw_bars(report: InferenceReport) -> Figure:
    """Draw a bar for each network, form, runtime and batch, with the quartiles."""
    figure = _figure(9, 1.4 + 0.32 * len(report.results))
    axes = figure.subplots()
    names, text = drawable([result.name for result in report.results], _LONGEST)
    labels = [f"{name}, {r.form}, {r.runtime}, batch {r.batch}" for name, r in zip(names, report.results)]
    medians = np.array([r.median for r in report.results])
    spread = np.array([[r.median - r.low, r.high - r.median] for r in report.results]).T
    colors = [ORANGE if r.form == "train form" else BLUE for r in report.results]
    axes.barh(np.arange(len(labels)), medians, xerr=spread, color=colors, ecolor=GREY, capsize=2)
    axes.set_yticks(np.arange(len(labels)), labels, fontsize=8, **text)
    axes.invert_yaxis()
    plain_axes(axes, "median of a batch, and its quartiles", x="milliseconds")
    return figure


def draw_curves(sweeps: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw a panel for each sweep, with a curve for each target and its quartiles."""
    figure = _figure(max(6, 4.2 * len(sweeps)), 3.6)
    for axes, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps):
        settings, curves = sweep["settings"], points_of(sweep)
        names, text = drawable(list(curves), _LONGEST)
        for color, name, points in zip(cycle((BLUE, ORANGE, GREEN, GREY)), names, curves.values()):
            low, median, high = ([point[key] for point in points] for key in ("low", "median", "high"))
            axes.plot(settings["values"], median, "o-", color=color, lw=1.5, ms=4, label=name)
            axes.fill_between(settings["values"], low, high, color=color, alpha=0.2)
        plain_axes(axes, "milliseconds an image", x=GROWS[settings["of"]])
        axes.set_ylim(0, None)
        for entry in axes.legend(frameon=False, fontsize=8).get_texts():
            entry.set(**text)
    return figure


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white", layout="constrained")
