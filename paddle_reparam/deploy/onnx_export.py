"""An ONNX file made of an export, and run by onnxruntime; needs the packages of the extra `onnx`."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import paddle

from ..errors import ReparamError, one_sentence
from ..files import Folder
from .export import FILE_NAME, WEIGHTS_SUFFIX, in_order, program_file

ONNX_FILE = f"{FILE_NAME}.onnx"
#: What writes, checks and runs it.
PACKAGES = ("paddle2onnx", "onnx", "onnxruntime")
#: The opset that is written: LayerNorm is one operator from 17 on.
OPSET = 17


def need(package: str) -> ModuleType:
    """Import a package of the extra `onnx`; raises `ReparamError` where it is missing or does not fit this Paddle."""
    try:
        return importlib.import_module(package)
    except (ImportError, ValueError) as error:  # paddle2onnx raises the latter on Paddle 2
        raise ReparamError(
            f"ONNX needs the package {package} ({error}); pip install 'paddle-reparam[onnx]', on Paddle 3"
        ) from error


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


class OnnxModel:
    """An ONNX file on the CPU, run by onnxruntime; called and run as an `InferenceModel` is."""

    def __init__(self, path: Folder, threads: int = 1) -> None:
        """Load a file; raises `ReparamError` where onnxruntime is missing or cannot load it."""
        onnxruntime = need("onnxruntime")
        self.name = str(path)
        with one_sentence(f"{path}: onnxruntime cannot load it"):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.output_shapes = [node.shape for node in self._session.get_outputs()]
        self.inputs = in_order([node.name for node in self._session.get_inputs()])
        #: What the file says of itself, name -> text.
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for the inputs, in the order in which the network takes them."""
        if len(self.inputs) != len(inputs):
            raise ReparamError(f"{self.name}: it takes {len(self.inputs)} inputs ({self.inputs}), not {len(inputs)}")
        with one_sentence(f"{self.name}: onnxruntime cannot run it"):
            return self._session.run(None, dict(zip(self.inputs, inputs)))

    def __call__(self, *inputs: paddle.Tensor) -> list[paddle.Tensor]:
        return [paddle.to_tensor(array) for array in self.run(*(x.numpy() for x in inputs))]


def _convert(program: str, path: str) -> None:
    # Its optimizers are other packages, which it would install by itself.
    os.environ["POLYGRAPHY_AUTOINSTALL_DEPS"] = "0"
    weights = str(Path(program).with_suffix(WEIGHTS_SUFFIX))
    need("paddle2onnx").export(program, weights, path, opset_version=OPSET, optimize_tool="None")
    # Here, as onnxruntime may abort the process too where it plans what a file says.
    OnnxModel(path)


if __name__ == "__main__":
    _convert(*sys.argv[1:])
