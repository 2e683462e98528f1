"""The program of an export, in Paddle 3's form or the one before: its files, what it may hold, how it is mended."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import paddle

from ..errors import ReparamError, one_sentence
from ..files import Folder
from .old_programs import old_programs

#: What the files are called before their suffixes, as in PaddleClas' exports.
FILE_NAME = "inference"


#: Which of them is the program depends on Paddle's version and its FLAGS_enable_pir_api.
PROGRAM_SUFFIXES = (".json", ".pdmodel")


WEIGHTS_SUFFIX = ".pdiparams"


#: Operators of Paddle that read or write files, or call functions: no export holds them.
ACTING_OPERATORS = {
    "load", "load_combine", "save", "save_combine", "read_file", "py_func", "py_layer", "run_program",
}  # fmt: skip


#: How `--format` names them.
FORMATS = ("json", "pdmodel")


def programs_of(file_format: str | None) -> contextlib.AbstractContextManager[None]:
    return old_programs() if file_format == "pdmodel" else contextlib.nullcontext()


@contextlib.contextmanager
def static_mode() -> Iterator[None]:
    was_dynamic = paddle.in_dynamic_mode()
    paddle.enable_static()
    try:
        yield
    finally:
        if was_dynamic:
            paddle.disable_static()


def in_order(names: Sequence[str]) -> list[str]:
    """Return the names of an export's inputs in the order in which `run` takes them, that of `input_names`."""
    numbered = all(name[:1] == "x" and name[1:].isdigit() for name in names)
    return sorted(names, key=(lambda name: int(name[1:])) if numbered else None)


def add_biases_by_axis(path: Path) -> None:
    """Rewrite a `.pdmodel` so that oneDNN takes the biases of convolutions into them.

    Paddle writes a bias as a reshape of the parameter and an addition, a pair that its oneDNN passes do not know; they
    know the addition of the parameter itself along an axis. Without it a MobileNetV2 with folded BNs takes 1.33 times
    as long.
    """
    with static_mode():
        program = paddle.static.Program.parse_from_string(path.read_bytes())
        block = program.global_block()
        parameters = {
            op.output("Out")[0]: op.input("X")[0]
            for op in block.ops
            if op.type == "reshape2" and block.var(op.input("X")[0]).persistable
            if list(op.attr("shape")) == [1, *block.var(op.input("X")[0]).shape, 1, 1]
        }
        readers = Counter(name for op in block.ops for name in op.input_arg_names)
        added = [
            op
            for op in block.ops
            if op.type == "elementwise_add" and op.input("Y")[0] in parameters and readers[op.input("Y")[0]] == 1
        ]
        reshaped = {op.input("Y")[0] for op in added}
        for op in added:
            op._rename_input(op.input("Y")[0], parameters[op.input("Y")[0]])
            op._set_attr("axis", 1)
        for index in reversed(range(len(block.ops))):
            if block.ops[index].type == "reshape2" and block.ops[index].output("Out")[0] in reshaped:
                block._remove_op(index)
        path.write_bytes(program.desc.serialize_to_string())


#: What oneDNN's passes take into the convolution before it.
_ACTIVATIONS = {
    "abs", "clip", "gelu", "hard_sigmoid", "hard_swish", "leaky_relu", "mish", "relu", "relu6", "sigmoid", "sqrt",
    "swish", "tanh",
}  # fmt: skip


def keep_activations_apart(path: Path) -> None:
    """Rewrite a `.pdmodel` so that between two activations in a row stands a product with one.

    Of two that stand behind a convolution, Paddle's oneDNN passes would take the second into it, and drop the first.
    """
    with static_mode():
        program = paddle.static.Program.parse_from_string(path.read_bytes())
        block = program.global_block()
        made_by = {name: op.type for op in block.ops for name in op.output_arg_names}
        seconds = [
            (index, op)
            for index, op in enumerate(block.ops)
            if op.type in _ACTIVATIONS and made_by.get(op.input("X")[0]) in _ACTIVATIONS
        ]
        for index, op in reversed(seconds):
            first = block.var(op.input("X")[0])
            between = block.create_var(name=f"{first.name}.apart{index}", dtype=first.dtype, shape=first.shape)
            scale = {"scale": 1.0, "bias": 0.0, "bias_after_scale": True}
            block._insert_op(index, type="scale", inputs={"X": first}, outputs={"Out": between}, attrs=scale)
            op._rename_input(first.name, between.name)
        path.write_bytes(program.desc.serialize_to_string())


def program_file(folder: Folder) -> Path:
    """Return the file of an export that holds the program, whatever Paddle wrote it; raises `ReparamError`."""
    found = programs_in(folder)
    if len(found) != 1:
        names = " or ".join(FILE_NAME + suffix for suffix in PROGRAM_SUFFIXES)
        raise ReparamError(f"{folder}: it must hold one exported program ({names}), it holds {len(found)}")
    return found[0]


def programs_in(folder: Folder) -> list[Path]:
    """Return the programs in a folder: one, in an export."""
    return [path for suffix in PROGRAM_SUFFIXES if (path := Path(folder) / f"{FILE_NAME}{suffix}").is_file()]


def program_to_run(folder: Folder) -> Path:
    """Return an export's program; raises `ReparamError` where it would do more than compute."""
    path = program_file(folder)
    found = set()
    with one_sentence(f"{folder}: Paddle cannot load it"):
        if path.suffix == ".pdmodel":
            description = paddle.framework.core.ProgramDesc(path.read_bytes())
            for block in map(description.block, range(description.num_blocks())):
                found |= {block.op(i).type() for i in range(block.op_size())}
        else:

            def look(entries: dict[str, Any]) -> dict[str, Any]:
                found.add(str(entries.get("#")).rsplit(".", 1)[-1])
                return entries

            json.loads(path.read_text(encoding="utf-8"), object_hook=look)
    if found & ACTING_OPERATORS:
        raise ReparamError(
            f"{path}: it holds the operator {min(found & ACTING_OPERATORS)}, which does not only compute"
        )
    return path
