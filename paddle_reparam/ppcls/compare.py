"""Methods compared on a plain network and the user's data: each trained with several seeds, shipped and measured."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..analysis.comparison import ComparisonReport, MethodResult, complete, in_a_sentence
from ..analysis.comparison_figures import draw_cost, draw_curves
from ..errors import OutputExists, ReparamError, exit_code
from ..files import atomic_write, create, digest
from ..measure.timing import end_with_parent
from ..training.claims import Claims, this_process
from . import setup
from .command import add_override, read_config
from .errors import ConfigError
from .methods import Method, check, read_methods
from .tasks import Task, tasks_of
from .trainings import as_sections, as_values, plain_config, quiet

RECORD, RESULT, TABLE = "comparison.json", "result.json", "table.md"
#: The picture of a report -> what draws it.
_PICTURES = {"cost.png": draw_cost, "curves.png": draw_curves}
#: Seconds between two looks at what the other processes do.
_LOOK = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `tools/compare.py`; return its exit code: 2 for wrong usage, 1 where a run failed."""
    parser = argparse.ArgumentParser(
        description="Train the plain network of a config, and the same network with other layers in the place of its "
        "convolutions, by one recipe and with several seeds; fuse, check and measure each, and say which differences "
        "are larger than the spread. The same command again goes on where it was killed, and more seeds or methods are "
        "added; given on several machines with one folder that all of them see, they share the runs."
    )
    parser.add_argument("-c", "--config", required=True, help="the YAML file of the plain network's training")
    parser.add_argument(
        "--methods", nargs="+", required=True, metavar="METHOD",
        help="layers by name, with options as in 'RefConv2D(map_k=5)', and where='PATTERN' for some convolutions only; "
        "plain is always there, and retrain (the plain network trained again) with RefConv2D",
    )  # fmt: skip
    parser.add_argument("--seeds", type=_count, default=3, help="how many, from Global.seed on (3)")
    parser.add_argument("--output", required=True, help="the folder to make; Global.output_dir is not used")
    parser.add_argument("--jobs", type=_count, default=1, help="trainings at a time, each in a process (1)")
    add_override(parser, "; Arch.where is for the layers of all methods")
    given = parser.parse_args(arguments)
    with exit_code() as result:
        setup()
        config = read_config(given.config, given.override)
        source = {"config": {"name": given.config, **digest(Path(given.config)), "overrides": given.override}}
        report = compare(config, given.output, given.methods, given.seeds, given.jobs, source)
        print(f"\n{report}\n\nwritten: {', '.join([RESULT, TABLE, *_PICTURES])} in {given.output}")
        if report.failed:
            [(first, why), *_] = report.failed.items()
            raise ReparamError(
                f"{len(report.failed)} of the runs failed, and the same command tries them again; {first}: {why}"
            )
    return result[0]


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it takes a whole number of 1 or more, not {text}")
    return int(text)


def compare(
    config: dict[str, Any],
    folder: str | os.PathLike[str],
    methods: Sequence[str],
    seeds: int = 3,
    jobs: int = 1,
    source: Mapping[str, Any] | None = None,
) -> ComparisonReport:
    """Train the plain network of a config by each method with each seed, and return and write what came of it.

    `config` is what `command.read_config` returns; its `Arch.where` limits where layers are put in. `methods` are names
    as `read_methods` takes them; seeds begin at `Global.seed`. The folder gets `runs/`, with a training and a release
    each, `costs/`, and last of all `result.json`, which is the report with `source` in it, a table and two pictures.

    What is finished is not repeated, and an interrupted training goes on. Of several processes in one folder each does
    what no other does, and all return the whole. Raises `ConfigError`, `UnknownName` or `ReparamError` for what cannot
    work, before anything is trained, and `OutputExists` for a folder with anything else in it. A run that fails is in
    the report's `failed`, and the others go on.
    """
    folder = Path(folder)
    plain = plain_config(config, "start it on several machines, or with several jobs, to use several devices")
    if config["Arch"].get("layer"):
        raise ConfigError("Arch.layer is one layer for all; give each method its options, as in 'RefConv2D(map_k=5)'")
    chosen = read_methods(methods, config["Arch"].get("where"))
    first = plain["Global"].get("seed") or 0
    numbers = list(range(first, first + seeds))
    record = _record(plain)
    _require_place(folder, record)
    with quiet():
        check(plain, chosen, first)
    create(folder / RECORD, record)
    _require_place(folder, record)
    tasks, claims = tasks_of(plain, chosen, numbers, folder), Claims()
    with _Shown(tasks, claims), quiet():
        if jobs == 1:
            work(tasks, claims)
        else:
            _work_in_processes(jobs, tasks, as_values(plain), chosen, numbers, folder)
    report = _report(tasks, chosen, plain, numbers, source or {})
    _write(report, folder)
    return report


def work(tasks: Sequence[Task], claims: Claims) -> None:
    """Do one task after the other that is ready and that no other process does, until all have ended."""
    while True:
        left = [task for task in tasks if not task.has_ended]
        if not left:
            return
        for task in left:
            claim = claims.take(task.folder) if task.is_ready else None
            if claim is None:
                continue
            try:
                with claim:
                    # Somebody may have ended it since, and let it go.
                    if not task.has_ended:
                        task.do(claim.tell)
            except KeyboardInterrupt:
                if not claim.lost:
                    raise
            break
        else:
            time.sleep(_LOOK)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def _work_in_processes(
    jobs: int, tasks: Sequence[Task], plain: dict[str, Any], methods: list[Method], seeds: list[int], folder: Path
) -> None:
    """Work in so many processes until all tasks have ended."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work_here, args=(plain, methods, seeds, folder)) for _ in range(jobs)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    if not all(task.has_ended for task in tasks):
        raise ReparamError("the processes of this command ended before its runs had; it goes on when it is given again")


def _work_here(plain: dict[str, Any], methods: list[Method], seeds: list[int], folder: Path) -> None:
    """Work in a process that another one started."""
    end_with_parent()
    with exit_code():
        setup()
        with quiet():
            work(tasks_of(as_sections(plain), methods, seeds, folder), Claims())


def _say(line: str) -> None:
    """Print a line above the bar, at once: who looks into a file is told too."""
    tqdm.write(line)
    sys.stdout.flush()


class _Shown:
    """Show how far all tasks are, whoever does them: a bar on a terminal, and a line where one begins or ends."""

    def __init__(self, tasks: Sequence[Task], claims: Claims) -> None:
        self._tasks, self._claims = tasks, claims
        self._states: dict[str, str] = {}
        self._shares = dict.fromkeys((task.title for task in tasks), 0.0)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._go_on, daemon=True)

    def __enter__(self) -> None:
        done = sum(task.has_ended for task in self._tasks)
        _say(f"{len(self._tasks)} runs" + (f", {done} of them done before" if done else ""))
        self._look(lambda line: None)
        self._bar = tqdm(
            total=len(self._tasks), initial=sum(self._shares.values()), disable=None, leave=False, smoothing=0,
            bar_format="{l_bar}{bar}| {n:.1f} of {total} runs, {elapsed} gone, {remaining} left",
        )  # fmt: skip
        self._thread.start()

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._look(_say)
        self._bar.close()

    def _go_on(self) -> None:
        while not self._ended.wait(_LOOK):
            self._look(_say)
            self._bar.n = sum(self._shares.values())
            self._bar.refresh()

    def _look(self, say: Callable[[str], None]) -> None:
        """Look at each task, and say what has changed."""
        here = this_process()["host"]
        for task in self._tasks:
            holder = None
            if task.result is not None:
                state = task.told()
            elif task.why_failed is not None:
                state = f"failed: {task.why_failed}"
            else:
                holder = self._claims.holder(task.folder)
                where = "" if not holder or holder["host"] == here else f" on {holder['host']}"
                state = f"begun{where}" if holder else ""
            self._shares[task.title] = (holder or {}).get("done", self._shares[task.title])
            if task.has_ended:
                self._shares[task.title] = 1.0
            if state and state != self._states.get(task.title):
                self._states[task.title] = state
                say(f"{time.strftime('%H:%M:%S')}  {task.title}: {state}")


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def _record(plain: dict[str, Any]) -> str:
    """Return what tells one comparison from another: all of its config but the seed."""
    config = as_values(plain)
    config["Global"].pop("seed", None)
    return json.dumps({"config": config}, indent=1)


def _require_place(folder: Path, record: str) -> None:
    """Raise `OutputExists` for a folder that holds anything but this comparison."""
    from .validation import check_place

    check_place(str(folder), "the output folder")
    try:
        there = (folder / RECORD).read_text(encoding="utf-8")
    except FileNotFoundError:
        # Another process may be about to write it.
        if os.path.lexists(folder) and not (folder.is_dir() and all(e.name.startswith(".") for e in folder.iterdir())):
            raise OutputExists(f"{folder} exists already and is kept; name another folder") from None
        return
    if there != record:
        raise OutputExists(
            f"{folder} holds a comparison of another config; name another folder, or give the same config and overrides"
        )


def _report(
    tasks: Sequence[Task], methods: Sequence[Method], plain: dict[str, Any], seeds: list[int], source: Mapping[str, Any]
) -> ComparisonReport:
    *trainings, measuring = tasks
    costs = measuring.result or {}
    results = []
    for method in methods:
        done = [task.result for task in trainings if task.method is method and task.result is not None]
        result = MethodResult(
            method.name, method.trainings, {each["seed"]: 100 * each["accuracy"] for each in done},
            **costs.get("methods", {}).get(method.name, {}),
        )  # fmt: skip
        for each in done[:1]:
            result.trainable_parameters = each["trained"]["trainable_parameters"]
            sizes = each["shipped"]
            result.shipped_parameters = sizes["trainable_parameters"] + sizes["frozen_parameters"]
            result.shipped_macs = sizes["macs_per_image"] + sizes["macs_per_pass"]
        results.append(result)
    results = complete(results, {method.name: method.control for method in methods if method.control})
    return ComparisonReport(
        plain["Arch"]["name"],
        _metric(plain),
        seeds,
        plain["Global"]["epochs"],
        results,
        [task.result for task in trainings if task.result is not None],
        {task.title: task.why_failed for task in tasks if task.result is None},
        {key: costs[key] for key in ("machine", "threads") if costs},
        dict(source),
        in_a_sentence(results),
    )


def _metric(config: dict[str, Any]) -> str:
    """Return the name of what PaddleClas measures first."""
    [(name, options), *_] = config["Metric"]["Eval"][0].items()
    ranks = (options or {}).get("topk", [1]) if name == "TopkAcc" else None
    return name if ranks is None else f"top-{ranks[0] if isinstance(ranks, list) else ranks}"


def _write(report: ComparisonReport, folder: Path) -> None:
    for name, text in ((RESULT, f"{report.to_json()}\n"), (TABLE, report.markdown())):
        atomic_write(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    for name, draw in _PICTURES.items():
        atomic_write(folder / name, lambda path, draw=draw: draw(report).savefig(path, dpi=110))
