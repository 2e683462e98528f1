"""The tasks of a comparison, each in a folder of its own: a training of each method and seed, and the measuring."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paddle

from ..errors import ReparamError
from ..files import atomic_write, digest
from ..measure.timing import machine_facts
from .costs import measure_costs
from .methods import PLAIN, Method
from .reparam import image_shape
from .trainings import as_values, evaluate, read_curve, ship, train

_RESULT, _FAILED = "result.json", "failed.json"
#: Threads of Paddle's kernels while it is measured: as many as Paddle takes in a training unless it is told.
_THREADS = 1


@dataclass
class Task:
    """What one process does at a time: `result` is there when it is done, `why_failed` when it cannot be.

    What failed before this command began is tried again; `needs` are the tasks that come before it.
    """

    folder: Path
    title: str
    needs: list[Task] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._failed_before = self._read(_FAILED)

    @property
    def result(self) -> dict[str, Any] | None:
        """What it gave, or None."""
        return self._read(_RESULT)

    @property
    def why_failed(self) -> str | None:
        """Why it failed since this command began; None where it did not."""
        failed = self._read(_FAILED)
        return None if failed is None or failed == self._failed_before else failed["why"]

    @property
    def is_ready(self) -> bool:
        """Whether all that comes before it has ended."""
        return all(need.has_ended for need in self.needs)

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to do."""
        return self.result is not None or self.why_failed is not None

    def do(self, watch: Callable[[float], None]) -> None:
        """Do it, or go on with it; where it fails, that is written down. `watch` is told the share that is done."""
        try:
            result = self._done(watch)
        except (ReparamError, OSError) as error:
            self._write(_FAILED, {"why": str(error), "attempt": os.urandom(8).hex()})
            return
        self._write(_RESULT, result)
        with contextlib.suppress(OSError):
            (self.folder / _FAILED).unlink()

    def told(self) -> str:
        """Return what a line says of its result."""
        return "done"

    def _done(self, watch: Callable[[float], None]) -> dict[str, Any]:
        raise NotImplementedError

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _write(self, name: str, value: dict[str, Any]) -> None:
        text = json.dumps(value, indent=1)
        atomic_write(self.folder / name, lambda path: path.write_text(f"{text}\n", encoding="utf-8"))


@dataclass
class TrainingTask(Task):
    """A method with a seed: trained, released, measured. `needs` is the plain network's training of this seed, for a
    method that starts from it."""

    method: Method = field(default_factory=lambda: Method(PLAIN))
    seed: int = 0
    plain: dict[str, Any] = field(default_factory=dict)

    @property
    def shipped(self) -> Path:
        """The folder of its release."""
        return self.folder / "shipped"

    @property
    def weights(self) -> Path:
        """The weights after the last epoch; it must be done."""
        return self.folder / self.result["weights"]["name"]

    @property
    def config(self) -> dict[str, Any]:
        """The config of its training; what it needs must be done."""
        return self.method.config(self.plain, self.seed, *(str(need.weights) for need in self.needs))

    def told(self) -> str:
        return f"{100 * self.result['accuracy']:.2f} %"

    def _done(self, watch: Callable[[float], None]) -> dict[str, Any]:
        for need in self.needs:
            if need.result is None:
                raise ReparamError(f"it starts from {need.title}, which failed")
        config, place = self.config, self.folder / "training"
        weights = train(config, place, watch)
        released = ship(self.plain, config, weights, self.shipped, progress=lambda line: None)
        return {
            "method": self.method.name,
            "seed": self.seed,
            "accuracy": evaluate(config, weights, self.folder),
            "curve": read_curve(place),
            "trained": released.train.to_dict(),
            "shipped": released.fused.to_dict(),
            "checks": {name: check.relative_error for name, check in released.checks.items()},
            "weights": {"name": os.path.relpath(weights, self.folder), **digest(weights)},
        }


@dataclass
class MeasuringTask(Task):
    """What the methods cost, of each the first training that ended well; `needs` are all trainings."""

    @property
    def result(self) -> dict[str, Any] | None:
        """What it gave, unless a method has been added since."""
        found = super().result
        return found if found is not None and self._firsts().keys() <= found["methods"].keys() else None

    def _firsts(self) -> dict[str, TrainingTask]:
        firsts: dict[str, TrainingTask] = {}
        for task in self.needs:
            if task.result is not None:
                firsts.setdefault(task.method.name, task)
        return firsts

    def _done(self, watch: Callable[[float], None]) -> dict[str, Any]:
        firsts = self._firsts()
        if PLAIN not in firsts:
            raise ReparamError("there is no plain network to measure the others beside")
        load = round(os.getloadavg()[0], 1)
        methods = measure_costs(
            {name: as_values(task.config) for name, task in firsts.items()},
            {name: task.shipped for name, task in firsts.items()},
            image_shape(self.needs[0].plain),
            _THREADS,
        )
        machine = {**machine_facts(), "device": paddle.get_device(), "load": load}
        return {"methods": methods, "machine": machine, "threads": _THREADS}


def tasks_of(plain: dict[str, Any], methods: Sequence[Method], seeds: Sequence[int], folder: Path) -> list[Task]:
    """Return what a comparison is made of, in the order in which it is done: seed by seed, then the measuring."""
    tasks: list[Task] = []
    for seed in seeds:
        base: list[Task] = []
        for method in methods:
            place = folder / "runs" / f"{method.folder}-{seed}"
            needs = base if method.trainings > 1 else []
            tasks.append(TrainingTask(place, f"{method.name}, seed {seed}", needs, method, seed, plain))
            if method.name == PLAIN:
                base = tasks[-1:]
    return [*tasks, MeasuringTask(folder / "costs", "cost of a step and of what ships", tasks)]
