"""What a release's manifest may hold, by key: checked once, when it is read or written, so that all can trust it.

A new entry of the manifest is a line in `MANIFEST_FORM`; what has no line may be anything, and nobody may rely on it.
"""

from __future__ import annotations

import math
from typing import Any

from ..forms import (
    boolean,
    dict_of,
    either,
    list_of,
    nothing_or,
    number,
    one_of,
    plain_name,
    record,
    require,
    sha256,
    text,
    whole,
)  # fmt: skip

#: Numbers that a sample of all inputs may have: the probe, made of two samples, then takes less than a gigabyte.
LARGEST_INPUT = 2**24
#: What a release may call the same function, relative.
LARGEST_TOLERANCE = 0.1
#: What rounding to fewer bits may change of the probe's output, relative; from 1 on it proves nothing.
_LARGEST_ROUNDING = 100.0
_LARGEST_IMAGE = 2**13

# ---------------------------------------------------------------------------------------------------------------------
# The manifest


def _input_shape(value: Any, place: str) -> None:
    """Take a shape with None for the batch, of a size that can be held."""
    list_of(nothing_or(whole(-1, LARGEST_INPUT)), 1, 8)(value, place)
    sizes = value[1:]
    require(value[0] in (None, -1) or value[0] >= 1, place)
    require(all(size is not None and size >= 1 for size in sizes) and math.prod(sizes) <= LARGEST_INPUT, place)


def _input(value: Any, place: str) -> None:
    """Take `input`, whose names are those of its shapes and whose normalisation is for one input's channels."""
    _INPUT(value, place)
    require(value["names"] is None or len(value["names"]) == len(value["shape"]), f"{place}.names")
    require(sum(math.prod(shape[1:]) for shape in value["shape"]) <= LARGEST_INPUT, f"{place}.shape")
    taken = value["normalization"]
    if taken is not None:
        channels = [shape[1:2] for shape in value["shape"]]
        require(
            channels == [[len(taken["mean"])]] and len(taken["std"]) == len(taken["mean"]), f"{place}.normalization"
        )
        require(0 not in taken["std"], f"{place}.normalization.std")


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

_OUTPUT = record({
    "activation": one_of(None, "softmax", "argmax", "sigmoid", "l2", "identity"), "keys": list_of(text, 0, 64),
    "left_out": list_of(text),
})  # fmt: skip

#: What the outputs are of, where that is not the image as a whole: "segmentation", of its pixels.
_TASK = one_of("segmentation")

_LABELS = nothing_or(list_of(nothing_or(text)))

#: What a single file says of itself, which is a part of what the manifest beside it says.
DESCRIPTION_FORM = record({"input": _input, "output": _OUTPUT}, {"labels": _LABELS, "task": _TASK})

MANIFEST_FORM = record(
    {
        "files": dict_of(plain_name, record({"bytes": whole(), "sha256": sha256}, closed=True)),
        "input": _input,
        "output": _OUTPUT,
        "plain_weights": record(
            {"file": nothing_or(plain_name), "why_none": nothing_or(text)}, {"arch": nothing_or(record({"name": text}))}
        ),
        "probe": record({
            "scale": number(1e-9, 1e9), "input_sha256": sha256, "tolerance": number(1e-12, LARGEST_TOLERANCE),
        }),
        "quantization": record({"kernels": list_of(_KERNEL)}),
        "size": record({"train_form": _SIZE, "fused": _SIZE}),
    },
    {
        "labels": _LABELS,
        "task": _TASK,
        # By which runtimes it is to be used, the fastest first, and how far each may be off for the probe.
        "serving": list_of(record({"runtime": text, "tolerance": number(1e-12, _LARGEST_ROUNDING)}), 1, 64),
    },
)  # fmt: skip
