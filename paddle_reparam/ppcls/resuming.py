"""Go on with a training from a checkpoint: network, loss, optimizers and moving average, all of it or an error."""

from __future__ import annotations

import math
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.base import framework
from paddle.base.layer_helper import LayerHelper
from paddle.optimizer.lr import LRScheduler
from ppcls.utils import logger

from ..arithmetic.tensors import type_name
from ..errors import CheckpointError
from ..forms import is_number
from ..training.sparsity import inner_optimizer
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
    run = _with_numbers(saving.read_states(f"{prefix}.pdstates"))
    check_run_states(f"{prefix}.pdstates", run, config["Global"]["epochs"])
    path = f"{prefix}.pdopt"
    states = saving.read_states(path)
    states = states if isinstance(states, list) else [states]
    if len(states) != len(optimizers):
        raise CheckpointError(f"{path}: it is of {len(states)} optimizers, the config has {len(optimizers)}")
    names = _names_now(trained, [getattr(net, "_layers", net), getattr(loss, "_layers", loss)])
    for optimizer, state in zip(optimizers, states):
        load_optimizer(path, optimizer, state, names)
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
        if not _is_count(value):
            raise CheckpointError(f"{path}: its {name} is {_shown(value)}; it must be a whole number from 0 on")
    for name, value in metrics.items():
        if not _is_finite(value):
            raise CheckpointError(f"{path}: its {name} is {_shown(value)}; it must be a number")
    if states["epoch"] > epochs:
        raise CheckpointError(
            f"{path}: it was saved after epoch {int(states['epoch'])}, and Global.epochs is {epochs}; raise that, or "
            "begin anew from its weights with Global.pretrained_model"
        )


def _with_numbers(states: Any) -> Any:
    """Return states with numbers in the place of arrays of one: some versions of PaddleClas write a metric so."""
    if isinstance(states, dict):
        return {key: _with_numbers(value) for key, value in states.items()}
    return states.item() if isinstance(states, np.ndarray) and states.size == 1 else states


def _is_finite(value: Any) -> bool:
    return is_number(value) and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return _is_finite(value) and value == int(value) and 0 <= value < 1 << 53


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to write out the largest.
        return f"a number of {value.bit_length()} bits"
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


@paddle.no_grad()
def load_optimizer(path: str, optimizer: Any, state: Any, names: Mapping[str, str] | None = None) -> None:
    """Give an optimizer its saved state, all of it or an error before its first step.

    `names` maps a parameter's saved name to its present one; without it they are the same. A parameter without entries
    is one that never had a gradient; if it has one at the first step, that is an error too.

    Raises `CheckpointError` for what is of another optimizer or network, is missing, is left over, has another shape or
    type, or is not finite: Paddle would find that out in the middle of the first step, or never.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: it holds {_shown(state)} where the states of an optimizer by name are needed")
    inner = inner_optimizer(optimizer)
    _check_kind(path, inner, state)
    by_name = {p.name: p for p in parameters_of(inner)}
    names = names or {name: name for name in by_name}
    # (parameter, what is kept of it) -> its saved value
    saved: dict[tuple[str, str], Any] = {}
    for key, value in state.items():
        if key in ("LR_Scheduler", "master_weights"):
            continue
        entry = _split(key, names)
        if entry in saved:
            raise CheckpointError(f"{path}: it has two entries for the {entry[1]} of {entry[0]}")
        saved[entry] = value
    masters = state.get("master_weights", {})
    _check_type(f"{path}: its master_weights", masters, dict)
    saved.update({(names.get(name, name), _MASTER): value for name, value in masters.items()})
    for name, kind in saved:
        if name not in by_name:
            raise CheckpointError(f"{path}: it has {kind} of {name}, which this optimizer does not train")
    known = {name for name, _ in saved}
    own = _entries(inner, [parameter for name, parameter in by_name.items() if name in known])
    fitted = []
    for (name, kind), tensor in own.items():
        if (name, kind) not in saved:
            raise CheckpointError(f"{path}: it has no {kind} of {name}; it is of another network, or not whole")
        fitted.append((tensor, _fit(f"{path}: its {kind} of {name}", saved.pop((name, kind)), tensor)))
    for name, kind in saved:
        raise CheckpointError(f"{path}: it has {kind} of {name}, which this optimizer does not keep")
    if isinstance(inner._learning_rate, LRScheduler):
        schedule = state.get("LR_Scheduler")
        _check_like(f"{path}: its LR_Scheduler", schedule, inner._learning_rate.state_dict())
        inner._learning_rate.set_state_dict(schedule)
    # In place: Paddle knows an entry by the name of its tensor.
    for tensor, value in fitted:
        tensor.set_value(value)
    if own:
        _require_at_first_step(path, inner, known)


_MASTER = "master weight"


def _split(key: str, names: Mapping[str, str]) -> tuple[str, str]:
    """Return an entry's parameter, by its present name where that is known, and what of it the entry is."""
    # Paddle numbers what it names, and keeps the moments of a float32 copy where it trains in another type.
    parts = re.sub(r"_\d+$", "", re.sub(r"_fp32_master_\d+_", "_", key)).split("_")
    for end in range(len(parts) - 1, 0, -1):
        owner = "_".join(parts[:end])
        if owner in names:
            return names[owner], "_".join(parts[end:])
    return parts[0], "_".join(parts[1:])


def _entries(optimizer: Any, parameters: list[Any]) -> dict[tuple[str, str], Any]:
    """Return (parameter, what is kept of it) -> tensor, as Paddle makes them at the first step.

    It knows best which there are, and of which shapes.
    """
    if optimizer.helper is None:
        optimizer.helper = LayerHelper(type(optimizer).__name__)
    optimizer._create_accumulators(framework.default_main_program().global_block(), parameters)
    masters = getattr(optimizer, "_master_weights", {})
    entries = {(name, _MASTER): tensor for name, tensor in masters.items()}
    names = {p.name: p.name for p in parameters}
    for by_parameter in optimizer._accumulators.values():
        entries.update({_split(tensor.name, names): tensor for tensor in by_parameter.values()})
    return entries


def _require_at_first_step(path: str, optimizer: Any, known: set[str]) -> None:
    """Let an optimizer's first step raise `CheckpointError` where it moves a parameter that nothing was saved of."""
    create = optimizer._create_accumulators

    def checked(block: Any, parameters: Any) -> None:
        del optimizer._create_accumulators
        for parameter in parameters["params"] if isinstance(parameters, dict) else parameters:
            if parameter.name not in known:
                raise CheckpointError(f"{path}: it has nothing of {parameter.name}, which is trained; it is not whole")
        create(block, parameters)

    optimizer._create_accumulators = checked


def parameters_of(optimizer: Any) -> list[Any]:
    """Return an optimizer's parameters, out of the groups that it may have them in."""
    entries = optimizer._parameter_list or []
    return [p for entry in entries for p in (entry["params"] if isinstance(entry, dict) else [entry])]


def _check_type(what: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        needed = "an array" if kind is np.ndarray else f"a {kind.__name__}"
        raise CheckpointError(f"{what} is {_shown(value)}, and must be {needed}")


def _fit(what: str, value: Any, own: Any) -> np.ndarray:
    """Return a saved array in the shape of the one that it is for; one number may have any number of axes."""
    _check_type(what, value, np.ndarray)
    shape, dtype = list(own.shape), type_name(own)
    # Paddle hands over bfloat16 as its bits.
    if str(value.dtype) != ("uint16" if dtype == "bfloat16" else dtype):
        raise CheckpointError(f"{what} is an array of {value.dtype}, and must be of {dtype}")
    if list(value.shape) != shape and not value.size == math.prod(shape) == 1:
        raise CheckpointError(f"{what} has the shape {list(value.shape)}, and must have {shape}")
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise CheckpointError(f"{what} holds numbers that are not finite; take an earlier checkpoint")
    return np.array(value).reshape(shape)


def _check_like(what: str, saved: Any, own: Any) -> None:
    """Raise `CheckpointError` where a saved schedule lacks an entry of this one, or has one of another kind."""
    if isinstance(own, dict):
        _check_type(what, saved, dict)
        for key, value in own.items():
            if key not in saved:
                raise CheckpointError(f"{what} has no {key}; it is of another schedule than the config's")
            _check_like(f"{what}.{key}", saved[key], value)
    elif what.endswith(".last_epoch") and not _is_count(saved):
        raise CheckpointError(f"{what} is {_shown(saved)}, and must be a whole number from 0 on")
    elif _is_finite(own) and not _is_finite(saved):
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
