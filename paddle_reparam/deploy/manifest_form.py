"""What a release's manifest may hold, by key: checked once, when it is read or written, so that all can trust it.

A form is a function of (value, place) that raises `Misfit` with the place where the value is of another form. A new
entry of the manifest is a line in `MANIFEST_FORM`; what has no line may be anything, and nobody may rely on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Callable

from ..errors import ReparamError

Form = Callable[[Any, str], None]

#: Numbers that a sample of all inputs may have: the probe, made of two samples, then takes less than a gigabyte.
LARGEST_INPUT = 2**24
#: What a release may call the same function, relative.
LARGEST_TOLERANCE = 0.1
_LONGEST_TEXT = 2**16
_LONGEST_LIST = 2**20
_LARGEST_IMAGE = 2**13


class Misfit(ReparamError):
    """A value of another form; the message is its place, such as `input.shape`."""


def _require(condition: bool, place: str) -> None:
    if not condition:
        raise Misfit(place)


# ---------------------------------------------------------------------------------------------------------------------
# Forms of single values


def text(value: Any, place: str) -> None:
    """Take a text."""
    _require(isinstance(value, str) and len(value) <= _LONGEST_TEXT, place)


def plain_name(value: Any, place: str) -> None:
    """Take the name of a file in the folder itself: no path, nothing hidden."""
    text(value, place)
    _require(re.fullmatch(r"[^./\\:\0][^/\\:\0]{0,254}", value) is not None, place)


def matching(pattern: str) -> Form:
    """Take a text that a pattern matches as a whole."""

    def form(value: Any, place: str) -> None:
        text(value, place)
        _require(re.fullmatch(pattern, value) is not None, place)

    return form


def boolean(value: Any, place: str) -> None:
    """Take True or False."""
    _require(isinstance(value, bool), place)


def whole(least: int = 0, most: int = 2**62) -> Form:
    """Take an integer in these bounds, themselves included."""

    def form(value: Any, place: str) -> None:
        _require(isinstance(value, int) and not isinstance(value, bool) and least <= value <= most, place)

    return form


def number(least: float = -1e30, most: float = 1e30) -> Form:
    """Take an integer or a finite number in these bounds, themselves included."""

    def form(value: Any, place: str) -> None:
        # In this order, as a huge integer is no float.
        _require(isinstance(value, (int, float)) and not isinstance(value, bool), place)
        _require(least <= value <= most and math.isfinite(value), place)

    return form


def one_of(*known: Any) -> Form:
    """Take one of these values, of the same type."""

    def form(value: Any, place: str) -> None:
        _require(any(type(value) is type(each) and value == each for each in known), place)

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
        _require(isinstance(value, list) and least <= len(value) <= most, place)
        for index, each in enumerate(value):
            item(each, f"{place}[{index}]")

    return form


def dict_of(name: Form, item: Form) -> Form:
    """Take a dict whose keys and values have these forms."""

    def form(value: Any, place: str) -> None:
        _require(isinstance(value, dict) and len(value) <= _LONGEST_LIST, place)
        for key, each in value.items():
            name(key, place)
            item(each, f"{place}.{key}")

    return form


def record(entries: Mapping[str, Form], optional: Mapping[str, Form] | None = None, closed: bool = False) -> Form:
    """Take a dict with these entries and perhaps the optional ones; with no other where it is `closed`."""
    known = {**entries, **(optional or {})}

    def form(value: Any, place: str) -> None:
        _require(isinstance(value, dict), place)
        inside = f"{place}." if place else ""
        for key, entry in known.items():
            if key in value:
                entry(value[key], f"{inside}{key}")
            elif key in entries:
                raise Misfit(f"{inside}{key}")
        for key in value:
            _require(not closed or key in known, f"{inside}{key}")

    return form


# ---------------------------------------------------------------------------------------------------------------------
# The manifest


def _input_shape(value: Any, place: str) -> None:
    """Take a shape with None for the batch, of a size that can be held."""
    list_of(nothing_or(whole(-1, LARGEST_INPUT)), 1, 8)(value, place)
    sizes = value[1:]
    _require(value[0] in (None, -1) or value[0] >= 1, place)
    _require(all(size is not None and size >= 1 for size in sizes) and math.prod(sizes) <= LARGEST_INPUT, place)


def _input(value: Any, place: str) -> None:
    """Take `input`, whose names are those of its shapes and whose normalisation is for one input's channels."""
    _INPUT(value, place)
    _require(value["names"] is None or len(value["names"]) == len(value["shape"]), f"{place}.names")
    _require(sum(math.prod(shape[1:]) for shape in value["shape"]) <= LARGEST_INPUT, f"{place}.shape")
    taken = value["normalization"]
    if taken is not None:
        channels = [shape[1:2] for shape in value["shape"]]
        _require(
            channels == [[len(taken["mean"])]] and len(taken["std"]) == len(taken["mean"]), f"{place}.normalization"
        )
        _require(0 not in taken["std"], f"{place}.normalization.std")


_hexadecimal = matching("[0-9a-f]{64}")
_side = whole(1, _LARGEST_IMAGE)
_sides = either(_side, list_of(_side, 2, 2))
_channels = list_of(number(), 1, 64)

_STEP = either(
    record({"ResizeImage": record({}, {
        "size": nothing_or(_sides), "resize_short": nothing_or(_side), "interpolation": nothing_or(text),
        "backend": text, "return_numpy": boolean,
    })}, closed=True),
    record({"CropImage": record({"size": _sides})}, closed=True),
    record({"NormalizeImage": record(
        {"mean": _channels, "std": _channels, "scale": number()}, {"order": one_of("", "chw", "hwc")}
    )}, closed=True),
    *(record({name: record({})}, closed=True) for name in ("ToCHWImage", "ToGray")),
)  # fmt: skip

_INPUT = record(
    {
        # One shape for each input.
        "shape": list_of(_input_shape, 1, 64),
        # Their names, where the network takes one dict of them.
        "names": nothing_or(list_of(text, 1, 64)),
        "dtype": one_of("uint8", "float16", "float32", "float64"),
        "size": one_of("fixed", "dynamic"),
        "normalization": nothing_or(record({
            "mean": _channels, "std": _channels, "scale": number(), "dtype": one_of("uint8", "float32"),
        }, closed=True)),
    },
    {"preprocessing": nothing_or(list_of(_STEP, 0, 64))},
)  # fmt: skip

_SIZE = record({
    **{key: whole() for key in ("trainable_parameters", "frozen_parameters", "nonzero_parameters", "macs_per_image",
                                "macs_per_pass", "layers")},
    "uncounted": list_of(text),
}, closed=True)  # fmt: skip

_KERNEL = record({
    "path": text, "shape": list_of(whole(), 1, 8), "outliers": list_of(whole()),
    **{key: number(0.0) for key in ("largest", "spread", "error_per_tensor", "error_per_channel")},
}, closed=True)  # fmt: skip

MANIFEST_FORM = record(
    {
        "files": dict_of(plain_name, record({"bytes": whole(), "sha256": _hexadecimal}, closed=True)),
        "input": _input,
        "output": record({
            "activation": one_of(None, "softmax", "sigmoid", "identity"), "keys": list_of(text, 0, 64),
            "left_out": list_of(text),
        }),
        "plain_weights": record(
            {"file": nothing_or(plain_name), "why_none": nothing_or(text)}, {"arch": nothing_or(record({"name": text}))}
        ),
        "probe": record({
            "scale": number(1e-9, 1e9), "input_sha256": _hexadecimal, "tolerance": number(1e-12, LARGEST_TOLERANCE),
        }),
        "quantization": record({"kernels": list_of(_KERNEL)}),
        "size": record({"train_form": _SIZE, "fused": _SIZE}),
    },
    {"labels": nothing_or(list_of(nothing_or(text)))},
)  # fmt: skip
