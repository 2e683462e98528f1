"""An ONNX file made of an export, and run by onnxruntime; needs the packages of the extra `onnx`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ..errors import ReparamError, one_sentence
from ..files import Folder
from .programs import WEIGHTS_SUFFIX, program_file
from .runtimes.onnx_runtime import ONNX_FILE, OnnxModel, need

#: What writes, checks and runs it.
PACKAGES = ("paddle2onnx", "onnx", "onnxruntime")
#: The opset that is written: LayerNorm is one operator from 17 on.
OPSET = 17


def onnx_versions() -> dict[str, str]:
    """Return package -> version of what writes, checks and runs ONNX files; raises `ReparamError` as `need` does."""
    return {package: need(package).__version__ for package in PACKAGES}


def export_onnx(folder: Folder) -> Path:
    """Write `inference.onnx` beside an export and return its path; raises `ReparamError` where it cannot be converted.

    The file has passed `onnx.checker`; `OnnxModel` runs it.
    """
    need("paddle2onnx")
    onnx = need("onnx")
    path = Path(folder) / ONNX_FILE
    # In a process of its own: where paddle2onnx cannot convert something, it may abort the process.
    converting = subprocess.run(
        [sys.executable, "-m", __name__, str(program_file(folder)), str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True, text=True,
    )  # fmt: skip
    if converting.returncode != 0:
        lines = [line.strip() for line in (converting.stdout + converting.stderr).splitlines()]
        reasons = [line for line in lines if "[ERROR]" in line or "Failed to convert" in line or "Error: " in line]
        reason = " ".join(reasons[:1]) or f"the process ended with {converting.returncode}"
        raise ReparamError(f"{folder}: it cannot be converted to ONNX: {reason}")
    with one_sentence(f"{path}: it is no ONNX file that holds"):
        model = onnx.load(str(path))
        read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
        # onnxruntime warns of each one, whenever somebody loads the file.
        for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in read]:
            model.graph.initializer.remove(tensor)
        for node in [node for node in model.graph.node if node.op_type == "Constant" and node.output[0] not in read]:
            model.graph.node.remove(node)
        _mend_pads(model.graph, program_file(folder))
        _mend_group_norms(model.graph, program_file(folder))
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, str(path))
    return path


def _attributes(program: Path, operator: str, name: str) -> list[float]:
    """Return an attribute of all operators of one kind in an exported program, in the order in which it runs them."""
    if program.suffix == ".pdmodel":
        description = paddle.framework.core.ProgramDesc(program.read_bytes())
        block = description.block(0)
        operators = [block.op(i) for i in range(block.op_size())]
        return [each.attr(name) for each in operators if each.type() == operator]
    found: list[dict[str, Any]] = []

    def look(entries: dict[str, Any]) -> dict[str, Any]:
        if str(entries.get("#")).endswith(f".{operator}"):
            found.append({attribute["N"]: attribute["AT"]["D"] for attribute in entries["A"]})
        return entries

    json.loads(program.read_text(encoding="utf-8"), object_hook=look)
    return [attributes[name] for attributes in found]


# Where paddle2onnx 2.1 writes whatever lies in memory, the value of the program is written.


def _mend_pads(graph: Any, program: Path) -> None:
    """Write the values that maps are padded with into a graph."""
    helper = need("onnx").numpy_helper
    values = _attributes(program, "pad3d", "value" if program.suffix == ".pdmodel" else "pad_value")
    constants = {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    pads = [node for node in graph.node if node.op_type == "Pad" and ".pad3d." in node.output[0]]
    if len(pads) != len(values):
        raise ReparamError(f"its {len(pads)} Pad nodes are not the {len(values)} of the program")
    for node, value in zip(pads, values):
        if len(node.input) > 2:  # the other ways to pad take no value
            tensor = constants[node.input[2]]
            tensor.CopyFrom(helper.from_array(np.full_like(helper.to_array(tensor), value), tensor.name))


def _mend_group_norms(graph: Any, program: Path) -> None:
    """Write the epsilons of group norms, which are instance norms between two reshapes there, into a graph."""
    epsilons = _attributes(program, "group_norm", "epsilon")
    nodes = [node for node in graph.node if node.op_type == "InstanceNormalization"]
    nodes = [node for node in nodes if ".instance_norm." not in node.output[0]]
    if len(nodes) != len(epsilons):
        raise ReparamError(f"its {len(nodes)} group norms are not the {len(epsilons)} of the program")
    for node, epsilon in zip(nodes, epsilons):
        del node.attribute[:]
        node.attribute.append(need("onnx").helper.make_attribute("epsilon", float(epsilon)))


def _convert(program: str, path: str) -> None:
    # Its optimizers are other packages, which it would install by itself.
    os.environ["POLYGRAPHY_AUTOINSTALL_DEPS"] = "0"
    weights = str(Path(program).with_suffix(WEIGHTS_SUFFIX))
    need("paddle2onnx").export(program, weights, path, opset_version=OPSET, optimize_tool="None")
    # Here, as onnxruntime may abort the process too where it plans what a file says.
    OnnxModel(path)


if __name__ == "__main__":
    _convert(*sys.argv[1:])
