"""Pictures of whole networks: the loss around their weights, and what the middle of their last map sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..fonts import drawable
from ..style import BLUE, GREEN, GREY, ORANGE, plain_axes
from .figures import in_two_lines
from .landscape import LandscapeRow
from .receptive_field import FieldRow, displayed, shares_within

_WIDTH, _HEIGHT = 11, 3.9
_COLORS = (BLUE, ORANGE, GREEN, GREY)
_LEVELS = 16


def draw_landscape(rows: Sequence[LandscapeRow]) -> Figure:
    """Draw the plane of each network by the same contours, and below it the cuts along all directions."""
    figure = Figure(figsize=(_WIDTH, 2 * _HEIGHT), facecolor="white", layout="constrained")
    figure.suptitle("The loss around the weights", x=0.01, ha="left", fontsize=13, weight="bold")
    characters = 120 // len(rows)
    names, text = drawable([row.network for row in rows], 2 * characters - 2)
    planes, lines = figure.subplots(2, len(rows), squeeze=False)
    low, high = (bound([row.cuts for row in rows]) for bound in (_lowest, _highest))
    levels = np.linspace(low, high, _LEVELS)
    drawn = None
    for axes, below, row, name in zip(planes, lines, rows, names):
        surface = np.nan_to_num(row.surface, nan=high, posinf=high)
        drawn = axes.contourf(row.axis, row.axis, surface, levels, cmap="viridis", extend="both")
        axes.contour(row.axis, row.axis, surface, levels, colors="white", linewidths=0.5)
        axes.set_aspect("equal")
        axes.set_title(f"{in_two_lines(name, characters)}\nloss {row.loss:.3g}", loc="left", fontsize=8, **text)
        axes.set(xlabel="along the first direction", ylabel="along the second")
        for cut in row.cuts:
            below.plot(row.axis, cut, color=GREY, lw=0.7)
        below.plot(row.axis, row.cuts.mean(axis=0), color=BLUE, lw=2)
        plain_axes(
            below,
            f"{len(row.cuts)} directions and their mean\n{row.sharpness:.3g} higher half way",
            "along a direction, in lengths of the filters",
            "loss",
        )
        below.title.set_fontsize(9)
        below.set_ylim(low - 0.03 * (high - low), high)
    figure.colorbar(drawn, ax=planes, format="%.3g", label="loss", shrink=0.9)
    return figure


def _lowest(cuts: Sequence[np.ndarray]) -> float:
    """Return the smallest loss of all."""
    return float(np.nanmin(np.concatenate([each.ravel() for each in cuts])))


def _highest(cuts: Sequence[np.ndarray]) -> float:
    """Return where scales end: nine tenths of what is on any cut lie below it."""
    values = np.concatenate([each.ravel() for each in cuts])
    return float(np.quantile(values[np.isfinite(values)], 0.9))


def draw_fields(rows: Sequence[FieldRow]) -> Figure:
    """Draw what each pixel contributes, by the protocol's scale, and how much lies within squares of all sizes."""
    columns = min(len(rows), 4)
    count = -(-len(rows) // columns)
    figure = Figure(figsize=(_WIDTH, 3.2 * count + _HEIGHT), facecolor="white", layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3.2 * count, _HEIGHT))
    above.suptitle("The effective receptive field", x=0.01, ha="left", fontsize=13, weight="bold")
    characters = 120 // columns
    names, text = drawable([row.network for row in rows], 2 * characters - 2)
    cells = above.subplots(count, columns, squeeze=False).ravel()
    for axes in cells[len(rows) :]:
        axes.set_axis_off()
    shown: Any = None
    for axes, row, name in zip(cells, rows, names):
        height, width = row.contributions.shape
        # Whole numbers are the middles of pixels.
        extent = (-(width // 2) - 0.5, width - width // 2 - 0.5, height - height // 2 - 0.5, -(height // 2) - 0.5)
        shown = axes.imshow(displayed(row.contributions), cmap="viridis", vmin=0, vmax=1, extent=extent)
        axes.set_title(f"{in_two_lines(name, characters)}\n{row.form}", loc="left", fontsize=7.5, **text)
        axes.set_xlabel("column, from the middle", fontsize=8)
        axes.set_ylabel("row, from the middle", fontsize=8)
        axes.tick_params(labelsize=7)
    above.colorbar(shown, ax=list(cells), shrink=0.8, label="log10(1 + contribution), largest 1")
    axes = below.subplots()
    networks = list(dict.fromkeys(row.network for row in rows))
    for row, name in zip(rows, names):
        within = shares_within(row.contributions)
        areas = (2 * np.arange(len(within)) + 1) ** 2 / row.contributions.size
        # What a network is fused into lies on it: broken, so that both are seen.
        first = row.difference is None
        axes.plot(
            areas, within, color=_COLORS[networks.index(row.network) % len(_COLORS)], lw=2.5 if first else 1.2,
            ls="-" if first else "--", alpha=0.5 if first else 1, label=f"{name}, {row.form}",
        )  # fmt: skip
    plain_axes(axes, "contributions within middle squares", "share of the image", "share of the contributions")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    for entry in axes.legend(frameon=False, fontsize=8).get_texts():
        entry.set(**text)
    return figure
