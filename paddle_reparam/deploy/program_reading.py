"""What an exported program says of its operators, by the names that they have in an ONNX file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Operator:
    """An operator of a program: its name in Paddle, its attributes, and what it takes and puts out.

    `inputs` and `outputs` are names, which paddle2onnx writes into an ONNX file, "" for what is left out. `shapes` are
    of both, with -1 for what is dynamic; `values` are inputs that are constants of the program.
    """

    kind: str
    attributes: Mapping[str, Any]
    inputs: list[str]
    outputs: list[str]
    shapes: Mapping[str, list[int]]
    values: Mapping[str, list[float]]
    layer: str

    @property
    def place(self) -> str:
        """Return which operator it is, for errors."""
        return f"the operator {self.kind} ({self.layer or self.outputs[0]})"


#: What stands for an input, in a program of Paddle 3 and in one that was translated.
INPUTS = ("data", "feed")


def write_attributes(program: Path, target: Path) -> None:
    """Write a program, a `.json`, with its attributes of 64 bits in 32, as which paddle2onnx 2.1 reads them anyway.

    Otherwise slopes, epsilons, paddings and factors are whatever lay in memory there.
    """
    text = program.read_text(encoding="utf-8")
    target.write_text(re.sub(r'"#":\s*"0\.a_f64"', '"#":"0.a_f32"', text), encoding="utf-8")


def operators(program: Path) -> Iterator[Operator]:
    """Yield the operators of an exported program, a `.json`, in the order in which it runs them."""
    [block] = json.loads(program.read_text(encoding="utf-8"))["program"]["regions"][0]["blocks"]
    # What is put out is written under the name that the program gives it.
    names = {
        op["I"][0]["%"]: next(each["AT"]["D"] for each in op["A"] if each["N"] == "name")
        for op in block["ops"]
        if op["#"].endswith(".fetch")
    }
    shapes: dict[int, list[int]] = {}
    values: dict[int, list[float]] = {}
    seen: Counter[str] = Counter()
    for op in block["ops"]:
        if op["#"] == "p":
            names[op["O"]["%"]], shapes[op["O"]["%"]] = op["A"][3], op["O"]["TT"]["D"][1]
            continue
        kind = op["#"].split(".", 1)[-1]
        attributes = {each["N"]: _plain(each["AT"]["D"]) for each in op["A"] if "D" in each["AT"]}
        outputs = [out for out in op["O"] if "TT" in out]
        for index, out in enumerate(outputs):
            default = attributes["name"] if kind in INPUTS else f"p2o.pd_op.{kind}.{seen[kind]}.{index}"
            names.setdefault(out["%"], default)
            if out["TT"]["#"].endswith(".t_dtensor"):
                shapes[out["%"]] = out["TT"]["D"][1]
            if kind == "full_int_array":
                values[out["%"]] = attributes["value"]
            elif kind == "full":
                values[out["%"]] = [attributes["value"]]
        seen[kind] += 1
        inputs, outputs = [entry["%"] for entry in op["I"]], [out["%"] for out in outputs]
        known = [number for number in (*inputs, *outputs) if number in names]
        yield Operator(
            kind,
            attributes,
            [names.get(number, "") for number in inputs],
            [names[number] for number in outputs],
            {names[number]: shapes[number] for number in known if number in shapes},
            {names[number]: values[number] for number in known if number in values},
            attributes.get("struct_name", "").strip("/"),
        )


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item["D"] if isinstance(item, dict) and "D" in item else item) for item in value]
    return value
