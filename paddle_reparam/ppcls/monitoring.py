"""The `Monitor` section of a config: what the layers do, in PaddleClas' VisualDL log; and a progress bar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from ppcls.utils import logger
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..errors import ReparamError
from ..training.monitor import MaskHistory, Monitor, undisturbed
from . import sections, values
from .errors import ConfigError
from .sections import Key
from .transforms import read_labels

#: Steps between two writes, images to look at.
KEYS = {"interval": Key(100, values.whole(1)), "images": Key(32, values.whole(1))}


def read_section(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `Monitor` section with its defaults, or None; raises `ConfigError` for what it cannot mean."""
    settings = sections.read(config, "Monitor", KEYS, "{interval: 100}")
    if settings is None:
        return None
    if not config["Global"].get("use_visualdl"):
        raise ConfigError("Monitor writes into VisualDL's log: set Global.use_visualdl to True, or Monitor to null")
    return settings


def start(engine: Any, settings: Mapping[str, Any]) -> Monitor | None:
    """Return the monitor of an Engine; None in all processes but the first, which have no log."""
    if engine.vdl_writer is None:
        return None
    model = getattr(engine.model, "_layers", engine.model)
    loader = getattr(engine, "eval_dataloader", None) or engine.train_dataloader
    with undisturbed(model):
        # Transforms of training images draw.
        count = min(settings["images"], len(loader.dataset))
        chosen = np.linspace(0, len(loader.dataset) - 1, count).round().astype(int)
        pixels, labels = zip(*(loader.dataset[int(i)][:2] for i in chosen))
    training = getattr(engine, "sparse_training", None)
    images = np.stack([np.asarray(each) for each in pixels]).astype("float32")
    labels = np.asarray(labels)
    if engine.config["Global"].get("use_multilabel"):
        # Some datasets put the share of each label in training behind them.
        labels = labels.reshape(count, -1, labels.shape[-1])[:, 0]
    else:
        labels = labels.reshape(count, -1)[:, 0]
    names = read_labels(engine.config, Path(logger.__file__).parents[2])
    masks = MaskHistory(training) if training else None
    try:
        monitor = Monitor(model, engine.vdl_writer, images, labels, masks, names)
    except ReparamError as error:
        raise ConfigError(str(error)) from None
    monitor.write_settings(hyperparameters(engine.config), ["train_loss", "eval_acc"])
    return monitor


def hyperparameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers and names of a config that describe a run, under their dotted paths."""
    found = {"Global.epochs": config["Global"]["epochs"], "Global.seed": config["Global"].get("seed")}
    found["batch_size"] = config["DataLoader"]["Train"]["sampler"].get("batch_size")
    for section in ("Arch", "Optimizer", "Sparsity"):
        found.update(_flat(config.get(section), section))
    kept = {key: str(value) if isinstance(value, bool) else value for key, value in found.items()}
    return {key: value for key, value in kept.items() if isinstance(value, (int, float, str))}


def _flat(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {path: value}
    return {key: each for name, part in value.items() for key, each in _flat(part, f"{path}.{name}").items()}


@contextlib.contextmanager
def progress(engine: Any) -> Iterator[None]:
    """Show a bar over the whole run as `engine.progress`, where stderr is a terminal and nobody watches; else None."""
    engine.progress = None
    # Newer Engines may have epochs of another length than the data.
    total = engine.config["Global"]["epochs"] * getattr(engine, "iter_per_epoch", len(engine.train_dataloader))
    engine.steps = total
    if engine.watch or paddle.distributed.get_rank() or not sys.stderr.isatty():
        yield
        return
    with logging_redirect_tqdm([logger._logger]), tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        engine.progress = bar
        yield


def advance(engine: Any, epoch: int) -> None:
    """Move the bar to the steps that are done, or tell who watches."""
    if engine.watch:
        engine.watch(engine.global_step / engine.steps)
    bar = engine.progress
    if bar is None:
        return
    done = engine.global_step
    if bar.n == 0 and done > 1:
        # A resumed run: what was done before it says nothing about its speed.
        bar.initial = bar.n = bar.last_print_n = done - 1
    known = {key: f"{engine.output_info[key].avg:.4f}" for key in ("loss", "top1") if key in engine.output_info}
    cost = engine.time_info["batch_cost"].avg
    if cost:
        known["images/s"] = f"{engine.train_dataloader.batch_sampler.batch_size / cost:.0f}"
    bar.set_description(f"epoch {epoch}/{engine.config['Global']['epochs']}", refresh=False)
    bar.set_postfix(known, refresh=False)
    bar.update(done - bar.n)
