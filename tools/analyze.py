"""Draw the papers' figures from a trained network: a table for each paper, the same as JSON, and a picture."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam import analysis
from paddle_reparam.errors import CheckpointError, OutputExists, exit_code
from paddle_reparam.files import new_folder
from paddle_reparam.ppcls import setup
from paddle_reparam.ppcls.command import add_override, read_config
from paddle_reparam.ppcls.errors import ConfigError
from paddle_reparam.style import BLUE, GREY, ORANGE, image_axes, plain_axes, spread_over

#: Layers whose arrays are drawn; the numbers of all of them are in the table.
LAYERS = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for wrong usage, 1 where there is nothing to analyse."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", "--config", required=True, help="the YAML file of the training")
    parser.add_argument("--weights", required=True, help="the weight file that training saved, in train form")
    parser.add_argument("--output", required=True, help="the folder to make")
    parser.add_argument("--images", type=int, default=256, help="validation images at most, evenly from the list")
    add_override(parser)
    given = parser.parse_args(arguments)
    if given.images < 1:
        parser.error("--images must be 1 or more")
    with exit_code() as result:
        run(given)
    return result[0]


def run(given: argparse.Namespace) -> None:
    """Analyse a network and write the folder, whole or not at all."""
    target = Path(os.path.realpath(given.output))
    if os.path.lexists(target):
        raise OutputExists(f"{given.output} exists already and is kept; name another folder")
    setup().utils.logger.init_logger(log_level="WARNING")
    from paddle_reparam.ppcls.images import read_validation_images
    from paddle_reparam.ppcls.loading import load_weights, weight_file
    from paddle_reparam.ppcls.reparam import build_train_form

    config = read_config(given.config, given.override)
    try:
        weights = weight_file(given.weights)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    images = read_validation_images(config, given.images)
    model = build_train_form(config)
    load_weights(model, weights, config, "export")
    papers = analysis.analyze(model, images.pixels)
    facts = {"config": given.config, "weights": str(weights), "images": len(images.labels)}
    with new_folder(target, given.output, replace=False) as folder:
        write(folder, papers, facts)
    for paper, rows in papers.items():
        print(f"{paper}\n{analysis.table_of(rows)}\n")
    print(f"written: {given.output}")


def write(folder: Path, papers: dict[str, list[Any]], facts: dict[str, Any]) -> None:
    """Write `analysis.json` and a picture for each paper into a folder."""
    layers = {paper: [analysis.numbers_of(row) for row in rows] for paper, rows in papers.items()}
    (folder / "analysis.json").write_text(json.dumps({**facts, "layers": layers}, indent=2) + "\n", encoding="utf-8")
    for paper, rows in papers.items():
        FIGURES[paper](rows).savefig(folder / f"{paper}.png", dpi=110)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def new_figure(title: str, rows: int) -> tuple[Figure, Any, Any]:
    """Return a figure with a row of diagrams above and so many rows of images below."""
    figure = Figure(figsize=(11, 3.7 + 2.3 * rows), facecolor="white", layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3.7, 2.3 * rows))
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
    return figure, above, below


def by_layer(axes: Any, rows: Sequence[Any], names: Sequence[str], title: str) -> None:
    """Draw numbers of all layers, in the order of the network; a layer without one has a gap."""
    numbers = range(1, len(rows) + 1)
    for name, color in zip(names, (BLUE, ORANGE, GREY)):
        values = [getattr(row, name) for row in rows]
        values = [np.nan if value is None else value for value in values]
        axes.plot(numbers, values, "o-", color=color, lw=1.5, ms=4, label=name.replace("_", " "))
    plain_axes(axes, title, x="layer, in the order of the table")
    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=8)


def draw_refconv(rows: Sequence[Any]) -> Figure:
    """Draw how far kernels moved and how alike their channels are; below, the matrices of some layers."""
    figure, above, below = new_figure("RefConv: what refocusing did to the kernels", 1)
    left, right = above.subplots(1, 2)
    by_layer(left, rows, ["relative_change"], "||Wt - Wb|| / ||Wb||")
    by_layer(right, rows, ["base_divergence", "refocused_divergence"], "mean KL divergence between kernel channels")
    depthwise = [row for row in rows if row.connectivity.size]
    if depthwise:
        for axes, row in zip(grid(below, 1), spread_over(depthwise, LAYERS)):
            image_axes(axes, row.connectivity, f"{row.path}\nconnectivity, Wt from Wb", cmap="viridis")
        return figure
    chosen = spread_over([row for row in rows if row.base_divergence is not None], LAYERS)
    for axes, row in zip(grid(below, 1), chosen):
        both = np.concatenate([row.divergence_of_base, row.divergence_of_refocused], axis=1)
        image_axes(axes, both, f"{row.path}\nKL divergences: Wb, Wt", cmap="viridis")
    return figure


def draw_dcd(rows: Sequence[Any]) -> Figure:
    """Draw the dynamic coefficients of all layers; below, how much each of Phi differs between images, of some."""
    figure, above, below = new_figure("DCD: what depends on the image", 1)
    left, right = above.subplots(1, 2)
    numbers = np.arange(1, len(rows) + 1)
    values = np.array([[row.lambda_mean or np.nan, row.lambda_spread or np.nan] for row in rows])
    left.errorbar(numbers, values[:, 0], values[:, 1], fmt="o-", color=BLUE, ecolor=ORANGE, lw=1.5, ms=4, capsize=3)
    plain_axes(left, "Lambda: mean, and its spread over images", x="layer, in the order of the table")
    by_layer(right, rows, ["phi_mean", "phi_spread"], "Phi: mean of absolute values, and spread over images")
    if all(row.phi_spread > 0 for row in rows):
        # Layers differ by orders of magnitude.
        right.set_yscale("log")
        right.autoscale()
    for axes, row in zip(grid(below, 1), spread_over(rows, LAYERS)):
        image_axes(axes, row.phi_deviation, f"{row.path}\nspread of each of Phi", cmap="viridis")
    return figure


def draw_spconv(rows: Sequence[Any]) -> Figure:
    """Draw the gates of each layer's channels."""
    figure = Figure(figsize=(11, 4.6), facecolor="white", layout="constrained")
    figure.suptitle("SPConv: the share of the representative channels in each output channel", x=0.01, ha="left",
                    fontsize=13, weight="bold")  # fmt: skip
    axes = figure.subplots()
    for number, row in enumerate(rows, 1):
        places = number + np.linspace(-0.3, 0.3, len(row.mean))
        order = np.argsort(row.mean)
        axes.errorbar(places, row.mean[order], row.deviation[order], fmt="o", ms=2.5, lw=0.6, color=BLUE, ecolor=GREY)
    axes.axhline(0.5, color=ORANGE, lw=1, ls="--")
    plain_axes(axes, "gate of each channel, sorted: mean over images, and one standard deviation",
               x="layer, in the order of the table", y="gate")  # fmt: skip
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def draw_slak(rows: Sequence[Any]) -> Figure:
    """Draw how much of a kernel's energy lies how far out; below, the kernels of some layers."""
    figure, above, below = new_figure("Large kernels: how far out they are used", 1)
    left, right = above.subplots(1, 2)
    for number, row in enumerate(rows):
        color = (np.array([0.2, 0.4, 0.54]) * (len(rows) - number) + np.array([0.82, 0.38, 0.24]) * number) / len(rows)
        left.plot(2 * np.arange(len(row.within)) + 1, row.within, color=color, lw=1.2)
    plain_axes(left, "share of the energy within the middle square (first layer blue)", x="side of the square")
    left.set_ylim(0, 1.02)
    by_layer(right, rows, ["density", "density_of_small"], "share of weights that are not zero")
    for axes, row in zip(grid(below, 1), spread_over(rows, LAYERS)):
        image_axes(axes, row.magnitude, f"{row.path}\nmean |weight|, {row.kernel.split(' ')[0]}", cmap="magma")
    return figure


def draw_repmlp(rows: Sequence[Any]) -> Figure:
    """Draw what the convolutions are of the fused FC3; below, what one unit of some layers looks at."""
    figure, above, below = new_figure("RepMLP: convolutions in the fully connected layer", 2)
    left, right = above.subplots(1, 2)
    by_layer(left, rows, ["share_of_fc3", "share_of_convolutions"], "share of the norms")
    by_layer(right, rows, ["concentration_of_fc3", "concentration_of_fused"],
             "share of a unit's weights in the 3x3 around its pixel")  # fmt: skip
    chosen = spread_over(rows, LAYERS)
    cells = grid(below, 2)
    for number, row in enumerate(chosen):
        image_axes(cells[number], row.unit_of_fc3, f"{row.path}\nmiddle unit of FC3", cmap="magma")
        image_axes(cells[LAYERS + number], row.unit_of_fused, "convolutions merged", cmap="magma")
    return figure


def grid(figure: Any, rows: int) -> list[Any]:
    """Return the axes of a grid of images, each without a frame until it is used."""
    cells = figure.subplots(rows, LAYERS, squeeze=False).reshape(-1)
    for axes in cells:
        axes.set_axis_off()
    return list(cells)


FIGURES = {"dcd": draw_dcd, "refconv": draw_refconv, "repmlp": draw_repmlp, "slak": draw_slak, "spconv": draw_spconv}


if __name__ == "__main__":
    sys.exit(main())
