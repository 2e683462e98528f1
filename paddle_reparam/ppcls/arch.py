"""What a YAML file's `Arch` may name: the models of this library, and `ReparamModel`."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from typing import Any, Callable

from paddle import nn
from ppcls import arch
from ppcls.utils import logger

from .. import models  # noqa: F401  (importing the models registers them)
from ..errors import ReparamError
from ..registry import Registry, create_model, get_model, list_models
from ..surgery import places, rewrite
from .errors import ConfigError
from .loading import load_weights, read_fresh

# What PaddleClas reads from Arch for itself and passes on to every builder.
ENGINE_KEYS = {"infer_output_key", "infer_add_softmax", "infer_model_name", "is_rec", "use_multilabel"}
# What PaddleClas' own backbones take: cut the network short, or hand out what is inside it.
_THESEUS_KEYS = {"return_patterns", "return_stages", "freeze_befor", "stop_after"}


def register() -> None:
    """Put every registered model and `ReparamModel` where PaddleClas looks a name of `Arch` up."""
    arch.ReparamModel = ReparamModel
    for name in list_models():
        if hasattr(arch, name) and get_model(name).in_paddleclas:
            continue
        if hasattr(arch, name):
            raise ReparamError(f"PaddleClas has a model named {name!r} of its own; rename the registered one")
        setattr(arch, name, functools.partial(_build_registered, name))


def get_builder(name: str) -> Callable[..., nn.Layer]:
    """Return what builds the `Arch` of a name; `UnknownName` names the nearest ones."""
    known = Registry("Arch")
    for key, value in vars(arch).items():
        is_layer = inspect.isclass(value) and issubclass(value, nn.Layer)
        if not key.startswith("_") and (is_layer or inspect.isfunction(value) or isinstance(value, functools.partial)):
            known.add(key, value)
    return known.get(name)


def ReparamModel(
    backbone: dict[str, Any] | None = None,
    layer: dict[str, Any] | None = None,
    where: str | list[str] | None = None,
    pretrained: str | None = None,
    class_num: int | None = None,
    fresh: bool | str | list[str] | None = None,
    **engine_keys: Any,
) -> nn.Layer:
    """Return a backbone that PaddleClas knows, its convolutions replaced by a layer of this library.

    `backbone` and `layer` are a `name` with the options of its builder; `where` limits the replacement to paths that
    match a pattern. `pretrained` is a weight file of the plain backbone, loaded before the replacement; `fresh` says
    what is not taken from it. What is returned is the backbone itself, so its state dict keeps its names.

    Raises `UnknownName` for unknown names and keys, `ConfigError` for what is no name with options, and
    `CheckpointError` where the weights do not fit.
    """
    own = set(inspect.signature(ReparamModel).parameters) - {"engine_keys"}
    for key in engine_keys:
        _refuse_unknown(key, own | ENGINE_KEYS, "ReparamModel")
    if pretrained is True:
        raise ConfigError(
            "Arch.pretrained of ReparamModel is a weight file; for PaddleClas' own weights set "
            "Arch.backbone.pretrained: True"
        )
    backbone_name, options = _named("backbone", backbone)
    if class_num is not None:
        options.setdefault("class_num", class_num)
    model = get_builder(backbone_name)(**options)
    left = read_fresh(fresh, "Arch.fresh")
    if pretrained:
        load_weights(model, pretrained, {}, "train", left)
    elif left:
        raise ConfigError("Arch.fresh goes with Arch.pretrained, and Arch.backbone.fresh with Arch.backbone.pretrained")
    layer_name, options = _named("layer", layer)
    report = rewrite.replace(model, layer_name, where=where, **options)
    _log(f"{layer_name} in {backbone_name}", report)
    return model


def _log(what: str, report: places.RewriteReport) -> None:
    """Log what was replaced: in short on the screen, each layer in the file that an Engine logs to."""
    # PaddleClas closes none; the last one is of the Engine that runs.
    files = [each for each in logger._logger.handlers if isinstance(each, logging.FileHandler)][-1:]
    logger.info(f"{what}:\n{report}" + "".join(f"\neach layer: {each.baseFilename}" for each in files))
    if logger._logger.isEnabledFor(logging.INFO):
        text = f"{what}, each layer:\n{report.table()}"
        for each in files:
            each.handle(logging.LogRecord("ppcls", logging.INFO, __file__, 0, text, None, None))


def _named(part: str, config: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(config, dict) or "name" not in config:
        raise ConfigError(f"Arch.{part} of ReparamModel needs a name and options, as {{name: ...}}, not {config!r}")
    options = dict(config)
    return options.pop("name"), options


def _build_registered(name: str, **config: Any) -> nn.Layer:
    """Build a model of this library as one of PaddleClas' own: with `stop_after`, `return_stages` and their like."""
    options = {k: config.pop(k) for k in _THESEUS_KEYS & set(config)}
    fresh = read_fresh(config.pop("fresh", None), f"fresh of {name}")
    config = {k: v for k, v in config.items() if k not in ENGINE_KEYS}
    file = config.get("pretrained")
    if "pretrained" in config and file is not True:
        config["pretrained"] = False
    model = _as_theseus(create_model(name, **config), options)
    if file:
        load_weights(model, file, {}, "train", fresh)
    elif fresh:
        raise ConfigError(f"fresh of {name} goes with pretrained, which names no weights here")
    return model


def _refuse_unknown(key: str, known: set[str], owner: str) -> None:
    keys = Registry(f"option of {owner}")
    for name in known:
        keys.add(name, name)
    keys.get(key)


@functools.cache
def _theseus_class(cls: type) -> type:
    return type(cls.__name__, (cls, arch.TheseusLayer), {"__module__": cls.__module__})


def _as_theseus(model: nn.Layer, options: dict[str, Any]) -> nn.Layer:
    """Make a plain network what RecModel and the pruners of PaddleClas ask for; forward and names stay."""
    model.__class__ = _theseus_class(type(model))
    model.res_dict, model.res_name, model.pruner, model.quanter = {}, model.full_name(), None, None
    stages = [f"{word}{i}" for word in ("layer", "stage") for i in range(1, 5) if hasattr(model, f"{word}{i}")]
    stages = stages or [f"stages[{i}]" for i in range(len(getattr(model, "stages", ())))]
    patterns = options.get("return_patterns") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in [*patterns, *(options[k] for k in ("stop_after", "freeze_befor") if options.get(k))]:
        _refuse_unknown(
            re.sub(r"\[(\d+)\]", r".\1", pattern), {n for n, _ in model.named_sublayers()}, type(model).__name__
        )
    if options.get("return_stages") and not stages:
        raise ConfigError(f"{type(model).__name__} has no stages to return; name layers with return_patterns")
    if hasattr(model, "init_net"):
        model.init_net(stages_pattern=stages, **options)
        return model
    # PaddleClas 2.4 has the same in two calls, and cannot freeze.
    if options.get("freeze_befor"):
        raise ConfigError("freeze_befor needs PaddleClas 2.5 or later")
    if patterns or options.get("return_stages"):
        model.init_res(stages, return_patterns=patterns, return_stages=options.get("return_stages"))
    if options.get("stop_after"):
        model.stop_after(options["stop_after"])
    return model
