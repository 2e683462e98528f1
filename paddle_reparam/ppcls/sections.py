"""Sections that this library adds to PaddleClas' configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError


def read(config: Mapping[str, Any], name: str, defaults: Mapping[str, Any], example: str) -> dict[str, Any] | None:
    """Return a section with its defaults, or None where the config has none.

    Raises `ConfigError` for what is no mapping, with an example of one, and for keys that have no default.
    """
    section = config.get(name)
    if section in (None, "null"):
        # "null" is what an override on the command line makes of YAML's null.
        return None
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name} is {section!r}; give it as {example}, or null for none")
    unknown = sorted(set(section) - set(defaults))
    if unknown:
        raise ConfigError(f"{name} has no {', '.join(unknown)}; it takes {', '.join(defaults)}")
    return {**defaults, **section}
