"""How a PaddleClas config makes a network's input of an image, as a plain value that a release can carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..export import Normalization
from .errors import ConfigError


def read_steps(config: Mapping[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """Return the transforms of a config's `Infer`, or else of its `DataLoader.Eval`, as `[{name: options}, ...]`.

    They end with the channels first, as the loader makes them. An empty list: the config has neither.
    """
    steps = (config.get("Infer") or {}).get("transforms")
    if not steps:
        dataset = ((config.get("DataLoader") or {}).get("Eval") or {}).get("dataset") or {}
        steps = dataset.get("transform_ops") or []
    steps = [{name: dict(options or {}) for name, options in step.items()} for step in steps]
    for step in steps:
        if "NormalizeImage" in step:
            step["NormalizeImage"] = _plain_numbers(step["NormalizeImage"])
    if steps and not any(
        "ToCHWImage" in step or step.get("NormalizeImage", {}).get("order") == "chw" for step in steps
    ):
        steps.append({"ToCHWImage": {}})
    return steps


def _plain_numbers(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of NormalizeImage with its scale, written as a number or like 1.0/255.0, as a number."""
    scale = options.get("scale")
    try:
        above, _, below = str(1.0 / 255.0 if scale is None else scale).partition("/")
        number = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"NormalizeImage.scale is {scale!r}; write a number, or 1.0/255.0") from None
    return {
        **options,
        "scale": number,
        "mean": list(options.get("mean") or [0.485, 0.456, 0.406]),
        "std": list(options.get("std") or [0.229, 0.224, 0.225]),
    }


def read_normalization(config: Mapping[str, Any], dtype: str) -> Normalization:
    """Return a config's own NormalizeImage for pixels of a dtype; raises `ConfigError` where it has not one."""
    found = [step["NormalizeImage"] for step in read_steps(config) if "NormalizeImage" in step]
    if len(found) != 1:
        raise ConfigError(
            f"--normalize needs one NormalizeImage in Infer.transforms or DataLoader.Eval; there are {len(found)}"
        )
    channels = config["Global"]["image_shape"][0]
    if len(found[0]["mean"]) != channels or found[0].get("channel_num", 3) != 3:
        raise ConfigError(
            f"--normalize is for images of {len(found[0]['mean'])} channels, the network takes {channels}"
        )
    return Normalization(tuple(found[0]["mean"]), tuple(found[0]["std"]), found[0]["scale"], dtype)
