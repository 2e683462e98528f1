"""A contact sheet: small pictures of labelled images, each with its best label above and its file's name below."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import one_sentence, printable
from ..files import atomic_write
from ..report import shown_width
from .predict import Prediction

#: Images on one sheet.
ON_A_SHEET = 48

#: What matplotlib brings along; it has no Chinese.
_USUAL = "DejaVu Sans"
#: What the usual systems have for Chinese, in plain strokes as the usual one; any other font that can is the next best.
_CHINESE = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Noto Sans CJK JP", "Microsoft YaHei", "PingFang SC",
    "Hiragino Sans GB", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Droid Sans Fallback",
)  # fmt: skip
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
    names, best = ([_shortened(text, missing) for text in texts] for texts in (names, best))
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


def _shortened(text: str, missing: str) -> str:
    """Return a text with these characters written out, and without its middle where it is long."""
    pieces = [c.encode("unicode_escape").decode() if c in missing else c for c in text]
    if shown_width("".join(pieces)) <= _LONGEST:
        return "".join(pieces)
    half = (_LONGEST - 1) // 2
    return f"{''.join(_fitting(pieces, half))}…{''.join(_fitting(pieces[::-1], half)[::-1])}"


def _fitting(pieces: list[str], columns: int) -> list[str]:
    """Return the first pieces that so many columns have room for."""
    return [piece for i, piece in enumerate(pieces) if shown_width("".join(pieces[: i + 1])) <= columns]


def fonts_for(text: str) -> tuple[list[str], str]:
    """Return the families of fonts that have all characters of a text, for matplotlib, and those that no font has."""
    from matplotlib import font_manager

    families, missing = [_USUAL], set(text) - _characters(font_manager.findfont(_USUAL))
    for family, file in _installed() if missing else ():
        found = missing & _characters(file)
        if found:
            families.append(family)
            missing -= found
        if not missing:
            break
    return families, "".join(sorted(missing))


def _installed() -> Iterator[tuple[str, str]]:
    """Yield the family and the file of each font, the best first, and last those that matplotlib has not seen yet."""
    from matplotlib import font_manager

    def by_use(entry: font_manager.FontEntry) -> tuple[int, bool, bool]:
        place = _CHINESE.index(entry.name) if entry.name in _CHINESE else len(_CHINESE)
        return place, entry.style != "normal", entry.weight != 400

    fonts = font_manager.fontManager
    listed = list(fonts.ttflist)
    for entry in sorted(listed, key=by_use):
        if not entry.name.startswith("Last Resort"):  # it has a box for every character
            yield entry.name, entry.fname
    # The list is of the day when matplotlib first ran; a font that was installed since is not in it.
    for file in sorted(set(font_manager.findSystemFonts()) - {entry.fname for entry in listed}):
        known = len(fonts.ttflist)
        with contextlib.suppress(Exception):  # whatever stands in a folder of fonts
            fonts.addfont(file)
        for entry in fonts.ttflist[known:]:
            yield entry.name, entry.fname


def _characters(file: str) -> set[str]:
    """Return the characters that a font's file can draw at every size: none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    with contextlib.suppress(Exception):  # whatever stands in a folder of fonts
        font = FT2Font(file)
        return set(map(chr, font.get_charmap())) if font.scalable else set()
    return set()
