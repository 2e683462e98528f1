"""The bytes of weight files, read without running what they contain, and written with a checksum."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping

import numpy as np
import paddle

from ..errors import CheckpointError
from . import pickles

_CHECKSUM = "paddle_reparam.sha256"
# Deflate makes a file of zeros a thousand times smaller; weights hardly shrink. Below this size nobody is hurt.
_ALWAYS_UNPACKED = 1 << 28
_FROM_SAFETENSORS = {
    "BOOL": "b1", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8",
    "U8": "u1", "BF16": "u2", "F16": "f2", "F32": "f4", "F64": "f8",
}  # fmt: skip


def _raw(array: np.ndarray) -> memoryview:
    """Return the bytes of a contiguous array without copying them."""
    return memoryview(array.reshape(-1).view(np.uint8))


def identical(arrays: Mapping[str, np.ndarray], others: Mapping[str, np.ndarray]) -> bool:
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


def kind_of(data: bytes, suffix: str) -> str | None:
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


READERS = {"safetensors": _read_safetensors, "pickle": pickles.read, "npz": _read_npz}
WRITERS = {".safetensors": _write_safetensors, ".pdparams": _write_pickle}
