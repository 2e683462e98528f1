"""The papers' figures as pictures: numbers of all layers, and maps of some, each with its axes and its scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..style import BLUE, GREY, ORANGE, plain_axes

#: Layers whose maps are drawn; the numbers of all of them are in the diagrams and in the table.
LAYERS = 6
#: Inches: the width of a figure, the height of its diagrams, and that of a row of maps by how many are in it.
_WIDTH, _DIAGRAMS, _MAPS = 11, 3.7, {3: 3.1, 4: 2.6}
_ORDER = "layer, in the order of the table"


@dataclass(frozen=True)
class Map:
    """A matrix to show as an image: what its rows, its columns and its values are.

    `title` stands over the layer's number and path. `middle`: rows and columns are counted from the middle. `largest`:
    where the scale ends, for maps that are to be compared.
    """

    title: str
    number: int
    path: str
    values: np.ndarray
    x: str
    y: str
    value: str
    middle: bool = False
    largest: float | None = None


def draw_refconv(rows: Sequence[Any]) -> Figure:
    """Draw how far kernels moved and how alike their channels are; below, the matrices of some layers."""
    maps, per_row = [], 3
    for number, row in _some([row if row.connectivity.size else None for row in rows]):
        maps.append(
            Map("connectivity", number, row.path, row.connectivity, "channel of Wb", "channel of Wt", "sum of |Wr|")
        )
    if not maps:
        per_row = 4
        for number, row in _some([None if row.base_divergence is None else row for row in rows]):
            both = (("base", "Wb", row.divergence_of_base), ("refocused", "Wt", row.divergence_of_refocused))
            largest = max(float(values.max()) for *_, values in both)
            for kind, name, values in both:
                axes = f"kernel channel j of {name}", f"kernel channel i of {name}"
                maps.append(Map(f"{kind} kernel", number, row.path, values, *axes, "KL(i || j), nats", largest=largest))
    figure, left, right = _new("RefConv: what refocusing did to the kernels", maps, per_row)
    _by_layer(left, rows, ["relative_change"], "how far the kernel moved", "||Wt - Wb|| / ||Wb||")
    _by_layer(right, rows, ["base_divergence", "refocused_divergence"],
              "how different the kernel channels are", "mean KL divergence, nats")  # fmt: skip
    return figure


def draw_dcd(rows: Sequence[Any]) -> Figure:
    """Draw the dynamic coefficients of all layers; below, how much each of Phi differs between images, of some."""
    maps = [
        Map("Phi", number, row.path, row.phi_deviation, "column", "row", "deviation over images")
        for number, row in _some(rows)
    ]
    figure, left, right = _new("DCD: what depends on the image", maps, 3)
    numbers = np.arange(1, len(rows) + 1)
    values = np.array([[row.lambda_mean or np.nan, row.lambda_spread or np.nan] for row in rows])
    left.errorbar(numbers, values[:, 0], values[:, 1], fmt="o-", color=BLUE, ecolor=ORANGE, lw=1.5, ms=4, capsize=3)
    plain_axes(left, "Lambda: mean, and its spread over images", x=_ORDER, y="factor of a channel")
    left.ticklabel_format(axis="y", useOffset=False)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    _by_layer(right, rows, ["phi_mean", "phi_spread"], "Phi: mean of absolute values, and spread over images",
              "coefficient")  # fmt: skip
    if all(row.phi_spread > 0 for row in rows):
        # Layers differ by orders of magnitude.
        right.set_yscale("log")
        right.autoscale()
    return figure


def draw_spconv(rows: Sequence[Any]) -> Figure:
    """Draw the gates of each layer's channels."""
    figure = Figure(figsize=(_WIDTH, 4.6), facecolor="white", layout="constrained")
    _head(figure, "SPConv: the share of the representative channels in each output channel")
    axes = figure.subplots()
    for number, row in enumerate(rows, 1):
        places = number + np.linspace(-0.3, 0.3, len(row.mean))
        order = np.argsort(row.mean)
        axes.errorbar(places, row.mean[order], row.deviation[order], fmt="o", ms=2.5, lw=0.6, color=BLUE, ecolor=GREY)
    axes.axhline(0.5, color=ORANGE, lw=1, ls="--")
    plain_axes(axes, "gate of each channel, sorted: mean over images, and one standard deviation", x=_ORDER, y="gate")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def draw_slak(rows: Sequence[Any]) -> Figure:
    """Draw how much of a kernel's energy lies how far out; below, the kernels of some layers."""
    maps = [
        Map(f"kernel {row.kernel.split(' ')[0]}", number, row.path, row.magnitude, "column, from the middle",
            "row, from the middle", "mean |weight|", middle=True)
        for number, row in _some(rows)
    ]  # fmt: skip
    figure, left, right = _new("Large kernels: how far out they are used", maps, 3)
    for number, row in enumerate(rows):
        color = (np.array([0.2, 0.4, 0.54]) * (len(rows) - number) + np.array([0.82, 0.38, 0.24]) * number) / len(rows)
        left.plot(2 * np.arange(len(row.within)) + 1, row.within, color=color, lw=1.2)
    plain_axes(left, "energy within the middle square (first layer blue)", x="side of the square, pixels",
               y="share of the energy")  # fmt: skip
    left.set_ylim(0, 1.02)
    _by_layer(right, rows, ["density", "density_of_small"], "weights that are not zero", "share of the weights")
    return figure


def draw_repmlp(rows: Sequence[Any]) -> Figure:
    """Draw what the convolutions are of the fused FC3; below, what one unit of some layers looks at."""
    maps = []
    for number, row in _some(rows):
        both = (("middle unit of FC3", row.unit_of_fc3), ("convolutions merged", row.unit_of_fused))
        largest = max(float(values.max()) for _, values in both)
        for title, values in both:
            axes = "column of the partition", "row of the partition"
            maps.append(Map(title, number, row.path, values, *axes, "mean |weight|", largest=largest))
    figure, left, right = _new("RepMLP: convolutions in the fully connected layer", maps, 4)
    _by_layer(left, rows, ["share_of_fc3", "share_of_convolutions"], "FC3 and convolutions", "share of the norms")
    _by_layer(right, rows, ["concentration_of_fc3", "concentration_of_fused"],
              "a unit's weights in the 3x3 around its pixel", "share of its weights")  # fmt: skip
    return figure


FIGURES = {"dcd": draw_dcd, "refconv": draw_refconv, "repmlp": draw_repmlp, "slak": draw_slak, "spconv": draw_spconv}


# ---------------------------------------------------------------------------------------------------------------------


def _new(title: str, maps: Sequence[Map], per_row: int) -> tuple[Figure, Any, Any]:
    """Return a figure with maps below, and the two diagrams above them."""
    height = _MAPS[per_row] * -(-len(maps) // per_row)
    figure = Figure(figsize=(_WIDTH, _DIAGRAMS + height), facecolor="white", layout="constrained")
    _head(figure, title)
    above = figure
    if maps:
        above, below = figure.subfigures(2, 1, height_ratios=(_DIAGRAMS, height))
        cells = below.subplots(-(-len(maps) // per_row), per_row, squeeze=False).reshape(-1)
        for axes in cells[len(maps) :]:
            axes.set_axis_off()
        for axes, each in zip(cells, maps):
            # So many have room over a map and its scale.
            _show(below, axes, each, 132 // per_row)
    left, right = above.subplots(1, 2)
    return figure, left, right


def _head(figure: Figure, title: str) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")


def _show(figure: Any, axes: Any, shown: Map, characters: int) -> None:
    """Show a map with its title, axes and scale."""
    height, width = shown.values.shape
    # Whole numbers are the middles of pixels.
    left, top = (-(width // 2), -(height // 2)) if shown.middle else (0, 0)
    extent = (left - 0.5, left + width - 0.5, top + height - 0.5, top - 0.5)
    scale = {} if shown.largest is None else {"vmin": 0, "vmax": shown.largest}
    image = axes.imshow(shown.values, interpolation="nearest", cmap="viridis", extent=extent, **scale)
    title = f"layer {shown.number}, {shown.title}\n{in_two_lines(shown.path, characters)}"
    axes.set_title(title, loc="left", fontsize=8)
    axes.set_xlabel(shown.x, fontsize=8)
    axes.set_ylabel(shown.y, fontsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    # As high as the map, which a bar with a place of its own would not be, and with no exponent above it: a title may
    # be there.
    bar = figure.colorbar(image, cax=axes.inset_axes((1.05, 0, 0.07, 1)), format="%.2g")
    bar.set_label(shown.value, fontsize=8)
    bar.locator = MaxNLocator(4)
    bar.update_ticks()
    for each in (axes, bar.ax):
        each.tick_params(labelsize=7)


def in_two_lines(path: str, characters: int) -> str:
    """Return a layer's path in two lines of so many characters at most, broken behind a dot, its middle left out."""
    if len(path) <= characters:
        return path
    if len(path) > 2 * characters - 1:
        path = f"{path[: characters - 3]}...{path[1 - characters :]}"
    cut = path.rfind(".", len(path) - characters - 1, characters) + 1 or characters
    return f"{path[:cut]}\n{path[cut:]}"


def _by_layer(axes: Any, rows: Sequence[Any], names: Sequence[str], title: str, y: str) -> None:
    """Draw numbers of all layers, in the order of the network; a layer without one has a gap."""
    numbers = range(1, len(rows) + 1)
    for name, color in zip(names, (BLUE, ORANGE, GREY)):
        values = [getattr(row, name) for row in rows]
        values = [np.nan if value is None else value for value in values]
        axes.plot(numbers, values, "o-", color=color, lw=1.5, ms=4, label=name.replace("_", " "))
    plain_axes(axes, title, x=_ORDER, y=y)
    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=8)


def _some(rows: Sequence[Any]) -> list[tuple[int, Any]]:
    """Return at most `LAYERS` of the rows that are not None, with their numbers, evenly from the first to the last."""
    there = [(number, row) for number, row in enumerate(rows, 1) if row is not None]
    if len(there) <= LAYERS:
        return there
    return [there[i] for i in np.linspace(0, len(there) - 1, LAYERS).round().astype(int)]
