"""What the library did, as values that print as a table and dump as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np

from .errors import printable


def format_table(header: list[str], rows: list[list[Any]]) -> str:
    """Return rows as aligned plain text; numbers are aligned to the right. Cells hold texts from files, so that what a
    terminal would obey is written out.
    """
    cells = [[printable(str(c)) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]

    def line(row: list[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)).rstrip()

    return "\n".join([line(cells[0]), line(["-" * w for w in widths]), *map(line, cells[1:])])


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
