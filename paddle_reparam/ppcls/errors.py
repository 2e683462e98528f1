"""What is wrong with how a command was called."""

from ..errors import UsageError


class ConfigError(UsageError):
    """A config or an override that cannot work; the message says which part and what to write instead."""
