"""Draw the papers' figures from a trained network: a table for each paper, the same as JSON, and a picture."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam import analysis
from paddle_reparam.analysis.figures import FIGURES
from paddle_reparam.errors import CheckpointError, OutputExists, exit_code
from paddle_reparam.files import new_folder
from paddle_reparam.ppcls import setup
from paddle_reparam.ppcls.command import add_override, read_config
from paddle_reparam.ppcls.errors import ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for wrong usage, 1 where there is nothing to analyse."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-c", "--config", required=True, help="the YAML file of the training")
    parser.add_argument("--weights", required=True, help="the weight file that training saved, in train form")
    parser.add_argument("--output", required=True, help="the folder to make")
    parser.add_argument("--images", type=int, default=256, help="validation images at most, evenly from the list")
    add_override(parser)
    given = parser.parse_args(arguments)
    if given.images < 1:
        parser.error("--images must be 1 or more")
    with exit_code() as result:
        run(given)
    return result[0]


def run(given: argparse.Namespace) -> None:
    """Analyse a network and write the folder, whole or not at all."""
    target = Path(os.path.realpath(given.output))
    if os.path.lexists(target):
        raise OutputExists(f"{given.output} exists already and is kept; name another folder")
    setup().utils.logger.init_logger(log_level="WARNING")
    from paddle_reparam.ppcls.images import read_validation_images
    from paddle_reparam.ppcls.loading import load_weights, weight_file
    from paddle_reparam.ppcls.reparam import build_train_form

    config = read_config(given.config, given.override)
    try:
        weights = weight_file(given.weights)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    images = read_validation_images(config, given.images)
    model = build_train_form(config)
    load_weights(model, weights, config, "export")
    papers = analysis.analyze(model, images.pixels)
    facts = {"config": given.config, "weights": str(weights), "images": len(images.labels)}
    with new_folder(target, given.output, replace=False) as folder:
        write(folder, papers, facts)
    for paper, rows in papers.items():
        print(f"{paper}\n{analysis.table_of(rows)}\n")
    print(f"written: {given.output}")


def write(folder: Path, papers: dict[str, list[Any]], facts: dict[str, Any]) -> None:
    """Write `analysis.json` and a picture for each paper into a folder."""
    layers = {paper: [analysis.numbers_of(row) for row in rows] for paper, rows in papers.items()}
    (folder / "analysis.json").write_text(json.dumps({**facts, "layers": layers}, indent=2) + "\n", encoding="utf-8")
    for paper, rows in papers.items():
        FIGURES[paper](rows).savefig(folder / f"{paper}.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
