"""Weights that go into PaddleClas' models: read without running them, and an error where they do not fit.

PaddleClas ignores what `set_state_dict` returns, so a file that does not fit leaves random weights without a word.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

from paddle import nn
from ppcls.engine import engine as engine_module
from ppcls.loss import build_loss
from ppcls.utils.download import get_weights_path_from_url

from .. import checkpoints
from ..errors import CheckpointError, MissingFile

_REFOCUSING = "convmap.weight"


@contextlib.contextmanager
def strict_loading(config: dict[str, Any], mode: str, resume: Callable[..., Any] | None = None) -> Iterator[None]:
    """Make PaddleClas' Engine load weights strictly while it runs in here; its own files stay as they are.

    `resume` takes the place of what it loads a checkpoint with.
    """
    load = functools.partial(load_weights, config=config, mode=mode)
    ours = {
        "load_dygraph_pretrain": load,
        "load_dygraph_pretrain_from_url": load,
    }
    if resume is not None:
        ours["init_model"] = resume
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
    raise MissingFile(f"there is no weight file {path} or {with_suffix}")


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
