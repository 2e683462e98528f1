"""Weight files and states of optimizers, read without running them, for frameworks that unpickle them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ..errors import CheckpointError
from ..weights import checkpoints, pickles

#: What Paddle puts behind the name of a parameter in a deep copy.
_COPIED = re.compile(r"(_deepcopy_\d+)+$")


class ReadingPaddle:
    """Paddle, or what a module has in its place, but for what reads a weight file."""

    def __init__(self, own: Any = paddle) -> None:
        self._own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    @staticmethod
    def load(path: str) -> dict[str, Any]:
        return checkpoints.load(path)


def load_fitting(
    model: nn.Layer, file: str, log: Callable[[str], None], match: Callable[..., Any] | None = None
) -> None:
    """Load of a weight file what fits a network that is then trained; the rest stays as it was drawn, and is logged.

    `match` finds the entries by other names than the network's own: of (its state, the arrays of the file) it makes
    name of the network -> name in the file. Raises `CheckpointError` where nothing fits, and where the file holds more
    of a layer than the network has of it: such a file is of the network with layers of this library in it.
    """
    arrays, own, name = checkpoints.load(file), model.state_dict(), type(model).__name__
    pairs = {key: key for key in own if key in arrays} if match is None else match(own, arrays)
    fitting = {key: at for key, at in pairs.items() if list(arrays[at].shape) == list(own[key].shape)}
    if not fitting:
        raise CheckpointError(
            f"{file}: none of its {len(arrays)} entries is one of {name}, such as "
            f"{checkpoints.listed(list(arrays)[:3])}; name a file of this network"
        )
    more = _more_of_layers(own, arrays, pairs)
    if more:
        raise CheckpointError(
            f"{file}: it holds more of {len(more)} layers than {name} has, such as {more[0]}; it is of a network with "
            "other layers in their place, and this one would compute something else"
        )
    # Of what is missing there, a network keeps its own.
    checkpoints.load_into(model, {**own, **{key: arrays[at] for key, at in fitting.items()}})
    log(f"{file}: {len(fitting)} of the {len(own)} entries of {name} are taken from it")
    if left := [key for key in own if key not in fitting]:
        log(f"not taken from it but as they were drawn: {checkpoints.listed(left)}")


def _more_of_layers(own: Iterable[str], arrays: Iterable[str], pairs: Mapping[str, str]) -> list[str]:
    """Return the entries of a file that lie in or below a layer of the network with entries, and are none of its."""
    layers = {key.rpartition(".")[0] for key in own} - {""}
    # A backbone's file has its names without what stands before them in the network.
    before = {"", *(key.removesuffix(at) for key, at in pairs.items())}
    taken = set(pairs.values())
    return [
        at for at in arrays
        if at not in taken and any(prefix + above in layers for above in _layers_above(at) for prefix in before)
    ]  # fmt: skip


def _layers_above(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:depth]) for depth in range(1, len(parts))}


def read_optimizer(model: nn.Layer, weights: str | os.PathLike[str], state: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the state of an optimizer under the names that the parameters of a network have in this process.

    `weights` is the file in which Paddle wrote down the names of the parameters that the state is of. Raises
    `CheckpointError` where a file cannot be read, and for a state of a parameter that the network does not have.
    """
    try:
        content = pickles.read_state(Path(state).read_bytes())
        of_file = pickles.parameter_names(Path(weights).read_bytes())
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"{state}: it cannot be read ({error})") from error
    # Paddle numbers parameters as they are made: those of this process may have other names.
    names = {_COPIED.sub("", of_file[key]): tensor.name for key, tensor in model.state_dict().items() if key in of_file}
    renamed = {}
    for entry, value in content.items():
        old = next((entry[:end] for end in range(len(entry), 0, -1) if entry[:end] in names), None)
        if old is None and isinstance(value, (np.ndarray, paddle.Tensor)):
            raise CheckpointError(f"{state}: its entry {entry} is of no parameter of {type(model).__name__}")
        renamed[entry if old is None else names[old] + entry[len(old) :]] = value
    return renamed
