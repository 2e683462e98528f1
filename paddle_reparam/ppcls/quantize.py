"""Quantise the released network of a PaddleClas config, and measure on its images what that costs."""

from __future__ import annotations

import argparse
import json
import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..deploy.outputs import Normalization
from ..deploy.quantization import KernelRange, QuantizationReport, export_int8
from ..deploy.released import MANIFEST, check_files, read_manifest, sealed
from ..deploy.runtimes.onnx_runtime import ONNX_FILE, OnnxModel
from ..errors import exit_code
from . import setup
from .command import add_override, image_of, next_steps, read_config
from .errors import ConfigError
from .transforms import read_labels, release_steps

#: Kernels that are printed.
_WORST = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `tools/quantize.py`; return its exit code: 2 for wrong usage, 1 where too much is lost."""
    parser = argparse.ArgumentParser(
        description="Write the ONNX file of a release in int8, calibrated on training images of the config, unless it "
        "is right about too few of the validation images."
    )
    parser.add_argument("-c", "--config", required=True, help="the YAML file of the training")
    parser.add_argument("--release", required=True, help="the folder that tools/reparam.py --onnx made")
    parser.add_argument("--output", required=True, help="the ONNX file to make")
    parser.add_argument("--images", type=int, default=256, help="training images to calibrate on (256)")
    parser.add_argument(
        "--largest-drop", type=float, default=1.0, metavar="POINTS",
        help="what may be lost of the validation images' accuracy, in percentage points (1.0)",
    )  # fmt: skip
    add_override(parser)
    given = parser.parse_args(arguments)
    if given.images < 1:
        parser.error(f"--images takes a number above zero, not {given.images}")
    if not 0 <= given.largest_drop < math.inf:
        parser.error(f"--largest-drop takes percentage points, 0 or more, not {given.largest_drop:g}")
    with exit_code() as result:
        _quantize(given)
    return result[0]


def _quantize(given: argparse.Namespace) -> None:
    setup().utils.logger.init_logger(log_level="WARNING")
    from .images import as_taken, read_training_images, require_classes_of, validation_batches

    source = Path(given.release) / ONNX_FILE
    if not source.is_file():
        raise ConfigError(f"{source} is missing; make the release with tools/reparam.py --onnx")
    if os.path.lexists(given.output):
        raise ConfigError(f"{given.output} exists already and is kept; name another file")
    config = read_config(given.config, given.override)
    manifest = read_manifest(given.release)
    check_files(given.release, manifest)
    if "features" in manifest["output"]["keys"]:
        raise ConfigError(
            f"{given.release}: its network puts out features, and what int8 costs is measured on classes; quantise it "
            "with paddle_reparam.deploy.quantization.quantize_onnx and measure what you retrieve with it"
        )
    kernels = manifest["quantization"]["kernels"]
    print(QuantizationReport([KernelRange(**kernel) for kernel in kernels]).worst(_WORST))
    normalization = Normalization.from_dict(manifest["input"]["normalization"])

    def measured() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for images in validation_batches(config):
            require_classes_of(images, manifest["output"]["activation"])
            yield as_taken(images.pixels, normalization), images.labels

    pixels = read_training_images(config, given.images).pixels
    _refuse_another_network(config, manifest, given.release)
    calibration = as_taken(pixels, normalization)
    # With the manifest in it the file can be used alone, as by tools/predict.py.
    facts = {MANIFEST: sealed(manifest)}
    print(f"\n{export_int8(source, given.output, calibration, measured(), given.largest_drop, facts)}")
    print(f"written: {given.output}")
    print(next_steps(("predict", [given.output, image_of(config)], "labels of images, by the int8 file")))


def _refuse_another_network(config: dict[str, Any], manifest: dict[str, Any], release: str) -> None:
    """Raise `ConfigError` where a config reads other images, or has other classes, than a release was made with."""
    normalization = Normalization.from_dict(manifest["input"]["normalization"])
    shapes = OnnxModel(Path(release) / ONNX_FILE).output_shapes
    root = Path(setup().__file__).parents[1]
    # What the config says, what the release says; None: it does not say.
    facts = {
        "Global.image_shape": (config["Global"].get("image_shape"), manifest["input"]["shape"][0][1:]),
        "Arch.class_num": (config["Arch"].get("class_num"), shapes[0][1] if len(shapes[0]) > 1 else None),
        "preprocessing": (release_steps(config, normalization), manifest["input"].get("preprocessing")),
        "list of labels": (read_labels(config, root), manifest.get("labels")),
    }
    for name, (of_config, of_release) in facts.items():
        said = of_config is not None and isinstance(of_release, (int, list))
        if said and json.loads(json.dumps(of_config)) != of_release:
            raise ConfigError(
                f"the config is not the one that {release} was made with: its {name} is "
                f"{textwrap.shorten(str(of_config), 80)}, the release's {textwrap.shorten(str(of_release), 80)}"
            )
