"""Draw curves of VisualDL logs beside each other: one panel for each kind of curve, one colour for each run."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from visualdl import LogReader

from paddle_reparam.errors import ReparamError, exit_code, one_sentence
from paddle_reparam.files import atomic_write
from paddle_reparam.style import BLUE, GREY, ORANGE, plain_axes

COLUMNS, COLORS = 3, 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, help="the PNG file to write")
    parser.add_argument(
        "--panel", required=True, nargs="+", action="append", metavar=("CURVE", "RUN=FOLDER"),
        help="a curve's name without its layer, such as refconv_relative_change, and the output folders of runs",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    for curve, *runs in given.panel:
        if not runs or not all("=" in run for run in runs):
            parser.error(f"--panel {curve}: name the runs to draw as RUN=FOLDER")
    with exit_code() as result, one_sentence("the curves cannot be drawn"):
        figure = draw([(curve, [run.split("=", 1) for run in runs]) for curve, *runs in given.panel])
        atomic_write(given.output, lambda path: save(figure, path))
        print(f"written: {given.output}")
    return result[0]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG of few colours, which are all that lines need."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90, format="png")
    Image.open(drawn).convert("RGB").quantize(COLORS).save(path, format="png", optimize=True)


def draw(panels: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> Figure:
    """Return the figure: a line for each layer, a colour for each run."""
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(11, 2.8 * rows), facecolor="white", layout="constrained")
    cells = figure.subplots(rows, COLUMNS, squeeze=False).reshape(-1)
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    for axes, (curve, runs) in zip(cells, panels):
        for (name, folder), color in zip(runs, (BLUE, ORANGE, GREY)):
            for number, (steps, values) in enumerate(curves_of(Path(folder), curve)):
                axes.plot(steps, values, color=color, lw=0.9, label=None if number else name)
        plain_axes(axes, curve.replace("_", " "), x="step")
        axes.legend(frameon=False, fontsize=8)
    return figure


def curves_of(folder: Path, curve: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (steps, values) of a curve, one for each layer, over all logs of a folder: a resumed run has several.

    Raises `ReparamError` where there is none.
    """
    points: dict[str, dict[int, float]] = {}
    for file in sorted(folder.rglob("*vdlrecords*.log")):
        reader = LogReader(file_path=str(file))
        for tag in reader.get_tags().get("scalar", []):
            if tag.split("/")[0] == curve:
                points.setdefault(tag, {}).update({each.id: each.value for each in reader.get_data("scalar", tag)})
    if not points:
        raise ReparamError(f"no log in {folder} has a curve {curve}; is it the output of a run with Monitor?")
    return [tuple(map(np.array, zip(*sorted(of_tag.items())))) for of_tag in points.values()]


if __name__ == "__main__":
    sys.exit(main())
