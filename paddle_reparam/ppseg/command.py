"""Train and evaluate with PaddleSeg, whose wheel has no commands: with one sentence and an exit code where it fails."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle

from ..errors import MissingFile, ReparamError, UsageError, one_sentence, ours_beneath, reason_of
from ..weights import checkpoints
from . import setup

#: What a config of PaddleSeg holds, and of this library.
_SECTIONS = {
    "batch_size", "iters", "train_dataset", "val_dataset", "optimizer", "lr_scheduler", "loss", "model", "test_config",
    "Reparam",
}  # fmt: skip


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a config of PaddleSeg and change its values."""
    parser.add_argument("-c", "--config", required=True, help="the YAML file")
    parser.add_argument(
        "-o", "--opts", "--override", dest="override", action="append", default=[], metavar="KEY=VALUE",
        help="replace a value of the config, as in -o model.num_classes=3; may be given several times",
    )  # fmt: skip


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of a training, named as those of PaddleSeg's tools/train.py."""
    parser.add_argument("--iters", type=int, help="batches to train on, where not as many as the config says")
    parser.add_argument("--batch_size", type=int, help="images in each, where not as many as the config says")
    parser.add_argument("--learning_rate", type=float, help="where not that of the config")
    parser.add_argument("--save_dir", default="output/seg", help="the folder for what is trained (output/seg)")
    parser.add_argument("--save_interval", type=int, default=1000, help="evaluate and save after so many (1000)")
    parser.add_argument("--log_iters", type=int, default=10, help="log after so many (10)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read images (0: this one)")
    parser.add_argument("--keep_checkpoint_max", type=int, default=5, help="so many are kept, and the best one (5)")
    parser.add_argument("--resume_model", help="the folder iter_N of a training to go on with")
    parser.add_argument("--use_vdl", action="store_true", help="write a log for VisualDL")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")


def train(given: argparse.Namespace) -> str:
    """Train the network of a config; return the file of its best weights."""
    for name in ("iters", "batch_size", "save_interval", "log_iters"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} is {value}; it is 1 or more")
    setup()
    from paddleseg import core

    paddle.seed(given.seed)
    np.random.seed(given.seed)
    random.seed(given.seed)
    values = {key: getattr(given, key) for key in ("learning_rate", "batch_size", "iters")}
    with building(given.config, given.override, **values) as builder:
        model, losses = builder.model, builder.loss
        train_set = builder.train_dataset
        val_set = builder.val_dataset if builder.config.val_dataset_cfg else None
        optimizer = builder.optimizer
        size = builder.config.batch_size
        if len(train_set) < size:
            raise ReparamError(f"{given.config}: {len(train_set)} images for training do not fill a batch of {size}")
        core.train(
            model, train_set, val_set, optimizer, given.save_dir, builder.config.iters, size, given.resume_model,
            given.save_interval, given.log_iters, given.num_workers, given.use_vdl, losses=losses,
            keep_checkpoint_max=given.keep_checkpoint_max, test_config=builder.config.test_config,
        )  # fmt: skip
    best = os.path.join(given.save_dir, "best_model", "model.pdparams")
    return best if val_set is not None else os.path.join(given.save_dir, f"iter_{builder.config.iters}/model.pdparams")


def evaluate(given: argparse.Namespace) -> dict[str, float]:
    """Measure trained weights on the validation images of a config; return mIoU and accuracy, as shares."""
    setup()
    from paddleseg import core

    weights = checkpoints.weight_file(given.weights)
    with building(given.config, given.override, without_weights=True) as builder:
        if not builder.config.val_dataset_cfg:
            raise UsageError(f"{given.config} has no val_dataset, so there is nothing to evaluate on")
        model = builder.model
        checkpoints.load_into(model, weights)
        options = builder.config.test_config
        miou, accuracy, *_ = core.evaluate(model, builder.val_dataset, **options)
    return {"mIoU": float(miou), "accuracy": float(accuracy)}


@contextlib.contextmanager
def building(path: str, override: list[str], without_weights: bool = False, **values: Any) -> Iterator[Any]:
    """Give the builder of a config; what goes wrong in the `with` block is a `ReparamError`, in one sentence.

    `without_weights` it reads none that the config names as pretrained: a weight file for all of it comes after.

    PaddleSeg wraps what a component raises while it is built: what this library raised there is raised again.
    """
    from paddleseg.cvlibs import Config, SegBuilder

    if not os.path.isfile(path):
        raise MissingFile(f"there is no config {path}")
    try:
        config = Config(path, opts=override or None, **values)
    except Exception as error:
        raise UsageError(f"{path} is no config that PaddleSeg can read: {reason_of(error)}") from error
    if unknown := set(config.dic) - _SECTIONS - set(Config._parse_from_yaml(path)):
        raise UsageError(f"-o: a config has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(_SECTIONS))}")
    if without_weights:
        _leave_weights_out(config.dic.get("model"))
    try:
        yield SegBuilder(config)
    except ReparamError:
        raise
    except Exception as error:
        if (ours := ours_beneath(error)) is not None:
            raise ours from error
        with one_sentence(path):
            raise


def _leave_weights_out(part: Any) -> None:
    """Let a part of a config, and the parts in it, name no weight file, in place."""
    if isinstance(part, dict):
        if "pretrained" in part:
            part["pretrained"] = None
        for inner in part.values():
            _leave_weights_out(inner)
