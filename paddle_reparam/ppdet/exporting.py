"""A detector fused, exported by PaddleDetection with all that stands behind its heads, and its boxes checked."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import paddle
from paddle import nn
from paddle.inference import Config, create_predictor

from ..deploy.old_programs import old_programs
from ..errors import BY_FORCE, NothingProven, OutputExists, ReparamError, UsageError, one_sentence, printable
from ..files import new_folder
from ..layers.base import ReparamLayer
from ..report import Report
from ..surgery import rewrite
from ..surgery.foreign import holds_norms
from ..surgery.tracing import walk
from ..surgery.verify import verify
from ..weights import checkpoints
from . import command, setup

#: The file of PaddleDetection's own that says how images are brought in front of the network.
_HOW = "infer_cfg.yml"
#: From which score on a box is compared, how far its score may be from that of the same box, and a corner in pixels.
_SCORE, _OF_SCORES, _OF_CORNERS = 0.05, 1e-3, 0.1


def register() -> None:
    """Let PaddleDetection's own export fuse the layers of this library, and run on a current Paddle."""
    from ppdet.engine import Trainer

    Trainer.export = _as_it_runs(Trainer.export)
    for name, module in list(sys.modules.items()):
        for value in list(vars(module).values()) if name.startswith("ppdet.modeling.") else ():
            if isinstance(value, type) and value.__module__ == name and "convert_to_deploy" in vars(value):
                value.convert_to_deploy = _whole_and_once(value.convert_to_deploy)


def _as_it_runs(export: Callable[..., Any]) -> Callable[..., Any]:
    """Return the export of a trainer, of the fused network, and written as the program that its last steps fit into."""

    @functools.wraps(export)
    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        self.model.eval()
        if any(isinstance(layer, ReparamLayer) for _, layer in walk(self.model)):
            self.model, _ = rewrite.reparameterize(self.model)
        whole = functools.partial(paddle.jit.to_static, full_graph=True)
        with old_programs(), patch.object(paddle.jit, "to_static", whole):
            return export(self, *arguments, **options)

    return run


def _whole_and_once(convert: Callable[[nn.Layer], None]) -> Callable[[nn.Layer], None]:
    """Return a block's way to fuse itself, which reads a kernel from whatever stands in a convolution's place."""

    @functools.wraps(convert)
    def convert_to_deploy(self: nn.Layer) -> None:
        layer = next((layer for _, layer in walk(self) if isinstance(layer, ReparamLayer)), None)
        if layer is not None:
            raise ReparamError(
                f"{type(self).__name__}.convert_to_deploy() would leave out the {type(layer).__name__} inside of it; "
                "fuse the network by reparameterize, which fuses both"
            )
        if holds_norms(self):
            convert(self)

    return convert_to_deploy


@dataclass
class ExportReport(Report):
    """What was written and how it was proven: where; up to the heads, the relative error and how much it may be; how
    many boxes were found in how many images, and the share of them that the trained and the exported network found.
    """

    output: str
    error: float
    tolerance: float
    boxes: int
    images: int
    same: float

    def __str__(self) -> str:
        return printable(
            f"{self.output}: the same function up to its heads (relative error {self.error:.1e}, tolerance "
            f"{self.tolerance:.0e}); {self.same:.1%} of {self.boxes} boxes in {self.images} images are found by both "
            "the trained and the exported network"
        )


def add_export(parser: argparse.ArgumentParser) -> None:
    """Add the options of an export to a parser."""
    command.add_config(parser)
    parser.add_argument("--weights", required=True, help="the weight file that training saved")
    parser.add_argument("--output", required=True, help="the folder to make")
    parser.add_argument("--images", type=int, default=20, help="so many validation images are compared by (20)")
    parser.add_argument("--force", action="store_true", help="replace what an earlier export wrote")


def export(given: argparse.Namespace) -> ExportReport:
    """Fuse trained weights, prove that, export them as PaddleDetection does, and compare the boxes of real images.

    The folder is one for PaddleDetection's deploy scripts and appears whole or not at all. Raises `ReparamError` where
    a check fails: where the fused network is another function up to its heads, or less than 99 % of the boxes are found
    again, or others beside them; and `OutputExists` for a folder that is there, but for one of this
    function with `force`.
    """
    output = Path(given.output)
    if output.exists() and not (given.force and (output / _HOW).is_file()):
        hint = "" if given.force else f", or {BY_FORCE} where it holds an export"
        raise OutputExists(f"{output} exists already and is kept; name another folder{hint}")
    if given.images < 1:
        raise UsageError(f"so many images are compared by: {given.images}; it is 1 or more")
    setup()
    from ppdet.engine import Trainer

    from .heads import UpToHeads

    weights = checkpoints.weight_file(given.weights)
    with command.reading(given.config, given.override) as config:
        shape = (config["TestReader"].get("inputs_def") or {}).get("image_shape")
        if not shape or min(shape[-3:]) < 1:
            raise UsageError(f"{given.config}: TestReader.inputs_def.image_shape is {shape}; an export is for one size")
        config["EvalReader"]["batch_size"] = 1
        images = Trainer(config, mode="eval").loader
        trainer = Trainer(config, mode="test")
        if hasattr(trainer.model, "rpn_head"):
            raise ReparamError(
                f"{given.config}: {type(trainer.model).__name__} proposes boxes first, and Paddle cannot trace what it "
                "does with their numbers; export a detector of one stage"
            )
        trainer.load_weights(weights)
        trainer.model.eval()
        spec = [[None, *shape[-3:]]]
        trained = UpToHeads(trainer.model)
        fused, _ = rewrite.reparameterize(trained, fold_bn=True, input_spec=spec)
        report = verify(trained, fused, spec)
        report.raise_if_failed(f"{weights}, fused")
        expected = _found_by(trainer.model, images, given.images)
        count = sum(_count(boxes) for _, boxes in expected)
        if not count:
            raise NothingProven(
                f"{weights}: the network finds no box with a score above {_SCORE} in {len(expected)} images, so "
                "comparing boxes would prove nothing; use trained weights"
            )
        trainer.model = fused.detector
        with new_folder(Path(os.path.realpath(output)), output, replace=output.exists()) as folder:
            trainer.export(str(folder))
            for file in (folder / config["filename"]).iterdir():
                file.rename(folder / file.name)
            (folder / config["filename"]).rmdir()
            found = _by_program(folder, [inputs for inputs, _ in expected])
            same = sum(_count_same(of_trained, boxes) for (_, of_trained), boxes in zip(expected, found))
            count = max(count, sum(map(_count, found)))
            if same / count < 0.99:
                raise ReparamError(
                    f"of {count} boxes in {len(expected)} images {same} are found by both networks, the trained one "
                    "and the exported one"
                )
    return ExportReport(str(output), report.relative_error, report.tolerance, count, len(expected), same / count)


def _found_by(detector: nn.Layer, images: Any, count: int) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Return (inputs, boxes `[n, 6]`: class, score, corners) of a detector for the first images of a loader."""
    found = []
    for _, batch in zip(range(count), images):
        inputs = {name: batch[name] for name in ("image", "im_shape", "scale_factor")}
        with paddle.no_grad():
            found.append((inputs, detector(dict(inputs))["bbox"].numpy()))
    return found


def _by_program(folder: Path, several: list[dict[str, Any]]) -> list[np.ndarray]:
    """Return the boxes that an exported program finds for each of several inputs, run as PaddleDetection deploys it."""
    with one_sentence(f"{folder}: Paddle Inference cannot run it"):
        settings = Config(str(folder / "model.pdmodel"), str(folder / "model.pdiparams"))
        settings.disable_glog_info()
        settings.disable_gpu()
        predictor = create_predictor(settings)
        found = []
        for inputs in several:
            for name in predictor.get_input_names():
                predictor.get_input_handle(name).copy_from_cpu(inputs[name].numpy())
            predictor.run()
            found.append(predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu())
    return found


def _count(boxes: np.ndarray) -> int:
    return int((boxes[:, 1] > _SCORE).sum())


def _count_same(expected: np.ndarray, found: np.ndarray) -> int:
    """Return how many of the expected boxes are found, of the same class, score and place."""
    allowed = np.array([0.0, _OF_SCORES, *[_OF_CORNERS] * 4])
    return sum(bool((np.abs(found - box) <= allowed).all(1).any()) for box in expected[expected[:, 1] > _SCORE])
