"""Release a trained network of PaddleSeg: fused, exported, proven, and as its own deploy script reads it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import paddle
import yaml

from ..deploy.command import add_release
from ..deploy.export import ExportOptions
from ..deploy.outputs import OutputSpec
from ..deploy.programs import FILE_NAME, WEIGHTS_SUFFIX
from ..deploy.release import ReleaseReport, release
from ..errors import MissingFile, ReparamError, UsageError
from ..files import digest
from ..weights import checkpoints
from . import setup
from .command import add_config, building

#: What PaddleSeg calls what comes after the scores of the classes -> what it is called here.
_OUTPUTS = {"argmax": "argmax", "softmax": "softmax", "none": "identity"}
#: How PaddleSeg's Resize is called -> how ours is.
_RESIZED = {"LINEAR": "bilinear", "NEAREST": "nearest", "CUBIC": "bicubic", "AREA": "area", "LANCZOS4": "lanczos"}


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the options of a release."""
    add_config(parser)
    # PaddleSeg's deploy script reads no other; its documents are all about this one.
    add_release(parser, file_format="pdmodel")
    parser.add_argument(
        "--output_op", choices=_OUTPUTS, default="argmax",
        help="what is put out: the number of the class of each pixel (argmax), probabilities, or scores (none)",
    )  # fmt: skip
    parser.add_argument(
        "--image_size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="of the images that the network is given; else that of the first validation image",
    )  # fmt: skip
    parser.add_argument("--labels", metavar="FILE", help="the names of the classes, one a line")


def export(given: argparse.Namespace) -> str:
    """Release the network of a config; return what is to be printed."""
    if given.image_size is not None and min(given.image_size) < 1:
        raise UsageError(f"--image_size is {' '.join(map(str, given.image_size))}; both are 1 or more")
    setup()
    # Fused, exported and compared where the Predictor runs; a GPU's shorter floats would blur the comparison.
    paddle.set_device("cpu")
    report = _released(given)
    layers = f"{report.fusing.table()}\n\n" if given.verbose else ""
    if given.dry_run:
        return f"{layers}{report}\nnothing is written; without --dry-run it is"
    return (
        f"{layers}{report}\nnext\n"
        f"  python tools/predict.py {given.output} IMAGES --masks FOLDER  # masks of images\n"
        f"  python tools/reparam.py --check {given.output}  # later, or where it is used: is it whole, and right?"
    )


def _released(given: argparse.Namespace) -> ReleaseReport:
    weights = checkpoints.weight_file(given.weights)
    with building(given.config, given.override, without_weights=True) as builder:
        config = builder.config
        model = builder.model
        labels = _labels(given.labels, config.dic["model"].get("num_classes"))
        transforms = config.val_dataset_cfg.get("transforms")
        shape = _input_shape(given, builder)
        stock, why_no_stock = None, "its config has no section Reparam, so the network is a stock one"
        if config.dic.pop("Reparam", None) is not None:
            with paddle.utils.unique_name.guard():
                stock = type(builder)(config).model
            stock.eval()
    steps = steps_of(transforms)
    deploy = {
        "model": f"{FILE_NAME}.{given.format}",
        "params": f"{FILE_NAME}{WEIGHTS_SUFFIX}",
        "transforms": transforms,
        "input_shape": [-1, 3, -1, -1] if given.size == "dynamic" else [-1, *shape],
        "output_op": given.output_op,
        "output_dtype": "int32" if given.output_op == "argmax" else "float32",
    }
    of_config = {"name": given.config, **digest(Path(given.config)), "overrides": given.override}
    return release(
        model,
        weights,
        given.output,
        [[None, *shape]],
        output=OutputSpec(_OUTPUTS[given.output_op]),
        stock=stock,
        why_no_stock=why_no_stock,
        options=ExportOptions(given.format, None, given.size == "dynamic", given.onnx),
        texts={} if transforms is None else {"deploy.yaml": yaml.safe_dump({"Deploy": deploy})},
        facts={
            "source": {"config": of_config},
            "input": {"preprocessing": steps},
            "labels": labels,
            "task": "segmentation",
            "versions": {"paddleseg": _version()},
        },
        force=given.force,
        dry_run=given.dry_run,
    )


def _version() -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("paddleseg")
    return None


def _input_shape(given: argparse.Namespace, builder: Any) -> list[int]:
    """Return [channels, height, width] of the images that a network is exported for."""
    if given.image_size is not None:
        return [3, *given.image_size]
    if not builder.config.val_dataset_cfg:
        raise UsageError(f"{given.config} has no val_dataset that says how large images are; give --image_size")
    return list(builder.val_dataset[0]["img"].shape)


def _labels(file: str | None, classes: int | None) -> list[str] | None:
    if file is None:
        return None
    if not Path(file).is_file():
        raise MissingFile(f"--labels: there is no file {file}")
    try:
        names = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ReparamError(f"{file}: it is no text ({error})") from error
    names = [name.strip() for name in names if name.strip()]
    if classes is not None and len(names) != classes:
        raise UsageError(f"--labels: {file} names {len(names)} classes, and the network has {classes}")
    return names


def steps_of(transforms: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return the steps by which `deploy.predict` does what transforms of PaddleSeg do with an image; None where it
    cannot.

    PaddleSeg resizes floats, and so do they: what is normalised first, and resized then, is the same.
    """
    resized, normalized = [], None
    for transform in transforms or [{}]:
        options = dict(transform)
        kind = options.pop("type", None)
        interpolation = _RESIZED.get(options.get("interp", "LINEAR"))
        if kind == "Normalize" and normalized is None:
            normalized = options
        elif kind == "Resize" and not (options.get("keep_ratio") or options.get("size_divisor")) and interpolation:
            size = list(options.get("target_size", (512, 512)))
            resized.append({"ResizeImage": {"size": size, "interpolation": interpolation}})
        else:
            return None
    if normalized is None:
        return None
    mean, std = ([*normalized.get(key, [0.5])] for key in ("mean", "std"))
    affine = {"mean": mean * (3 // len(mean)), "std": std * (3 // len(std)), "scale": 1 / 255, "order": "hwc"}
    return [{"NormalizeImage": affine}, *resized, {"ToCHWImage": {}}]
