"""Weights that go into PaddleClas' models: read without running them, and an error where they do not fit.

PaddleClas ignores what `set_state_dict` returns, so a file that does not fit leaves random weights without a word.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from paddle import nn
from ppcls.engine import engine as engine_module
from ppcls.loss import build_loss
from ppcls.utils import logger
from ppcls.utils.download import get_weights_path_from_url

from .. import checkpoints
from ..errors import CheckpointError
from ..sparsity import inner_optimizer
from . import saving

_REFOCUSING = "convmap.weight"


@contextlib.contextmanager
def strict_loading(
    config: dict[str, Any], mode: str, on_resume: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> Iterator[None]:
    """Make PaddleClas' Engine load weights strictly while it runs in here; its own files stay as they are.

    `on_resume` gets the states of a checkpoint and returns what the Engine goes on from: `metric` and `epoch`.
    """
    load = functools.partial(load_weights, config=config, mode=mode)
    ours = {
        "load_dygraph_pretrain": load,
        "load_dygraph_pretrain_from_url": load,
        "init_model": functools.partial(_resume, config=config, on_resume=on_resume),
    }
    theirs = {name: getattr(engine_module, name) for name in ours if hasattr(engine_module, name)}
    for name in theirs:
        setattr(engine_module, name, ours[name])
    try:
        yield
    finally:
        for name, function in theirs.items():
            setattr(engine_module, name, function)


def weight_file(path: str) -> str:
    """Return the local file of what `Global.pretrained_model` names: a URL, a file, or one without its suffix."""
    if path.startswith(("http://", "https://")):
        return get_weights_path_from_url(path)
    if os.path.isfile(path):
        return path
    with_suffix = f"{path}.pdparams"
    if os.path.isfile(with_suffix):
        return with_suffix
    raise CheckpointError(f"there is no weight file {path} or {with_suffix}")


def load_weights(models: nn.Layer | list[nn.Layer | None], path: str, config: dict[str, Any], mode: str) -> None:
    """Load a weight file into a model, and into the training loss where that has weights as well.

    In training a plain baseline may go into RefConv layers, which it has no refocusing weights for; elsewhere they
    would be random. Raises `CheckpointError` for whatever else is missing, left over or of another shape.
    """
    model, *losses = models if isinstance(models, list) else [models]
    file = weight_file(path)
    state = checkpoints.load(file)
    own = model.state_dict()
    for loss in filter(None, losses):
        of_loss = {name: state.pop(name) for name in loss.state_dict() if name in state}
        if of_loss:
            checkpoints.load_into(loss, of_loss)
    if mode != "train" and set(state) - set(own) and "Loss" in config:
        # What was saved in training holds the training loss' weights too; no other mode has a use for them.
        for name in build_loss(config["Loss"]["Train"]).state_dict():
            state.pop(name, None)
    lacking = [name for name in own if name.endswith(_REFOCUSING) and name not in state]
    if lacking and mode != "train":
        raise CheckpointError(
            f"{file}: it lacks {len(lacking)} refocusing weights ({lacking[0]}), which would stay random; "
            f"for {mode} give the weights that training saved, or the plain backbone's config for plain weights"
        )
    try:
        checkpoints.load_into(model, state, may_miss=[f"*{_REFOCUSING}"] if lacking else [])
    except CheckpointError as error:
        raise error.at(file) from None


def _resume(
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
    states = saving.read_states(f"{prefix}.pdopt")
    states = states if isinstance(states, list) else [states]
    if len(states) != len(optimizers):
        raise CheckpointError(f"{prefix}.pdopt: it is of {len(states)} optimizers, the config has {len(optimizers)}")
    for optimizer, state in zip(optimizers, states):
        check_optimizer(f"{prefix}.pdopt", optimizer, state)
        optimizer.set_state_dict(saving.as_tensors(state))
    logger.info(f"training goes on from {prefix}")
    return on_resume(saving.read_states(f"{prefix}.pdstates"))


def check_optimizer(path: str, optimizer: Any, state: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where a saved state is not of this kind of optimizer.

    Paddle would leave entries that it has no use for alone, and look for those that it needs at the first step only.
    """
    kind = type(inner_optimizer(optimizer))
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
