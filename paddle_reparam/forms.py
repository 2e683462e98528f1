"""What values out of JSON files may be, and what a number is.

A form is a function of (value, place) that raises `Misfit` with the place where the value is of another form.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Callable

from .errors import ReparamError

Form = Callable[[Any, str], None]

_LONGEST_TEXT = 2**16
_LONGEST_LIST = 2**20


class Misfit(ReparamError):
    """A value of another form; the message is its place, such as `input.shape`."""


def is_number(value: Any) -> bool:
    """Return whether a value is an integer or a float; Python says so of True and False too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def require(condition: bool, place: str) -> None:
    """Raise `Misfit` where a condition does not hold."""
    if not condition:
        raise Misfit(place)


# ---------------------------------------------------------------------------------------------------------------------
# Forms of single values


def text(value: Any, place: str) -> None:
    """Take a text."""
    require(isinstance(value, str) and len(value) <= _LONGEST_TEXT, place)


def matching(pattern: str) -> Form:
    """Take a text that a pattern matches as a whole."""

    def form(value: Any, place: str) -> None:
        text(value, place)
        require(re.fullmatch(pattern, value) is not None, place)

    return form


_NAME = r"[^./\\:\0][^/\\:\0]{0,254}"
#: The name of a file in the folder itself: no path, nothing hidden.
plain_name = matching(_NAME)
#: The path of a file in the folder or in one below it.
plain_path = matching(f"{_NAME}(/{_NAME})*")
sha256 = matching("[0-9a-f]{64}")


def boolean(value: Any, place: str) -> None:
    """Take True or False."""
    require(isinstance(value, bool), place)


def whole(least: int = 0, most: int = 2**62) -> Form:
    """Take an integer in these bounds, themselves included."""

    def form(value: Any, place: str) -> None:
        require(is_number(value) and isinstance(value, int) and least <= value <= most, place)

    return form


def number(least: float = -1e30, most: float = 1e30) -> Form:
    """Take an integer or a finite number in these bounds, themselves included."""

    def form(value: Any, place: str) -> None:
        # In this order, as a huge integer is no float.
        require(is_number(value), place)
        require(least <= value <= most and math.isfinite(value), place)

    return form


def one_of(*known: Any) -> Form:
    """Take one of these values, of the same type."""

    def form(value: Any, place: str) -> None:
        require(any(type(value) is type(each) and value == each for each in known), place)

    return form


# ---------------------------------------------------------------------------------------------------------------------
# Forms of values that hold others


def nothing_or(form: Form) -> Form:
    """Take None, or what another form takes."""
    return lambda value, place: None if value is None else form(value, place)


def either(*forms: Form) -> Form:
    """Take what one of these forms takes."""

    def form(value: Any, place: str) -> None:
        for each in forms:
            try:
                return each(value, place)
            except Misfit:
                continue
        raise Misfit(place)

    return form


def list_of(item: Form, least: int = 0, most: int = _LONGEST_LIST) -> Form:
    """Take a list of so many items of a form."""

    def form(value: Any, place: str) -> None:
        require(isinstance(value, list) and least <= len(value) <= most, place)
        for index, each in enumerate(value):
            item(each, f"{place}[{index}]")

    return form


def dict_of(name: Form, item: Form) -> Form:
    """Take a dict whose keys and values have these forms."""

    def form(value: Any, place: str) -> None:
        require(isinstance(value, dict) and len(value) <= _LONGEST_LIST, place)
        for key, each in value.items():
            name(key, place)
            item(each, f"{place}.{key}")

    return form


def record(entries: Mapping[str, Form], optional: Mapping[str, Form] | None = None, closed: bool = False) -> Form:
    """Take a dict with these entries and perhaps the optional ones; with no other where it is `closed`."""
    known = {**entries, **(optional or {})}

    def form(value: Any, place: str) -> None:
        require(isinstance(value, dict), place)
        inside = f"{place}." if place else ""
        for key, entry in known.items():
            if key in value:
                entry(value[key], f"{inside}{key}")
            elif key in entries:
                raise Misfit(f"{inside}{key}")
        for key in value:
            require(not closed or key in known, f"{inside}{key}")

    return form
