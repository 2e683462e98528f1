"""What is wrong with a config, said before anything is built."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from . import saving
from .arch import get_builder
from .errors import ConfigError

# What the Engine reads from Global without asking whether it is there.
_NEEDED = {
    "train": ("epochs", "print_batch_step", "save_interval", "eval_during_train", "eval_interval"),
    "eval": ("print_batch_step",),
    "infer": (),
    "export": ("image_shape", "save_inference_dir"),
}
_DEFAULTS = {
    "pretrained_model": None,
    "checkpoints": None,
    "use_visualdl": False,
    "output_dir": "./output",
    "device": "cpu",
}


def networks(arch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every part of `Arch` that names a network, the inner ones of RecModel and the like included."""
    if "name" in arch:
        yield arch
    for part in (arch.get("Backbone"), arch.get("backbone")):
        if isinstance(part, dict):
            yield from networks(part)
    for entry in arch.get("models") or []:
        for part in entry.values():
            yield from networks(part)


def check_config(config: dict[str, Any], mode: str) -> None:
    """Raise `UnknownName` or `ConfigError` for an `Arch` that cannot be built, or would never learn."""
    weights, checkpoints = config["Global"].get("pretrained_model"), config["Global"].get("checkpoints")
    if not config["Arch"].get("name"):
        raise ConfigError("Arch has no name; give the model's, as in -o Arch.name=ResNet50")
    parts = list(networks(config["Arch"]))
    for network in parts:
        get_builder(network["name"])
    for network in parts:
        if network["name"] != "ReparamModel":
            continue
        if mode != "train" and weights:
            # These come with the weights that training saved.
            network["pretrained"] = None
        elif mode == "train" and _wants_base(network) and not (weights or checkpoints):
            raise ConfigError(
                "RefConv2D with base: pretrained has nothing to refocus: set Arch.pretrained or "
                "Global.pretrained_model to the weights of the trained plain backbone, or base: random"
            )


def _wants_base(network: dict[str, Any]) -> bool:
    layer, backbone = network.get("layer") or {}, network.get("backbone") or {}
    if layer.get("name") != "RefConv2D" or network.get("pretrained") or backbone.get("pretrained"):
        return False
    return layer.get("base", "pretrained") == "pretrained"


def check_run(config: dict[str, Any], mode: str) -> None:
    """Fill in what may be left out of `Global`; raise `ConfigError` for what the Engine would stumble over."""
    settings = config["Global"]
    for key, value in _DEFAULTS.items():
        settings.setdefault(key, value)
    if mode == "train" and settings["checkpoints"] == "auto":
        found = saving.newest(settings["output_dir"])
        settings["checkpoints"] = None if found is None else str(found.prefix)
    lacking = [key for key in _NEEDED[mode] if key not in settings]
    if lacking:
        raise ConfigError(f"the config lacks Global.{', Global.'.join(lacking)}, which {mode} needs")
    if mode != "train" or settings["device"] == "cpu":
        # Only training shares its batch statistics between processes, and Paddle cannot on a CPU.
        config["Arch"]["use_sync_bn"] = False
    if mode != "train" and settings["checkpoints"] and not settings["pretrained_model"]:
        raise ConfigError(
            "Global.checkpoints is where training goes on from; "
            f"{mode} reads Global.pretrained_model: set that to {settings['checkpoints']}"
        )
    inner = list(networks(config["Arch"]))
    # The baseline that training starts from says nothing of what the layers put into it have learnt.
    complete = any(n.get("pretrained") for n in inner) and not any(n["name"] == "ReparamModel" for n in inner)
    if mode != "train" and not settings["pretrained_model"] and not complete:
        raise ConfigError(f"{mode} has no weights: set Global.pretrained_model to what training saved")
    splits = {"train": ["Train", "Eval"] if settings.get("eval_during_train") else ["Train"], "eval": ["Eval"]}
    for split in splits.get(mode, []):
        check_dataset(config, split)


def check_dataset(config: dict[str, Any], split: str) -> None:
    """Raise `ConfigError` where the files of `DataLoader.Train` or `DataLoader.Eval` are not there."""
    dataset = (config["DataLoader"].get(split) or {}).get("dataset") or {}
    for key in ("image_root", "cls_label_path"):
        if isinstance(dataset.get(key), str) and not os.path.exists(dataset[key]):
            raise ConfigError(f"DataLoader.{split}.dataset.{key}: there is no {dataset[key]}")
