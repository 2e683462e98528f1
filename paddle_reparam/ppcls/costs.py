"""What networks cost beside a plain one: a step of their training, its memory, and the time of what they ship."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ..deploy.runtimes import get_runtime
from ..deploy.tuning import BASELINE
from ..measure import timing
from ..measure.memory import own_peak
from ..measure.steps import in_process_of
from . import setup
from .trainings import as_sections, quiet, started

#: Rounds at most, and seconds after which no more are begun: of steps for all networks, of an export for each.
_ROUNDS, _SECONDS_OF_STEPS, _SECONDS_OF_EXPORT = 30, 120.0, 8.0


def measure_costs(
    configs: Mapping[str, dict[str, Any]], exports: Mapping[str, Path], shape: Sequence[int], threads: int
) -> dict[str, dict[str, Any]]:
    """Return name -> `step` and `latency`, shares of the first network's with quartiles, and `memory` in bytes.

    A step is what a training does with one batch of the config's own images: forward, its loss, backward, its
    optimizer; the steps of all networks are timed in turns, in a new process. `memory` is the most that a process of
    its own has in two of them. An export runs on one image of a shape, in turns with the first one.
    """
    values = dict(configs)
    steps = in_process_of(threads, time_steps, values)
    peaks = {name: in_process_of(threads, memory_of_steps, config) for name, config in values.items()}
    latencies = in_process_of(threads, time_exports, dict(exports), list(shape), threads)
    return {name: {"step": steps[name], "memory": peaks[name], "latency": latencies.get(name)} for name in values}


# ---------------------------------------------------------------------------------------------------------------------
# In the new process


def time_steps(configs: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Time a step of each training in turns; `ratio`, `low` and `high` are shares of the first one's median."""
    steps = {name: make_step(config) for name, config in configs.items()}
    found = timing.alternate(steps, _ROUNDS, warm_up=2, seconds=_SECONDS_OF_STEPS)
    first = next(iter(found.values())).median
    return {
        name: {"seconds": each.median, "ratio": each.median / first, "low": each.low / first, "high": each.high / first}
        for name, each in found.items()
    }


def memory_of_steps(config: dict[str, Any]) -> int:
    """Train for two steps and return the most memory, in bytes, that this process, or its GPU, ever held."""
    step = make_step(config)
    for _ in range(2):
        step()
    return paddle.device.cuda.max_memory_reserved() if _on_gpu() else own_peak()


def make_step(config: dict[str, Any]) -> Callable[[], None]:
    """Return what does one step of a config's training, on its first batch each time."""
    setup()
    with quiet(), tempfile.TemporaryDirectory() as folder, started(as_sections(config), Path(folder)) as engine:
        images, labels, *_ = next(iter(engine.train_dataloader))
        if not config["Global"].get("use_multilabel"):
            labels = labels.reshape([len(images), -1])
    engine.model.train()

    def step() -> None:
        outputs = engine.model(images, labels) if engine.is_rec else engine.model(images)
        engine.train_loss_func(outputs, labels)["loss"].backward()
        for optimizer in engine.optimizer:
            optimizer.step()
            optimizer.clear_grad()
        if _on_gpu():
            paddle.device.synchronize()

    return step


def _on_gpu() -> bool:
    return paddle.get_device().startswith("gpu")


def time_exports(folders: Mapping[str, Path], shape: Sequence[int], threads: int) -> dict[str, dict[str, float]]:
    """Time each export beside the first one, on one image of noise; returns name -> what `timing.time_beside` does."""
    runtime = get_runtime(BASELINE)
    image = np.float32(np.random.default_rng(0).standard_normal([1, *shape]))
    calls = {name: functools.partial(runtime.load(folder, threads).run, image) for name, folder in folders.items()}
    first = next(iter(calls.values()))
    return {name: timing.time_beside(first, call, _ROUNDS, _SECONDS_OF_EXPORT) for name, call in calls.items()}
