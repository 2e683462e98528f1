"""How the pictures of this project look, and what they say of themselves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREEN, GREY, LIGHT = "#33658a", "#d1603d", "#4f8a5b", "#777777", "#e8e8e8"
DPI = 110
#: The key of the digest in a PNG file's metadata.
DIGEST = "Drawn"


def plain_axes(axes: Any, title: str, x: str = "", y: str = "") -> None:
    """Give a diagram its title and axis labels, a grid, and no frame above and on the right."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=LIGHT, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def digest_of(drawn: Any) -> str:
    """Return a sha256 of what is drawn, as JSON holds it."""
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def save_with_digest(figure: Any, path: Path, digest: str) -> None:
    """Write a PNG file with the digest of what is drawn: its pixels differ between versions of matplotlib."""
    figure.savefig(path, dpi=DPI, format="png", metadata={"Software": None, DIGEST: digest})
