"""How the pictures of this project look."""

from __future__ import annotations

from typing import Any

BLUE, ORANGE, GREEN, GREY, LIGHT = "#33658a", "#d1603d", "#4f8a5b", "#777777", "#e8e8e8"


def plain_axes(axes: Any, title: str, x: str = "", y: str = "") -> None:
    """Give a diagram its title and axis labels, a grid, and no frame above and on the right."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=LIGHT, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
