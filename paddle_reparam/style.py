"""How the pictures of this project look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

BLUE, ORANGE, GREEN, GREY, LIGHT = "#33658a", "#d1603d", "#4f8a5b", "#777777", "#e8e8e8"


def plain_axes(axes: Any, title: str, x: str = "", y: str = "") -> None:
    """Give a diagram its title and axis labels, a grid, and no frame above and on the right."""
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=LIGHT, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def image_axes(axes: Any, image: np.ndarray, title: str, **options: Any) -> Any:
    """Show a matrix as an image without ticks; return what a colour bar needs."""
    axes.set_axis_on()
    shown = axes.imshow(image, interpolation="nearest", **options)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color("#cccccc")
    return shown


def spread_over(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many of the items, evenly from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]
