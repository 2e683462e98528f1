"""Published state dicts under the names and in the layouts of this library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from paddle import nn

from ..arithmetic.tensors import type_name
from ..errors import CheckpointError, ReparamError
from ..registry import create_model, get_model, list_models
from .checkpoints import classifier, listed

#: Published names of what a BN keeps -> Paddle's; the counter has no counterpart.
_OF_A_BATCH_NORM = {"running_mean": "_mean", "running_var": "_variance", "num_batches_tracked": None}


def convert_state(name: str, state: Mapping[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
    """Return a published state dict as one that `create_model(name, **options)` takes, entry for entry.

    `state`: published key -> array, in the layouts of the published files (a Linear's weight is `[out, in]`), with or
    without the prefix `module.`. Floats are cast to the model's type.

    Raises `CheckpointError` with what is missing, left over or of another shape, and for a model without published
    weights.
    """
    model = create_model(name, **options)
    return fit_exactly(model, in_our_names(name, state, model), f"{name}{options or ''}")


def in_our_names(name: str, state: Mapping[str, np.ndarray], model: nn.Layer) -> dict[str, np.ndarray]:
    """Return a published state dict under the names and in the layouts of `model`, whatever fits it.

    Raises `CheckpointError` for a model without published weights and for entries that cannot be brought into its form.
    """
    rename = get_model(name).rename
    if rename is None:
        known = ", ".join(n for n in list_models() if get_model(n).rename is not None)
        raise CheckpointError(f"no published weight files of {name} are known; those of {known} can be converted")
    from_parallel = all(key.startswith("module.") for key in state)
    plain = {key[len("module.") :] if from_parallel else key: np.asarray(value) for key, value in state.items()}
    try:
        renamed = rename(plain)
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, ReparamError):
            raise
        raise CheckpointError(f"its entries are not those of a published {name} ({error!r})") from error
    owners = dict(model.named_sublayers(include_self=True))
    arrays: dict[str, np.ndarray] = {}
    for key, value in renamed.items():
        path, _, last = key.rpartition(".")
        last = _OF_A_BATCH_NORM.get(last, last)
        if last is None:
            continue
        key = f"{path}.{last}" if path else last
        array = np.asarray(value)
        arrays[key] = array.T if last == "weight" and isinstance(owners.get(path), nn.Linear) else array
    return arrays


def fit_exactly(model: nn.Layer, arrays: Mapping[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    """Return the arrays in the types of the model, `what` by name; `CheckpointError` lists all that does not fit."""
    own = model.state_dict()
    faults = {
        "missing": [key for key in own if key not in arrays],
        "left over": [key for key in arrays if key not in own],
        "of another shape": [
            f"{key} (file {list(arrays[key].shape)}, model {list(own[key].shape)})"
            for key in own
            if key in arrays and list(arrays[key].shape) != list(own[key].shape)
        ],
    }
    if any(faults.values()):
        lines = [f"{len(names)} {kind}: {listed(names)}" for kind, names in faults.items() if names]
        found = None if faults["missing"] or faults["left over"] else classifier(own, arrays)
        advice = "give the options that they were trained with"
        if found is not None:
            advice = (
                f"they are of {found[1]} classes: convert them without class_num, and load the file with fresh=True "
                "(in a config: Arch.fresh beside Arch.pretrained)"
            )
        raise CheckpointError(f"the published weights are not those of {what}; {advice}\n  " + "\n  ".join(lines))
    return {key: np.ascontiguousarray(arrays[key].astype(type_name(own[key]))) for key in own}
