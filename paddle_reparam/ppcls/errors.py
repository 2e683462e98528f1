"""What is wrong with how a command was called."""

from ..errors import ReparamError


class ConfigError(ReparamError):
    """A config or an override that cannot work; the message says which part and what to write instead."""
