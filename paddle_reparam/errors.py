"""The errors that users see: one sentence with what, where, and what to do; and what a command makes of them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterator


class ReparamError(ValueError):
    """Something that the user asked for cannot be done; the message says why and what to do."""

    def at(self, path: str) -> ReparamError:
        """Return the same error with the path of the layer it belongs to in front of its message."""
        return type(self)(f"{path}: {self}")


class UnsupportedConv(ReparamError):
    """A convolution that a layer or a rewrite cannot stand in for; `replace` lists it as skipped with this reason."""


class UsageError(ReparamError):
    """What was asked for cannot be meant, whatever is in the files: a name, an option, a place that is taken."""


class UnknownName(UsageError):
    """A name that nothing is registered under."""


class NothingProven(ReparamError):
    """A comparison that would pass whatever was wrong, because the output hardly depends on the input."""


class NothingToFuse(ReparamError):
    """A network in which fusing would change nothing, although that is what was asked for."""


class CheckpointError(ReparamError):
    """A weight file that cannot be read, or whose keys and shapes are not those of the model."""


class MissingFile(CheckpointError, UsageError):
    """A file or folder, of weights mostly, that is not where it was said to be."""


class OutputExists(UsageError):
    """The file or folder to write stands there already, and may not be replaced."""


#: How to replace it all the same, in Python and on the command line.
BY_FORCE = "replace it with force=True (in a command, --force)"
#: What releases a network that fusing does not make faster.
BY_TUNING = "another runtime or precision may be faster: release it with a tuning (in a command, --tune or --precision)"


#: What a terminal does not show but obeys: controls, directions of writing, halves of characters, ends of lines.
_NOT_SHOWN = ("Cc", "Cf", "Cs", "Zl", "Zp")
#: Some scripts join letters by these two.
_JOINERS = "\u200c\u200d"


def printable(text: str, kept: str = "") -> str:
    """Return a text from a file with what a terminal would obey written out, as in \\x1b, but for those in `kept`."""
    return "".join(
        character
        if character in _JOINERS + kept or unicodedata.category(character) not in _NOT_SHOWN
        else character.encode("unicode_escape").decode()
        for character in text
    )


@contextlib.contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Raise whatever is raised in the `with` block as a `ReparamError` that says what, and why in one line."""
    try:
        yield
    except (ReparamError, BrokenPipeError):
        raise
    except Exception as error:
        raise ReparamError(f"{what}: {reason_of(error)}") from error


def ours_beneath(error: BaseException | None) -> ReparamError | None:
    """Return the `ReparamError` that led to an error of somebody else's code, or None."""
    while error is not None and not isinstance(error, ReparamError):
        error = error.__cause__ or error.__context__
    return error


def reason_of(error: BaseException) -> str:
    """Return in one line what an error of somebody else's code says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines and isinstance(error, AssertionError):
        # It says no more than the line of code does.
        lines = [str(frame.line) for frame in traceback.extract_tb(error.__traceback__)]
    # Paddle prints its call stack first; what happened is in the line that names an error or, as in "(InvalidArgument)
    # ...", its kind, or the last one.
    told = [line for line in lines if re.match(r"\([A-Z][A-Za-z]+\) ", line)] or lines[-1:]
    return next((line for line in lines if "Error:" in line), ": ".join([type(error).__name__, *told[:1]]))


@contextlib.contextmanager
def exit_code() -> Iterator[list[int]]:
    """Print a `ReparamError` or `OSError` of the `with` block; what is given holds the exit code.

    It is 2 for wrong usage and 1 for what else is wrong; 130 where the user interrupted it, as a shell says, and 141
    where nobody reads what is printed any more. Warnings are not shown, unless Python was told to (`-W`): what a
    library tells the code that calls it, nobody who types a command can act on.
    """
    result = [0]
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield result
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        result[0] = 141
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        result[0] = 130
    except (ReparamError, OSError) as error:
        text = printable(str(error), kept="\n")
        print(f"error: {text}", file=sys.stderr)
        result[0] = 2 if isinstance(error, UsageError) else 1
