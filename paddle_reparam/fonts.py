"""Fonts that have the characters of a text, such as a label in Chinese."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from .errors import printable
from .report import shown_width

#: What matplotlib brings along; it has no Chinese.
_USUAL = "DejaVu Sans"
#: What the usual systems have for Chinese, in plain strokes as the usual one; any other font that can is the next best.
_CHINESE = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Noto Sans CJK JP", "Microsoft YaHei", "PingFang SC",
    "Hiragino Sans GB", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Droid Sans Fallback",
)  # fmt: skip


def shortened(text: str, missing: str, columns: int) -> str:
    """Return a text with these characters written out, and without its middle where it has more columns.

    A Chinese character takes two.
    """
    pieces = [c.encode("unicode_escape").decode() if c in missing else c for c in text]
    if shown_width("".join(pieces)) <= columns:
        return "".join(pieces)
    half = (columns - 1) // 2
    return f"{''.join(_fitting(pieces, half))}…{''.join(_fitting(pieces[::-1], half)[::-1])}"


def _fitting(pieces: list[str], columns: int) -> list[str]:
    """Return the first pieces that so many columns have room for."""
    return [piece for i, piece in enumerate(pieces) if shown_width("".join(pieces[: i + 1])) <= columns]


def drawable(names: Sequence[str], columns: int) -> tuple[list[str], dict[str, Any]]:
    """Return names of networks as matplotlib can draw them, in so many columns, and how it is to draw them.

    They may come from folders, which have names in any script.
    """
    names = [printable(name) for name in names]
    fonts, missing = fonts_for("".join(names))
    return [shortened(name, missing, columns) for name in names], {"fontfamily": fonts, "parse_math": False}


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


def pillow_font(text: str) -> tuple[Any, str]:
    """Return the font of Pillow that has most of the characters of a text, and the characters that it lacks."""
    from PIL import ImageFont

    if text.isascii():
        return ImageFont.load_default(), ""
    from matplotlib import font_manager

    files = [font_manager.findfont(family) for family in fonts_for(text)[0]]
    lacking = {file: set(text) - _characters(file) for file in files}
    best = min(files, key=lambda file: len(lacking[file]))
    return ImageFont.truetype(best, 11), "".join(sorted(lacking[best]))


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


@functools.cache
def _characters(file: str) -> frozenset[str]:
    """Return the characters that a font's file can draw at every size: none where it cannot be read."""
    from matplotlib.ft2font import FT2Font

    with contextlib.suppress(Exception):  # whatever stands in a folder of fonts
        font = FT2Font(file)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    return frozenset()
