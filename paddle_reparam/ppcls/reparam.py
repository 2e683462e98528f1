"""Release the network of a PaddleClas config: build it, fuse it, export it, with every step checked."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from tqdm import tqdm

from ..deploy.command import add_release
from ..deploy.export import ExportOptions
from ..deploy.outputs import Normalization, OutputSpec
from ..deploy.release import ReleaseReport, release
from ..deploy.released import MANIFEST, check_release, read_manifest
from ..deploy.runtimes.base import PRECISIONS
from ..deploy.tuning import Tuning
from ..errors import ReparamError, exit_code, one_sentence
from ..files import digest
from ..measure.timing import machine_facts
from . import setup
from .command import add_override, image_of, next_steps, options, read_config
from .errors import ConfigError
from .serving import files_for_others
from .transforms import read_labels, read_normalization, release_steps


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `tools/reparam.py`; return its exit code: 2 for wrong usage, 1 where a check fails."""
    parser = argparse.ArgumentParser(
        description="Fuse the trained network of a PaddleClas config, export it for Paddle Inference, and check each "
        "step: an output folder appears only when everything in it is the same function as the trained network."
    )
    parser.add_argument("-c", "--config", help="the YAML file of the training")
    add_override(parser)
    add_release(parser, required=False)
    parser.add_argument(
        "--normalize", nargs="?", const="uint8", choices=("uint8", "float32"),
        help="put the config's NormalizeImage into the export, which then takes RGB pixels 0..255 of this type",
    )  # fmt: skip
    parser.add_argument(
        "--normalize-features", action="store_true", help="of a recognition network: ship features of length 1"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="ship this one too, proven on the config's images (float32 always is)",
    )
    parser.add_argument(
        "--tune", action="store_true",
        help="try each form, runtime and precision that this machine can run, and ship the fastest that holds",
    )  # fmt: skip
    trying = parser.add_argument_group("with --tune or --precision")
    trying.add_argument(
        "--largest-drop", type=float, metavar="POINTS",
        help=f"what may be lost of the validation images' accuracy, in percentage points ({Tuning.largest_drop:g})",
    )  # fmt: skip
    trying.add_argument("--batch", type=int, nargs="+", help="how many images it will be given at once (1)")
    trying.add_argument("--threads", type=int, help="that it will be given (the cores of this machine)")
    trying.add_argument(
        "--tune-seconds", type=float, metavar="SECONDS",
        help=f"nothing more is begun after so many seconds, but one way is always tried ({Tuning.seconds:g})",
    )  # fmt: skip
    parser.add_argument("--check", metavar="FOLDER", help="check a folder that was made before; takes no other option")
    given = parser.parse_args(arguments)
    making = [name for name in ("config", "weights", "output") if getattr(given, name) is not None]
    if given.check is None and len(making) < 3:
        parser.error("give -c, --weights and --output, or --check FOLDER")
    if given.check is not None and vars(given) != {**vars(parser.parse_args([])), "check": given.check}:
        parser.error("--check takes no other option")
    _check_tuning(given, parser)
    with exit_code() as result:
        print(_release(given) if given.check is None else _check(given.check))
    return result[0]


def _check_tuning(given: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End with what is wrong with the options of a tuning."""
    values = {
        "--largest-drop": given.largest_drop, "--batch": given.batch, "--threads": given.threads,
        "--tune-seconds": given.tune_seconds,
    }  # fmt: skip
    tries = given.tune or given.precision not in (None, "float32")
    for option, value in values.items():
        if value is None:
            continue
        smallest = 0 if option == "--largest-drop" else 1
        if not tries:
            parser.error(f"{option} says how something is tried; give --tune, or a --precision below float32")
        if not all(smallest <= each < math.inf for each in np.atleast_1d(value)):
            parser.error(f"{option} takes {smallest} or more, not {' '.join(map(str, np.atleast_1d(value)))}")
    if given.dry_run and tries:
        parser.error("what is tried is what is written; leave out --dry-run")


def _tuning(
    given: argparse.Namespace, config: dict[str, Any], output: OutputSpec, normalization: Normalization | None
) -> Tuning | None:
    """Return what is to be tried, on images of the config; None for nothing but float32."""
    if not given.tune and given.precision in (None, "float32"):
        return None
    from .images import as_taken, read_training_images, read_validation_images, require_classes_of
    from .validation import check_loader

    for part in ("Eval", *(["Train"] if given.precision in (None, "int8") else [])):
        check_loader(config, part)

    def validation(most: int) -> tuple[np.ndarray, np.ndarray | None]:
        images = read_validation_images(config, most)
        if "features" in output.keys:
            return as_taken(images.pixels, normalization), None
        require_classes_of(images, output.activation)
        return as_taken(images.pixels, normalization), images.labels

    def training(most: int) -> np.ndarray:
        return as_taken(read_training_images(config, most).pixels, normalization)

    asked = {"largest_drop": given.largest_drop, "batches": given.batch, "seconds": given.tune_seconds,
             "threads": given.threads or machine_facts()["cores"]}  # fmt: skip
    return Tuning(
        validation,
        training,
        PRECISIONS if given.precision is None else (given.precision,),
        given.tune,
        watch=functools.partial(tqdm, unit=" ways", leave=False, disable=None),
        **{name: tuple(value) if name == "batches" else value for name, value in asked.items() if value is not None},
    )


def _release(given: argparse.Namespace) -> str:
    setup().utils.logger.init_logger(log_level="WARNING")
    config = read_config(given.config, given.override)
    report = _released(given, config)
    each_layer = f"{report.fusing.table()}\n\n" if given.verbose else ""
    return f"{each_layer}{report}\n{_next_steps(given, report.manifest, config)}"


def _next_steps(given: argparse.Namespace, manifest: dict[str, Any], read: dict[str, Any]) -> str:
    if given.dry_run:
        return "nothing is written; without --dry-run it is"
    config = options(given.config, given.override)
    steps = []
    if "features" not in manifest["output"]["keys"]:
        steps.append(("predict", [given.output, image_of(read)], "labels of images"))
        if given.onnx:
            int8 = f"{given.output.rstrip('/')}_int8.onnx"
            steps.append(("quantize", [*config, "--release", given.output, "--output", int8], "the ONNX file in int8"))
    steps.append(("reparam", ["--check", given.output], "later, or where it is used: is it whole, and right?"))
    return f"each layer: {Path(given.output) / MANIFEST}, in fusing\n{next_steps(*steps)}"


def _released(given: argparse.Namespace, config: dict[str, Any]) -> ReleaseReport:
    ppcls = setup()
    from .loading import load_weights, weight_file

    # Fused, exported and compared where the Predictor runs; a GPU's shorter floats would blur the comparison.
    paddle.set_device("cpu")
    weights = weight_file(given.weights)
    model = build_train_form(config)
    of_stock, why_no_stock = stock_config(config)
    # Some backbones give their parameters fixed names, which can be given once; in here the names start anew.
    with paddle.utils.unique_name.guard():
        stock = None if of_stock is None else _build(of_stock)
    normalization = None if given.normalize is None else read_normalization(config, given.normalize)
    output = read_output(config)
    if given.normalize_features:
        output = _of_unit_length(output, config)
    shape = image_shape(config)
    steps, labels = release_steps(config, normalization), read_labels(shipped(config), Path(ppcls.__file__).parents[1])
    return release(
        model,
        weights,
        given.output,
        [[None, *shape]],
        output=output,
        load=functools.partial(load_weights, config=config, mode="export"),
        stock=stock,
        why_no_stock=why_no_stock,
        options=ExportOptions(given.format, normalization, given.size == "dynamic", given.onnx),
        texts=files_for_others(steps, labels, output, shape[1:] if given.size == "fixed" else None),
        facts={
            "source": {
                "config": {
                    "name": given.config,
                    "sha256": digest(Path(given.config))["sha256"],
                    "overrides": given.override,
                }
            },
            "input": {"preprocessing": steps},
            "labels": labels,
            "versions": {"paddleclas": _version_of(ppcls)},
            "plain_weights": {"arch": _for_manifest(of_stock)},
        },
        force=given.force,
        dry_run=given.dry_run,
        tuning=_tuning(given, config, output, normalization),
        progress=tqdm.write,
    )


def _check(folder: str) -> Any:
    paddle.set_device("cpu")
    arch = read_manifest(folder)["plain_weights"].get("arch")
    if arch is None:
        return check_release(folder)
    setup().utils.logger.init_logger(log_level="WARNING")
    from .stock_arch import check_stock_arch

    try:
        check_stock_arch(arch)
    except ReparamError as error:
        raise error.at(f"{folder}: its manifest names a network that is not built from a manifest") from error
    with paddle.utils.unique_name.guard():
        return check_release(folder, _build({"Arch": arch}))


def _for_manifest(of_stock: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the `Arch` that `--check` builds to load the plain weights; None where it builds none."""
    from .stock_arch import check_stock_arch

    if of_stock is None:
        return None
    with contextlib.suppress(ReparamError):
        check_stock_arch(of_stock["Arch"])
        return of_stock["Arch"]
    return None


def build_train_form(config: dict[str, Any]) -> nn.Layer:
    """Return the network of a config that ships, as it is trained, without the weights that `pretrained` names."""
    from .validation import check_config, without_weights

    config = copy.deepcopy(shipped(config))
    without_weights(config["Arch"])
    check_config(config, "export")
    return _build(config)


def shipped(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config of the network that is exported: of a distillation, the one that `infer_model_name` names."""
    arch = config["Arch"]
    if arch.get("name") != "DistillationModel":
        return config
    known = {name: network for entry in arch.get("models") or [] for name, network in entry.items()}
    if arch.get("infer_model_name") not in known:
        raise ConfigError(
            f"Arch.infer_model_name is {arch.get('infer_model_name')!r}; name the network of the distillation that "
            f"is exported: {', '.join(known)}"
        )
    return {**config, "Arch": known[arch["infer_model_name"]]}


def stock_config(config: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Return the config of the stock network, a backbone where `ReparamModel` stood; or None and why there is none."""
    from .validation import networks, without_weights

    config = copy.deepcopy(shipped(config))
    without_weights(config["Arch"])
    wrapped = [network for network in networks(config["Arch"]) if network["name"] == "ReparamModel"]
    if not wrapped:
        name = config["Arch"].get("name")
        return None, f"{name} is no ReparamModel around a backbone, so there is no stock network to load its weights"
    for network in wrapped:
        backbone = {**network["backbone"], "pretrained": False}
        if network.get("class_num") is not None:
            backbone.setdefault("class_num", network["class_num"])
        network.clear()
        network.update(backbone)
    return config, ""


def _build(config: dict[str, Any]) -> nn.Layer:
    from ppcls.arch import build_model
    from ppcls.utils import logger

    # Batch statistics are shared between processes in training only.
    config["Arch"]["use_sync_bn"] = False
    level = logger._logger.level
    # What is replaced is told where it is trained.
    logger._logger.setLevel(logging.WARNING)
    try:
        with one_sentence(f"Arch {config['Arch'].get('name')} cannot be built"):
            model = build_model(config, mode="export")
    finally:
        logger._logger.setLevel(level)
    model.eval()
    return model


def read_output(config: dict[str, Any]) -> OutputSpec:
    """Return what PaddleClas' own export of a config puts out: with softmax unless the config says otherwise.

    Of several labels it is a sigmoid, as in PaddleClas 2.5 and later; 2.4 puts a softmax there for some metrics.
    """
    arch = config["Arch"]
    key = arch.get("infer_output_key")
    metrics = (config.get("Metric") or {}).get("Eval") or [{}]
    if config["Global"].get("use_multilabel") or "ATTRMetric" in metrics[0]:
        activation = "sigmoid"
    else:
        activation = "softmax" if arch.get("infer_add_softmax", True) else None
    return OutputSpec(activation, () if key is None else (key,))


def _of_unit_length(output: OutputSpec, config: dict[str, Any]) -> OutputSpec:
    """Return an output of features as one whose features have length 1; raises `ConfigError` where it is none."""
    if output.activation is not None or "features" not in output.keys:
        raise ConfigError(
            "--normalize-features is for features: set Arch.infer_output_key to features and Arch.infer_add_softmax to "
            "False"
        )
    if not config["Global"].get("feature_normalize", True):
        raise ConfigError(
            "Global.feature_normalize is False, so the features were measured as they are; leave out "
            "--normalize-features, or that"
        )
    return OutputSpec("l2", output.keys)


def image_shape(config: dict[str, Any]) -> list[int]:
    shape = config["Global"].get("image_shape")
    if not isinstance(shape, (list, tuple)) or not all(isinstance(size, int) for size in shape) or len(shape) != 3:
        raise ConfigError(
            f"Global.image_shape is {shape!r}; give [channels, height, width], as in -o Global.image_shape=[3,224,224]"
        )
    return list(shape)


def _version_of(ppcls: Any) -> dict[str, Any]:
    """Tell which PaddleClas this is: the version of an installed one, and the content of its Engine."""
    engine = Path(ppcls.__file__).parent / "engine" / "engine.py"
    installed = {"site-packages", "dist-packages"} & set(engine.parts)
    return {
        "installed_version": importlib.metadata.version("paddleclas") if installed else None,
        "engine_sha256": digest(engine)["sha256"],
    }
