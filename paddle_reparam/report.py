"""What the library did, as values that print as a table and dump as JSON."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from .errors import printable


def shown_width(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for one of Chinese, none for an accent alone."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )


def format_row(row: Sequence[Any], widths: Sequence[int], right: Sequence[bool] = ()) -> str:
    """Return cells as a line of columns of these widths, those of `right` aligned there.

    Cells hold texts from files, so that what a terminal would obey is written out.
    """
    cells = []
    for i, width in enumerate(widths):
        text = printable(str(row[i]))
        blanks = " " * (width - shown_width(text))
        cells.append(blanks + text if right and right[i] else text + blanks)
    return "  ".join(cells).rstrip()


def format_table(header: list[str], rows: list[list[Any]]) -> str:
    """Return rows as aligned plain text; numbers are aligned to the right. Cells are those of `format_row`."""
    columns = list(zip(header, *rows))
    widths = [max(shown_width(printable(str(cell))) for cell in column) for column in columns]
    right = [bool(rows) and all(isinstance(cell, (int, float)) for cell in column[1:]) for column in columns]
    return "\n".join(format_row(row, widths, right) for row in [header, ["-" * width for width in widths], *rows])


def format_markdown(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as a table in Markdown."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [header, ["---"] * len(header), *rows])


class Report:
    """Base of the report dataclasses: JSON from their fields, text from `__str__`."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as what JSON can hold; a number that is not finite, which it cannot, becomes its name."""
        return _plain(asdict(self))

    def to_json(self) -> str:
        """Return the report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
