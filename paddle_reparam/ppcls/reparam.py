"""Release the network of a PaddleClas config: build it, fuse it, export it, with every step checked."""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import paddle
from paddle import nn

from ..errors import CheckpointError, ReparamError, UnknownName
from ..export import OutputSpec, one_sentence
from ..release import OutputExists, release
from . import setup
from .errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `tools/reparam.py`; return its exit code: 2 for wrong usage, 1 where a check fails."""
    parser = argparse.ArgumentParser(
        description="Fuse the trained network of a PaddleClas config, export it for Paddle Inference, and check each "
        "step: an output folder appears only when everything in it is the same function as the trained network."
    )
    parser.add_argument("-c", "--config", required=True, help="the YAML file of the training")
    parser.add_argument("--weights", required=True, help="the weight file that training saved, in train form")
    parser.add_argument("--output", required=True, help="the folder to make")
    parser.add_argument(
        "-o", "--override", action="append", default=[], metavar="KEY=VALUE",
        help="replace a value of the config, as in -o Global.image_shape=[3,224,224]; may be given several times",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an earlier release in the output folder")
    parser.add_argument("--dry-run", action="store_true", help="fuse and compare, and write nothing")
    given = parser.parse_args(arguments)
    try:
        print(_release(given))
    except ReparamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ConfigError, UnknownName, OutputExists)) else 1
    return 0


def _release(given: argparse.Namespace) -> Any:
    ppcls = setup()
    from .command import read_config
    from .loading import weight_file

    # Fused, exported and compared where the Predictor runs; a GPU's shorter floats would blur the comparison.
    paddle.set_device("cpu")
    ppcls.utils.logger.init_logger(log_level="WARNING")
    config = read_config(given.config, given.override)
    try:
        weights = weight_file(given.weights)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    model = build_train_form(config)
    stock, why_no_stock = build_stock(config)
    return release(
        model,
        weights,
        given.output,
        [[None, *image_shape(config)]],
        output=read_output(config),
        stock=stock,
        why_no_stock=why_no_stock,
        facts={
            "source": {
                "config": {
                    "name": given.config,
                    "sha256": hashlib.sha256(Path(given.config).read_bytes()).hexdigest(),
                    "overrides": given.override,
                }
            },
            "versions": {"paddleclas": _version_of(ppcls)},
        },
        force=given.force,
        dry_run=given.dry_run,
    )


def build_train_form(config: dict[str, Any]) -> nn.Layer:
    """Return the network of a config as it is trained, without the weights that `pretrained` names."""
    from .engine import check_config, networks

    config = copy.deepcopy(config)
    for network in networks(config["Arch"]):
        if "pretrained" in network:
            network["pretrained"] = None if network["name"] == "ReparamModel" else False
    check_config(config, "export")
    return _build(config)


def build_stock(config: dict[str, Any]) -> tuple[nn.Layer | None, str]:
    """Return the network of a config with the plain backbone in the place of `ReparamModel`, or None and why."""
    from .engine import networks

    config = copy.deepcopy(config)
    wrapped = [network for network in networks(config["Arch"]) if network["name"] == "ReparamModel"]
    if not wrapped:
        name = config["Arch"].get("name")
        return None, f"{name} is no ReparamModel around a backbone, so there is no plain network to load its weights"
    for network in wrapped:
        backbone = {**network["backbone"], "pretrained": False}
        if network.get("class_num") is not None:
            backbone.setdefault("class_num", network["class_num"])
        network.clear()
        network.update(backbone)
    # Some backbones give their parameters fixed names, which can be given once; in here the names start anew.
    with paddle.utils.unique_name.guard():
        return _build(config), ""


def _build(config: dict[str, Any]) -> nn.Layer:
    from ppcls.arch import build_model

    # Batch statistics are shared between processes in training only.
    config["Arch"]["use_sync_bn"] = False
    with one_sentence(f"Arch {config['Arch'].get('name')} cannot be built"):
        model = build_model(config, mode="export")
    model.eval()
    return model


def read_output(config: dict[str, Any]) -> OutputSpec:
    """Return what PaddleClas' own export of a config puts out: with softmax unless the config says otherwise."""
    arch = config["Arch"]
    keys = [arch.get("infer_model_name") if arch["name"] == "DistillationModel" else None, arch.get("infer_output_key")]
    metrics = (config.get("Metric") or {}).get("Eval") or [{}]
    if config["Global"].get("use_multilabel") or "ATTRMetric" in metrics[0]:
        activation = "sigmoid"
    else:
        activation = "softmax" if arch.get("infer_add_softmax", True) else None
    return OutputSpec(activation, tuple(key for key in keys if key is not None))


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
        "engine_sha256": hashlib.sha256(engine.read_bytes()).hexdigest(),
    }
