"""Published weight files: read without running what they contain, brought into the form of this library, checked."""

from __future__ import annotations

import argparse
import inspect
import os
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from paddle import nn

from ..errors import BY_FORCE, CheckpointError, MissingFile, OutputExists, ReparamError
from ..files import atomic_write
from ..registry import create_model, get_model
from ..report import Report, format_table
from ..surgery.rewrite import reparameterize
from ..surgery.verify import VerifyReport, verify
from . import checkpoints
from .published import fit_exactly, in_our_names

#: The parts of a training checkpoint that hold the weights, and the parts that hold their moving average.
PLAIN_PARTS = ("state_dict", "model", "module")
EMA_PARTS = ("model_ema", "state_dict_ema")

# Of older versions, `weights_only` is known to run code that a file brings along (CVE-2025-32434).
_TORCH = (2, 6)
_BY_SUFFIX = {".npz": "npz", ".safetensors": "safetensors", ".pdparams": "Paddle", ".pdema": "Paddle"}
# Networks that take images of any size are checked with small ones.
_SMALL = 64


@dataclass(frozen=True)
class PublishedWeights:
    """What lies in a weight file: arrays by published key, in torch's layouts, float16 and bfloat16 as float32.

    `kind` is the file's format, `part` the part of the checkpoint that the arrays come from ("" where the file holds
    nothing else), `types` how many arrays of each type it has, `has_ema` whether it holds a moving average as well.
    """

    arrays: Mapping[str, np.ndarray]
    kind: str
    part: str
    types: Mapping[str, int]
    has_ema: bool


@dataclass
class ConversionReport(Report):
    """What a conversion found and wrote; `check` compares the train form with the fused network."""

    name: str
    options: Mapping[str, Any]
    source: str
    kind: str
    part: str
    has_ema: bool
    entries: int
    types: Mapping[str, int]
    merged: bool
    class_num: int | None
    class_num_from_file: bool
    nonzero: float
    output: str
    written: int
    input_shape: Sequence[int | None]
    check: VerifyReport

    def __str__(self) -> str:
        part = self.part or "the whole file"
        if self.has_ema and self.part not in EMA_PARTS:
            part += " (a moving average is there too: ask for the ema weights)"
        form = "merged (deploy); split into the branches of the train form" if self.merged else "train"
        classes = f"{self.class_num}{' (read from the file)' if self.class_num_from_file else ''}"
        rows = [
            ["network", f"{self.name}{dict(self.options) or ''}"],
            ["file", f"{self.source} ({self.kind})"],
            ["part", part],
            ["entries", f"{self.entries}, {', '.join(f'{n} of {kind}' for kind, n in self.types.items())}"],
            ["form", form],
            ["weights that are not zero", f"{self.nonzero:.2%}"],
            ["classes", classes],
            ["written", f"{self.output}, {self.written} entries in train form"],
        ]
        shape = "x".join(str(n) for n in self.input_shape[1:])
        return f"{format_table(['', ''], rows)}\n\nthe train form against the fused network, {shape}\n{self.check}"


def convert(
    name: str,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    weights: str | None = None,
    options: Mapping[str, Any] | None = None,
    force: bool = False,
) -> ConversionReport:
    """Write a published weight file as one for `create_model(name, **options)`, a `.pdparams` or `.safetensors` file.

    Every entry must find its place. The number of classes is read from the file unless `options` has it. What is
    written is loaded again, and the network that it makes compared with its fused form, before it stands under its
    name. `weights`: "plain", or "ema" for the moving average that a training checkpoint may hold as well; None takes
    what the file holds, the plain ones of both.

    Raises `OutputExists` for a file that stands there already, unless `force`, `UnknownName` for a name or option that
    is none, and `ReparamError` where anything else does not hold; nothing is then written.
    """
    if os.path.lexists(output) and not force:
        raise OutputExists(f"{output} exists already and is kept; name another file, or {BY_FORCE}")
    get_model(name)
    published = read_published(source, weights)
    options = dict(options or {})
    model = _build(name, options)
    try:
        renamed = in_our_names(name, published.arrays, model)
        found = None if "class_num" in options else _class_count(name, renamed, model)
        if found is not None:
            options["class_num"] = found
            model = _build(name, options)
        state = fit_exactly(model, renamed, f"{name}{options or ''}")
    except CheckpointError as error:
        raise error.at(str(source)) from error
    shape: list[int | None] = []
    check: VerifyReport | None = None

    def write(path: Path) -> None:
        nonlocal shape, check
        checkpoints.save(state, path)
        checkpoints.load_into(model, path)
        shape, check = _compare_with_fused(name, model)

    atomic_write(output, write)
    counted = {key: a for key, a in published.arrays.items() if not key.endswith("num_batches_tracked")}
    large = [array for array in counted.values() if array.ndim > 1]
    return ConversionReport(
        name=name,
        options={key: value for key, value in options.items() if key != "class_num"},
        source=str(source),
        kind=published.kind,
        part=published.part,
        has_ema=published.has_ema,
        entries=len(published.arrays),
        types=published.types,
        merged=len(counted) < len(state),
        class_num=options.get("class_num", _default_class_count(name)),
        class_num_from_file=found is not None,
        nonzero=sum(np.count_nonzero(a) for a in large) / max(sum(a.size for a in large), 1),
        output=str(output),
        written=len(state),
        input_shape=shape,
        check=check,
    )


def _build(name: str, options: Mapping[str, Any]) -> nn.Layer:
    try:
        return create_model(name, **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, ReparamError):
            raise
        raise ReparamError(f"{name} cannot be built with {dict(options)}: {error}") from error


def _default_class_count(name: str) -> int | None:
    parameter = inspect.signature(get_model(name).build).parameters.get("class_num")
    return None if parameter is None else parameter.default


def _class_count(name: str, arrays: Mapping[str, np.ndarray], model: nn.Layer) -> int | None:
    """Return the number of classes of arrays that differ from the model in that number; None where they do not."""
    default, counts = _default_class_count(name), set()
    for key, tensor in model.state_dict().items():
        ours, theirs = list(tensor.shape), list(arrays[key].shape) if key in arrays else []
        different = [pair for pair in zip(ours, theirs) if pair[0] != pair[1]] if len(ours) == len(theirs) else []
        if len(different) == 1 and different[0][0] == default:
            counts.add(different[0][1])
    return counts.pop() if len(counts) == 1 else None


def _compare_with_fused(name: str, model: nn.Layer) -> tuple[list[int | None], VerifyReport]:
    """Return the shape of the images and how far the model's fused form is from the model."""
    model.eval()
    sizes = [published.input_size for published in get_model(name).published] or [224]
    refusal: ReparamError | None = None
    for size in dict.fromkeys([min(_SMALL, sizes[0]), *sizes]):
        shape = [None, 3, size, size]
        try:
            fused, _ = reparameterize(model, fold_bn=True, input_spec=[shape])
        except ReparamError as error:  # Some networks take images of one size only.
            refusal = error
            continue
        report = verify(model, fused, [shape])
        report.raise_if_failed("the fused form of the converted network")
        return shape, report
    raise refusal


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_published(path: str | os.PathLike[str], weights: str | None = None) -> PublishedWeights:
    """Return the arrays of a published weight file, without running anything that the file contains.

    `.npz`, `.safetensors` and `.pdparams` are read as `checkpoints.load` does; Paddle's own names and layouts are
    brought into torch's. Every other file is taken for one of PyTorch, which must be installed: `.pth`, `.pt`,
    `.pth.tar`, `.bin`. Of a training checkpoint, `weights` chooses what is taken: "plain" (`state_dict`, `model` or
    `module`, and for None) or "ema" (`model_ema`, `state_dict_ema`). PaddleClas has them in two files, of which
    `.pdparams` holds the average where there is a `.pdema`, and that the plain ones; there it must be the right file.

    Raises `CheckpointError` where the file cannot be read, holds no such weights or would run code.
    """
    if weights not in (None, "plain", "ema"):
        raise ReparamError(f"there are no weights {weights!r}; choose 'plain' or 'ema'")
    kind = _BY_SUFFIX.get(Path(path).suffix.lower(), "PyTorch")
    try:
        content = _load_torch(Path(path)) if kind == "PyTorch" else checkpoints.load(path)
    except CheckpointError as error:
        raise error if kind != "PyTorch" else error.at(str(path)) from error
    has_ema = isinstance(content, Mapping) and any(isinstance(content.get(part), Mapping) for part in EMA_PARTS)
    try:
        part, state = _part_of_two(Path(path), weights), content
        if part is None:
            part, state = _open(content, weights or "plain")
        arrays, types = {}, Counter()
        for key, value in state.items():
            arrays[key], dtype = _array_of(key, value)
            types[dtype] += 1
    except CheckpointError as error:
        raise error.at(str(path)) from None
    if kind == "Paddle" or any(key.endswith("._mean") for key in arrays):
        arrays = {key: a.T if key.endswith(".weight") and a.ndim == 2 else a for key, a in arrays.items()}
    return PublishedWeights(arrays, kind, part, dict(types), has_ema)


def _part_of_two(path: Path, weights: str | None) -> str | None:
    """Return which weights a file of PaddleClas holds where it wrote two; None for every other file.

    Raises `CheckpointError` where the other ones are asked for.
    """
    average, plain = path.with_suffix(".pdparams"), path.with_suffix(".pdema")
    if path.suffix not in (average.suffix, plain.suffix) or not plain.is_file():
        return None
    found, other, place = ("plain", "ema", average) if path == plain else ("ema", "plain", plain)
    if weights == other:
        raise CheckpointError(f"it holds the {found} weights; give {place} for the {other} ones")
    kinds = {"plain": "the weights as they were trained", "ema": "the moving average of the weights"}
    return f"{kinds[found]} (the other ones: {place.name})"


def _load_torch(path: Path) -> Any:
    """Return what `torch.save` wrote, with tensors in it and nothing that could run."""
    if not path.is_file():
        raise MissingFile("there is no such file")
    way_out = "or save its arrays by name as .safetensors or .npz where PyTorch is"
    try:
        import torch
    except (ImportError, OSError) as error:
        raise CheckpointError(
            f"it is read by PyTorch, which cannot be imported here ({error}); install torch {_TORCH[0]}.{_TORCH[1]} or "
            f"later (the extra `convert` of this package), {way_out}"
        ) from error
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < _TORCH:
        raise CheckpointError(
            f"PyTorch {torch.__version__} may run code of a file that it reads; install torch {_TORCH[0]}.{_TORCH[1]} "
            f"or later, {way_out}"
        )
    try:
        # Training checkpoints hold their command line: an argparse.Namespace, a class that takes values and does
        # nothing with them. It is looked at by nobody here.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"it cannot be read ({error.strerror or error})") from error
    except Exception as error:  # Whatever torch makes of damaged bytes, the user has one thing to know.
        asked = re.search(r"Unsupported (?:global|class|operand)[^A-Za-z]*(?:GLOBAL )?([\w.]+)", str(error))
        if asked:
            raise CheckpointError(
                f"it holds more than arrays and plain values ({asked[1]}); reading that could run code, so it is not "
                "read. If you trust the file, load it in PyTorch and save its state dict alone"
            ) from error
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 150)
        raise CheckpointError(f"it is truncated, damaged or no file of PyTorch; get it again ({reason})") from error


def _open(content: Any, weights: str) -> tuple[str, Mapping[str, Any]]:
    """Return (names of the parts that were opened, the state dict inside)."""
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"it holds a {type(content).__name__} in the place of named weights")
    parts = {part: content[part] for part in (*PLAIN_PARTS, *EMA_PARTS) if isinstance(content.get(part), Mapping)}
    if not parts:
        if weights == "ema":
            raise CheckpointError(
                "it holds one set of weights and no moving average of them; ask for the plain weights"
            )
        return "", content
    wanted = [part for part in (EMA_PARTS if weights == "ema" else PLAIN_PARTS) if part in parts]
    if not wanted:
        other = "plain" if weights == "ema" else "ema"
        raise CheckpointError(
            f"of its parts ({', '.join(map(str, content))}) none are {weights} weights; ask for the {other} weights"
        )
    # What lies deeper is of the kind that was chosen here.
    inner, state = _open(parts[wanted[0]], "plain")
    return f"{wanted[0]}.{inner}" if inner else wanted[0], state


def _array_of(key: Any, value: Any) -> tuple[np.ndarray, str]:
    """Return (the array, the name of the type that it had in the file) of a tensor or an array."""
    if isinstance(value, np.ndarray):
        array = value
        dtype = "bfloat16" if array.dtype == np.uint16 else str(array.dtype)
    elif hasattr(value, "detach") and isinstance(key, str):
        dtype = str(value.dtype).replace("torch.", "")
        array = (value.float() if dtype == "bfloat16" else value).detach().cpu().numpy()
    else:
        raise CheckpointError(
            f"its entry {str(key)!r} is no array but of the type {type(value).__name__}, so this is no state dict"
        )
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return (array.astype(np.float32) if array.dtype == np.float16 else array), dtype
