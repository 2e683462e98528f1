"""Detection with PaddleDetection: train, evaluate and export a network of it with the layers of paddle_reparam."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.errors import exit_code
from paddle_reparam.ppdet import command, exporting


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for wrong usage, 1 where data, weights or a check are wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
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


if __name__ == "__main__":
    sys.exit(main())
