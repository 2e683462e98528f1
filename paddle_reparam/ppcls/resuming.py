"""Go on with a training from a checkpoint: network, loss, optimizers and moving average, all of it or an error."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from paddle import nn
from paddle.base import framework
from paddle.base.layer_helper import LayerHelper
from paddle.optimizer.lr import LRScheduler
from ppcls.utils import logger

from ..errors import CheckpointError
from ..sparsity import inner_optimizer
from . import saving
from .loading import load_weights


def resume(
    settings: dict[str, Any],
    net: nn.Layer,
    optimizers: list[Any],
    loss: nn.Layer,
    average: nn.Layer | None = None,
    *,
    config: dict[str, Any],
    on_resume: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """Load a checkpoint into the network, the loss, the optimizers and the moving average, all of it or an error."""
    prefix = settings["checkpoints"]
    saving.require_whole(prefix)
    # Where there is a moving average, .pdparams holds that one.
    trained = f"{prefix}.pdema" if average is not None else f"{prefix}.pdparams"
    load_weights([getattr(net, "_layers", net), loss], trained, config, mode="resuming")
    if average is not None:
        load_weights([getattr(average, "_layers", average), None], f"{prefix}.pdparams", config, mode="resuming")
    run = saving.read_states(f"{prefix}.pdstates")
    check_run_states(f"{prefix}.pdstates", run, config["Global"]["epochs"])
    path = f"{prefix}.pdopt"
    states = saving.read_states(path)
    states = states if isinstance(states, list) else [states]
    if len(states) != len(optimizers):
        raise CheckpointError(f"{path}: it is of {len(states)} optimizers, the config has {len(optimizers)}")
    names = _names_now(trained, [getattr(net, "_layers", net), getattr(loss, "_layers", loss)])
    # What was saved by this library is whole; parameters that never had a gradient have no entries there.
    whole = saving.has_record(prefix)
    for optimizer, state in zip(optimizers, states):
        optimizer.set_state_dict(saving.as_tensors(fit_optimizer(path, optimizer, state, names, whole)))
    logger.info(f"training goes on from {prefix}")
    return on_resume(run)


def check_run_states(path: str, states: Any, epochs: int) -> None:
    """Raise `CheckpointError` where a `.pdstates` file does not say which epoch a training of `epochs` goes on with."""
    if not isinstance(states, dict):
        raise CheckpointError(f"{path}: it holds no states by name; it is of another program")
    best = states.get("best")
    if best is not None and not (isinstance(best, dict) and {"metric", "epoch"} <= set(best)):
        raise CheckpointError(f"{path}: its best is neither null nor a metric and an epoch")
    counts = {"epoch": states.get("epoch"), "global_step": states.get("global_step", 0)}
    metrics = {"metric": states.get("metric", 0.0)}
    if best is not None:
        counts["best.epoch"], metrics["best.metric"] = best["epoch"], best["metric"]
    for name, value in counts.items():
        if not _is_number(value) or value != int(value) or not 0 <= value < 1 << 53:
            raise CheckpointError(f"{path}: its {name} is {_shown(value)}; it must be a whole number from 0 on")
    for name, value in metrics.items():
        if not _is_number(value):
            raise CheckpointError(f"{path}: its {name} is {_shown(value)}; it must be a number")
    if states["epoch"] > epochs:
        raise CheckpointError(
            f"{path}: it was saved after epoch {int(states['epoch'])}, and Global.epochs is {epochs}; raise that, or "
            "begin anew from its weights with Global.pretrained_model"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    plain = isinstance(value, (int, float, str))
    return textwrap.shorten(repr(value), 60, placeholder="...") if plain else f"a value of type {_kind(value)}"


def _kind(value: Any) -> str:
    return f"array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__


def _names_now(weights: str, layers: Sequence[Any]) -> dict[str, str]:
    """Return the name that a parameter had when a weight file was saved -> the one that it has now.

    Paddle numbers parameters as they are made, so a network that is built second has other names. The file says which
    name stood for which entry of the state dict.
    """
    states = [layer.state_dict() for layer in layers if isinstance(layer, nn.Layer)]
    now = {key: tensor.name for state in states for key, tensor in state.items()}
    return {name: now[key] for key, name in saving.read_parameter_names(weights).items() if key in now}


def fit_optimizer(
    path: str, optimizer: Any, state: Any, names: Mapping[str, str] | None = None, partial: bool = False
) -> dict[str, Any]:
    """Return a saved state under the names that an optimizer's own entries have now.

    `names` maps a parameter's saved name to its present one, where they differ. With `partial` a parameter may have no
    entries at all. Raises `CheckpointError` for what is of another optimizer or network, is missing, is left over, has
    another shape or type, or is not finite: Paddle would find that out at the first step, or never.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: it holds {_shown(state)} where the states of an optimizer by name are needed")
    inner = inner_optimizer(optimizer)
    _check_kind(path, inner, state)
    names = names or {}
    entries: dict[str, Any] = {}
    for key, value in state.items():
        if key in ("LR_Scheduler", "master_weights"):
            continue
        stem = re.sub(r"_\d+$", "", key)
        owner = max((old for old in names if stem.startswith(f"{old}_")), key=len, default=None)
        if owner is not None:
            stem = names[owner] + stem[len(owner) :]
        if stem in entries:
            raise CheckpointError(f"{path}: it has two entries for {stem}")
        entries[stem] = value
    parameters = [p for p in _parameters(inner) if not p.stop_gradient]
    if partial:
        parameters = [p for p in parameters if any(stem.startswith(f"{p.name}_") for stem in entries)]
    # What Paddle would make at the first step: it knows best which entries there are, and of which shapes.
    if inner.helper is None:
        inner.helper = LayerHelper(type(inner).__name__)
    inner._create_accumulators(framework.default_main_program().global_block(), parameters)
    fitted: dict[str, Any] = {}
    for kind, by_parameter in inner._accumulators.items():
        for name, own in by_parameter.items():
            stem = f"{name}_{kind}"
            if stem not in entries:
                raise CheckpointError(f"{path}: it has no {stem}; it is of another network, or not whole")
            fitted[own.name] = _fit(f"{path}: its {stem}", entries.pop(stem), own)
    if entries:
        raise CheckpointError(f"{path}: it has {next(iter(entries))}, which this network does not have")
    if isinstance(inner._learning_rate, LRScheduler):
        saved = state.get("LR_Scheduler")
        _check_like(f"{path}: its LR_Scheduler", saved, inner._learning_rate.state_dict())
        fitted["LR_Scheduler"] = saved
    if "master_weights" in state:
        by_name = {p.name: p for p in _parameters(inner)}
        masters = state["master_weights"]
        _check_type(f"{path}: its master_weights", masters, dict)
        fitted["master_weights"] = {}
        for old, value in masters.items():
            name = names.get(old, old)
            if name not in by_name:
                raise CheckpointError(f"{path}: it has the master weight {old}, which this network does not have")
            fitted["master_weights"][name] = _fit(f"{path}: its master weight {old}", value, by_name[name], "float32")
    return fitted


def _parameters(optimizer: Any) -> list[Any]:
    """Return an optimizer's parameters, out of the groups that it may have them in."""
    entries = optimizer._parameter_list or []
    return [p for entry in entries for p in (entry["params"] if isinstance(entry, dict) else [entry])]


def _check_type(what: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        needed = "an array" if kind is np.ndarray else f"a {kind.__name__}"
        raise CheckpointError(f"{what} is {_shown(value)}, and must be {needed}")


def _fit(what: str, value: Any, own: Any, dtype: str | None = None) -> np.ndarray:
    """Return a saved array in the shape of the one that it is for; one number may have any number of axes."""
    _check_type(what, value, np.ndarray)
    shape, dtype = list(own.shape), dtype or str(own.dtype).rsplit(".", 1)[-1]
    # Paddle hands over bfloat16 as its bits.
    if str(value.dtype) != ("uint16" if dtype == "bfloat16" else dtype):
        raise CheckpointError(f"{what} is an array of {value.dtype}, and must be of {dtype}")
    if list(value.shape) != shape and not value.size == math.prod(shape) == 1:
        raise CheckpointError(f"{what} has the shape {list(value.shape)}, and must have {shape}")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise CheckpointError(f"{what} holds numbers that are not finite; take an earlier checkpoint")
    return value.reshape(shape)


def _check_like(what: str, saved: Any, own: Any) -> None:
    """Raise `CheckpointError` where a saved schedule lacks an entry of this one, or has one of another kind."""
    if isinstance(own, dict):
        _check_type(what, saved, dict)
        for key, value in own.items():
            if key not in saved:
                raise CheckpointError(f"{what} has no {key}; it is of another schedule than the config's")
            _check_like(f"{what}.{key}", saved[key], value)
    elif _is_number(own) and not _is_number(saved):
        raise CheckpointError(f"{what} is {_shown(saved)}, and must be a number")


def _check_kind(path: str, optimizer: Any, state: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where a saved state is not of this kind of optimizer."""
    kind = type(optimizer)
    needed = {getattr(kind, name) for name in dir(kind) if name.endswith("_acc_str")}
    entries = [name for name in state if name not in ("LR_Scheduler", "master_weights")]
    unused = [name for name in entries if not any(f"_{each}_" in name for each in needed)]
    missing = sorted(each for each in needed if not any(f"_{each}_" in name for name in entries))
    if unused or missing:
        name = kind.__name__
        wrong = f"has {unused[0]}, which {name} does not use" if unused else f"has no {missing[0]}, which {name} needs"
        raise CheckpointError(
            f"{path}: it is of another optimizer than the config's: it {wrong}; resume with the Optimizer that it was "
            "saved with, or begin anew from its weights with Global.pretrained_model"
        )
