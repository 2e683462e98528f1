"""Every way in which this machine can run a network, timed beside the export that an earlier commit made of it.

A way is a runtime in a precision and a form of the network. Each is timed in a process of its own, in turns with the
earlier export; a runtime that ends its process ends no more than that.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..deploy.onnx_export import export_onnx
from ..deploy.runtimes import get_runtime
from ..deploy.runtimes.base import Runtime
from ..deploy.runtimes.onnx_runtime import ONNX_FILE
from ..deploy.tuning import INT8_FILES
from ..errors import OutputExists, ReparamError, reason_of
from ..report import Report, format_markdown, format_table
from ..surgery.verify import NETWORK_TOLERANCE, relative_error
from .benchmark import Contender
from .timing import in_new_process, machine_facts, time_beside

#: The commit whose float32 exports the ratios are to.
BASELINE = "39bb01d390de9a5f78c0aeecda88981005deb35e"
#: What runs these exports, and what the ways' answers are compared with.
REFERENCE = "onednn"
_REFCONV = "ppcls_configs/imagenet/refconv"
#: The networks of the table: names, and configs of this repository.
NETWORKS = (
    "ResNet50",
    f"{_REFCONV}/ResNet50_RefConv.yaml",
    f"{_REFCONV}/MobileNetV3_large_x1_0_RefConv.yaml",
    "SLaK_tiny",
    "RepMLPNet_T224",
    "RepMLPResNet50_light_224",
    "RepMLPResNet50_bottleneck_224",
    "ResNet50_DCD",
    "MobileNetV2_x1_0_DCD",
    "ResNet50_SPConv",
)
#: Below this precision the weights decide what an error means, and here they are random.
BOUNDED = ("bfloat16",)
#: Images that answers are compared on, and noise that ranges of int8 are measured on: what that loses is not shown.
_COMPARED, _CALIBRATION = 2, 16
#: A process that takes longer is stopped, or what it does is.
_MOST_SECONDS = 600.0


def baseline_folder() -> Path:
    """Return the folder in this user's cache that holds the exports of `BASELINE`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "paddle_reparam" / f"exports_of_{BASELINE[:7]}"


@dataclass
class Way:
    """A runtime, its precision, and a form of the network; what they took, and how far off they are.

    `times` has, for each batch size, what `time_beside` returns; `error` is relative to the float32 export of the same
    weights. `why_not` says why nothing was timed, or why it does not count; None: it counts.
    """

    runtime: str
    precision: str
    form: str
    times: dict[str, dict[str, float]] = field(default_factory=dict)
    error: float | None = None
    why_not: str | None = None

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.runtime if self.form == "fused" else f"{self.runtime}, {self.form}"


@dataclass
class Network:
    """A network's ways, and by how much the rounding of a precision may change its output."""

    name: str
    bounds: dict[str, float]
    ways: list[Way]

    def best(self, batch: int, allowed: Callable[[Way], bool] = lambda way: True) -> Way | None:
        """Return the fastest allowed way at a batch size; None where there is none."""
        counting = [way for way in self.ways if way.why_not is None and str(batch) in way.times and allowed(way)]
        return min(counting, key=lambda way: way.times[str(batch)]["ratio"], default=None)


def _in_paddle(way: Way) -> bool:
    return way.runtime.startswith(REFERENCE)


def _float32(way: Way) -> bool:
    return way.precision == "float32"


def _not_int8(way: Way | Runtime) -> bool:
    return way.precision != "int8"


@dataclass
class WaysReport(Report):
    """A run: the machine, the settings, the runtimes' versions, and what each network took in every way."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    versions: dict[str, str]
    networks: list[Network] = field(default_factory=list)
    command: str = ""

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> WaysReport:
        """Return what `to_dict` made a dict of."""
        networks = [
            Network(each["name"], each["bounds"], [Way(**way) for way in each["ways"]]) for each in written["networks"]
        ]
        return cls(**{**written, "networks": networks})

    def begun_as(self, other: WaysReport) -> bool:
        """Tell whether both are runs on the same machine with the same settings and versions."""
        return (self.machine, self.settings, self.versions) == (other.machine, other.settings, other.versions)

    def columns(self) -> list[str]:
        """Return the head of the table of the best ways."""
        batches = self.settings["batches"]
        return [
            "network", *(f"batch {batch}" for batch in batches), f"16 bits or more, batch {batches[0]}",
            f"Paddle Inference, batch {batches[0]}", f"float32, batch {batches[0]}",
        ]  # fmt: skip

    def rows(self) -> list[list[str]]:
        """Return the table of the best ways: of all, of those without int8, of Paddle Inference's, of float32 ones."""
        first, *_ = batches = self.settings["batches"]
        return [
            [network.name, *(_cell(network.best(batch), batch) for batch in batches),
             *(_cell(network.best(first, allowed), first) for allowed in (_not_int8, _in_paddle, _float32))]
            for network in self.networks
        ]  # fmt: skip

    def every_way(self) -> tuple[list[str], list[list[str]]]:
        """Return the head and the rows of the table of all ways: what each took, and how far off it is."""
        names = dict.fromkeys(way.title for network in self.networks for way in network.ways if way.times)
        head = ["way", *(network.name for network in self.networks)]
        found = {(network.name, way.title): way for network in self.networks for way in network.ways}
        rows = [[name, *(self._took(found.get((network.name, name))) for network in self.networks)] for name in names]
        return head, rows

    def _took(self, way: Way | None) -> str:
        if way is None or not way.times:
            return "" if way is None else "-"
        ratios = " / ".join(f"{way.times[str(batch)]['ratio']:.2f}" for batch in self.settings["batches"])
        return f"{ratios}, {way.error:.0e}" if way.why_not is None else f"({ratios}, {way.error:.0e})"

    def failures(self) -> list[str]:
        """Return a sentence for each way that was not timed, or does not count, and of which networks that is so."""
        found: dict[str, list[str]] = {}
        for network in self.networks:
            for way in network.ways:
                if way.why_not is not None:
                    found.setdefault(f"{way.title}: {way.why_not}", []).append(network.name)
        return [
            f"{why} ({'all networks' if len(names) == len(self.networks) else ', '.join(names)})"
            for why, names in found.items()
        ]

    def conditions(self) -> str:
        """Return what it was measured with and on, as a sentence."""
        facts = [f"{self.settings['threads']} threads", f"at most {self.settings['rounds']} rounds"]
        versions = sorted(set(self.versions.values()))
        return "; ".join([*facts, *(f"{key}: {value}" for key, value in self.machine.items()), *versions]) + "."

    def to_markdown(self) -> str:
        """Return both tables, what is missing there and why, and what was measured on, for a page."""
        tables = [format_markdown(self.columns(), self.rows()), format_markdown(*self.every_way())]
        failures = [f"Missing, or in brackets: {'; '.join(self.failures())}."] if self.failures() else []
        return "\n\n".join([f"`{self.command}`", *tables, *failures, self.conditions()])

    def __str__(self) -> str:
        tables = [format_table(self.columns(), self.rows()), format_table(*self.every_way())]
        return "\n\n".join([*tables, *self.failures(), self.conditions()])


def _cell(way: Way | None, batch: int) -> str:
    if way is None:
        return "-"
    times = way.times[str(batch)]
    return f"{times['ratio']:.2f} ({times['low']:.2f} to {times['high']:.2f}) {way.title}"


def begin(settings: dict[str, Any], runtimes: Sequence[str], command: str, written: Path | None) -> WaysReport:
    """Return the report of a run like this one that was `written`, if there is one, and else an empty one.

    Raises `OutputExists` where that file holds something else.
    """
    versions = {}
    for name in runtimes:
        with contextlib.suppress(ReparamError):  # where it is not installed
            versions[name] = get_runtime(name).version()
    report = WaysReport(machine_facts(), settings, versions, command=command)
    if written is None or not written.is_file():
        return report
    try:
        earlier = WaysReport.from_dict(json.loads(written.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputExists(f"{written} holds no table of an earlier run ({reason_of(error)}); give another") from error
    return earlier if earlier.begun_as(report) else report


def time_ways(
    contenders: Sequence[Contender],
    baseline: Path,
    runtimes: Sequence[str],
    settings: Mapping[str, Any],
    progress: Callable[[str], None] = print,
) -> list[Way]:
    """Time the forms of a network, the first of them its own choice, in each runtime beside an earlier export.

    In int8 only the form that is fastest without it is timed.
    `settings` are the `batches`, `threads`, `rounds`, and the `seconds` that timing all of them takes, besides what
    making files and loading takes. What cannot be made, loaded or run, or errs by more than its rounding may, says so
    in its `why_not`. Raises `ReparamError` where that is so of all.
    """
    batches = settings["batches"]
    tried = [get_runtime(name) for name in dict.fromkeys([REFERENCE, *runtimes])]
    seconds = settings["seconds"] / (len(contenders) * len(tried) * len(batches))
    missing: dict[Path, str] = {}
    expected: list[np.ndarray] = []

    def time_way(contender: Contender, runtime: Runtime) -> Way:
        way = Way(runtime.name, runtime.precision, contender.form)
        progress(f"{contender.name}: {way.title}")
        try:
            runtime.require()
            _make(runtime, contender, missing)
            output, way.times = in_new_process(
                _beside, runtime.name, contender, baseline, batches, settings["threads"], settings["rounds"],
                seconds, seconds=_MOST_SECONDS,
            )  # fmt: skip
        except ReparamError as error:
            way.why_not = str(error)
        else:
            expected.append(output)
            way.error = relative_error(expected[0], output)
            way.why_not = _too_far_off(way, contender)
        return way

    ways = [time_way(each, runtime) for each in contenders for runtime in tried if _not_int8(runtime)]
    best = Network(contenders[0].name, {}, ways).best(batches[0])
    if best is None:
        raise ReparamError(f"{contenders[0].name} can be timed in no way: {ways[0].title}: {ways[0].why_not}")
    fastest = next(each for each in contenders if each.form == best.form)
    # Making a file of int8 takes as long as timing all else, so that it is made of one form.
    return [*ways, *(time_way(fastest, runtime) for runtime in tried if not _not_int8(runtime))]


def _make(runtime: Runtime, contender: Contender, missing: dict[Path, str]) -> None:
    """Make the file that a runtime loads, where it is not there; `missing` says why those are not that cannot be."""
    for name in (ONNX_FILE, runtime.file_name) if runtime.file_name is not None else ():
        file = contender.folder / name
        if file in missing:
            raise ReparamError(missing[file])
        if not file.is_file():
            try:
                in_new_process(_write, file, contender.images(_CALIBRATION), seconds=_MOST_SECONDS)
            except ReparamError as error:
                missing[file] = str(error)
                raise


def _write(file: Path, images: np.ndarray) -> None:
    if file.name == ONNX_FILE:
        export_onnx(file.parent)
    else:
        INT8_FILES[file.name](file.with_name(ONNX_FILE), file, images)


def _too_far_off(way: Way, contender: Contender) -> str | None:
    bounds = {"float32": 100 * NETWORK_TOLERANCE, **contender.bounds}
    bound = bounds.get(way.precision, float("inf"))
    return None if way.error <= bound else f"off by {way.error:.1e}, and its rounding by {bound:.1e} at most"


def _beside(
    name: str, contender: Contender, baseline: Path, batches: Sequence[int], threads: int, rounds: int, seconds: float
) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
    """Return what a runtime gives for some images, and for each batch size what it takes beside the earlier export."""
    first = get_runtime(REFERENCE).load(baseline, threads)
    network = get_runtime(name).load(contender.folder, threads)
    [output, *_] = network.run(contender.images(_COMPARED))
    times = {}
    for batch in batches:
        images = contender.images(batch)
        calls = [functools.partial(each.run, images) for each in (first, network)]
        times[str(batch)] = time_beside(*calls, rounds, seconds)
    return output, times
