"""Go on with a training from a checkpoint: network, loss, optimizers and moving average, all of it or an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from paddle import nn
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
