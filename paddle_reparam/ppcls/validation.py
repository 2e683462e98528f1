"""What is wrong with a config, said before anything is built."""

from __future__ import annotations

import functools
import importlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..forms import is_number
from . import saving, values
from .arch import get_builder
from .constructors import check_constructor, check_operators, only_entry, parameters_of
from .errors import ConfigError

#: The parts of a PaddleClas config.
SECTIONS = {
    "Global", "Arch", "AMP", "EMA", "Loss", "UnLabelLoss", "Optimizer", "DataLoader", "Metric", "Infer", "Slim",
    "MLDecoder", "Sparsity", "Monitor",
}  # fmt: skip

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

# ---------------------------------------------------------------------------------------------------------------------
# Sections


def check_form(config: dict[str, Any]) -> None:
    """Raise `ConfigError` for what no section of a config can be: misspelt ones, keys that are no texts, NaN."""
    _check_keys(config, "")
    values.refuse_misspelt(config, SECTIONS, "the config")
    for section in ("Global", "Arch", "DataLoader"):
        values.section(config, section, section)
    for section in ("Loss", "UnLabelLoss", "Metric", "Infer", "AMP", "EMA", "Slim", "MLDecoder"):
        if config.get(section) is not None:
            values.section(config, section, section)
    settings = config["Global"]
    values.refuse_misspelt(settings, {*values.GLOBAL, *values.OTHER_GLOBAL}, "Global")
    # A device is asked for only where the Engine runs: the other commands compute on the CPU.
    values.check_values(settings, {key: check for key, check in values.GLOBAL.items() if key != "device"}, "Global")
    check_arch(config["Arch"])


def _check_keys(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{where or 'the config'} has the key {key!r}; keys are texts: put it in quotes")
            _check_keys(part, f"{where}.{key}" if where else key)
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            _check_keys(part, f"{where}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is {value}; it takes a finite number")
    elif isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{where} holds a character of code 0")


def check_arch(arch: Mapping[str, Any], where: str = "Arch") -> None:
    """Raise `ConfigError` for an `Arch`, or a network inside it, of a form that no builder takes."""
    values.check_values(arch, {"class_num": values.whole(1, values.MOST_CLASSES)}, where)
    for key, value in arch.items():
        _check_size(value, f"{where}.{key}", values.MOST_CLASSES if key == "class_num" else values.LARGEST_OPTION)
    for key in ("Backbone", "backbone", "Head", "Neck", *(["layer"] if arch.get("name") == "ReparamModel" else [])):
        if arch.get(key) is not None:
            part = values.section(arch, key, f"{where}.{key}")
            if key in ("Backbone", "backbone"):
                check_arch(part, f"{where}.{key}")
    if arch.get("models") is not None:
        if not isinstance(arch["models"], list):
            raise ConfigError(f"{where}.models is {values.shown(arch['models'])}; it takes a list of NAME: NETWORK")
        for number, entry in enumerate(arch["models"]):
            name, part = only_entry(entry, f"{where}.models.{number}")
            check_arch(
                values.section(entry, name, f"{where}.models.{number}.{name}"), f"{where}.models.{number}.{name}"
            )
    if "name" in arch and arch["name"] and values.text(arch["name"]):
        raise ConfigError(f"{where}.name is {values.shown(arch['name'])}; it takes the name of a network")


def _check_size(value: Any, where: str, most: int) -> None:
    parts = value if isinstance(value, list) else value.values() if isinstance(value, Mapping) else ()
    for part in parts:
        _check_size(part, where, values.MOST_CLASSES if isinstance(value, Mapping) and "class_num" in value else most)
    if is_number(value) and abs(value) > most:
        raise ConfigError(f"{where} is {values.shown(value)}; no network is that large")


def check_training(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` or `UnknownName` for what only a training reads: `Loss.Train`, `Optimizer`.

    A regularizer or clip_norm that is null is taken out: PaddleClas would hand it on.
    """
    loss = values.section(config, "Loss", "Loss")
    values.refuse_misspelt(loss, {"Train", "Eval"}, "Loss")
    check_operators("loss", loss.get("Train"), "Loss.Train", more=["weight"])
    optimizer = config.get("Optimizer")
    if isinstance(optimizer, list):
        for number, entry in enumerate(optimizer):
            name, options = only_entry(entry, f"Optimizer.{number}")
            if not isinstance(options, Mapping) or values.text(options.get("scope")):
                raise ConfigError(f"Optimizer.{number}: {name} needs the option scope")
            _leave_out_nulls(options)
            _check_optimizer(name, options, f"Optimizer.{number}.{name}")
        return
    values.section(config, "Optimizer", "Optimizer")
    if "name" not in optimizer:
        raise ConfigError("Optimizer has no name; give one, as in -o Optimizer.name=Momentum")
    _leave_out_nulls(optimizer)
    _check_optimizer(optimizer["name"], {key: optimizer[key] for key in optimizer if key != "name"}, "Optimizer")


def _leave_out_nulls(options: Any) -> None:
    for key in ("regularizer", "clip_norm"):
        if options.get(key, "") is None:
            del options[key]


def _check_optimizer(name: Any, options: Mapping[str, Any], where: str) -> None:
    own = ("lr", "regularizer", "clip_norm", "scope")
    values.refuse_misspelt(options, {*own, *parameters_of("optimizer", name, where)}, where)
    rest = {key: value for key, value in options.items() if key not in own}
    check_constructor("optimizer", name, rest, where, ("learning_rate", "grad_clip"))
    values.check_values(options, {"clip_norm": values.RATES["clip_norm"]}, where)
    rate = values.section(options, "lr", f"{where}.lr")
    if "name" in rate:
        rest = {key: value for key, value in rate.items() if key != "name"}
        check_constructor("schedule", rate["name"], rest, f"{where}.lr", ("epochs", "step_each_epoch"))
    else:
        values.check_values(rate, values.RATES, f"{where}.lr", ["learning_rate"])
    regularizer = options.get("regularizer")
    if regularizer is not None:
        values.section(options, "regularizer", f"{where}.regularizer")
        checks = {"name": values.one_of("L1", "L2"), "coeff": values.RATES["coeff"]}
        values.refuse_misspelt(regularizer, checks, f"{where}.regularizer")
        values.check_values(regularizer, checks, f"{where}.regularizer", ["name"])


def check_loader(config: Mapping[str, Any], split: str) -> None:
    """Raise `ConfigError` or `UnknownName` for a part of `DataLoader` that cannot be read; its files must be there."""
    loaders = config["DataLoader"]
    values.refuse_misspelt(loaders, {"Train", "Eval", "UnLabelTrain", "class_num", "epochs"}, "DataLoader")
    where = f"DataLoader.{split}"
    part = values.section(loaders, split, where)
    if config["Global"].get("eval_mode") == "retrieval" and split == "Eval":
        for key in part:
            _check_reader(values.section(part, key, f"{where}.{key}"), f"{where}.{key}")
    else:
        _check_reader(part, where)


def _check_reader(part: Mapping[str, Any], where: str) -> None:
    values.refuse_misspelt(part, {"dataset", "sampler", "loader"}, where)
    check_dataset(values.section(part, "dataset", f"{where}.dataset"), f"{where}.dataset")
    sampler = values.section(part, "sampler", f"{where}.sampler")
    if "name" in sampler:
        rest = {key: value for key, value in sampler.items() if key != "name"}
        given = ("dataset", "data_source", "total_epochs")
        check_constructor("sampler", sampler["name"], rest, f"{where}.sampler", given)
    else:
        values.refuse_misspelt(sampler, values.SAMPLER, f"{where}.sampler")
    values.check_values(sampler, values.SAMPLER, f"{where}.sampler", () if "name" in sampler else values.SAMPLER_NEEDS)
    loader = values.section(part, "loader", f"{where}.loader")
    values.refuse_misspelt(loader, values.LOADER, f"{where}.loader")
    values.check_values(loader, values.LOADER, f"{where}.loader", values.LOADER_NEEDS)


def check_dataset(dataset: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` or `UnknownName` for a data set that cannot be made, or whose files are not there."""
    if "name" not in dataset:
        raise ConfigError(f"{where} has no name; give one, such as ImageNetDataset")
    own = ("name", "batch_transform_ops")
    rest = {key: value for key, value in dataset.items() if key not in own}
    values.refuse_misspelt(rest, {*own, *parameters_of("data set", dataset["name"], where)}, where)
    check_constructor("data set", dataset["name"], rest, where)
    values.check_values(dataset, values.DATASET, where)
    for key in ("transform_ops", "batch_transform_ops"):
        if dataset.get(key) is not None:
            check_operators("transform", dataset[key], f"{where}.{key}", ("class_num",))
    for key, is_there, what in (
        ("image_root", os.path.isdir, "a folder"),
        ("cls_label_path", os.path.isfile, "a file"),
    ):
        path = dataset.get(key)
        if path is None:
            continue
        if values.text(path):
            raise ConfigError(f"{where}.{key} is {values.shown(path)}; it takes the path of {what}")
        if not is_there(path):
            wrong = f"{path} is not {what}" if os.path.lexists(path) else f"there is no {path}"
            raise ConfigError(f"{where}.{key}: {wrong}")


def check_metrics(config: Mapping[str, Any], split: str) -> None:
    """Raise `ConfigError` or `UnknownName` for `Metric.Train` or `Metric.Eval`."""
    metric = config.get("Metric") or {}
    values.refuse_misspelt(metric, {"Train", "Eval"}, "Metric")
    if metric.get(split) is not None:
        check_operators("metric", metric[split], f"Metric.{split}")


def check_infer(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` or `UnknownName` for what infer reads; its images must be there."""
    infer = values.section(config, "Infer", "Infer")
    values.refuse_misspelt(infer, values.INFER, "Infer")
    values.check_values(infer, values.INFER, "Infer", values.INFER_NEEDS)
    if not os.path.exists(infer["infer_imgs"]):
        raise ConfigError(f"Infer.infer_imgs: there is no {infer['infer_imgs']}")
    check_operators("transform", infer["transforms"], "Infer.transforms", ("class_num",))
    name, rest = infer["PostProcess"].get("name"), {k: v for k, v in infer["PostProcess"].items() if k != "name"}
    check_constructor("postprocess", name, rest, "Infer.PostProcess")


def check_place(folder: str, where: str) -> None:
    """Raise `ConfigError` for a folder in which nothing can be written."""
    try:
        parent = Path(folder).absolute()
        while not os.path.lexists(parent):
            parent = parent.parent
    except OSError as error:
        raise ConfigError(f"{where} is {values.shown(folder)}: {error.strerror}") from error
    if not parent.is_dir():
        raise ConfigError(f"{where} is {folder}, but {parent} is not a folder; name another place")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"{where} is {folder}, but nothing may be written in {parent}; name another place")


# ---------------------------------------------------------------------------------------------------------------------
# All of it


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
    check_form(config)
    for key, value in _DEFAULTS.items():
        settings.setdefault(key, value)
    values.check_values({"device": settings["device"]}, values.GLOBAL, "Global")
    check_place(settings["output_dir"], "Global.output_dir")
    if isinstance(settings["pretrained_model"], (list, tuple)):
        _weights_of_each(config)
    if mode == "train" and settings["checkpoints"] == "auto":
        found = saving.newest(settings["output_dir"])
        settings["checkpoints"] = None if found is None else str(found.prefix)
    lacking = [key for key in _NEEDED[mode] if settings.get(key) is None]
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
    for key, checks in (("AMP", values.AMP), ("EMA", values.EMA)):
        part = config.get(key) or {}
        values.refuse_misspelt(part, checks, key)
        values.check_values(part, checks, key)
        if key in config and (config[key] is None or not part.get("use_amp", True)):
            # PaddleClas asks whether the section is there, and 2.4 nothing else.
            del config[key]
    if mode == "train":
        _refuse_what_nobody_reads(config)
    for key in ("Metric", "Loss"):
        for split in ("Train", "Eval"):
            if key in config and (config[key] is None or config[key].get(split, "") is None):
                # PaddleClas asks whether the key is there.
                config[key] = {part: value for part, value in (config[key] or {}).items() if value is not None}
    splits = {"train": ["Train", "Eval"] if settings.get("eval_during_train") else ["Train"], "eval": ["Eval"]}
    for split in splits.get(mode, []):
        check_loader(config, split)
    _check_task(config, mode)
    for split in splits.get(mode, []):
        check_metrics(config, split)
        if split == "Eval" and "Eval" in config.get("Loss", {}):
            check_operators("loss", config["Loss"]["Eval"], "Loss.Eval", more=["weight"])
    if mode == "train":
        check_training(config)
    if mode == "infer":
        check_infer(config)
    if mode == "export":
        check_place(settings["save_inference_dir"], "Global.save_inference_dir")


def _refuse_what_nobody_reads(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for what newer Engines read, and the one of PaddleClas 2.4 passes over in silence."""
    asked = {"EMA": "EMA" in config, "update_freq": config["Global"].get("update_freq", 1) > 1}
    for key, is_asked in asked.items():
        if is_asked and not any(re.search(rf"\b{key}\b", code) for code in _engine_code()):
            raise ConfigError(
                f"this PaddleClas does not know {'EMA' if key == 'EMA' else f'Global.{key}'}, and would train without "
                "it; leave it out, or set PADDLECLAS_HOME to a checkout of PaddleClas 2.6"
            )


@functools.cache
def _engine_code() -> list[str]:
    folder = Path(importlib.import_module("ppcls.engine").__file__).parent
    return [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))]


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
