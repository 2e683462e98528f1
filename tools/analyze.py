"""Draw the papers' figures from trained networks: their layers, the loss around their weights, what their outputs see.

Each gives a table, the same as JSON, and a picture. Without the name of a command it is `layers`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from paddle_reparam import analysis
from paddle_reparam.analysis.figures import FIGURES
from paddle_reparam.analysis.network_figures import draw_fields, draw_landscape
from paddle_reparam.errors import OutputExists, exit_code
from paddle_reparam.files import new_folder
from paddle_reparam.ppcls import setup
from paddle_reparam.ppcls.command import add_override, read_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for wrong usage, 1 where there is nothing to analyse."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        arguments.insert(0, "layers")
    given = parser_of().parse_args(arguments)
    given.command_line = shlex.join(["python", "tools/analyze.py", *arguments])
    with exit_code() as result:
        given.run(given)
    return result[0]


def parser_of() -> argparse.ArgumentParser:
    """Return what reads the command line; `run` is the function that analyses."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    layers = commands.add_parser("layers", help="what each layer has learned, by the paper that it is from")
    layers.add_argument("-c", "--config", required=True, help="the YAML file of the training")
    layers.add_argument("--weights", required=True, help="the weight file that training saved, in train form")
    landscape = commands.add_parser("landscape", help="the loss around the weights of networks, side by side")
    field = commands.add_parser("field", help="the effective receptive field, before and after fusing")
    for command in (landscape, field):
        command.add_argument(
            "-c", "--config", required=True, nargs="+", help="the YAML file of all trainings, or one for each"
        )
        command.add_argument(
            "--weights", required=command is landscape, nargs="+", default=[], help="the weight files, one a network"
        )
    landscape.add_argument("--radius", type=positive, default=1.0, help="as far as the filters are long is 1 (1)")
    landscape.add_argument("--points", type=points, default=21, help="a side of the plane, 5, 9, 13, ... (21)")
    landscape.add_argument("--directions", type=at_least(2), default=10, help="that the spread is of (10)")
    landscape.add_argument("--seed", type=at_least(0), default=0, help="of the directions (0)")
    field.add_argument("--release", metavar="FOLDER", help="a released network too, or alone: its own program")
    field.add_argument("--size", type=at_least(3), help="enlarge the images to this side, as the papers do to 1024")
    for command, run, images, kind in (
        (layers, run_layers, 256, "validation"), (landscape, run_landscape, 512, "training"),
        (field, run_field, 50, "validation"),
    ):  # fmt: skip
        command.set_defaults(run=run)
        command.add_argument("--output", required=True, help="the folder to make")
        least = 2 if command is landscape else 1
        what = f"{kind} images at most, evenly from the list ({images})"
        command.add_argument("--images", type=at_least(least), default=images, help=what)
        add_override(command)
    return parser


def at_least(smallest: int) -> Any:
    """Return what reads a whole number of so much or more."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {smallest} on")
        return int(text)

    return read


def points(text: str) -> int:
    """Return a number of points of which one is the middle and two are half way to the edge."""
    number = at_least(5)(text)
    if number % 4 != 1:
        raise argparse.ArgumentTypeError(f"{text} has no point half way to the edge; give 5, 9, 13, 17, 21, ...")
    return number


def positive(text: str) -> float:
    """Return a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def start(given: argparse.Namespace) -> Path:
    """Return the folder to make, which must not be there, and set PaddleClas up."""
    target = Path(os.path.realpath(given.output))
    if os.path.lexists(target):
        raise OutputExists(f"{given.output} exists already and is kept; name another folder")
    setup().utils.logger.init_logger(log_level="WARNING")
    return target


def run_layers(given: argparse.Namespace) -> None:
    """Analyse a network's layers and write the folder, whole or not at all."""
    target = start(given)
    from paddle_reparam.ppcls.images import read_validation_images
    from paddle_reparam.ppcls.pictures import load_network

    config = read_config(given.config, given.override)
    images = read_validation_images(config, given.images)
    papers = analysis.analyze(load_network(config, given.weights), images.pixels)
    facts = {"config": given.config, "weights": given.weights, "images": len(images.labels)}
    with new_folder(target, given.output, replace=False) as folder:
        write(folder, papers, facts)
    for paper, rows in papers.items():
        print(f"{paper}\n{analysis.table_of(rows)}\n")
    print(f"written: {given.output}")


def write(folder: Path, papers: dict[str, list[Any]], facts: dict[str, Any]) -> None:
    """Write `analysis.json` and a picture for each paper into a folder."""
    layers = {paper: [analysis.numbers_of(row) for row in rows] for paper, rows in papers.items()}
    write_json(folder / "analysis.json", {**facts, "layers": layers})
    for paper, rows in papers.items():
        FIGURES[paper](rows).savefig(folder / f"{paper}.png", dpi=110)


def run_landscape(given: argparse.Namespace) -> None:
    """Draw the loss around networks' weights and write the folder, whole or not at all."""
    target = start(given)
    from paddle_reparam.ppcls.pictures import draw_landscape as landscape_of
    from paddle_reparam.ppcls.pictures import pairs_of

    options = {name: getattr(given, name) for name in ("radius", "points", "directions", "seed")}
    pairs = pairs_of(given.config, given.weights)
    rows = landscape_of(pairs, given.override, given.images, functools.partial(watch, unit=" places"), **options)
    arrays = [{"axis": as_list(row.axis), "surface": as_list(row.surface), "cuts": as_list(row.cuts)} for row in rows]
    finish(given, target, rows, draw_landscape(rows), arrays)


def run_field(given: argparse.Namespace) -> None:
    """Find the receptive fields of networks and write the folder, whole or not at all."""
    target = start(given)
    from paddle_reparam.ppcls.errors import ConfigError
    from paddle_reparam.ppcls.pictures import find_fields, pairs_of

    if not given.weights and given.release is None:
        raise ConfigError("nothing is named that has a receptive field; give --weights, --release or both")
    pairs = pairs_of(given.config, given.weights) if given.weights else []
    rows = find_fields(
        pairs, given.release, given.config[0], given.override, given.images, given.size,
        functools.partial(watch, unit=" batches"),
    )  # fmt: skip
    finish(given, target, rows, draw_fields(rows), [{} for _ in rows])


def watch(items: Sequence[Any], name: str, unit: str) -> tqdm:
    """Return what gives the items one by one and shows how many are done, where somebody can see it."""
    return tqdm(items, name, unit=unit, leave=False, disable=None)


def finish(given: argparse.Namespace, target: Path, rows: Sequence[Any], figure: Any, arrays: Sequence[Any]) -> None:
    """Write the numbers and the picture into the folder, named as the command, and print the table."""
    found = [{**analysis.numbers_of(row), **each} for row, each in zip(rows, arrays)]
    with new_folder(target, given.output, replace=False) as folder:
        write_json(folder / f"{given.command}.json", {"command": given.command_line, "rows": found})
        figure.savefig(folder / f"{given.command}.png", dpi=110)
    print(f"{analysis.table_of(rows)}\nwritten: {given.output}")


def as_list(values: np.ndarray) -> Any:
    """Return an array as what JSON holds, with six digits; what is not finite becomes None."""
    if values.ndim > 1:
        return [as_list(each) for each in values]
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
