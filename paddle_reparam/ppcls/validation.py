"""What is wrong with a config, said before anything is built."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import paddle

from ..errors import UsageError
from ..registry import Registry
from . import saving
from .arch import get_builder
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
# Values: each of these returns what a value must be, or None where it is that.

Check = Callable[[Any], "str | None"]

#: Of images; more would fill any memory.
_LONGEST_SIDE = 8192
_LARGEST_BATCH = 1 << 16
_MOST_CLASSES = 10**7
#: Of a network's options, the number of classes aside: numbers above it would fill any memory.
_LARGEST_OPTION = 10**6


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(least: int, most: int = 2**31 - 1) -> Check:
    what = f"a whole number from {least}" if most == 2**31 - 1 else f"a whole number from {least} to {most}"
    return lambda value: None if _is_number(value) and isinstance(value, int) and least <= value <= most else what


def _number(least: float = -math.inf) -> Check:
    what = "a number" if least == -math.inf else f"a number from {least:g}"
    return lambda value: None if _is_number(value) and value >= least else what


def _one_of(*choices: Any) -> Check:
    what = f"one of {', '.join(map(str, choices))}"
    return lambda value: None if isinstance(value, str) and value in choices else what


def _truth(value: Any) -> str | None:
    return None if isinstance(value, bool) or (_is_number(value) and value in (0, 1)) else "True or False"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) and value and "\0" not in value else "a text"


def _list(value: Any) -> str | None:
    return None if isinstance(value, list) else "a list"


def _mapping(value: Any) -> str | None:
    return None if isinstance(value, Mapping) else "a section of KEY: VALUE"


def _or_none(check: Check) -> Check:
    def either(value: Any) -> str | None:
        wrong = None if value is None else check(value)
        return wrong and f"{wrong}, or null"

    return either


def _weights(value: Any) -> str | None:
    """Return what `Global.pretrained_model` must be; a distillation's is a list."""
    files = value if isinstance(value, list) else [value]
    wrong = not files or any(file is not None and _text(file) for file in files)
    return "a text, or a list of them" if wrong else None


def _image_shape(value: Any) -> str | None:
    side = _whole(1, _LONGEST_SIDE)
    if isinstance(value, list) and len(value) == 3 and not any(map(side, value)):
        return None
    return f"[channels, height, width], whole numbers from 1 to {_LONGEST_SIDE}"


def _device(value: Any) -> str | None:
    kinds = ("cpu", "gpu", "xpu", "npu", "mlu", "ascend", "intel_gpu", "mps")
    if not isinstance(value, str) or value not in kinds:
        return "cpu or gpu; which GPU is chosen with CUDA_VISIBLE_DEVICES"
    if value == "gpu" and not paddle.is_compiled_with_cuda():
        return "cpu here: this Paddle is built for the CPU alone"
    if value == "gpu" and not paddle.device.cuda.device_count():
        return "cpu here: Paddle finds no GPU"
    if value == "xpu" and not paddle.is_compiled_with_xpu():
        return "cpu here: this Paddle is not built for XPUs"
    return None


_GLOBAL: dict[str, Check] = {
    "output_dir": _text,
    "device": _device,
    "seed": lambda value: None if value in (None, False) else _whole(0, 2**32 - 1)(value),
    "epochs": _whole(1),
    "eval_during_train": _truth,
    "eval_interval": _whole(1),
    "start_eval_epoch": _whole(0),
    "save_interval": _whole(1),
    "print_batch_step": _whole(1),
    "use_visualdl": _truth,
    "pretrained_model": _or_none(_weights),
    "checkpoints": _or_none(_text),
    "image_shape": _or_none(_image_shape),
    "save_inference_dir": _text,
    "class_num": _whole(1, _MOST_CLASSES),
    "eval_mode": _one_of("classification", "retrieval", "adaface"),
    "use_multilabel": _truth,
    "use_dali": _truth,
    "to_static": _truth,
    "update_freq": _whole(1),
    "iter_per_epoch": _or_none(_whole(1)),
    "warmup_iter": _or_none(_whole(0)),
    "feature_normalize": _truth,
    "retrieval_feature_from": _text,
    "re_ranking": _truth,
}
#: What else PaddleClas reads from Global, of which it says itself what is wrong.
_OTHER_GLOBAL = {
    "fresh", "train_mode", "distributed", "feature_binarize", "sim_block_size", "log_ranks", "print_mem_info",
    "infer_config_path", "hpi_config_path", "pdx_model_name", "export_for_fd", "uniform_output_enabled", "model_name",
}  # fmt: skip

_LOADER: dict[str, Check] = {"num_workers": _whole(0, 256), "use_shared_memory": _truth}
_SAMPLER: dict[str, Check] = {"batch_size": _whole(1, _LARGEST_BATCH), "drop_last": _truth, "shuffle": _truth}
_RATES: dict[str, Check] = {
    "learning_rate": _number(0),
    "weight_decay": _or_none(_number(0)),
    "momentum": _number(0),
    "coeff": _number(0),
    "clip_norm": _number(0),
    "weight": _number(),
    "warmup_epoch": _number(0),
}
_AMP: dict[str, Check] = {
    "level": _one_of("O0", "O1", "O2"),
    "scale_loss": _number(0),
    "use_dynamic_loss_scaling": _truth,
    "use_amp": _truth,
    "use_fp16_test": _truth,
    "use_promote": _truth,
}
_INFER: dict[str, Check] = {
    "infer_imgs": _text,
    "batch_size": _whole(1, _LARGEST_BATCH),
    "transforms": _list,
    "PostProcess": _mapping,
    "infer_list": _or_none(_text),
    "save_dir": _or_none(_text),
}


def _check_values(
    section: Mapping[str, Any], checks: Mapping[str, Check], where: str, needed: Iterable[str] = ()
) -> None:
    for key in needed:
        if key not in section:
            raise ConfigError(f"{where} lacks {key}")
    for key, value in section.items():
        wrong = checks[key](value) if key in checks else None
        if wrong:
            raise ConfigError(f"{where}.{key} is {_shown(value)}; it takes {wrong}")


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_misspelt(keys: Iterable[str], known: Collection[str], where: str) -> None:
    """Raise `ConfigError` for a key that is nearly a known one; what else is not known belongs to somebody else."""
    for key in keys:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if key not in known and near:
            raise ConfigError(f"{where} has no {key!r}; did you mean {near[0]!r}?")


# ---------------------------------------------------------------------------------------------------------------------
# Names: what PaddleClas looks up in its modules, with the arguments of its constructors.


@functools.cache
def _classes(kind: str, module: str, base: str = "object", own: bool = False) -> Registry:
    """Return the classes in a module of PaddleClas by name: those below `base`, or `own`, that are written in it."""
    package, _, name = base.rpartition(".")
    parent = getattr(importlib.import_module(package), name) if package else object
    known = Registry(kind)
    for name, value in vars(importlib.import_module(module)).items():
        is_one = inspect.isclass(value) and issubclass(value, parent) and value is not parent
        if is_one and (not own or value.__module__ == module):
            known.add(name, value)
    return known


def _constructors(kind: str) -> Registry:
    return _classes(*_KINDS[kind])


_KINDS: dict[str, tuple[Any, ...]] = {
    "optimizer": ("optimizer", "ppcls.optimizer.optimizer", "object", True),
    "schedule": ("schedule of the learning rate", "ppcls.optimizer.learning_rate", "object", True),
    "loss": ("loss", "ppcls.loss", "paddle.nn.Layer"),
    "metric": ("metric", "ppcls.metric", "paddle.nn.Layer"),
    "data set": ("data set", "ppcls.data", "paddle.io.Dataset"),
    "sampler": ("sampler", "ppcls.data", "paddle.io.Sampler"),
    "transform": ("transform", "ppcls.data.preprocess"),
    "postprocess": ("post-processing", "ppcls.data.postprocess"),
}


def _check_constructor(kind: str, name: Any, options: Any, where: str, given: Collection[str] = ()) -> None:
    """Raise for a class that PaddleClas does not have, or that cannot be made with these options.

    `given` are the arguments that PaddleClas adds by itself.
    """
    if _text(name):
        raise ConfigError(f"{where}: the name of the {kind} is {_shown(name)}; it takes a text")
    options = {} if options is None else options
    try:
        cls = _constructors(kind).get(name)
    except UsageError as error:
        raise error.at(where) from None
    if not isinstance(options, Mapping):
        raise ConfigError(f"{where}: the options of {name} are {_shown(options)}; it takes a section of KEY: VALUE")
    known, is_open, needed = _parameters(cls)
    unknown = [key for key in options if key not in known]
    _refuse_misspelt(unknown, known, f"{where}: {name}")
    if unknown and not is_open:
        takes = ", ".join(sorted(set(known) - set(given))) or "no options"
        raise ConfigError(f"{where}: {name} has no option {unknown[0]!r}; it takes {takes}")
    lacking = [key for key in needed if key not in options and key not in given]
    if lacking:
        raise ConfigError(f"{where}: {name} needs the option {lacking[0]}")
    for key, value in options.items():
        wrong = _unlike(value, known[key].default) if key in known else None
        wrong = wrong or (_RATES[key](value) if key in _RATES else None)
        if kind == "transform" and ("size" in key or "short" in key):
            wrong = wrong or _side(value)
        if wrong:
            raise ConfigError(f"{where}: {key} of {name} is {_shown(value)}; it takes {wrong}")


def _parameters(cls: type) -> tuple[dict[str, inspect.Parameter], bool, list[str]]:
    """Return the arguments of a constructor by name, those of its bases included where it hands on what it is given;
    whether it takes others as well; and which ones it needs."""
    found: dict[str, inspect.Parameter] = {}
    needed: list[str] | None = None
    levels = [base for base in cls.__mro__[:-1] if "__init__" in vars(base)]
    for base in levels:
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if needed is None:
            needed = [p.name for p in named if p.default is p.empty]
        for parameter in named:
            found.setdefault(parameter.name, parameter)
        if all(p.kind != p.VAR_KEYWORD for p in parameters):
            # What only the first one was given may go no further.
            return found, base is not levels[0], needed
    return found, bool(levels), needed or []


def _unlike(value: Any, default: Any) -> str | None:
    """Return what a value must be to be of its default's kind; PaddleClas evaluates some texts such as 1.0/255.0."""
    if value is None or default is inspect.Parameter.empty or default is None:
        return None
    if isinstance(default, bool):
        return _truth(value)
    if isinstance(value, str) and re.fullmatch(r"[-+*/().\de ]+", value):
        return None
    if isinstance(default, (int, float)):
        return "a number" if isinstance(value, (str, bool, Mapping)) else None
    if isinstance(default, (list, tuple)):
        return "a list" if isinstance(value, (bool, Mapping)) else None
    if isinstance(default, str):
        return None if isinstance(value, str) else "a text"
    return None


def _side(value: Any) -> str | None:
    """Return what the size of an image must be; a pair is height and width."""
    sides = value if isinstance(value, list) else [value]
    wrong = sides and any(_is_number(side) and not 0 < side <= _LONGEST_SIDE for side in sides)
    return f"numbers above 0 and up to {_LONGEST_SIDE}" if wrong else None


def _check_operators(
    kind: str, given: Any, where: str, by_ppcls: Collection[str] = (), more: Collection[str] = ()
) -> None:
    """Check a list of `NAME: OPTIONS`; `more` are options that PaddleClas takes out before it calls the constructor."""
    if not isinstance(given, list):
        raise ConfigError(f"{where} is {_shown(given)}; it takes a list of NAME: OPTIONS")
    for number, entry in enumerate(given):
        name, options = _only_entry(entry, f"{where}.{number}")
        if isinstance(options, Mapping):
            for key in more:
                if key not in options:
                    raise ConfigError(f"{where}.{number}: {name} needs the option {key}")
            _check_values({key: options[key] for key in more}, _RATES, f"{where}.{number}.{name}")
            options = {key: value for key, value in options.items() if key not in more}
        elif more:
            raise ConfigError(f"{where}.{number}: {name} needs the option {more[0]}")
        _check_constructor(kind, name, options, f"{where}.{number}", by_ppcls)


def _only_entry(entry: Any, where: str) -> tuple[str, Any]:
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(f"{where} is {_shown(entry)}; it takes one NAME: OPTIONS")
    return next(iter(entry.items()))


def _section(parent: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """Return the section under a key, or raise `ConfigError` where there is none."""
    if key not in parent:
        raise ConfigError(f"the config has no section {where}")
    if not isinstance(parent[key], Mapping):
        raise ConfigError(f"{where} is {_shown(parent[key])}; it takes a section of KEY: VALUE")
    return parent[key]


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def check_form(config: dict[str, Any]) -> None:
    """Raise `ConfigError` for what no section of a config can be: misspelt ones, keys that are no texts, NaN."""
    _check_keys(config, "")
    _refuse_misspelt(config, SECTIONS, "the config")
    for section in ("Global", "Arch", "DataLoader"):
        _section(config, section, section)
    for section in ("Loss", "UnLabelLoss", "Metric", "Infer", "AMP", "EMA", "Slim", "MLDecoder"):
        if config.get(section) is not None:
            _section(config, section, section)
    settings = config["Global"]
    _refuse_misspelt(settings, {*_GLOBAL, *_OTHER_GLOBAL}, "Global")
    # A device is asked for only where the Engine runs: the other commands compute on the CPU.
    _check_values(settings, {key: check for key, check in _GLOBAL.items() if key != "device"}, "Global")
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
    _check_values(arch, {"class_num": _whole(1, _MOST_CLASSES)}, where)
    for key, value in arch.items():
        _check_size(value, f"{where}.{key}", _MOST_CLASSES if key == "class_num" else _LARGEST_OPTION)
    for key in ("Backbone", "backbone", "Head", "Neck", *(["layer"] if arch.get("name") == "ReparamModel" else [])):
        if arch.get(key) is not None:
            part = _section(arch, key, f"{where}.{key}")
            if key in ("Backbone", "backbone"):
                check_arch(part, f"{where}.{key}")
    if arch.get("models") is not None:
        if not isinstance(arch["models"], list):
            raise ConfigError(f"{where}.models is {_shown(arch['models'])}; it takes a list of NAME: NETWORK")
        for number, entry in enumerate(arch["models"]):
            name, part = _only_entry(entry, f"{where}.models.{number}")
            check_arch(_section(entry, name, f"{where}.models.{number}.{name}"), f"{where}.models.{number}.{name}")
    if "name" in arch and arch["name"] and _text(arch["name"]):
        raise ConfigError(f"{where}.name is {_shown(arch['name'])}; it takes the name of a network")


def _check_size(value: Any, where: str, most: int) -> None:
    parts = value if isinstance(value, list) else value.values() if isinstance(value, Mapping) else ()
    for part in parts:
        _check_size(part, where, _MOST_CLASSES if isinstance(value, Mapping) and "class_num" in value else most)
    if _is_number(value) and abs(value) > most:
        raise ConfigError(f"{where} is {_shown(value)}; no network is that large")


def check_training(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` or `UnknownName` for what only a training reads: `Loss.Train`, `Optimizer`.

    A regularizer or clip_norm that is null is taken out: PaddleClas would hand it on.
    """
    loss = _section(config, "Loss", "Loss")
    _refuse_misspelt(loss, {"Train", "Eval"}, "Loss")
    _check_operators("loss", loss.get("Train"), "Loss.Train", more=["weight"])
    optimizer = config.get("Optimizer")
    if isinstance(optimizer, list):
        for number, entry in enumerate(optimizer):
            name, options = _only_entry(entry, f"Optimizer.{number}")
            if not isinstance(options, Mapping) or _text(options.get("scope")):
                raise ConfigError(f"Optimizer.{number}: {name} needs the option scope")
            _leave_out_nulls(options)
            _check_optimizer(name, options, f"Optimizer.{number}.{name}")
        return
    _section(config, "Optimizer", "Optimizer")
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
    _refuse_misspelt(options, {*own, *_parameters_of("optimizer", name, where)}, where)
    rest = {key: value for key, value in options.items() if key not in own}
    _check_constructor("optimizer", name, rest, where, ("learning_rate", "grad_clip"))
    _check_values(options, {"clip_norm": _RATES["clip_norm"]}, where)
    rate = _section(options, "lr", f"{where}.lr")
    if "name" in rate:
        rest = {key: value for key, value in rate.items() if key != "name"}
        _check_constructor("schedule", rate["name"], rest, f"{where}.lr", ("epochs", "step_each_epoch"))
    else:
        _check_values(rate, _RATES, f"{where}.lr", ["learning_rate"])
    regularizer = options.get("regularizer")
    if regularizer is not None:
        _section(options, "regularizer", f"{where}.regularizer")
        checks = {"name": _one_of("L1", "L2"), "coeff": _RATES["coeff"]}
        _refuse_misspelt(regularizer, checks, f"{where}.regularizer")
        _check_values(regularizer, checks, f"{where}.regularizer", ["name"])


def _parameters_of(kind: str, name: Any, where: str) -> Collection[str]:
    if _text(name):
        raise ConfigError(f"{where}: the name of the {kind} is {_shown(name)}; it takes a text")
    try:
        return _parameters(_constructors(kind).get(name))[0]
    except UsageError as error:
        raise error.at(where) from None


def check_loader(config: Mapping[str, Any], split: str) -> None:
    """Raise `ConfigError` or `UnknownName` for a part of `DataLoader` that cannot be read; its files must be there."""
    loaders = config["DataLoader"]
    _refuse_misspelt(loaders, {"Train", "Eval", "UnLabelTrain", "class_num", "epochs"}, "DataLoader")
    where = f"DataLoader.{split}"
    part = _section(loaders, split, where)
    if config["Global"].get("eval_mode") == "retrieval" and split == "Eval":
        for key in part:
            _check_reader(_section(part, key, f"{where}.{key}"), f"{where}.{key}")
    else:
        _check_reader(part, where)


def _check_reader(part: Mapping[str, Any], where: str) -> None:
    _refuse_misspelt(part, {"dataset", "sampler", "loader"}, where)
    check_dataset(_section(part, "dataset", f"{where}.dataset"), f"{where}.dataset")
    sampler = _section(part, "sampler", f"{where}.sampler")
    if "name" in sampler:
        rest = {key: value for key, value in sampler.items() if key != "name"}
        given = ("dataset", "data_source", "total_epochs")
        _check_constructor("sampler", sampler["name"], rest, f"{where}.sampler", given)
    else:
        _refuse_misspelt(sampler, _SAMPLER, f"{where}.sampler")
    _check_values(sampler, _SAMPLER, f"{where}.sampler", [] if "name" in sampler else list(_SAMPLER))
    loader = _section(part, "loader", f"{where}.loader")
    _refuse_misspelt(loader, _LOADER, f"{where}.loader")
    _check_values(loader, _LOADER, f"{where}.loader", list(_LOADER))


def check_dataset(dataset: Mapping[str, Any], where: str) -> None:
    """Raise `ConfigError` or `UnknownName` for a data set that cannot be made, or whose files are not there."""
    if "name" not in dataset:
        raise ConfigError(f"{where} has no name; give one, such as ImageNetDataset")
    own = ("name", "batch_transform_ops")
    rest = {key: value for key, value in dataset.items() if key not in own}
    _refuse_misspelt(rest, {*own, *_parameters_of("data set", dataset["name"], where)}, where)
    _check_constructor("data set", dataset["name"], rest, where)
    for key in ("transform_ops", "batch_transform_ops"):
        if dataset.get(key) is not None:
            _check_operators("transform", dataset[key], f"{where}.{key}", ("class_num",))
    for key, is_there, what in (
        ("image_root", os.path.isdir, "a folder"),
        ("cls_label_path", os.path.isfile, "a file"),
    ):
        path = dataset.get(key)
        if path is None:
            continue
        if _text(path):
            raise ConfigError(f"{where}.{key} is {_shown(path)}; it takes the path of {what}")
        if not is_there(path):
            wrong = f"{path} is not {what}" if os.path.lexists(path) else f"there is no {path}"
            raise ConfigError(f"{where}.{key}: {wrong}")


def check_metrics(config: Mapping[str, Any], split: str) -> None:
    """Raise `ConfigError` or `UnknownName` for `Metric.Train` or `Metric.Eval`."""
    metric = config.get("Metric") or {}
    _refuse_misspelt(metric, {"Train", "Eval"}, "Metric")
    if metric.get(split) is not None:
        _check_operators("metric", metric[split], f"Metric.{split}")


def check_infer(config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` or `UnknownName` for what infer reads; its images must be there."""
    infer = _section(config, "Infer", "Infer")
    _refuse_misspelt(infer, _INFER, "Infer")
    _check_values(infer, _INFER, "Infer", ("infer_imgs", "batch_size", "transforms", "PostProcess"))
    if not os.path.exists(infer["infer_imgs"]):
        raise ConfigError(f"Infer.infer_imgs: there is no {infer['infer_imgs']}")
    _check_operators("transform", infer["transforms"], "Infer.transforms", ("class_num",))
    name, rest = infer["PostProcess"].get("name"), {k: v for k, v in infer["PostProcess"].items() if k != "name"}
    _check_constructor("postprocess", name, rest, "Infer.PostProcess")


def check_place(folder: str, where: str) -> None:
    """Raise `ConfigError` for a folder in which nothing can be written."""
    try:
        parent = Path(folder).absolute()
        while not os.path.lexists(parent):
            parent = parent.parent
    except OSError as error:
        raise ConfigError(f"{where} is {_shown(folder)}: {error.strerror}") from error
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
    _check_values({"device": settings["device"]}, _GLOBAL, "Global")
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
    for key in ("AMP", "EMA"):
        _check_values(config.get(key) or {}, {**_AMP, "decay": _number(0)}, key)
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
            _check_operators("loss", config["Loss"]["Eval"], "Loss.Eval", more=["weight"])
    if mode == "train":
        check_training(config)
    if mode == "infer":
        check_infer(config)
    if mode == "export":
        check_place(settings["save_inference_dir"], "Global.save_inference_dir")


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
