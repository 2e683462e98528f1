"""Processes of one training that would not train the same: one sentence in all of them before the first step."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ..files import digest
from ..training.processes import differing
from .errors import ConfigError
from .saving import SUFFIXES
from .trainings import as_values
from .validation import without_weights

#: Of `Global`: what all processes must do equally often.
_OFTEN = ("epochs", "eval_during_train", "eval_interval", "start_eval_epoch", "iter_per_epoch", "update_freq")


def check_agreement(engine: Any) -> None:
    """Raise `ConfigError` in every process of a training unless all of them would train the same.

    They may have been started on several machines, each by a command of its own. Where weights and images lie may
    differ from one machine to the next, and so may what only the first process does.
    """
    if paddle.distributed.get_world_size() == 1:
        return
    config, arch = engine.config, as_values(engine.config["Arch"])
    without_weights(arch)
    compared = {section: config.get(section) for section in ("Loss", "Optimizer", "AMP", "EMA", "Sparsity", "Monitor")}
    compared.update(Arch=arch, Global=[config["Global"].get(key) for key in _OFTEN])
    for split in ("Train", "Eval"):
        dataset = getattr(getattr(engine, f"{split.lower()}_dataloader", None), "dataset", None)
        if dataset is not None:
            compared[f"DataLoader.{split}.sampler"] = config["DataLoader"][split].get("sampler")
            compared[f"the images of DataLoader.{split}"] = _images(dataset)
    wrong = [list(compared)[i] for i in differing([_digest(value) for value in compared.values()])]
    if wrong:
        raise ConfigError(
            f"the processes of this training differ in {' and '.join(wrong)}: every machine needs the same command, "
            "the same config and the same lists of images"
        )
    if differing([_digest(_checkpoint(engine.config["Global"]["checkpoints"]))]):
        raise ConfigError(
            f"the processes of this training do not go on from the same checkpoint; this one would from "
            f"{engine.config['Global']['checkpoints'] or 'none'}. The first process alone writes them: "
            "Global.output_dir must be a folder that all machines see, or be copied to each before"
        )


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_plain).encode()).digest()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else type(value).__name__


def _images(dataset: Any) -> list[Any]:
    """Return how many images there are, where each lies in the folder of its data set, and their labels."""
    folder = str(getattr(dataset, "_img_root", ""))
    paths = [str(path) for path in getattr(dataset, "images", None) or []]
    paths = [path[len(folder) :].lstrip("/") if path.startswith(folder) else path for path in paths]
    labels = getattr(dataset, "labels", None)
    return [len(dataset), paths, [] if labels is None else list(labels)]


def _checkpoint(prefix: str | None) -> list[str] | None:
    files = [Path(f"{prefix}{suffix}") for suffix in SUFFIXES]
    return [digest(file)["sha256"] if file.is_file() else "" for file in files] if prefix else None
