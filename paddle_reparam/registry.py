"""Layers and models by name: a decorator registers, `list_*` lists, an unknown name answers with the nearest ones."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable

import numpy as np

from .errors import ReparamError, UnknownName


class Registry:
    """Names of one kind of thing and what stands behind them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Any] = {}

    def add(self, name: str, value: Any) -> None:
        """Register `value`; a name that is taken already raises `ReparamError`."""
        if name in self._entries:
            raise ReparamError(
                f"a {self.kind} named {name!r} is registered already ({self._entries[name]}); choose another name"
            )
        self._entries[name] = value

    def get(self, name: str) -> Any:
        """Return what is registered under `name`, or raise `UnknownName` with the nearest names."""
        if not isinstance(name, str):
            raise UnknownName(f"a {self.kind} is chosen by its name, a text, not by {name!r}")
        if name not in self._entries:
            by_lower_case = {known.lower(): known for known in self._entries}
            near = difflib.get_close_matches(str(name).lower(), by_lower_case, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(by_lower_case[n] for n in near)}?" if near else _known(self.names())
            raise UnknownName(f"there is no {self.kind} named {name!r}; {hint}")
        return self._entries[name]

    def names(self, pattern: str | Sequence[str] = "*") -> list[str]:
        """Return the sorted names that match a shell pattern, or one of several, upper and lower case alike."""
        patterns = [pattern] if isinstance(pattern, str) else pattern
        return sorted(n for n in self._entries if any(fnmatch.fnmatchcase(n.lower(), p.lower()) for p in patterns))


def _known(names: list[str]) -> str:
    """Return names for an error: all of a few, some of many."""
    some = ", ".join(names[:30])
    return f"known: {some}" if len(names) <= 30 else f"{len(names)} are known, such as {some}"


@dataclass(frozen=True)
class LayerEntry:
    """A registered layer class and, where the shared contract test cannot test it, the reason."""

    layer: type
    untestable: str | None


@dataclass(frozen=True)
class Published:
    """What others published of a network: `top1` accuracy in percent, `source` says who and where.

    `options` are the builder's arguments that make this network, `input_size` the side of its images in pixels. `top1`
    is None where no text source gives one. `sparsity` is the share of zeros in the weights of two and four axes.
    """

    source: str
    top1: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    input_size: int = 224
    sparsity: float = 0.0


@dataclass(frozen=True)
class ModelEntry:
    """A registered builder, what was published of its networks, how published weights are renamed for it, and whether
    PaddleClas may have the same network under the same name."""

    build: Callable[..., Any]
    published: Sequence[Published]
    rename: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None
    in_paddleclas: bool = False


_layers = Registry("layer")
_models = Registry("model")


def register_layer(cls: type | None = None, *, untestable: str | None = None) -> Any:
    """Class decorator: register a layer under its class name.

    Every registered layer is run through the shared contract test; `untestable` is the reason why one is not.
    """
    if cls is None:
        return lambda c: register_layer(c, untestable=untestable)
    _layers.add(cls.__name__, LayerEntry(cls, untestable))
    return cls


def register_model(
    builder: Callable[..., Any] | None = None,
    *,
    published: Sequence[Published] = (),
    rename: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
    in_paddleclas: bool = False,
) -> Callable[..., Any]:
    """Decorator: register a function that builds a model under the function's name.

    `published`: one entry for each network that its paper or repository published. `rename`: takes the state dict of a
    published weight file, by its own keys, and returns the arrays under the names of this library; the running
    statistics of BNs and the layout of `nn.Linear` are seen to by `published.convert_state`. `in_paddleclas`: where
    PaddleClas has a network of this name it is the same one, and a config that names it gets PaddleClas' own.
    """
    if builder is None:
        return lambda b: register_model(b, published=published, rename=rename, in_paddleclas=in_paddleclas)
    _models.add(builder.__name__, ModelEntry(builder, tuple(published), rename, in_paddleclas))
    return builder


def list_layers(pattern: str | Sequence[str] = "*") -> list[str]:
    """Return the names of the registered layers that match a shell pattern, or one of several."""
    return _layers.names(pattern)


def get_layer(name: str) -> LayerEntry:
    """Return the entry of a registered layer; `UnknownName` names the nearest ones."""
    return _layers.get(name)


def list_models(pattern: str | Sequence[str] = "*") -> list[str]:
    """Return the names of the registered models that match a shell pattern, e.g. `"*spconv*"`, or one of several."""
    return _models.names(pattern)


def get_model(name: str) -> ModelEntry:
    """Return the entry of a registered model; `UnknownName` names the nearest ones."""
    return _models.get(name)


def create_model(name: str, **kwargs: Any) -> Any:
    """Build a registered model by name; keyword arguments go to its builder."""
    return get_model(name).build(**kwargs)
