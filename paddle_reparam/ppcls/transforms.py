"""How a PaddleClas config makes a network's input of an image, as a plain value that a release can carry."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..deploy.outputs import Normalization
from ..deploy.predict import STEPS, to_gray
from ..images import why_misread
from .errors import ConfigError


class ToGray:
    """A transform of configs for networks of one channel, behind NormalizeImage: `[H, W, 3]` to `[H, W, 1]`."""

    def __call__(self, image: Any) -> np.ndarray:
        return to_gray(np.asarray(image))


def register() -> None:
    """Put the transforms of this library where PaddleClas looks the names of a config up, and mind what it decodes."""
    from ppcls.data import preprocess

    preprocess.ToGray = ToGray
    preprocess.DecodeImage.__call__ = _refusing_misread(preprocess.DecodeImage.__call__)


def _refusing_misread(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Return DecodeImage's call, an error for what it decodes to another picture, as where an image is predicted."""

    @functools.wraps(decode)
    def checked(self: Any, image: Any) -> Any:
        reason = why_misread(image) if isinstance(image, bytes) else None
        if reason:
            raise ValueError(reason)
        return decode(self, image)

    return checked


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
        if "ResizeImage" in step:
            step["ResizeImage"] = _plain_words(step["ResizeImage"])
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


def _plain_words(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of ResizeImage with what PIL does where nothing is said, which is another thing in 2.4."""
    options = {key: value.lower() if isinstance(value, str) else value for key, value in options.items()}
    if options.get("backend") == "pil" and options.get("interpolation") is None:
        from ppcls.data.preprocess.ops.operators import UnifiedResize

        default = UnifiedResize(backend="pil").resize_func.keywords["resample"]
        options["interpolation"] = "bicubic" if default is None else "bilinear"
    return options


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


#: Of the number of a class; one list holds the labels of all up to the last.
_DIGITS = 6


def read_labels(config: Mapping[str, Any], root: Path) -> list[str | None] | None:
    """Return the label of each class from the file that a config's `Infer.PostProcess` names, None without one.

    The file has lines like "3 cat"; it is looked for from here, and from the folder `root` of PaddleClas. A class that
    it leaves out has None.
    """
    name = ((config.get("Infer") or {}).get("PostProcess") or {}).get("class_id_map_file")
    path = next((path for path in (Path(name), root / name) if path.is_file()), None) if name else None
    if path is None:
        return None
    labels: dict[int, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        index, _, label = line.partition(" ")
        if not (index.isascii() and index.isdecimal() and len(index) <= _DIGITS):
            raise ConfigError(f"{path}, line {number}: {line[:40]!r} is no class number and label, as in '3 cat'")
        labels[int(index)] = label
    classes = max([config["Arch"].get("class_num") or 0, *(number + 1 for number in labels)])
    return [labels.get(i) for i in range(classes)]


def release_steps(config: Mapping[str, Any], normalization: Normalization | None) -> list[dict[str, Any]] | None:
    """Return what makes an export's input of an RGB image, or None where `predict` does not know such a step."""
    steps = [step for step in read_steps(config) if "DecodeImage" not in step]
    decoding = [step["DecodeImage"] for step in read_steps(config) if "DecodeImage" in step]
    as_here = all(
        options.get("to_rgb", True) and not options.get("channel_first") and options.get("backend", "cv2") == "cv2"
        for options in decoding
    )
    if not steps or not as_here or any(name not in STEPS for step in steps for name in step):
        return None
    if any(step.get("NormalizeImage", {}).get("channel_num", 3) != 3 for step in steps):
        return None
    for step in steps:
        for option in ("channel_num", "output_fp16"):  # the export casts its input itself
            step.get("NormalizeImage", {}).pop(option, None)
    if normalization is not None:
        # The export does it; what is left makes floats of pixels where it takes those.
        left = {"mean": [0.0] * 3, "std": [1.0] * 3, "scale": 1.0}
        floats = normalization.dtype == "float32"
        steps = [
            {"NormalizeImage": {**step["NormalizeImage"], **left}} if "NormalizeImage" in step else step
            for step in steps
            if floats or "NormalizeImage" not in step
        ]
        if not floats and not any("ToCHWImage" in step for step in steps):
            steps.append({"ToCHWImage": {}})
    return steps
