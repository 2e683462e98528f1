"""Bring a published weight file, of PyTorch mostly, into a form that this library loads; checked before it is kept."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.errors import exit_code
from paddle_reparam.weights.conversion import convert


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for wrong usage, 1 where the file is not what it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="name of the network, such as RepLKNet_31B")
    parser.add_argument("--input", required=True, help="the published file: .pth, .pt, .safetensors, .npz, .pdparams")
    parser.add_argument("--output", required=True, type=_weight_file, help="the .pdparams or .safetensors to write")
    parser.add_argument(
        "--weights", choices=["plain", "ema"],
        help="which of the weights of a training checkpoint: as trained (the default), or their moving average",
    )  # fmt: skip
    parser.add_argument(
        "--option", action="append", default=[], type=_option, metavar="KEY=VALUE",
        help="an argument of the network, as in --option ratio=0.25; may be given several times",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace the output file where it exists")
    given = parser.parse_args(arguments)
    with exit_code() as result:
        print(
            convert(
                given.model, given.input, given.output,
                weights=given.weights, options=dict(given.option), force=given.force,
            )
        )  # fmt: skip
    return result[0]


def _weight_file(text: str) -> str:
    if Path(text).suffix not in (".pdparams", ".safetensors"):
        raise argparse.ArgumentTypeError(f"{text} is neither a .pdparams nor a .safetensors file")
    return text


def _option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    try:
        if key.isidentifier() and separator:
            return key, yaml.safe_load(value)
    except yaml.YAMLError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: write KEY=VALUE, as in ratio=0.25 or kernel_size=[31,29,27,13,5]")


if __name__ == "__main__":
    sys.exit(main())
