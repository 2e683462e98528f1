"""Time several functions in one run and in turns, so that all of them meet the same machine."""

from __future__ import annotations

import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import paddle

from ..errors import ReparamError

#: Rounds below which quartiles say nothing.
FEWEST_ROUNDS = 5
#: Seconds for which the threads of another runtime are left to fall asleep: those of Paddle's OpenMP take 0.2.
PAUSE = 0.25
#: What takes so long is called once a turn, as a pause is nothing beside it; else so often.
_LONG = 0.1
_CALLS_OF_A_TURN = 3

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Timing:
    """Seconds a call took: the median, the lower and the upper quartile, of so many rounds."""

    median: float
    low: float
    high: float
    rounds: int


def alternate(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int = 30,
    warm_up: int = 3,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Call all functions in turns, `warm_up` rounds untimed and then `rounds` rounds timed, and return what each took.

    Every second round goes in the opposite order. Rounds stop early when the timed ones have taken `seconds`, but not
    before there are five. Raises `ReparamError` for no function and for fewer than five rounds.
    """

    def timed(function: Callable[[], Any]) -> Callable[[], float]:
        def call() -> float:
            started = clock()
            function()
            return clock() - started

        return call

    calls = {name: timed(function) for name, function in functions.items()}
    took = _in_turns(calls, rounds, warm_up, seconds, clock)
    return {name: _timing(values) for name, values in took.items()}


def time_beside(
    first: Callable[[], Any],
    other: Callable[[], Any],
    rounds: int = 30,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return how long a function takes as a share of what the first takes, in turns, though they are two runtimes'.

    A turn is a pause of `PAUSE`, a call that is not timed, and some that are: the threads of a runtime go on asking for
    work when it has none, and would take a core from the other. `ratio`, `low` and `high` are the median and the
    quartiles of the rounds' own ratios, so that a machine that becomes slower for a while changes none of them;
    `milliseconds` and `milliseconds_of_first` are medians.
    """

    def turn(function: Callable[[], Any]) -> Callable[[], float]:
        def timed() -> float:
            time.sleep(PAUSE)
            begin = clock()
            function()
            started = clock()
            calls = _CALLS_OF_A_TURN if started - begin < _LONG else 1
            for _ in range(calls):
                function()
            return (clock() - started) / calls

        return timed

    turns = {"first": turn(first), "other": turn(other)}
    took = _in_turns(turns, rounds, 1, seconds, clock)
    low, ratio, high = np.percentile(np.divide(took["other"], took["first"]), [25, 50, 75])
    medians = {name: 1000 * float(np.median(values)) for name, values in took.items()}
    return {
        "ratio": float(ratio), "low": float(low), "high": float(high),
        "milliseconds": medians["other"], "milliseconds_of_first": medians["first"],
    }  # fmt: skip


def _in_turns(
    functions: Mapping[str, Callable[[], float]],
    rounds: int,
    warm_up: int,
    seconds: float,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Return what each function returned in each of its turns: how long it took."""
    if not functions or rounds < FEWEST_ROUNDS:
        raise ReparamError(
            f"{len(functions)} functions in {rounds} rounds: give one or more, and {FEWEST_ROUNDS} rounds"
        )
    names = list(functions)
    for _ in range(warm_up):
        for name in names:
            functions[name]()
    took: dict[str, list[float]] = {name: [] for name in names}
    begin = clock()
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and clock() - begin > seconds:
            break
        for name in names if number % 2 == 0 else reversed(names):
            took[name].append(functions[name]())
    return took


def _timing(values: list[float]) -> Timing:
    low, median, high = np.percentile(values, [25, 50, 75])
    return Timing(float(median), float(low), float(high), len(values))


def machine_facts() -> dict[str, Any]:
    """Return what a timing depends on: the processor, the cores that this process may use, and the versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "python": platform.python_version(),
        "paddle": paddle.__version__,
        "numpy": np.__version__,
    }


def conditions(facts: Mapping[str, Any], threads: int) -> str:
    """Return `machine_facts`, with the device and the load that were measured beside them, as a part of a sentence."""
    return (
        f"threads: {threads}, on {facts['processor']} with {facts['cores']} cores (load before: {facts['load']}), "
        f"Paddle {facts['paddle']} on {facts['device']}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_rate(threads: int = 1, size: int = 2**29) -> float:
    """Return how many bytes a second `threads` threads read from memory together: the median of five readings.

    What is read has `size` bytes, far more than the caches hold.
    """
    parts = np.array_split(np.ones(size // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        # An or of integers does less for a byte than any other way by which numpy reads an array without copying it.
        timings = alternate({"read": lambda: list(pool.map(np.bitwise_or.reduce, parts))}, FEWEST_ROUNDS, warm_up=1)
    return sum(part.nbytes for part in parts) / timings["read"].median


def in_new_process(function: Callable[..., Returned], *arguments: Any, seconds: float | None = None) -> Returned:
    """Return what a function returns, or raise what it raises, in a Python started for it; what it prints is lost.

    Raises `ReparamError` where that Python dies, or takes more than so many seconds.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        running = pool.submit(_without_output, function, *arguments)
        try:
            return running.result(seconds)
        except BrokenProcessPool:
            raise ReparamError("the process that was to run it ended before it had") from None
        except TimeoutError:
            if running.done():  # then the function has raised it
                raise
            for process in list(pool._processes.values()):
                process.kill()
            raise ReparamError(f"it was stopped, as it took more than {seconds:.0f} seconds") from None


def end_with_parent() -> None:
    """Let this process, which another one started, end when that one does: it may be killed, and say nothing."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _without_output(function: Callable[..., Returned], *arguments: Any) -> Returned:
    end_with_parent()
    # What dies says so at length, from below Python.
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    return function(*arguments)
