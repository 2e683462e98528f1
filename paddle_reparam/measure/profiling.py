"""Where the time of an exported network goes: oneDNN's own log of its runs, by kind of primitive."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..deploy.programs import WEIGHTS_SUFFIX, program_file
from ..deploy.runtimes.paddle_inference import LoadedPredictor
from ..errors import ReparamError
from ..files import Folder
from ..report import Report, format_table
from .timing import in_new_process

#: Written into the log at the beginning of each timed run; what stands before the first is loading and warming up.
_MARK = "----- a timed run\n"
_WARM_UP = 3
#: A primitive that was run; `onednn_verbose,v1,primitive,exec,cpu,...` in oneDNN 3.6, `onednn_verbose,exec,cpu,...`
#: in 3.2, which Paddle 2.6 has.
_PRIMITIVE = re.compile(
    r"onednn_verbose,(?:v\d+,)?(?:primitive,)?exec,cpu,(?P<kind>\w+),(?P<how>[^,]*),"
    r".*?(?:,alg:(?P<algorithm>\w+)[^,]*)?,(?P<problem>[^,]*),(?P<milliseconds>[\d.e+-]+)"
)
_CONVOLUTION = re.compile(
    r"(?:g(?P<groups>\d+))?mb\d+_ic(?P<inputs>\d+)oc(?P<outputs>\d+)_.*?kh(?P<kh>\d+).*kw(?P<kw>\d+)"
)


@dataclass
class Share:
    """What the primitives of one kind took of a run: how many there are, and milliseconds an image."""

    kind: str
    calls: int
    milliseconds: float


@dataclass
class Profile(Report):
    """Where the time of an exported network goes, all in milliseconds an image.

    `shares` are those of oneDNN's primitives, the largest first; `whole` is the run that they are of, `without_log` a
    run whose primitives were not logged. `macs` are multiply-adds of an image, where they are known, and
    `weights_bytes` what a run reads of weights at the least.
    """

    name: str
    batch: int
    macs: int | None
    weights_bytes: int
    shares: list[Share]
    whole: float
    without_log: float

    @property
    def primitives(self) -> float:
        """All of oneDNN's primitives together."""
        return sum(share.milliseconds for share in self.shares)

    @property
    def rest(self) -> float:
        """What is not within a primitive: operators outside oneDNN, the executor, and the log itself."""
        return self.whole - self.primitives

    def __str__(self) -> str:
        rows = [(share.kind, share.calls, share.milliseconds) for share in self.shares]
        rows += [("all primitives", sum(share.calls for share in self.shares), self.primitives)]
        rows += [("the rest", "", self.rest), ("the run", "", self.whole), ("without the log", "", self.without_log)]
        cells = [[kind, f"{calls:>5}", f"{ms:8.3f}", f"{ms / self.whole:6.1%}"] for kind, calls, ms in rows]
        return format_table([f"{self.name}, batch {self.batch}", "calls", "ms an image", "share"], cells)


@dataclass
class ProfileReport(Report):
    """Profiles of one run, the first of a plain network, and how many bytes a second the machine read from memory."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    memory_rate: float
    profiles: list[Profile]

    def __str__(self) -> str:
        plain = self.profiles[0]
        rows = []
        for each in self.profiles:
            known = each.macs is not None and plain.macs is not None
            operations = f"{limit_by_operations(each.macs, plain.macs, plain.without_log):.2f}" if known else "-"
            reading = limit_by_weights(each.weights_bytes, self.memory_rate, each.batch)
            rows.append([each.name, f"{each.without_log:.2f}", operations, f"{reading:.2f}"])
        header = ["network", "ms an image", f"its operations at {plain.name}'s rate, ms", "reading its weights, ms"]
        notes = [
            f"read from memory: {self.memory_rate / 1e9:.1f} GB/s, by {self.settings['threads']} threads",
            "the rest: operators outside oneDNN, the executor, and what the log takes itself",
        ]
        return "\n\n".join([*map(str, self.profiles), format_table(header, rows), "\n".join(notes)])


def limit_by_operations(macs: int, plain_macs: int, plain_milliseconds: float) -> float:
    """Return the milliseconds that multiply-adds take at the rate at which a plain network's are done."""
    return macs / plain_macs * plain_milliseconds


def limit_by_weights(weights_bytes: int, memory_rate: float, batch: int = 1) -> float:
    """Return the milliseconds an image that it takes to read weights once a batch, at so many bytes a second."""
    return 1000 * weights_bytes / memory_rate / batch


def profile(
    folder: Folder, x: np.ndarray, threads: int = 1, rounds: int = 30, name: str = "", macs: int | None = None
) -> Profile:
    """Run an export on a batch `rounds` times in a new process with oneDNN's log and as often without; return where
    time goes.

    What is returned is the mean of the middle half of the runs, by their time; `name` and `macs` are passed on. Raises
    `ReparamError` where the network cannot be run, and where the log is not that of so many runs.
    """
    batch = len(x)
    times, log = in_new_process(_run, str(folder), x, threads, rounds, True)
    plain_times, _ = in_new_process(_run, str(folder), x, threads, rounds, False)
    runs = read_log(log, rounds)
    kept = middle_half(times)
    shares = [
        Share(kind, runs[0][kind][0], sum(runs[i][kind][1] for i in kept) / len(kept) / batch) for kind in runs[0]
    ]
    whole, without_log = (
        1000 * float(np.mean([of[i] for i in middle_half(of)])) / batch for of in (times, plain_times)
    )
    shares.sort(key=lambda share: -share.milliseconds)
    weights_bytes = program_file(folder).with_suffix(WEIGHTS_SUFFIX).stat().st_size
    return Profile(name or str(folder), batch, macs, weights_bytes, shares, whole, without_log)


def middle_half(times: Sequence[float]) -> list[int]:
    """Return which of the times are neither in the lowest nor in the highest quarter."""
    cut = len(times) // 4
    return [int(i) for i in np.argsort(times, kind="stable")[cut : len(times) - cut]]


def read_log(log: str, rounds: int) -> list[dict[str, tuple[int, float]]]:
    """Return for each run kind -> (calls, milliseconds), from a log with a mark before each of the runs.

    Raises `ReparamError` where the log holds no primitives, or not the same ones in every run.
    """
    runs = []
    for section in log.split(_MARK)[1:]:
        calls: Counter[str] = Counter()
        took: Counter[str] = Counter()
        for line in section.splitlines():
            found = _PRIMITIVE.fullmatch(line.strip())
            if found:
                kind = _kind(found)
                calls[kind] += 1
                took[kind] += float(found["milliseconds"])
        runs.append({kind: (calls[kind], took[kind]) for kind in calls})
    if not any(runs):
        raise ReparamError(
            "oneDNN's log holds no primitive: this Paddle, or this network in it, runs without oneDNN, so there is no "
            "profile of it"
        )
    counts = {frozenset((kind, calls) for kind, (calls, _) in run.items()) for run in runs}
    if len(runs) != rounds or len(counts) != 1:
        raise ReparamError(
            f"oneDNN's log holds {len(runs)} runs with {len(counts)} different sets of primitives, where there were "
            f"{rounds} runs of one; its lines are lost or mixed, run again"
        )
    return runs


def _kind(found: re.Match[str]) -> str:
    """Return what the primitives like that of a line of the log are called."""
    kind = found["kind"].replace("_", " ")
    convolution = _CONVOLUTION.match(found["problem"]) if kind == "convolution" else None
    if convolution:
        groups, inputs, outputs = (int(convolution[each] or 1) for each in ("groups", "inputs", "outputs"))
        kind += f" {convolution['kh']}x{convolution['kw']}"
        if groups > 1:
            kind += ", depthwise" if groups == inputs == outputs else ", grouped"
    elif kind in ("binary", "eltwise") and found["algorithm"]:
        kind = found["algorithm"].replace("_", " ")
    return f"{kind}, reference code" if found["how"].startswith("ref") else kind


def _run(folder: str, x: np.ndarray, threads: int, rounds: int, logged: bool) -> tuple[list[float], str]:
    """Return the seconds of each run of an export, and oneDNN's log; in a process of its own, whose output it takes."""
    with tempfile.TemporaryFile() as file:
        # oneDNN reads this at its first primitive, and writes to the process' standard output.
        os.environ["ONEDNN_VERBOSE"] = str(int(logged))
        os.dup2(file.fileno(), 1)
        model = LoadedPredictor(folder, threads=threads)
        for _ in range(_WARM_UP):
            model.run(x)
        times = []
        for _ in range(rounds):
            os.write(1, _MARK.encode())
            started = time.perf_counter()
            model.run(x)
            times.append(time.perf_counter() - started)
        file.seek(0)
        return times, file.read().decode(errors="replace")
