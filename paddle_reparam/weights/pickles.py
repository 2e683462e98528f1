"""Paddle's weight pickles, read as data: nothing that a file names is ever imported or called.

`paddle.load` runs whatever a file asks for. Here the pickle's instructions are taken one by one; the few calls that
Paddle's own files make are known by name and their results are built by hand, and everything else is refused.
"""

from __future__ import annotations

import hashlib
import io
import pickletools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import CheckpointError

#: numpy's codes of what a weight file may hold; "u2" is bfloat16, which Paddle hands over as its 16 bits.
DTYPES = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "f2", "f4", "f8"})

# What paddle.save adds to a mapping, and how it stores arrays of more than 1 GiB under the pickle protocols 2 and 3.
_NAME_TABLE = "StructuredToParameterName@@"
_SPLIT_TABLE = "UnpackBigParamInfor@@"
# Readers of pickles stop at the STOP instruction, so that what follows it disturbs none of them.
_SEAL = b"\npaddle-reparam sha256 "

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# fmt: off
_LITERALS = frozenset((
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING",
))
# fmt: on


def seal(pickled: bytes) -> bytes:
    """Return a pickle with its sha256 behind its end, where `read` finds it and other readers do not look."""
    return pickled + _SEAL + hashlib.sha256(pickled).digest()


def read(data: bytes) -> dict[str, np.ndarray]:
    """Return the arrays of one of Paddle's weight pickles by name; they are read-only views of `data`.

    Raises `CheckpointError` for what is no weight file, and any other exception for bytes that are no pickle.
    """
    return _name_arrays(_run_whole(data))


def read_state(data: bytes) -> Any:
    """Return what paddle.save wrote of an optimizer or of a run: lists, dicts, numbers and text, arrays among them.

    The arrays are read-only views of `data`. Raises as `read` does.
    """
    return _with_arrays(_run_whole(data), [len(data)])


def parameter_names(data: bytes) -> dict[str, str]:
    """Return which name Paddle had given to the parameter behind each entry, where a weight pickle says so.

    Raises as `read` does.
    """
    content = _run_whole(data)
    table = content.get(_NAME_TABLE) if type(content) is dict else None
    pairs = table.items() if type(table) is dict else ()
    return {key: name for key, name in pairs if type(key) is str and type(name) is str}


def _run_whole(data: bytes) -> Any:
    length = len(data) - len(_SEAL) - hashlib.sha256().digest_size
    if not data.startswith(_SEAL, max(length, 0)):
        length = len(data)
    elif hashlib.sha256(memoryview(data)[:length]).digest() != data[length + len(_SEAL) :]:
        raise CheckpointError("its checksum is not that of its contents: it is damaged; get or save it again")
    content, end = _run(data)
    if end != length:
        raise CheckpointError(f"{length - end} bytes follow its end: it is damaged; get or save it again")
    return content


def array_of(code: str, shape: Sequence[int], data: bytes, fortran: bool = False) -> np.ndarray:
    """Return the read-only array that raw bytes hold; `code` is numpy's, with or without a byte order in front.

    Raises `CheckpointError` where the bytes are not those of such an array.
    """
    if not isinstance(code, str) or code.lstrip("<>=|") not in DTYPES:
        raise CheckpointError(f"it holds an array of the dtype {shown(code)}, which no weight has")
    dtype = np.dtype(code)
    size = dtype.itemsize
    if len(shape) > 32 or any(type(extent) is not int or not 0 <= extent < 1 << 63 for extent in shape):
        raise CheckpointError(f"it holds an array of the shape {shown(shape)}; it is damaged")
    for extent in shape:
        size *= extent
    if not isinstance(data, (bytes, bytearray)) or size != len(data):
        raise CheckpointError(
            f"it holds an array of shape {shown(shape)} and dtype {dtype.name} with other than {size} bytes; "
            "it is damaged"
        )
    if dtype.kind == "b" and data.strip(b"\0\1"):
        raise CheckpointError("it holds a bool array with other bytes than 0 and 1; it is damaged")
    return np.ndarray(tuple(shape), dtype, buffer=bytes(data), order="F" if fortran else "C")


def shown(value: Any) -> str:
    """Return how a value from a file is quoted in messages: on one line and short, whatever it is."""
    if type(value) in (tuple, list):
        return str([item if type(item) is int and item.bit_length() < 64 else "?" for item in value[:10]])
    if type(value) is str:
        return repr(value if len(value) < 100 else f"{value[:97]}...")
    return f"({type(value).__name__})"


class _Global(str):
    """The dotted name of something that a file wants to import, and that is not imported."""


class _Dtype:
    """numpy's dtype in the making."""

    def __init__(self, code: str) -> None:
        self.code = code


class _Array:
    """numpy's array in the making: empty until the instruction BUILD brings shape, dtype and bytes."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None


def _run(data: bytes) -> tuple[Any, int]:
    """Carry out a pickle's instructions; return what it holds and how many bytes it took.

    Time and memory grow with the length of the file and no faster, whatever it says.
    """
    stream = io.BytesIO(data)
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    # The same bytes can be made into texts and arrays over and over; Paddle's files do so once.
    encoded = built = 0
    for opcode, argument, position in pickletools.genops(stream):
        name = opcode.name
        if position == 0 and name != "PROTO":
            raise ValueError("it does not start as a pickle does")
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop(), stream.tell()
        if name in _LITERALS:
            if type(argument) is int and argument.bit_length() > 64:
                raise CheckpointError("it holds a number of more than 64 bits; this is no file of Paddle's")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(_pop_to_mark(stack)))
        elif name in _TUPLES:
            stack.append(tuple(_pop(stack, _TUPLES[name])))
        elif name == "APPEND":
            _append(stack, _pop(stack, 1))
        elif name == "APPENDS":
            _append(stack, _pop_to_mark(stack))
        elif name == "SETITEM":
            _set_items(stack, _pop(stack, 2))
        elif name == "SETITEMS":
            _set_items(stack, _pop_to_mark(stack))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            # Writers count up, from 0 or 1; other numbers could be chosen to collide.
            if argument > len(memo) + 1:
                raise ValueError("it numbers what it remembers out of order")
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "INST"):
            stack.append(_global(*argument.split(" ", 1)))
            if name == "INST":
                raise _blocked(f"an instance of {stack[-1]}")
        elif name == "STACK_GLOBAL":
            stack.append(_global(*_pop(stack, 2)))
        elif name == "REDUCE":
            stack.append(_call(*_pop(stack, 2)))
            encoded += len(stack[-1]) if type(stack[-1]) is bytes else 0
        elif name == "BUILD":
            built += _build(stack[-2], stack.pop())
        else:
            raise _blocked(f"the pickle instruction {name}")
        if max(encoded, built) > len(data):
            raise CheckpointError("its arrays come to more bytes than the file has; do not trust this file")
    raise ValueError("it has no end")


def _pop(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise ValueError("it takes more from its stack than it put there")
    values = stack[-count:]
    del stack[-count:]
    return values


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    values = []
    while stack[-1] is not _MARK:
        values.append(stack.pop())
    stack.pop()
    return values[::-1]


def _append(stack: list[Any], values: list[Any]) -> None:
    if type(stack[-1]) is not list:
        raise ValueError("it appends to what is no list")
    stack[-1].extend(values)


def _set_items(stack: list[Any], values: list[Any]) -> None:
    if type(stack[-1]) is not dict or len(values) % 2:
        raise ValueError("it sets items of what is no mapping")
    for key, value in zip(values[::2], values[1::2]):
        # The hash of text is secret. Numbers can be chosen to collide, and tuples nested so that theirs takes for ever.
        if type(key) is not str:
            raise CheckpointError(f"it has a key that is no text but a {type(key).__name__}; this is no weight file")
        stack[-1][key] = value


def _blocked(what: str) -> CheckpointError:
    return CheckpointError(
        f"it asks for {what}, which no weight file of Paddle does, and nothing was run; unless you trust its maker, do "
        "not give it to paddle.load either, but ask for the weights as .safetensors"
    )


def _global(module: Any, name: Any) -> _Global:
    if type(module) is not str or type(name) is not str:
        raise ValueError("it imports by what is no name")
    dotted = f"{_MODULES.get(module, module)}.{name}"
    if dotted not in _CALLS:
        raise _blocked(shown(f"{module}.{name}").strip("'\""))
    return _Global(dotted)


def _call(function: Any, arguments: Any) -> Any:
    """Return what a call that Paddle's files make would have returned, without making it."""
    if type(function) is not _Global or type(arguments) is not tuple:
        raise ValueError("it calls what is no function")
    matches, result = _CALLS[function]
    if not matches(arguments):
        detail = f" of {shown(arguments[0])}" if arguments and type(arguments[0]) is str else ""
        raise _blocked(f"another call of {function} than Paddle's own{detail}")
    return result(arguments)


# Python 2's and numpy 2's names of the same modules.
_MODULES = {"__builtin__": "builtins", "numpy._core.multiarray": "numpy.core.multiarray"}

# name: (whether these are the arguments that Paddle's and numpy's files give, what the call returns)
_CALLS: dict[str, tuple[Any, Any]] = {
    "numpy.core.multiarray._reconstruct": (
        lambda a: len(a) == 3 and type(a[0]) is _Global and a[0] == "numpy.ndarray" and a[1] == (0,),
        lambda a: _Array(),
    ),
    "numpy.ndarray": (lambda a: False, None),
    "numpy.dtype": (
        lambda a: len(a) == 3 and type(a[0]) is str and a[0] in DTYPES,
        lambda a: _Dtype(a[0]),
    ),
    "collections.OrderedDict": (lambda a: a == (), lambda a: {}),
    # A number that numpy computed.
    "numpy.core.multiarray.scalar": (
        lambda a: len(a) == 2 and type(a[0]) is _Dtype and type(a[1]) is bytes,
        lambda a: array_of(a[0].code, [], a[1])[()].item(),
    ),
    # A Tensor inside a container is stored as tuple((name, array)).
    "builtins.tuple": (lambda a: len(a) == 1 and type(a[0]) is tuple, lambda a: a[0]),
    # A DenseTensor is stored as eval('data', {'data': array}). Only this very call is known, and it is not made: the
    # array is taken out of it.
    "builtins.eval": (
        lambda a: (
            len(a) == 2 and type(a[0]) is str and a[0] == "data" and type(a[1]) is dict and list(a[1]) == ["data"]
        ),
        lambda a: a[1]["data"],
    ),
    # Pickle protocol 2 has no bytes.
    "builtins.bytes": (lambda a: a == (), lambda a: b""),
    "_codecs.encode": (
        lambda a: len(a) == 2 and type(a[0]) is str and type(a[1]) is str and a[1] == "latin1",
        lambda a: a[0].encode("latin1"),
    ),
}


def _build(target: Any, state: Any) -> int:
    """Fill a dtype or an array in the making with its state; return the bytes of the array."""
    if type(state) is not tuple or type(target) not in (_Dtype, _Array):
        raise _blocked("the state of an object to be set")
    if type(target) is _Dtype:
        # (version, byte order, then what only structured and date dtypes have)
        if len(state) != 8 or state[1] not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise CheckpointError("it holds a structured dtype, which no weight has")
        target.code = state[1] + target.code.lstrip("<>=|")
        return 0
    if len(state) != 5 or type(state[1]) is not tuple or type(state[2]) is not _Dtype or target.value is not None:
        raise ValueError("it holds an array whose state is not that of an array")
    _, shape, dtype, fortran, raw = state
    # Python 2 wrote bytes as text.
    data = raw.encode("latin1") if type(raw) is str else raw
    target.value = array_of(dtype.code, shape, data, fortran is True)
    return len(data)


def _with_arrays(content: Any, left: list[int]) -> Any:
    """Return nested content with its arrays in place, built anew; `left` counts down how many parts it may have.

    A short file can name one list many times over, or within itself.
    """
    left[0] -= 1
    if left[0] < 0:
        raise CheckpointError("it unfolds to more than it has bytes; do not trust this file")
    if content is None or type(content) in (bool, int, float, str):
        return content
    if type(content) is tuple and len(content) == 2 and type(content[0]) is str and type(content[1]) is _Array:
        # A Tensor: its name and its array.
        content = content[1]
    if type(content) is _Array and content.value is not None:
        return content.value
    if type(content) in (list, tuple):
        return [_with_arrays(value, left) for value in content]
    if type(content) is dict and _SPLIT_TABLE not in content:
        return {key: _with_arrays(value, left) for key, value in content.items() if key != _NAME_TABLE}
    raise CheckpointError(f"it holds a {type(content).__name__.lstrip('_')}; this is no state of a training run")


def _name_arrays(content: Any) -> dict[str, np.ndarray]:
    """Take the arrays out of what paddle.save wrote, without Paddle's own bookkeeping."""
    if type(content) is not dict:
        raise CheckpointError(f"it holds a {type(content).__name__.lstrip('_')}, not arrays by name")
    splits = content.pop(_SPLIT_TABLE, {})
    content.pop(_NAME_TABLE, None)
    arrays = {name: _array_named(name, value) for name, value in content.items()}
    used = set()
    # One list of parts can be named by many arrays.
    for part in (part for split in splits.values() for part in split["slices"]):
        if id(arrays[part]) in used:
            raise CheckpointError("it uses one part of a large array twice; do not trust this file")
        used.add(id(arrays[part]))
    for name, split in splits.items():
        parts = [arrays.pop(part) for part in split["slices"]]
        arrays[name] = np.concatenate(parts).reshape(split["OriginShape"])
    return arrays


def _array_named(name: Any, value: Any) -> np.ndarray:
    if type(name) is not str:
        raise CheckpointError(f"its entry {shown(name)} has no text for a name; this is no weight file")
    if type(value) is tuple and len(value) == 2 and type(value[0]) is str:
        value = value[1]
    if type(value) is not _Array or value.value is None:
        raise CheckpointError(
            f"its entry {shown(name)} is a {type(value).__name__.lstrip('_')}, not an array; if that is a container, "
            "save the part with the weights on its own"
        )
    return value.value
