"""Where layers stand in a network, swapped there, and the report of a walk over it."""

from __future__ import annotations

import copy
import re
import types
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from paddle import nn
from paddle.jit.dy2static.program_translator import StaticFunction

from ..errors import ReparamError, UnsupportedConv
from ..report import Report, format_table
from .tracing import walk

#: What stands behind one of these in a report is of one layer alone: its geometry, or where it went.
_ONE_LAYER = re.compile(r"\(|, this one | into |, \d")
#: Kinds of changes that a short report tells apart.
_KINDS = 12


@dataclass
class RewriteReport(Report):
    """What a walk did: (path, what became of it) and (path, why it was left), each in the order of the model.

    As text it has a row for each kind of change; `table` has one for each layer.
    """

    touched: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    #: What a fused model still carries: reason or kind -> count.
    left_over: dict[str, int] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """Share of what the walk reports that was touched: convolutions, or in fusing layers, blocks and norms."""
        return len(self.touched) / max(1, len(self.touched) + len(self.skipped))

    def __str__(self) -> str:
        counts = Counter(_ONE_LAYER.split(what)[0] for _, what in self.touched)
        counts.update(f"skipped: {_ONE_LAYER.split(why)[0]}" for _, why in self.skipped)
        rows = [[count, kind] for kind, count in counts.items()]
        if len(rows) > _KINDS:
            rows = [*rows[: _KINDS - 1], [sum(count for count, _ in rows[_KINDS - 1 :]), "of other kinds"]]
        return f"{format_table(['layers', 'what / why'], rows)}\n{self._sums()}"

    def table(self) -> str:
        """Return the report with a row for each layer."""
        rows = [[path, "done", what] for path, what in self.touched]
        rows += [[path, "skipped", why] for path, why in self.skipped]
        return f"{format_table(['layer', '', 'what / why'], rows)}\n{self._sums()}"

    def _sums(self) -> str:
        text = f"{len(self.touched)} done, {len(self.skipped)} skipped ({self.coverage:.0%} done)"
        if self.left_over:
            text += "; left over: " + ", ".join(f"{count} {kind}" for kind, count in self.left_over.items())
        return text


def places_of(model: nn.Layer) -> dict[int, tuple[nn.Layer, list[str]]]:
    """Return id -> (layer, all of its paths), in the order of the model."""
    places: dict[int, tuple[nn.Layer, list[str]]] = {}
    for path, layer in walk(model):
        places.setdefault(id(layer), (layer, []))[1].append(path)
    return places


def swap(model: nn.Layer, new_layers: dict[int, nn.Layer]) -> None:
    """Put each new layer at every place of the layer whose id it is listed under.

    Some models call their layers through a Python list that they keep beside the registered sublayers; those are
    followed too.
    """

    def swapped(value: Any) -> Any:
        if isinstance(value, nn.Layer):
            return new_layers.get(id(value), value)
        if type(value) is list:
            value[:] = [swapped(v) for v in value]
        elif type(value) is dict:
            value.update({k: swapped(v) for k, v in value.items()})
        elif type(value) is tuple:
            return tuple(swapped(v) for v in value)
        return value

    layers = [layer for _, layer in walk(model)]
    for layer in layers:
        for name, child in layer._sub_layers.items():
            layer._sub_layers[name] = new_layers.get(id(child), child)
        for name, value in vars(layer).items():
            # Paddle's own fields start with an underscore and hold no layers but the sublayers just done.
            if not name.startswith("_") and type(value) in (list, dict, tuple):
                vars(layer)[name] = swapped(value)


def has_hooks(layer: nn.Layer) -> bool:
    return bool(layer._forward_pre_hooks or layer._forward_post_hooks)


def refuse_compiled(model: nn.Layer) -> None:
    for path, layer in walk(model):
        if isinstance(vars(layer).get("forward"), StaticFunction):
            raise ReparamError(
                f"{path or type(layer).__name__} was compiled by paddle.jit.to_static, and would go on computing the "
                "layers that it had then; compile the network after its layers were replaced or fused"
            )


def owners_of(model: nn.Layer) -> dict[int, set[int]]:
    """Return id of a parameter -> ids of the layers that hold it."""
    owners: dict[int, set[int]] = {}
    for _, layer in walk(model):
        for parameter in layer._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(id(layer))
    return owners


def refuse_shared(layer: nn.Layer, owners: dict[int, set[int]]) -> None:
    for name, parameter in layer._parameters.items():
        if parameter is not None and len(owners[id(parameter)]) > 1:
            raise UnsupportedConv(f"its {name} is shared with another layer; a new layer would break the tie")


def copy_model(model: nn.Layer, share_tensors: bool = False) -> nn.Layer:
    """Return a deep copy whose hooks speak of the copy; with `share_tensors` it has the model's own tensors.

    `copy.deepcopy` keeps functions as they are, so a hook that is a closure over the model (as PaddleClas'
    return_patterns is) would go on changing the original.
    """
    tensors = (*model.parameters(), *model.buffers()) if share_tensors else ()
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    duplicate = copy.deepcopy(model, memo)

    def rebound(hook: Any) -> Any:
        cells = getattr(hook, "__closure__", None)
        if not isinstance(hook, types.FunctionType) or not cells:
            return hook
        new_cells = tuple(types.CellType(memo.get(id(c.cell_contents), c.cell_contents)) for c in cells)
        return types.FunctionType(hook.__code__, hook.__globals__, hook.__name__, hook.__defaults__, new_cells)

    for _, layer in walk(duplicate):
        for hooks in (layer._forward_pre_hooks, layer._forward_post_hooks):
            for key, hook in hooks.items():
                hooks[key] = rebound(hook)
    return duplicate
