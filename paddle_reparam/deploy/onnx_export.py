"""An ONNX file made of an export, which others can use too; needs the packages of the extra `onnx`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import paddle

from ..errors import ReparamError, one_sentence
from ..files import Folder
from .onnx_graph import finish, join_hard_swish, mend, simplify
from .program_reading import INPUTS, operators, write_attributes
from .programs import WEIGHTS_SUFFIX, program_file
from .runtimes.onnx_runtime import ONNX_FILE, OnnxModel, need

#: What writes, checks and runs it.
PACKAGES = ("paddle2onnx", "onnx", "onnxruntime")
#: The opset that is written: LayerNorm is one operator from 17 on. onnxruntime reads it from 1.12 on.
OPSET = 17
#: What the process that converts says before the reason why it cannot, and before operators that may be one.
_REASON, _UNKNOWN = "reason: ", "unknown: "


def onnx_versions() -> dict[str, str]:
    """Return package -> version of what writes, checks and runs ONNX files; raises `ReparamError` as `need` does."""
    return {package: need(package).__version__ for package in PACKAGES}


def export_onnx(folder: Folder, metadata: Mapping[str, str] | None = None) -> Path:
    """Write `inference.onnx` beside an export and return its path; raises `ReparamError` where it cannot be converted.

    Its weights are initialisers, its operators those of ONNX' own opset `OPSET`, its axis of samples is called batch.
    The file says `metadata` of itself. It has passed `onnx.checker`; `OnnxModel` runs it.
    """
    for package in PACKAGES:
        need(package)
    path = Path(folder) / ONNX_FILE
    # In a process of its own: where paddle2onnx cannot convert something, it may abort the process.
    converting = subprocess.run(
        [sys.executable, "-m", __name__, str(program_file(folder)), str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, input=json.dumps(dict(metadata or {})),
        capture_output=True, text=True,
    )  # fmt: skip
    if converting.returncode != 0:
        path.unlink(missing_ok=True)
        raise ReparamError(f"{folder}: it cannot be converted to ONNX: {_reason(converting)}")
    return path


def _reason(converting: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (converting.stdout + converting.stderr).splitlines()]

    def after(start: str) -> list[str]:
        return [line[len(start) :] for line in lines if line.startswith(start) and line != start.strip()]

    theirs = [line for line in lines if "[ERROR]" in line or "Failed to convert" in line or "Error: " in line]
    if any("unsupported operators" in line for line in theirs):
        theirs = [f"paddle2onnx does not know {operator}" for operator in after(_UNKNOWN)] + theirs
    return " ".join((after(_REASON) or theirs)[:1]) or f"the process ended with {converting.returncode}"


def convert(program: Path, path: Path, metadata: Mapping[str, str]) -> None:
    """Write an ONNX file of a program, in this process; raises `ReparamError`, or ends the process."""
    # Its optimizers are other packages, which it would install by itself.
    os.environ["POLYGRAPHY_AUTOINSTALL_DEPS"] = "0"
    onnx, paddle2onnx = need("onnx"), need("paddle2onnx")
    with tempfile.TemporaryDirectory() as folder, one_sentence(f"{path}: it is no ONNX file that holds"):
        readable = Path(folder) / "readable.json"
        if program.suffix == ".pdmodel":
            program = _translated(program, Path(folder) / "translated.json")
        write_attributes(program, readable)
        found = list(operators(readable))
        print(f"{_UNKNOWN}{', '.join(dict.fromkeys(op.place for op in found if not _known(op.kind)))}", file=sys.stderr)
        weights = str(program.with_suffix(WEIGHTS_SUFFIX))
        paddle2onnx.export(str(readable), weights, str(path), opset_version=OPSET, optimize_tool="None")
        model = onnx.load(str(path))
        mend(model, found)
        onnx.save(model, str(path))
        simplify(path)
        model = onnx.load(str(path))
        join_hard_swish(model)
        finish(model, OnnxModel(path), metadata)
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, str(path))
    # Here, as onnxruntime may abort the process too where it plans what a file says.
    OnnxModel(path)


def _known(kind: str) -> bool:
    """Return whether paddle2onnx may know an operator: its list has other names for some."""
    known = need("paddle2onnx.convert").c_p2o.get_all_supported_operators_pir()
    return kind in (*INPUTS, "fetch") or any(kind.rstrip("_") in name for name in known)


def _translated(program: Path, target: Path) -> Path:
    """Write a `.pdmodel` and its weights as a program of Paddle 3, by the functions that paddle2onnx has for it."""
    converter = need("paddle2onnx.convert")
    with paddle.pir_utils.OldIrGuard():
        old, *_ = paddle.static.load_inference_model(
            str(program.with_suffix("")), paddle.static.Executor(paddle.CPUPlace())
        )
    new = paddle.pir.translate_to_pir(old.desc)
    converter.load_parameter(new)
    converter.save_program(new, str(target.with_suffix("")))
    return target


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.stdin.read()))
    except ReparamError as error:
        print(f"{_REASON}{error}", file=sys.stderr)
        sys.exit(1)
