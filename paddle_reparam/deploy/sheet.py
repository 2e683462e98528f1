"""A contact sheet: small pictures of labelled images, each with its best label above and its file's name below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..errors import one_sentence, printable
from ..files import atomic_write
from ..fonts import fonts_for, shortened
from .predict import Prediction

#: Images on one sheet.
ON_A_SHEET = 48

#: Columns of a text under or above a picture, a Chinese character taking two.
_LONGEST = 26


def draw_sheet(path: Path, predictions: Sequence[Prediction]) -> str:
    """Write a contact sheet of images with their best labels; return the characters that no installed font has.

    Those are written as in \\u4e2d. Raises `ReparamError` where the file cannot be written.
    """
    from matplotlib.figure import Figure

    names = [printable(prediction.path.name) for prediction in predictions]
    best = [printable(prediction.labels[0][0]) if prediction.labels else "none" for prediction in predictions]
    fonts, missing = fonts_for("".join(names + best))
    names, best = ([shortened(text, missing, _LONGEST) for text in texts] for texts in (names, best))
    columns = min(8, math.ceil(math.sqrt(len(predictions))))
    rows = math.ceil(len(predictions) / columns)
    figure = Figure(figsize=(2.2 * columns, 2.8 * rows), facecolor="white", layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.axis("off")
    for axes, prediction, name, label in zip(grid, predictions, names, best):
        axes.imshow(prediction.thumbnail)
        above = f"{label}\n{prediction.labels[0][1]:.1%}" if prediction.labels else label
        axes.set_title(above, fontsize=9, fontfamily=fonts, parse_math=False)
        axes.text(
            0.5, -0.03, name, fontsize=8, fontfamily=fonts, parse_math=False, color="0.35",
            ha="center", va="top", transform=axes.transAxes,
        )  # fmt: skip
    with one_sentence(f"{path}: it cannot be drawn"):
        atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))
    return missing
