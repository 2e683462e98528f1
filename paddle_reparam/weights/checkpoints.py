"""Weight files: read without running what they contain, written whole or not at all, loaded strictly."""

from __future__ import annotations

import fnmatch
import os
import stat
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import paddle
from paddle import nn

from ..arithmetic.tensors import type_name
from ..errors import CheckpointError, MissingFile, ReparamError
from ..files import atomic_write
from ..registry import get_layer, list_layers
from ..report import Report, format_table
from ..surgery import masks
from ..surgery.computed_weights import refresh_computed_weights
from . import pickles
from .formats import READERS, WRITERS, identical, kind_of

# Axes of an entry -> the one that counts the classes where it is a classifier's: a bias, a Linear, a 1x1 convolution.
_CLASS_AXIS = {1: 0, 2: 1, 4: 0}


@dataclass(frozen=True)
class LoadReport(Report):
    """What `load_into` did: the entries that were loaded, those left as they were, the percentage of the first.

    `missing` are those that the file may lack, `fresh` those that were not to be loaded.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    coverage: float
    fresh: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.fresh)
        rows = [["loaded", len(self.loaded), ""], ["left as they were", len(self.missing), listed(self.missing)]]
        if self.fresh:
            rows.append(["fresh, as they were drawn", len(self.fresh), listed(self.fresh)])
        table = format_table(["entries of the model", "count", "names"], rows)
        return f"{table}\ncoverage {self.coverage:.1f} % of {total}"


def weight_file(path: str | os.PathLike[str]) -> str:
    """Return the file that a path names, with or without its suffix `.pdparams`; raises `MissingFile` for none."""
    path = os.fspath(path)
    for file in (path, f"{path}.pdparams"):
        if os.path.isfile(file):
            return file
    if os.path.isdir(path):
        inside = sorted(Path(path).glob("*.pdparams"))
        hint = f", such as {inside[0]}" if inside else ""
        raise MissingFile(f"{path} is a folder and no weight file; name a file{hint}")
    raise MissingFile(f"there is no weight file {path} or {path}.pdparams")


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the arrays of a weight file by name, without running anything that the file contains.

    Reads `.safetensors`, the pickles that Paddle and PaddleClas write (`.pdparams`, `.pdema`) and `.npz`, told apart
    by content. bfloat16 comes as uint16, its bits, as Paddle itself hands it over.

    A changed byte is noticed in what `save` wrote, and in `.npz`, whose zip format has checksums. Pickles and
    `.safetensors` by other programs have none: there, a change among the numbers themselves goes unnoticed.

    Raises `CheckpointError`, and nothing else, where the file cannot be read.
    """
    try:
        # Of a pipe nobody knows when it ends.
        if not stat.S_ISREG(mode := os.stat(path).st_mode) and not stat.S_ISDIR(mode):
            raise CheckpointError(f"{path}: it is no file but a device or a pipe")
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise MissingFile(f"{path}: it cannot be read ({error.strerror})") from error
    except OSError as error:
        raise CheckpointError(f"{path}: it cannot be read ({error.strerror})") from error
    kind = kind_of(data, Path(path).suffix)
    try:
        if kind is None:
            raise CheckpointError(
                "it is empty"
                if not data
                else "it is no .safetensors, .pdparams, .pdema or .npz file, by name or content"
            )
        arrays = READERS[kind](data)
        if not arrays:
            raise CheckpointError("it holds no arrays")
    except CheckpointError as error:
        raise error.at(str(path)) from None
    except ImportError as error:
        raise CheckpointError(f"{path}: it needs a package that is not installed: {error}") from error
    except Exception as error:  # Whatever a parser makes of damaged bytes, the user has one thing to know.
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 150)
        raise CheckpointError(
            f"{path}: it is truncated, damaged or no {kind} file; get or save it again ({reason})"
        ) from error
    del data  # large weights need not be here three times
    # One copy for each array, in this machine's byte order, that can be written to.
    copies = {id(array): np.array(array, array.dtype.newbyteorder("="), order="C") for array in arrays.values()}
    return {name: copies[id(array)] for name, array in arrays.items()}


def save(state: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state dict of Tensors or arrays to a `.safetensors` or `.pdparams` file, whole or not at all.

    Either carries a sha256 that `load` checks; other readers do not see it. A `.pdparams` file is what `paddle.save`
    writes. uint16 is bfloat16, as everywhere in Paddle. What was written is read back and compared before it takes
    the place of an older file.

    Raises `CheckpointError` for another suffix or what is no array, `ReparamError` where it cannot be written.
    """
    suffix = Path(path).suffix
    if suffix not in WRITERS:
        raise CheckpointError(
            f"{path}: weights are written as {' or '.join(WRITERS)}, not as {suffix or 'no suffix'!r}"
        )
    try:
        arrays = _to_arrays(state)
    except CheckpointError as error:
        raise error.at(str(path)) from None
    data = WRITERS[suffix](arrays)

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)
        if not identical(load(temporary), arrays):
            raise ReparamError("what was read back is not what was written; the disk or the memory may be failing")

    atomic_write(path, write)


def form_of(names: Iterable[str]) -> Literal["train", "fused"]:
    """Tell from its names whether a state dict is one of layers in train form.

    "train": some registered layer's `train_form_keys` are all there under one prefix. "fused": there are none; a
    plain network reads the same.
    """
    present = set(names)
    for entry in map(get_layer, list_layers()):
        keys = entry.layer.train_form_keys
        prefixes = (name[: -len(keys[0])] for name in present if keys and f".{name}".endswith(f".{keys[0]}"))
        if any(all(prefix + key in present for key in keys) for prefix in prefixes):
            return "train"
    return "fused"


def load_into(
    model: nn.Layer,
    path_or_state: str | os.PathLike[str] | Mapping[str, Any],
    may_miss: Sequence[str] = (),
    fresh: bool | Sequence[str] = False,
) -> LoadReport:
    """Load a weight file, or a state dict of Tensors or arrays, into a model: all of it or nothing.

    `may_miss`: shell patterns for entries of the model that the file may lack and that then stay as they are, such as
    `"*.convmap.weight"` where a plain baseline goes into RefConv layers. Float types are cast to the model's. Masks of
    dynamic sparse training that the file carries become buffers of the model.

    `fresh` is for another number of classes. True leaves the classifier as the model drew it: what differs from the
    file in the number of outputs alone. Shell patterns, such as `["head.*"]`, say which entries are not loaded, of
    whatever shape, and what of the file is not looked at. Where the file has a mask for a parameter that stays fresh, a
    new one is drawn, as dense as that.

    Raises `CheckpointError` with the entries that are missing, extra or of another shape or type, and the share in
    percent of the model's entries that fit; also where `fresh` leaves nothing fresh. The model is then unchanged.
    """
    for name, patterns in (("may_miss", may_miss), ("fresh", fresh)):
        if isinstance(patterns, str):
            raise CheckpointError(f"{name} is a list of patterns: write [{patterns!r}]")
    from_file = isinstance(path_or_state, (str, os.PathLike))
    where = weight_file(path_or_state) if from_file else "the state"
    arrays = load(where) if from_file else _to_arrays(path_or_state)
    left = _left_fresh(model.state_dict(use_hook=False), arrays, fresh)
    wanted = {name: array for name, array in arrays.items() if name not in left}
    adopted = masks.adopt_masks(model, wanted)
    try:
        report = _load_arrays(model, wanted, may_miss, left if fresh else None, where)
    except CheckpointError:
        masks.drop_buffers(model, adopted)
        raise
    shares = {
        name[: -len(masks.SUFFIX)]: float(np.mean(arrays[name]))
        for name in left
        if name in arrays and name.endswith(masks.SUFFIX)
    }
    masks.draw_anew(model, shares)
    return report


def _left_fresh(own: Mapping[str, Any], arrays: Mapping[str, np.ndarray], fresh: bool | Sequence[str]) -> set[str]:
    """Return the entries of the model and of a file that `fresh` speaks of, and the masks of its parameters."""
    if fresh is True:
        found = classifier(own, arrays)
        left = set() if found is None else set(found[0])
    else:
        left, names = set(), [*own, *(name for name in arrays if name not in own)]
        for pattern in fresh or ():
            matching = fnmatch.filter(names, pattern)
            if not matching:
                raise CheckpointError(f"fresh {pattern!r} is the name of no entry of the model")
            left.update(matching)
    return left | {f"{name}{masks.SUFFIX}" for name in left}


def classifier(own: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> tuple[list[str], int, int] | None:
    """Return (names, file's number of classes, model's) where the shapes differ in the number of outputs alone.

    More than one layer may count them: auxiliary classifiers, heads that are distilled. Where a layer within the
    network is wider, the layer behind it has more inputs, and this is None.
    """
    shapes = {name: (list(arrays[name].shape), list(own[name].shape)) for name in own if name in arrays}
    different = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    counts = set()
    for theirs, ours in different.values():
        axes = [axis for axis, sizes in enumerate(zip(theirs, ours)) if sizes[0] != sizes[1]]
        if len(theirs) != len(ours) or axes != [_CLASS_AXIS.get(len(ours))]:
            return None
        counts.add((theirs[axes[0]], ours[axes[0]]))
    return (list(different), *counts.pop()) if len(counts) == 1 else None


def _load_arrays(
    model: nn.Layer, arrays: Mapping[str, np.ndarray], may_miss: Sequence[str], left: set[str] | None, where: str
) -> LoadReport:
    """Load arrays; of what is `left` fresh there must be some, unless it is None."""
    everything = model.state_dict(use_hook=False)
    for pattern in may_miss:
        if not fnmatch.filter(everything, pattern):
            raise CheckpointError(f"may_miss {pattern!r} is the name of no entry of the model")

    own = {name: tensor for name, tensor in everything.items() if name not in (left or ())}
    missing = [name for name in own if name not in arrays]
    extra = [name for name in arrays if name not in own]
    both = [name for name in own if name in arrays]
    shapes = [name for name in both if list(arrays[name].shape) != list(own[name].shape)]
    cast = {name: _cast(arrays[name], own[name]) for name in both if name not in shapes}
    types = [name for name, value in cast.items() if value is None]
    too_large = [name for name, value in cast.items() if value is not None and not _same_finite(arrays[name], value)]
    faults = {
        "missing": [n for n in missing if not any(fnmatch.fnmatchcase(n, pattern) for pattern in may_miss)],
        "extra": extra,
        "of another shape": [f"{n} (file {list(arrays[n].shape)}, model {list(own[n].shape)})" for n in shapes],
        "of another type": [f"{n} (file {type_name(arrays[n])}, model {type_name(own[n])})" for n in types],
        "too large for the model's type": [f"{n} (model {type_name(own[n])})" for n in too_large],
    }
    loaded = [name for name in cast if name not in types and name not in too_large]
    coverage = 100.0 * len(loaded) / max(len(own), 1)
    if any(faults.values()):
        lines = [f"{len(names)} {kind}: {listed(names)}" for kind, names in faults.items() if names]
        others = any(names for kind, names in faults.items() if kind != "of another shape")
        hint = _form_hint(arrays, own) or ("" if others else _class_hint(own, arrays))
        raise CheckpointError(
            f"{where}: {hint}it does not fit the model, which is unchanged: "
            f"{len(loaded)} of the model's {len(own)} entries fit ({coverage:.1f} %)\n  " + "\n  ".join(lines)
        )
    if left is not None and not left:
        raise CheckpointError(
            f"{where}: it fits the model as it is, so there is no classifier to leave fresh; leave fresh out"
        )
    if left and not loaded:
        raise CheckpointError(f"{where}: nothing of it would be loaded: fresh names every entry of the model")
    for name in loaded:
        own[name].set_value(cast[name])
    refresh_computed_weights(model)
    fresh = tuple(name for name in everything if name not in own)
    return LoadReport(tuple(loaded), tuple(missing), 100.0 * len(loaded) / max(len(everything), 1), fresh)


def _form_hint(arrays: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    file_form, model_form = form_of(arrays), form_of(own)
    if (file_form, model_form) == ("train", "fused"):
        return (
            "this is a weight file in train form and the model is fused or plain: load it into the model in train form "
            "and call reparameterize on that; "
        )
    if (file_form, model_form) == ("fused", "train"):
        return (
            "this is a weight file of a fused or plain model and the model is in train form: load it into the fused or "
            "plain model, or name in may_miss what a plain baseline lacks; "
        )
    return ""


def _class_hint(own: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    found = classifier(own, arrays)
    if found is None:
        return ""
    names, theirs, ours = found
    return (
        f"it is of {theirs} classes and the model of {ours}: fresh=True leaves {listed(names)} as the model drew them "
        "(in a config: Arch.fresh beside Arch.pretrained, Global.fresh beside Global.pretrained_model); without it "
    )


def listed(names: Sequence[str]) -> str:
    """Return the first ten names, and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    short = [name if len(name) <= 200 else f"{name[:200]}..." for name in names[:10]]
    return ", ".join(name if name.isprintable() else repr(name) for name in short) + more


def _cast(array: np.ndarray, own: paddle.Tensor) -> paddle.Tensor | None:
    """Return an array as a Tensor of the model's dtype; None where that would be more than a change of float type."""
    tensor = paddle.to_tensor(array)
    if tensor.dtype == own.dtype:
        return tensor
    return tensor.astype(own.dtype) if tensor.is_floating_point() and own.is_floating_point() else None


def _same_finite(array: np.ndarray, cast: paddle.Tensor) -> bool:
    """Return whether a cast left every finite number finite."""
    tensor = paddle.to_tensor(array)
    if tensor.dtype == cast.dtype:
        return True
    return bool((paddle.isfinite(tensor) == paddle.isfinite(cast)).all())


def _to_arrays(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the entries of a state dict as arrays, bfloat16 as uint16."""
    arrays = {}
    for name, value in state.items():
        array = value.detach().cpu().numpy() if isinstance(value, paddle.Tensor) else value
        if not isinstance(name, str) or not isinstance(array, np.ndarray) or array.dtype.str[1:] not in pickles.DTYPES:
            kind = array.dtype if isinstance(array, np.ndarray) else type(value).__name__
            raise CheckpointError(f"the entry {name!r} is no Tensor or array of numbers but of the type {kind}")
        arrays[name] = np.asarray(array, array.dtype.newbyteorder("="), order="C")
    if not arrays:
        raise CheckpointError("the state holds no arrays")
    return arrays
