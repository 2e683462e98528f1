"""The papers' figures as numbers: from a trained network to one row for each layer, with arrays to draw."""

from __future__ import annotations

import math
from typing import Any, Callable

import numpy as np
from paddle import nn

from ..errors import ReparamError
from . import dcd, refconv, repmlp, slak, spconv
from .observe import layers_of as layers_of
from .observe import numbers_of as numbers_of
from .observe import table_of as table_of

#: Paper -> its layers, and what analyses a model over images.
PAPERS: dict[str, tuple[tuple[type, ...], Callable[[nn.Layer, np.ndarray], list[Any]]]] = {
    "dcd": (dcd.KINDS, dcd.analyze),
    "refconv": (refconv.KINDS, lambda model, images: refconv.analyze(model)),
    "repmlp": (repmlp.KINDS, lambda model, images: repmlp.analyze(model)),
    "slak": (slak.KINDS, lambda model, images: slak.analyze(model)),
    "spconv": (spconv.KINDS, spconv.analyze),
}


def analyze(model: nn.Layer, images: np.ndarray) -> dict[str, list[Any]]:
    """Return paper -> its rows for the papers whose layers a model in eval mode has, over images `[N, C, H, W]`.

    Raises `ReparamError` for a model that has no such layer, is in training mode, or gives numbers that are not finite.
    """
    kinds = tuple(kind for of_paper, _ in PAPERS.values() for kind in of_paper)
    found = {type(layer) for layer in layers_of(model, *kinds).values()}
    rows = {
        paper: function(model, images)
        for paper, (kinds, function) in PAPERS.items()
        if any(issubclass(kind, kinds) for kind in found)
    }
    for row in (row for of_paper in rows.values() for row in of_paper):
        for name, value in numbers_of(row).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ReparamError(f"{row.path}: its {name} is {value}; look for weights that are not finite")
    return rows
