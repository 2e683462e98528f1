"""Sections that this library adds to PaddleClas' configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from . import values
from .errors import ConfigError


class Key(NamedTuple):
    """What holds where a section does not say, and what may be said."""

    default: Any
    check: values.Check


def read(config: Mapping[str, Any], name: str, keys: Mapping[str, Key], example: str) -> dict[str, Any] | None:
    """Return a section with its defaults, or None where the config has none.

    Raises `ConfigError` for what is no mapping, with an example of one, for other keys, and for values of another kind.
    """
    section = config.get(name)
    if section in (None, "null"):
        # "null" is what an override on the command line makes of YAML's null.
        return None
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name} is {section!r}; give it as {example}, or null for none")
    unknown = sorted(set(section) - set(keys))
    if unknown:
        raise ConfigError(f"{name} has no {', '.join(unknown)}; it takes {', '.join(keys)}")
    settings = {key: section.get(key, default) for key, (default, _) in keys.items()}
    values.check_values(settings, {key: check for key, (_, check) in keys.items()}, name)
    return settings
