"""The names that a config gives, looked up in PaddleClas' modules, with the arguments of their constructors."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import UsageError
from ..forms import is_number
from ..registry import Registry
from . import values
from .errors import ConfigError


@functools.cache
def _classes(kind: str, module: str, base: str = "object", own: bool = False) -> Registry:
    """Return the classes in a module of PaddleClas by name: those below `base`, or `own`, that are written in it."""
    package, _, name = base.rpartition(".")
    parent = getattr(importlib.import_module(package), name) if package else object
    known = Registry(kind)
    for name, value in vars(importlib.import_module(module)).items():
        is_one = inspect.isclass(value) and issubclass(value, parent) and value is not parent
        if is_one and (not own or value.__module__ == module):
            known.add(name, value)
    return known


def _constructors(kind: str) -> Registry:
    return _classes(*_KINDS[kind])


_KINDS: dict[str, tuple[Any, ...]] = {
    "optimizer": ("optimizer", "ppcls.optimizer.optimizer", "object", True),
    "schedule": ("schedule of the learning rate", "ppcls.optimizer.learning_rate", "object", True),
    "loss": ("loss", "ppcls.loss", "paddle.nn.Layer"),
    "metric": ("metric", "ppcls.metric", "paddle.nn.Layer"),
    "data set": ("data set", "ppcls.data", "paddle.io.Dataset"),
    "sampler": ("sampler", "ppcls.data", "paddle.io.Sampler"),
    "transform": ("transform", "ppcls.data.preprocess"),
    "postprocess": ("post-processing", "ppcls.data.postprocess"),
}


def check_constructor(kind: str, name: Any, options: Any, where: str, given: Collection[str] = ()) -> None:
    """Raise for a class that PaddleClas does not have, or that cannot be made with these options.

    `given` are the arguments that PaddleClas adds by itself.
    """
    if values.text(name):
        raise ConfigError(f"{where}: the name of the {kind} is {values.shown(name)}; it takes a text")
    options = {} if options is None else options
    try:
        cls = _constructors(kind).get(name)
    except UsageError as error:
        raise error.at(where) from None
    if not isinstance(options, Mapping):
        raise ConfigError(
            f"{where}: the options of {name} are {values.shown(options)}; it takes a section of KEY: VALUE"
        )
    known, is_open, needed = _parameters(cls)
    unknown = [key for key in options if key not in known]
    values.refuse_misspelt(unknown, known, f"{where}: {name}")
    if unknown and not is_open:
        takes = ", ".join(sorted(set(known) - set(given))) or "no options"
        raise ConfigError(f"{where}: {name} has no option {unknown[0]!r}; it takes {takes}")
    lacking = [key for key in needed if key not in options and key not in given]
    if lacking:
        raise ConfigError(f"{where}: {name} needs the option {lacking[0]}")
    for key, value in options.items():
        wrong = _unlike(value, known[key].default) if key in known else None
        wrong = wrong or (values.RATES[key](value) if key in values.RATES else None)
        if kind == "transform" and ("size" in key or "short" in key):
            wrong = wrong or _side(value)
        if wrong:
            raise ConfigError(f"{where}: {key} of {name} is {values.shown(value)}; it takes {wrong}")


def _parameters(cls: type) -> tuple[dict[str, inspect.Parameter], bool, list[str]]:
    """Return the arguments of a constructor by name, those of its bases included where it hands on what it is given;
    whether it takes others as well; and which ones it needs."""
    found: dict[str, inspect.Parameter] = {}
    needed: list[str] | None = None
    levels = [base for base in cls.__mro__[:-1] if "__init__" in vars(base)]
    for base in levels:
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if needed is None:
            needed = [p.name for p in named if p.default is p.empty]
        for parameter in named:
            found.setdefault(parameter.name, parameter)
        if all(p.kind != p.VAR_KEYWORD for p in parameters):
            # What only the first one was given may go no further.
            return found, base is not levels[0], needed
    return found, bool(levels), needed or []


def _unlike(value: Any, default: Any) -> str | None:
    """Return what a value must be to be of its default's kind; PaddleClas evaluates some texts such as 1.0/255.0."""
    if value is None or default is inspect.Parameter.empty or default is None:
        return None
    if isinstance(default, bool):
        return values.truth(value)
    if isinstance(value, str) and re.fullmatch(r"[-+*/().\de ]+", value):
        return None
    if isinstance(default, (int, float)):
        return "a number" if isinstance(value, (str, bool, Mapping)) else None
    if isinstance(default, (list, tuple)):
        return "a list" if isinstance(value, (bool, Mapping)) else None
    if isinstance(default, str):
        return None if isinstance(value, str) else "a text"
    return None


def _side(value: Any) -> str | None:
    """Return what the size of an image must be; a pair is height and width."""
    sides = value if isinstance(value, list) else [value]
    wrong = sides and any(is_number(side) and not 0 < side <= values.LONGEST_SIDE for side in sides)
    return f"numbers above 0 and up to {values.LONGEST_SIDE}" if wrong else None


def check_operators(
    kind: str, given: Any, where: str, by_ppcls: Collection[str] = (), more: Collection[str] = ()
) -> None:
    """Check a list of `NAME: OPTIONS`; `more` are options that PaddleClas takes out before it calls the constructor."""
    if not isinstance(given, list):
        raise ConfigError(f"{where} is {values.shown(given)}; it takes a list of NAME: OPTIONS")
    for number, entry in enumerate(given):
        name, options = only_entry(entry, f"{where}.{number}")
        if isinstance(options, Mapping):
            for key in more:
                if key not in options:
                    raise ConfigError(f"{where}.{number}: {name} needs the option {key}")
            values.check_values({key: options[key] for key in more}, values.RATES, f"{where}.{number}.{name}")
            options = {key: value for key, value in options.items() if key not in more}
        elif more:
            raise ConfigError(f"{where}.{number}: {name} needs the option {more[0]}")
        check_constructor(kind, name, options, f"{where}.{number}", by_ppcls)


def only_entry(entry: Any, where: str) -> tuple[str, Any]:
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(f"{where} is {values.shown(entry)}; it takes one NAME: OPTIONS")
    return next(iter(entry.items()))


def parameters_of(kind: str, name: Any, where: str) -> Collection[str]:
    if values.text(name):
        raise ConfigError(f"{where}: the name of the {kind} is {values.shown(name)}; it takes a text")
    try:
        return _parameters(_constructors(kind).get(name))[0]
    except UsageError as error:
        raise error.at(where) from None
