"""Which form, runtime and precision of a network is the fastest that still gives its answers: timed and checked.

A way is one of them, such as the form `products` by OpenVINO in bfloat16. Each is tried in a process of its own, beside
the float32 export in turns, since a runtime may end the process that it stops in.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ReparamError
from ..measure.timing import in_new_process, machine_facts, time_beside
from ..report import Report, format_table
from ..surgery.verify import NETWORK_TOLERANCE, compare_outputs
from .nncf_int8 import quantize_openvino
from .outputs import OutputSpec, comparable
from .precision import Agreement, agreement, images_needed, require_images
from .quantization import quantize_onnx
from .runtimes import SERVING, LoadedNetwork, get_runtime
from .runtimes.base import PRECISIONS, Runtime
from .runtimes.onnx_runtime import INT8_ONNX_FILE, ONNX_FILE
from .runtimes.openvino import INT8_OPENVINO_FILE

#: What the other ways are compared with.
BASELINE = SERVING[0].name
#: Images that are labelled at once, and that ranges are measured on.
_AT_ONCE, _CALIBRATION_IMAGES = 16, 256
#: Images that answers are compared on: as many as take a good processor some seconds, within limits.
_MULTIPLY_ADDS, _MOST_IMAGES = 7.5e11, 1024
#: In which order precisions are tried: the time may be used up before the last.
_FASTEST_FIRST = ("bfloat16", "int8", "float32")
#: Images that a precision's rounding is measured on.
_IMAGES_OF_BOUND = 2
#: Seconds that timing a way at one batch size takes at most, and a way is given at least.
_TIMED_SECONDS, _FEWEST_SECONDS = 4.0, 60.0

#: File of a folder -> what makes it of the ONNX file and of training images, and says what it did.
INT8_FILES: dict[str, Callable[..., dict[str, Any]]] = {
    INT8_ONNX_FILE: quantize_onnx,
    INT8_OPENVINO_FILE: quantize_openvino,
}


@dataclass(frozen=True)
class Tuning:
    """What a release may be besides float32, and on what it is proven.

    `images` returns so many validation images, as the network takes them, with their labels (`[N]`, or `[N, labels]` of
    0, 1, and -1 for not known); `calibration` so many training images. All of `precisions` besides float32 are made and
    checked; what is fastest on `batches`, in the mean, ships. Where not `timed`, the first of the last precision does.
    """

    images: Callable[[int], tuple[np.ndarray, np.ndarray]]
    calibration: Callable[[int], np.ndarray]
    precisions: tuple[str, ...] = PRECISIONS
    timed: bool = True
    batches: tuple[int, ...] = (1,)
    threads: int = 1
    seconds: float = 180.0
    largest_drop: float = 1.0
    #: Given the ways before they are tried, it returns them again, and may show how far they are.
    watch: Callable[[Sequence[Any]], Iterable[Any]] = iter


@dataclass
class Way:
    """A way of running the network, and what was found: per batch size the time, as a share of the float32 export's
    (median, and quartiles), how far its outputs are from that one's, and what it answers on the images.

    `why_not` says why it does not ship; None: it may.
    """

    form: str | None
    runtime: str
    precision: str
    times: dict[int, dict[str, float]] = field(default_factory=dict)
    error: float | None = None
    bound: float | None = None
    answers: Agreement | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    why_not: str | None = None

    @property
    def title(self) -> str:
        """What progress and tables call it."""
        return self.runtime if self.form is None else f"{self.runtime}, {self.form}"

    @property
    def ratio(self) -> float | None:
        """The geometric mean of the shares over the batch sizes; None where it was not timed."""
        ratios = [each["ratio"] for each in self.times.values()]
        return float(np.exp(np.mean(np.log(ratios)))) if ratios else None


@dataclass
class TuningReport(Report):
    """All ways that were tried, the machine, on how many images they answered, and those that ship, the best first."""

    machine: dict[str, Any]
    versions: dict[str, str]
    images: int
    threads: int
    ways: list[Way]
    serving: list[Way] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [
            [
                way.title,
                *("-" if batch not in way.times else f"{way.times[batch]['ratio']:.2f}" for batch in self._batches()),
                "-" if way.error is None else f"{way.error:.1e}",
                "-" if way.bound is None else f"{way.bound:.1e}",
                "-" if way.answers is None else f"{way.answers.agreement:.1%}",
                "-" if way.answers is None else f"{way.answers.drop:.2f}",
                self._verdict(way),
            ]
            for way in self.ways
        ]
        times = [f"time, batch {batch}" for batch in self._batches()]
        head = ["way", *times, "error", "bound", "agreement", "drop", ""]
        return format_table(head, rows)

    def _batches(self) -> list[int]:
        return sorted({batch for way in self.ways for batch in way.times})

    def _verdict(self, way: Way) -> str:
        if way.why_not is not None:
            return way.why_not
        return "ships" if any(way is each for each in self.serving) else "holds"


def count_images(tuning: Tuning, multiply_adds: int) -> int:
    """Return on how many images a network of so many multiply-adds an image is to answer."""
    affordable = int(_MULTIPLY_ADDS / max(multiply_adds, 1))
    count = max(images_needed(tuning.largest_drop), min(affordable, _MOST_IMAGES))
    # Some runtimes compile the network anew for each number of images at once.
    return -(-count // _AT_ONCE) * _AT_ONCE


class Tuner:
    """Tries ways one after the other, until the time is used up.

    `output` is what the network puts out; `report` grows with each way, and `said` is told of it.
    """

    def __init__(
        self, tuning: Tuning, output: OutputSpec, multiply_adds: int, place: Path, said: Callable[[str], None]
    ) -> None:
        """Read the images; raises `ReparamError` for fewer than are needed to see the largest drop."""
        self.tuning, self.output, self.said, self.place = tuning, output, said, place
        self.deadline = time.monotonic() + tuning.seconds
        images, self.labels = tuning.images(count_images(tuning, multiply_adds))
        require_images(len(images), tuning.largest_drop)
        #: Those on which a precision's rounding is measured; a view would keep all of them.
        self.some_images = np.array(images[:_IMAGES_OF_BOUND])
        np.save(self._images, images)
        self.report = TuningReport(machine_facts(), {}, len(images), tuning.threads, [])
        self.reference: list[np.ndarray] = []
        self.baseline: Path | None = None
        self.tried = False

    @property
    def _images(self) -> Path:
        return self.place / "images.npy"

    def runtimes(self) -> list[Runtime]:
        """Return the runtimes of the precisions that may ship, what is most often the fastest first."""
        wanted = [runtime for runtime in SERVING if runtime.precision in ("float32", *self.tuning.precisions)]
        return sorted(reversed(wanted), key=lambda runtime: _FASTEST_FIRST.index(runtime.precision))

    def reads_onnx(self) -> bool:
        """Tell whether some way needs the ONNX file of an export, or what is made of it."""
        return any(runtime.file_name for runtime in self.runtimes())

    def start(self, folder: Path) -> Way:
        """Take an export as what the others are compared with, and return it as a way."""
        self.baseline, self.before = folder, time.monotonic()
        way = self._run(Way(None, BASELINE, "float32"), folder)
        if way.why_not is not None:
            raise ReparamError(f"the float32 export cannot be run: {way.why_not}")
        return way

    def attempt(self, form: str | None, runtime: Runtime, folder: Path, bound: Callable[[str], float]) -> Way:
        """Try a way; `bound` returns what a precision's rounding may do. What it cannot do it says in `why_not`."""
        way = Way(form, runtime.name, runtime.precision)
        # One of them is always tried: making the files may have taken all the time that there was.
        if time.monotonic() > self.deadline and self.tried:
            return self._done(way, f"not tried: the {self.tuning.seconds:g} seconds are used up")
        try:
            runtime.require()
        except ReparamError as error:
            return self._done(way, f"not tried: {error}")
        self.tried = True
        try:
            if runtime.file_name in INT8_FILES:
                way.settings = self._quantize(folder, runtime.name)
            if runtime.file(folder) is None:
                return self._done(way, f"not tried: there is no {runtime.file_name}")
            way.bound = 10 * NETWORK_TOLERANCE if runtime.precision == "float32" else bound(runtime.precision)
        except ReparamError as error:
            return self._done(way, f"fails: {error}")
        return self._run(way, folder)

    def _quantize(self, folder: Path, name: str) -> dict[str, Any]:
        calibration = self.place / "calibration.npy"
        if not calibration.is_file():
            np.save(calibration, self.tuning.calibration(_CALIBRATION_IMAGES))
        return in_new_process(
            _quantized, name, folder, calibration, self._images, self.reference[0], self.labels,
            self.tuning.largest_drop, self.tuning.threads, seconds=self._remaining(),
        )  # fmt: skip

    def _remaining(self) -> float:
        return max(_FEWEST_SECONDS, self.deadline - time.monotonic())

    def _run(self, way: Way, folder: Path) -> Way:
        tuning = self.tuning
        timed = tuning.batches if tuning.timed else ()
        try:
            outputs, way.times, version = in_new_process(
                _tried, way.runtime, folder, self.baseline, self._images, timed, tuning.threads,
                seconds=self._remaining(),
            )  # fmt: skip
        except ReparamError as error:
            return self._done(way, str(error))
        self.report.versions[way.runtime] = version
        if not self.reference:
            self.reference = outputs
            return self._done(way, None)
        return self._done(way, self._judged(way, outputs))

    def _judged(self, way: Way, outputs: list[np.ndarray]) -> str | None:
        """Return why a way's answers do not hold, or None."""
        expected, actual = (
            comparable([part[: len(self.some_images)] for part in each], self.output)
            for each in (self.reference, outputs)
        )
        way.error, _ = compare_outputs(expected, actual, way.bound)
        way.answers = agreement(self.reference[0], outputs[0], self.labels, self.tuning.largest_drop)
        if not way.error <= way.bound:
            return f"fails: it is off by {way.error:.1e}, and its rounding by {way.bound:.1e} at most"
        if not way.answers.passed:
            return f"fails: it loses {way.answers.drop:.2f} points, {self.tuning.largest_drop:g} are allowed"
        return None

    def _done(self, way: Way, why_not: str | None) -> Way:
        way.why_not = why_not
        self.report.ways.append(way)
        ratio = "" if way.ratio is None else f": {way.ratio:.2f} of the float32 export's time"
        now = time.monotonic()
        self.said(f"{now - self.before:6.1f} s  {way.title}{ratio}" + ("" if why_not is None else f"; {why_not}"))
        self.before = now
        return way

    def best_form(self) -> str | None:
        """Return the form of the fastest way so far."""
        return self.ranked()[0].form

    def ranked(self) -> list[Way]:
        """Return the ways that hold, the best first."""
        holding = [way for way in self.report.ways if way.why_not is None]
        if self.tuning.timed:
            return sorted(holding, key=lambda way: way.ratio)
        return sorted(holding, key=lambda way: -PRECISIONS.index(way.precision))

    def choose(self) -> Way:
        """Settle on what ships, the fastest way of the precisions asked for, and return it.

        Raises `ReparamError` where none of them holds.
        """
        asked = self.tuning.precisions
        best = [way for way in self.ranked() if way.precision in asked]
        if not best:
            failed = [f"{way.title}: {way.why_not}" for way in self.report.ways if way.precision in asked]
            raise ReparamError(f"nothing holds in {' or '.join(asked)}: {'; '.join(failed) or 'no runtime has it'}")
        self.best = best[0]
        return self.best

    def files_to_ship(self, folder: Path, onnx: bool) -> list[Path]:
        """Return the files of an export that ship: its program, and what the best way loads, with `onnx` the ONNX file.

        Which ways the release is then used by, the best first, is kept in the report.
        """
        names = {None, get_runtime(self.best.runtime).file_name, *([ONNX_FILE] if onnx else [])}
        rest = [way for way in self.ranked() if way is not self.best and way.form == self.best.form]
        rest = [way for way in rest if get_runtime(way.runtime).file_name in names]
        self.report.serving = [self.best, *rest]
        if BASELINE not in [way.runtime for way in self.report.serving]:
            # Not tried in this form, for want of time; each release is compared in it all the same.
            self.report.serving.append(Way(self.best.form, BASELINE, "float32"))
        made = {name for name in (ONNX_FILE, *INT8_FILES) if name not in names}
        return [file for file in sorted(folder.iterdir()) if not {file.name, companion_of(file)} & made]


def companion_of(file: Path) -> str:
    """Return the name of the file that holds a network, where `file` holds its weights alone; else its own."""
    return file.with_suffix(".xml").name if file.suffix == ".bin" else file.name


def _quantized(
    name: str,
    folder: Path,
    calibration: Path,
    images: Path,
    reference: np.ndarray,
    labels: np.ndarray | None,
    largest_drop: float,
    threads: int,
) -> dict[str, Any]:
    """Write the file of int8 that a runtime loads, by what it loses on the images; return how it was made."""
    runtime = get_runtime(name)

    def drop(file: Path) -> float:
        outputs = _outputs_of(runtime.load(file, threads), np.load(images, mmap_mode="r"))
        return agreement(reference, outputs[0], labels, largest_drop).drop

    return INT8_FILES[runtime.file_name](
        folder / ONNX_FILE, folder / runtime.file_name, np.load(calibration, mmap_mode="r"), drop=drop,
        largest_drop=largest_drop, threads=threads,
    )  # fmt: skip


def _outputs_of(network: LoadedNetwork, images: np.ndarray) -> list[np.ndarray]:
    parts = [network.run(np.array(images[i : i + _AT_ONCE])) for i in range(0, len(images), _AT_ONCE)]
    return [np.concatenate(each) for each in zip(*parts)]


def _tried(
    name: str, folder: Path, baseline: Path, images: Path, batches: Sequence[int], threads: int
) -> tuple[list[np.ndarray], dict[int, dict[str, float]], str]:
    """Return what a runtime gives for the images, its times beside the float32 export's, and its version."""
    runtime, pixels = get_runtime(name), np.load(images, mmap_mode="r")
    network = runtime.load(folder, threads)
    outputs = _outputs_of(network, pixels)
    times = {}
    same = (name, folder) == (BASELINE, baseline)
    first = network if same or not batches else get_runtime(BASELINE).load(baseline, threads)
    for batch in batches:
        x = np.array(pixels[:batch])
        calls = [functools.partial(each.run, x) for each in (first, network)]
        times[batch] = time_beside(*calls, seconds=_TIMED_SECONDS)
    return outputs, times, runtime.version()


def manifest_of(report: TuningReport) -> dict[str, Any]:
    """Return what a manifest says of a tuning: all of its report but for what ships, which it says elsewhere."""
    return {key: value for key, value in json.loads(report.to_json()).items() if key != "serving"}
