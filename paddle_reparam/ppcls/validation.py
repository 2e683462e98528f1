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


def without_weights(arch: dict[str, Any]) -> None:
    """Take from an `Arch` what names weights, where all of them come from elsewhere."""
    for network in networks(arch):
        if "pretrained" in network:
            network["pretrained"] = None if network["name"] == "ReparamModel" else False
        network.pop("fresh", None)
        network.pop("pretrained_list", None)


def check_config(config: dict[str, Any], mode: str) -> None:
    """Raise `UnknownName` or `ConfigError` for an `Arch` that cannot be built, or would never learn."""
    weights, checkpoints = config["Global"].get("pretrained_model"), config["Global"].get("checkpoints")
    if not config["Arch"].get("name"):
        raise ConfigError("Arch has no name; give the model's, as in -o Arch.name=ResNet50")
    parts = list(networks(config["Arch"]))
    for network in parts:
        get_builder(network["name"])
    if checkpoints or (mode != "train" and weights):
        # What training saved holds all weights. They may be fewer or of another number of classes to begin with.
        without_weights(config["Arch"])
    elif mode != "train" and any(network.get("fresh") for network in parts):
        raise ConfigError(f"Arch.fresh leaves a classifier untrained: for {mode} set Global.pretrained_model instead")
    for network in parts:
        if network["name"] in ("RecModel", "DistillationModel", "AttentionModel"):
            for key in ("pretrained", "fresh"):
                if network.get(key):
                    raise ConfigError(
                        f"{network['name']} has no {key} of its own; give it to the network inside, as in "
                        f"Arch.Backbone.{key} or models: [{{Student: {{{key}: ...}}}}]"
                    )
        if network["name"] != "ReparamModel":
            continue
        if mode == "train" and _wants_base(network) and not (weights or checkpoints):
            raise ConfigError(
                "RefConv2D with base: pretrained has nothing to refocus: set Arch.pretrained or "
                "Global.pretrained_model to the weights of the trained plain backbone, or base: random"
            )


def _wants_base(network: dict[str, Any]) -> bool:
    layer, backbone = network.get("layer") or {}, network.get("backbone") or {}
    if layer.get("name") != "RefConv2D" or network.get("pretrained") or backbone.get("pretrained"):
        return False
    return layer.get("base", "pretrained") == "pretrained"


def _weights_of_each(config: dict[str, Any]) -> None:
    """Make a list of the teacher's and the student's weights `Arch.pretrained_list`, in the order of the models."""
    files, arch = list(config["Global"]["pretrained_model"]), config["Arch"]
    names = [next(iter(entry)) for entry in arch.get("models") or []]
    if not names or len(files) > len(names):
        raise ConfigError(
            f"Global.pretrained_model is a list of {len(files)} files, and Arch has {len(names)} models; a list is for "
            "the teacher and the student of a DistillationModel"
        )
    places = sorted(range(len(names)), key=lambda i: {"teacher": 0, "student": 1}.get(names[i].lower(), 2))
    arch["pretrained_list"] = [None] * len(names)
    for place, file in zip(places, files):
        arch["pretrained_list"][place] = file
    config["Global"]["pretrained_model"] = None


def _is_complete(arch: dict[str, Any]) -> bool:
    """Return whether every weight of a network comes from a file that `Arch` names."""
    if "models" in arch:
        parts = [part for entry in arch["models"] or [] for part in entry.values()]
        files = arch.get("pretrained_list") or [None] * len(parts)
        return all(file or _is_complete(part) for file, part in zip(files, parts))
    if "Backbone" in arch:
        return not (arch.get("Neck") or arch.get("Head")) and _is_complete(arch["Backbone"])
    # The baseline that training starts from says nothing of what the layers put into it have learnt.
    return bool(arch.get("pretrained")) and arch.get("name") != "ReparamModel"


def check_run(config: dict[str, Any], mode: str) -> None:
    """Fill in what may be left out of `Global`; raise `ConfigError` for what the Engine would stumble over."""
    settings = config["Global"]
    for key, value in _DEFAULTS.items():
        settings.setdefault(key, value)
    if isinstance(settings["pretrained_model"], (list, tuple)):
        _weights_of_each(config)
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
    if mode == "train" and settings["checkpoints"]:
        # It holds all weights: nothing is loaded before it, or drawn anew.
        settings.update(pretrained_model=None, fresh=None)
    if mode == "train" and settings.get("fresh") and not settings["pretrained_model"]:
        raise ConfigError("Global.fresh goes with Global.pretrained_model, and Arch.fresh with Arch.pretrained")
    if mode != "train" and not settings["pretrained_model"] and not _is_complete(config["Arch"]):
        raise ConfigError(f"{mode} has no weights: set Global.pretrained_model to what training saved")
    splits = {"train": ["Train", "Eval"] if settings.get("eval_during_train") else ["Train"], "eval": ["Eval"]}
    for split in splits.get(mode, []):
        check_dataset(config, split)
    _check_task(config, mode)


def _check_task(config: dict[str, Any], mode: str) -> None:
    """Raise `ConfigError` where a mode has nothing to measure, or nothing to print."""
    if not (config.get("Metric") or {}).get("Eval"):
        if mode == "eval" or (mode == "train" and config["Global"]["eval_during_train"]):
            raise ConfigError(
                "Metric.Eval is missing, so an evaluation would measure nothing; write into the config what it "
                "measures, such as TopkAcc, or train with -o Global.eval_during_train=False"
            )
        # PaddleClas reads it, and takes null for entries.
        config["Metric"] = {**(config.get("Metric") or {}), "Eval": [{}]}
    if mode == "infer" and config["Global"].get("eval_mode", "classification") != "classification":
        raise ConfigError(
            f"infer prints classes, and Global.eval_mode is {config['Global']['eval_mode']}; export the network and "
            "compare its features"
        )
    inner = list(networks(config["Arch"]))
    if any(n["name"] == "RecModel" and "Head" in n for n in inner) and config["Arch"]["name"] != "RecModel":
        # Otherwise the inner one's head does not get the labels that its margin is for.
        config["Arch"].setdefault("is_rec", True)


def check_dataset(config: dict[str, Any], split: str) -> None:
    """Raise `ConfigError` where the files of `DataLoader.Train` or `DataLoader.Eval` are not there."""
    dataset = (config["DataLoader"].get(split) or {}).get("dataset") or {}
    for key in ("image_root", "cls_label_path"):
        if isinstance(dataset.get(key), str) and not os.path.exists(dataset[key]):
            raise ConfigError(f"DataLoader.{split}.dataset.{key}: there is no {dataset[key]}")
