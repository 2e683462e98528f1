"""Which `Arch` a released folder may have built: a known network with plain options, and nothing that acts.

PaddleClas evaluates some names and some options as code, and follows `pretrained` to a file that it unpickles. A
config may do so, as it is code. A manifest is data.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from paddle import nn
from ppcls import arch
from ppcls.arch import gears

from ..errors import ReparamError
from ..registry import list_models
from .arch import ENGINE_KEYS

#: Networks that hold others -> their keys for a single one.
_WITH_PARTS = {"RecModel": ("Backbone",), "DistillationModel": (), "AttentionModel": ()}
_GEARS = ("Neck", "Head")
_WORD = re.compile(r"[A-Za-z_]\w{0,63}")
_LAYER_PATH = re.compile(r"[A-Za-z_][\w.\[\]]{0,127}")
#: A network of more classes, wider, or deeper than this is none that somebody has trained.
_LARGEST = 10**6


def check_stock_arch(config: Any) -> None:
    """Raise `ReparamError` for an `Arch` that a manifest may not have built; the message names what is at fault."""
    _check_network(config, "Arch")


def _check_network(config: Any, place: str) -> None:
    name = config.get("name") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in {*_WITH_PARTS, *list_models(), *_stock_networks()}:
        raise ReparamError(f"{place}.name is {str(name)[:80]!r}, which is no network that is known")
    for key, value in config.items():
        inner = f"{place}.{key}"
        if key == "name" or (key in ("pretrained", "pretrained_list") and not value):
            continue
        if key in _WITH_PARTS.get(name, ()):
            _check_network(value, inner)
        elif name == "RecModel" and key in _GEARS:
            _check_gear(value, inner)
        elif name == "RecModel" and key == "BackboneStopLayer":
            if not (isinstance(value, dict) and set(value) == {"name"} and _matches(_LAYER_PATH, value["name"])):
                raise _odd(inner, value)
        elif name in ("DistillationModel", "AttentionModel") and key == "models":
            for each in value if isinstance(value, list) else [None]:
                if not (isinstance(each, dict) and len(each) == 1 and all(_matches(_WORD, part) for part in each)):
                    raise _odd(inner, value)
                _check_network(*each.values(), inner)
        else:
            _check_option(key, value, inner, words=name in list_models() and name not in _stock_networks())


def _check_gear(config: Any, place: str) -> None:
    known = {key for key, value in vars(gears).items() if inspect.isclass(value) and issubclass(value, nn.Layer)}
    if not (isinstance(config, dict) and isinstance(config.get("name"), str) and config["name"] in known):
        raise _odd(place, config)
    for key, value in config.items():
        if key != "name":
            _check_option(key, value, f"{place}.{key}", words=False)


def _check_option(key: Any, value: Any, place: str, words: bool) -> None:
    """Take numbers, booleans, None and lists of them, and, where no builder evaluates them, words."""
    if not _matches(_WORD, key) or key.startswith("pretrained"):
        raise _odd(place, value)
    words = words or key in ENGINE_KEYS
    stack = [(value, 0)]
    while stack:
        each, depth = stack.pop()
        if isinstance(each, list) and len(each) <= 1000 and depth < 4:
            stack += [(inner, depth + 1) for inner in each]
        elif isinstance(each, (int, float)) and -_LARGEST <= each <= _LARGEST:
            continue
        elif not (each is None or (words and _matches(_WORD, each))):
            raise _odd(place, value)


def _stock_networks() -> set[str]:
    """Return the names of PaddleClas' own builders of networks, and of nothing else that it has beside them."""
    return {
        key
        for key, value in vars(arch).items()
        if inspect.isfunction(value) and str(value.__module__).startswith("ppcls.arch.backbone.")
    }


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _odd(place: str, value: Any) -> ReparamError:
    return ReparamError(f"{place} is {str(value)[:80]!r}, which is no plain option")
