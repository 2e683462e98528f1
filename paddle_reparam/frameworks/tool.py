"""The command of a framework whose wheel has none: train, evaluate and export a network of a config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import ModuleType

from ..errors import exit_code


def run(description: str, command: ModuleType, exporting: ModuleType, arguments: Sequence[str] | None) -> int:
    """Run `train`, `eval` or `export` and return the exit code: 2 for wrong usage, 1 where data, weights or a check are
    wrong. `command` and `exporting` are modules of the framework's room: what they add to a parser, and what they do.
    """
    parser = argparse.ArgumentParser(description=description)
    kinds = parser.add_subparsers(dest="kind", required=True)
    train = kinds.add_parser("train", help="train the network of a config")
    command.add_config(train)
    command.add_training(train)
    evaluate = kinds.add_parser("eval", help="measure trained weights on the validation images of a config")
    command.add_config(evaluate)
    evaluate.add_argument("--weights", required=True, help="the weight file that training saved")
    export = kinds.add_parser("export", help="fuse trained weights, export them, and check each step: a folder to ship")
    exporting.add_export(export)
    given = parser.parse_args(arguments)
    with exit_code() as result:
        if given.kind == "train":
            print(f"the best weights: {command.train(given)}")
        elif given.kind == "eval":
            print("; ".join(f"{name}: {value:.4f}" for name, value in command.evaluate(given).items()))
        else:
            print(exporting.export(given))
    return result[0]
