"""What a sweep measured: networks as their work grows, by kernel size, by size of the images, or by batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What may grow -> what it is called on an axis.
GROWS = {"kernel_size": "kernel size", "size": "side of the images", "batch": "batch"}


def name_of(target: str, of: str, value: int | None) -> str:
    """Return what a sweep calls a target where `of` has a value; where the batch grows, it is the same network."""
    return target if of == "batch" else f"{target}, {of} {value}"


def points_of(sweep: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    """Return target -> median, low and high for each value of a sweep (an `InferenceReport` as a dict), in
    milliseconds an image."""
    settings = sweep["settings"]
    times = {(each["name"], each["batch"]): each for each in sweep["results"]}
    points = {}
    for target in settings["targets"]:
        points[target] = []
        for value in settings["values"]:
            batch = value if settings["of"] == "batch" else 1
            each = times[name_of(target, settings["of"], value), batch]
            points[target].append({key: each[key] / batch for key in ("median", "low", "high")})
    return points
