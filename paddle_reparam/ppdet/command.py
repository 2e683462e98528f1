"""Train and evaluate with PaddleDetection, whose wheel has no commands: with one sentence where it fails."""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
import yaml

from ..errors import MissingFile, ReparamError, UsageError, one_sentence, ours_beneath, reason_of
from ..frameworks.section import SECTION
from ..weights import checkpoints
from . import setup

#: Sections and values that a config may have, or get by an override, beside the classes of PaddleDetection.
_VALUES = {
    SECTION, "architecture", "pretrain_weights", "epoch", "snapshot_epoch", "save_dir", "log_iter", "worker_num",
    "use_gpu", "use_ema", "ema_decay", "ema_decay_type", "num_classes", "metric", "norm_type", "use_vdl", "vdl_log_dir",
    "amp", "classwise", "find_unused_parameters", "TrainDataset", "EvalDataset", "TestDataset",
}  # fmt: skip


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a config of PaddleDetection and change its values."""
    parser.add_argument("-c", "--config", required=True, help="the YAML file")
    parser.add_argument(
        "-o", "--opt", "--override", dest="override", action="append", default=[], metavar="KEY=VALUE",
        help="replace a value of the config, as in -o TrainReader.batch_size=4; may be given several times",
    )  # fmt: skip


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of a training, named as those of PaddleDetection's tools/train.py."""
    parser.add_argument("-r", "--resume", help="the weight file of a training to go on with")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")


def train(given: argparse.Namespace) -> str:
    """Train the network of a config, and evaluate it as often as it is saved; return the file of its best weights."""
    setup()
    from ppdet.engine import Trainer

    paddle.seed(given.seed)
    np.random.seed(given.seed)
    random.seed(given.seed)
    with reading(given.config, given.override) as config:
        _check_boxes(config, "Train")
        _check_boxes(config, "Eval")
        trainer = Trainer(config, mode="train")
        if not len(trainer.loader):
            raise ReparamError(
                f"{given.config}: {len(trainer.dataset)} images for training do not fill a batch of "
                f"{config['TrainReader']['batch_size']}"
            )
        if given.resume:
            trainer.resume_weights(given.resume)
        elif config.get("pretrain_weights"):
            trainer.load_weights(config["pretrain_weights"])
        trainer.train(True)
        folder = os.path.join(config["save_dir"], config["filename"])
    best = os.path.join(folder, "best_model.pdparams")
    return best if os.path.isfile(best) else os.path.join(folder, "model_final.pdparams")


def evaluate(given: argparse.Namespace) -> dict[str, float]:
    """Measure trained weights on the validation images of a config; return the metrics by name, as shares."""
    setup()
    from ppdet.engine import Trainer

    weights = checkpoints.weight_file(given.weights)
    with reading(given.config, given.override) as config:
        _check_boxes(config, "Eval")
        trainer = Trainer(config, mode="eval")
        trainer.load_weights(weights)
        results: dict[str, float] = {}
        trainer.register_callbacks([_keeping(trainer, results)])
        trainer.evaluate()
    if not results:
        raise ReparamError(f"{given.config}: the network found nothing in the images, so there is nothing to measure")
    return results


def _keeping(trainer: Any, results: dict[str, float]) -> Any:
    """Return a callback that keeps what an evaluation measured, before it is forgotten."""
    from ppdet.engine.callbacks import Callback

    class Keeping(Callback):
        def on_epoch_end(self, status: dict[str, Any]) -> None:
            for metric in trainer._metrics:
                for kind, values in metric.get_results().items():
                    values = np.atleast_1d(values)
                    # What COCO calls these two.
                    results[f"{kind} mAP"] = float(values[0])
                    if len(values) > 1:
                        results[f"{kind} AP50"] = float(values[1])

    return Keeping(trainer)


def _check_boxes(config: dict[str, Any], part: str) -> None:
    """Raise `ReparamError` where the file is missing that says what the images of a data set hold."""
    from ppdet.core.workspace import create

    dataset = create(f"{part}Dataset")()
    path = os.path.join(dataset.dataset_dir, dataset.anno_path or "")
    # Where the folder is missing too, PaddleDetection may know where to get it from.
    if os.path.isdir(dataset.dataset_dir) and not os.path.isfile(path):
        raise ReparamError(f"{part}Dataset: there is no file {path}; make the data set, or name it by anno_path")


@contextlib.contextmanager
def reading(path: str, override: list[str]) -> Iterator[dict[str, Any]]:
    """Give a config of PaddleDetection; what goes wrong in the `with` block is a `ReparamError`, in one sentence.

    PaddleDetection has one config in a process, into which it reads all: afterwards it is as it was before.
    """
    from ppdet.core import workspace
    from ppdet.utils.check import check_config

    if not os.path.isfile(path):
        raise MissingFile(f"there is no config {path}")
    whole = workspace.global_config
    before = {
        name: (value, copy.deepcopy(dict(value)) if isinstance(value, dict) else None) for name, value in whole.items()
    }
    try:
        config = _read(path, override)
        try:
            check_config(config)
            config.setdefault("save_dir", "output")
            if not config.get("output_eval"):
                # Otherwise it writes the boxes that it found into the folder that the command is run in.
                config["output_eval"] = os.path.join(config["save_dir"], config["filename"])
                os.makedirs(config["output_eval"], exist_ok=True)
            yield config
        except ReparamError:
            raise
        except (Exception, SystemExit) as error:
            if (ours := ours_beneath(error)) is not None:
                raise ours from error
            with one_sentence(path):
                raise (
                    error if isinstance(error, Exception) else RuntimeError("PaddleDetection ended the run")
                ) from error
    finally:
        whole.clear()
        for name, (value, content) in before.items():
            if content is not None:
                value.clear()
                value.update(content)
            whole[name] = value


def _read(path: str, override: list[str]) -> dict[str, Any]:
    from ppdet.core import workspace

    known = set(workspace.global_config)
    try:
        config = workspace.load_config(path)
    except Exception as error:
        raise UsageError(f"{path} is no config that PaddleDetection can read: {reason_of(error)}") from error
    for each in override:
        key, equals, text = each.partition("=")
        parts = key.split(".")
        if not equals or not all(parts):
            raise UsageError(f"-o {each}: write KEY=VALUE, as in -o TrainReader.batch_size=4")
        if parts[0] not in config and parts[0] not in _VALUES:
            raise UsageError(f"-o {each}: neither the config nor PaddleDetection has {parts[0]!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"-o {each}: the value is not written as YAML") from error
        _put(config, parts, value, each)
    if not isinstance(config.get("architecture"), str) or config["architecture"] not in known:
        raise UsageError(f"{path} is no config of PaddleDetection: its architecture is {config.get('architecture')!r}")
    return config


def _put(config: Any, parts: list[str], value: Any, override: str) -> None:
    """Put a value in its place, in sections and in data sets, which PaddleDetection builds as it reads them."""
    *above, last = parts
    for part in above:
        config = config.setdefault(part, {}) if isinstance(config, dict) else getattr(config, part, None)
        if not isinstance(config, dict) and not hasattr(config, "__dict__"):
            raise UsageError(f"-o {override}: {part} holds no section")
    if isinstance(config, dict):
        config[last] = value
    elif hasattr(config, last):
        setattr(config, last, value)
    else:
        raise UsageError(f"-o {override}: {'.'.join(above)} has no {last!r}")
