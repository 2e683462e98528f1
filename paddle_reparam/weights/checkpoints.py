"""Weight files: read without running what they contain, written whole or not at all, loaded strictly."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import os
import stat
import textwrap
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import paddle
from paddle import nn

from ..errors import CheckpointError, MissingFile, ReparamError
from ..files import atomic_write
from ..registry import create_model, get_layer, get_model, list_layers, list_models
from ..report import Report, format_table
from ..surgery import masks
from . import pickles

_CHECKSUM = "paddle_reparam.sha256"
# Deflate makes a file of zeros a thousand times smaller; weights hardly shrink. Below this size nobody is hurt.
_ALWAYS_UNPACKED = 1 << 28
# Axes of an entry -> the one that counts the classes where it is a classifier's: a bias, a Linear, a 1x1 convolution.
_CLASS_AXIS = {1: 0, 2: 1, 4: 0}
_FROM_SAFETENSORS = {
    "BOOL": "b1", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8",
    "U8": "u1", "BF16": "u2", "F16": "f2", "F32": "f4", "F64": "f8",
}  # fmt: skip


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
        rows = [["loaded", len(self.loaded), ""], ["left as they were", len(self.missing), _listed(self.missing)]]
        if self.fresh:
            rows.append(["fresh, as they were drawn", len(self.fresh), _listed(self.fresh)])
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
    kind = _kind_of(data, Path(path).suffix)
    try:
        if kind is None:
            raise CheckpointError(
                "it is empty"
                if not data
                else "it is no .safetensors, .pdparams, .pdema or .npz file, by name or content"
            )
        arrays = _READERS[kind](data)
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
    if suffix not in _WRITERS:
        raise CheckpointError(
            f"{path}: weights are written as {' or '.join(_WRITERS)}, not as {suffix or 'no suffix'!r}"
        )
    try:
        arrays = _to_arrays(state)
    except CheckpointError as error:
        raise error.at(str(path)) from None
    data = _WRITERS[suffix](arrays)

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)
        if not _identical(load(temporary), arrays):
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
        found = _classifier(own, arrays)
        left = set() if found is None else set(found[0])
    else:
        left, names = set(), [*own, *(name for name in arrays if name not in own)]
        for pattern in fresh or ():
            matching = fnmatch.filter(names, pattern)
            if not matching:
                raise CheckpointError(f"fresh {pattern!r} is the name of no entry of the model")
            left.update(matching)
    return left | {f"{name}{masks.SUFFIX}" for name in left}


def _classifier(own: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> tuple[list[str], int, int] | None:
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
        "of another type": [f"{n} (file {_type_name(arrays[n])}, model {_type_name(own[n])})" for n in types],
        "too large for the model's type": [f"{n} (model {_type_name(own[n])})" for n in too_large],
    }
    loaded = [name for name in cast if name not in types and name not in too_large]
    coverage = 100.0 * len(loaded) / max(len(own), 1)
    if any(faults.values()):
        lines = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in faults.items() if names]
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
    fresh = tuple(name for name in everything if name not in own)
    return LoadReport(tuple(loaded), tuple(missing), 100.0 * len(loaded) / max(len(everything), 1), fresh)


#: Published names of what a BN keeps -> Paddle's; the counter has no counterpart.
_OF_A_BATCH_NORM = {"running_mean": "_mean", "running_var": "_variance", "num_batches_tracked": None}


def convert_state(name: str, state: Mapping[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
    """Return a published state dict as one that `create_model(name, **options)` takes, entry for entry.

    `state`: published key -> array, in the layouts of the published files (a Linear's weight is `[out, in]`), with or
    without the prefix `module.`. Floats are cast to the model's type.

    Raises `CheckpointError` with what is missing, left over or of another shape, and for a model without published
    weights.
    """
    model = create_model(name, **options)
    return fit_exactly(model, in_our_names(name, state, model), f"{name}{options or ''}")


def in_our_names(name: str, state: Mapping[str, np.ndarray], model: nn.Layer) -> dict[str, np.ndarray]:
    """Return a published state dict under the names and in the layouts of `model`, whatever fits it.

    Raises `CheckpointError` for a model without published weights and for entries that cannot be brought into its form.
    """
    rename = get_model(name).rename
    if rename is None:
        known = ", ".join(n for n in list_models() if get_model(n).rename is not None)
        raise CheckpointError(f"no published weight files of {name} are known; those of {known} can be converted")
    from_parallel = all(key.startswith("module.") for key in state)
    plain = {key[len("module.") :] if from_parallel else key: np.asarray(value) for key, value in state.items()}
    try:
        renamed = rename(plain)
    except (LookupError, TypeError, ValueError) as error:
        if isinstance(error, ReparamError):
            raise
        raise CheckpointError(f"its entries are not those of a published {name} ({error!r})") from error
    owners = dict(model.named_sublayers(include_self=True))
    arrays: dict[str, np.ndarray] = {}
    for key, value in renamed.items():
        path, _, last = key.rpartition(".")
        last = _OF_A_BATCH_NORM.get(last, last)
        if last is None:
            continue
        key = f"{path}.{last}" if path else last
        array = np.asarray(value)
        arrays[key] = array.T if last == "weight" and isinstance(owners.get(path), nn.Linear) else array
    return arrays


def fit_exactly(model: nn.Layer, arrays: Mapping[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    """Return the arrays in the types of the model, `what` by name; `CheckpointError` lists all that does not fit."""
    own = model.state_dict()
    faults = {
        "missing": [key for key in own if key not in arrays],
        "left over": [key for key in arrays if key not in own],
        "of another shape": [
            f"{key} (file {list(arrays[key].shape)}, model {list(own[key].shape)})"
            for key in own
            if key in arrays and list(arrays[key].shape) != list(own[key].shape)
        ],
    }
    if any(faults.values()):
        lines = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in faults.items() if names]
        found = None if faults["missing"] or faults["left over"] else _classifier(own, arrays)
        advice = "give the options that they were trained with"
        if found is not None:
            advice = (
                f"they are of {found[1]} classes: convert them without class_num, and load the file with fresh=True "
                "(in a config: Arch.fresh beside Arch.pretrained)"
            )
        raise CheckpointError(f"the published weights are not those of {what}; {advice}\n  " + "\n  ".join(lines))
    return {key: np.ascontiguousarray(arrays[key].astype(_type_name(own[key]))) for key in own}


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
    found = _classifier(own, arrays)
    if found is None:
        return ""
    names, theirs, ours = found
    return (
        f"it is of {theirs} classes and the model of {ours}: fresh=True leaves {_listed(names)} as the model drew them "
        "(in a config: Arch.fresh beside Arch.pretrained, Global.fresh beside Global.pretrained_model); without it "
    )


def _listed(names: Sequence[str]) -> str:
    """Return the first ten names, and how many more there are."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    short = [name if len(name) <= 200 else f"{name[:200]}..." for name in names[:10]]
    return ", ".join(name if name.isprintable() else repr(name) for name in short) + more


def _type_name(value: np.ndarray | paddle.Tensor) -> str:
    name = str(value.dtype).replace("paddle.", "")
    return "bfloat16" if name == "uint16" else name


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


def _raw(array: np.ndarray) -> memoryview:
    """Return the bytes of a contiguous array without copying them."""
    return memoryview(array.reshape(-1).view(np.uint8))


def _identical(arrays: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> bool:
    """Return whether two states have the same names, types, shapes and bytes."""
    return arrays.keys() == others.keys() and all(
        (array.dtype, array.shape) == (others[name].dtype, others[name].shape)
        and np.array_equal(_raw(array), _raw(others[name]))
        for name, array in arrays.items()
    )


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the sha256 over names, types, shapes and bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.str[1:], list(array.shape)]).encode())
        digest.update(_raw(array))
    return digest.hexdigest()


def _kind_of(data: bytes, suffix: str) -> str | None:
    """Return the format of a file's contents; where they do not show it, the one that its name says."""
    header_size = int.from_bytes(data[:8], "little")
    if data[8:9] == b"{" and header_size <= len(data) - 8:
        return "safetensors"
    if data.startswith(b"PK\x03\x04"):
        return "npz"
    if data[:1] == b"\x80" and data[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "pickle"
    by_suffix = {".safetensors": "safetensors", ".npz": "npz", ".pdparams": "pickle", ".pdema": "pickle"}
    return by_suffix.get(suffix) if data else None


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    import safetensors

    arrays = {}
    for name, tensor in safetensors.deserialize(data):
        if tensor["dtype"] not in _FROM_SAFETENSORS:
            raise CheckpointError(
                f"its entry {pickles.shown(name)} has the type {tensor['dtype']}, which no weight has"
            )
        code = f"<{_FROM_SAFETENSORS[tensor['dtype']]}"
        arrays[name] = pickles.array_of(code, tensor["shape"], bytes(tensor["data"]))
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if _CHECKSUM in metadata and metadata[_CHECKSUM] != _checksum(arrays):
        raise CheckpointError("its checksum is not that of its contents: it is damaged; get or save it again")
    return arrays


def _write_safetensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save as to_safetensors

    data = to_safetensors(dict(arrays), {_CHECKSUM: _checksum(arrays)})
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    # numpy has no bfloat16; its bits were written as uint16.
    for entry in header.values():
        if entry.get("dtype") == "U16":
            entry["dtype"] = "BF16"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def _write_pickle(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    cpu = paddle.CPUPlace()
    paddle.save({name: paddle.to_tensor(array, place=cpu) for name, array in arrays.items()}, buffer)
    return pickles.seal(buffer.getvalue())


def _read_npz(data: bytes) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        # zipfile takes entries that a changed length hides for a comment; numpy writes none of either.
        if data[-22:-18] != b"PK\5\6" or int.from_bytes(data[-12:-10], "little") != min(len(entries), 0xFFFF):
            raise CheckpointError("its list of arrays is not whole: it is damaged; get or save it again")
        if sum(entry.file_size for entry in entries) > max(_ALWAYS_UNPACKED, 100 * len(data)):
            raise CheckpointError("it is packed more than a hundred times; save it again with numpy.savez")
        for entry in entries:
            name, suffix = os.path.splitext(entry.filename)
            if suffix != ".npy" or name in arrays:
                raise CheckpointError(
                    f"it is a zip archive with {pickles.shown(entry.filename)} in it, and no .npz file"
                )
            arrays[name] = _read_npy(archive.read(entry))
    return arrays


def _read_npy(data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = readers[np.lib.format.read_magic(stream)](stream)
    return pickles.array_of(dtype.str, shape, data[stream.tell() :], fortran)


_READERS = {"safetensors": _read_safetensors, "pickle": pickles.read, "npz": _read_npz}
_WRITERS = {".safetensors": _write_safetensors, ".pdparams": _write_pickle}
