"""What the papers' figures share: find a paper's layers, watch them over images, lay their numbers out as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ..arithmetic.tensors import to_float64
from ..errors import ReparamError
from ..layers.base import ReparamLayer
from ..report import format_table

#: Images that run through a model at once.
BATCH = 64


def layers_of(model: nn.Layer, *kinds: type[ReparamLayer]) -> dict[str, Any]:
    """Return path -> layer for the layers of some kinds, in train form; raises `ReparamError` where there is none."""
    found = {
        path: layer
        for path, layer in model.named_sublayers(include_self=True)
        if isinstance(layer, kinds) and not layer.is_repped
    }
    if not found:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ReparamError(f"this {type(model).__name__} has no {names} in train form; analyse a network that has one")
    return found


def watch(
    model: nn.Layer,
    layers: Mapping[str, nn.Layer],
    images: np.ndarray,
    read: Callable[[nn.Layer, paddle.Tensor, paddle.Tensor], paddle.Tensor],
) -> dict[str, np.ndarray]:
    """Run images `[N, C, H, W]` through a model in eval mode; return what `read` makes of each layer, `[N, ...]`.

    `read` gets a layer, its input and its output, and should make them small: all of it is kept. A layer that runs
    several times in one pass gives several values for each image. Raises `ReparamError` for a model in training mode,
    and where a layer did not run.
    """
    if model.training:
        raise ReparamError(
            f"this {type(model).__name__} is in training mode, where its output depends on the batch; call "
            "model.eval() before analysing it"
        )
    seen: dict[str, list[np.ndarray]] = {key: [] for key in layers}

    def hook_of(key: str) -> Callable[..., None]:
        def hook(layer: nn.Layer, inputs: Any, output: paddle.Tensor) -> None:
            x = inputs[0] if isinstance(inputs, (tuple, list)) else inputs
            seen[key].append(to_float64(read(layer, x, output)))

        return hook

    hooks = [layer.register_forward_post_hook(hook_of(key)) for key, layer in layers.items()]
    try:
        with paddle.no_grad():
            for start in range(0, len(images), BATCH):
                model(paddle.to_tensor(images[start : start + BATCH]))
    finally:
        for hook in hooks:
            hook.remove()
    idle = [key for key, values in seen.items() if not values]
    if idle:
        raise ReparamError(f"{idle[0]}: this layer did not run; nothing can be said about it")
    return {key: np.concatenate(values) for key, values in seen.items()}


def numbers_of(row: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are no arrays, by name."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}


def table_of(rows: Sequence[Any]) -> str:
    """Return dataclasses of one kind as a table: a row each, a column for each field that is no array."""
    header = [name.replace("_", " ") for name in numbers_of(rows[0])]
    return format_table(header, [[cell_of(value) for value in numbers_of(row).values()] for row in rows])


def cell_of(value: Any) -> str:
    """Return a number, a name or None as a table shows it."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def share(part: np.ndarray, parts: Iterable[np.ndarray]) -> float:
    """Return the norm of an array as a share of the norms of several; 0 where all of them are zero."""
    total = sum(float(np.linalg.norm(each)) for each in parts)
    return float(np.linalg.norm(part)) / total if total else 0.0
