"""The errors that users see: one sentence with what, where, and what to do."""


class ReparamError(ValueError):
    """Something that the user asked for cannot be done; the message says why and what to do."""

    def at(self, path: str) -> "ReparamError":
        """Return the same error with the path of the layer it belongs to in front of its message."""
        return type(self)(f"{path}: {self}")


class UnsupportedConv(ReparamError):
    """A convolution that a layer or a rewrite cannot stand in for; `replace` lists it as skipped with this reason."""


class UnknownName(ReparamError):
    """A name that nothing is registered under."""


class NothingProven(ReparamError):
    """A comparison that would pass whatever was wrong, because the output hardly depends on the input."""


class CheckpointError(ReparamError):
    """A weight file that cannot be read, or whose keys and shapes are not those of the model."""
