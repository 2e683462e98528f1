"""How fast exported networks are: every form of every network in one run, in turns, with what else it costs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import numpy as np
import paddle
from paddle import nn

from ..deploy.export import ExportOptions, export_inference
from ..deploy.onnx_export import export_onnx
from ..deploy.precision import LARGEST_BOUND, rounding_bound
from ..deploy.programs import WEIGHTS_SUFFIX, program_file
from ..deploy.runtimes import get_runtime
from ..deploy.runtimes.paddle_inference import LoadedPredictor
from ..errors import NothingProven, ReparamError, one_sentence
from ..files import Folder
from ..report import Report, format_table
from ..surgery.flops import ModelSize, measure
from ..surgery.rewrite import forms_of, reparameterize
from ..surgery.tracing import InputSpec, sample_inputs
from ..surgery.verify import NETWORK_TOLERANCE, relative_error, settle_batch_norms
from .memory import own_peak
from .profiling import ProfileReport, profile
from .timing import Timing, alternate, in_new_process, machine_facts, memory_rate

#: In which forms a network is exported: `dynamic size` is fused for images of every size, `fused` for those of one,
#: `every form` as that and in each form that its layers have a name for.
FORMS = ("train form", "fused", "dynamic size", "every form")


class WrongImages(ReparamError):
    """Images of a shape that a network does not take."""


@dataclass
class Contender:
    """An exported network: its name, which form of it, the folder, the shape of its images (channels, height, width),
    their dtype, and its sizes and error where they are known.

    `difference` is the relative error of its output from the train form's, measured on what is timed; `bounds` says of
    a precision by how much its rounding may change the output for `images(2)`, where that is less than all of it.
    """

    name: str
    form: str
    folder: Path
    shape: tuple[int, int, int]
    dtype: str = "float32"
    size: ModelSize | None = None
    difference: float | None = None
    bounds: dict[str, float] = field(default_factory=dict)

    def images(self, batch: int) -> np.ndarray:
        """Return a batch of noise."""
        noise = np.random.default_rng(0).standard_normal([batch, *self.shape])
        return np.clip(128 + 64 * noise, 0, 255).astype(self.dtype) if self.dtype == "uint8" else np.float32(noise)

    @property
    def bytes(self) -> int:
        """Size of the program and its weights."""
        program = program_file(self.folder)
        return sum(path.stat().st_size for path in (program, program.with_suffix(WEIGHTS_SUFFIX)))


@dataclass
class Result:
    """What one contender took: milliseconds a batch, and the ratio of the medians to the first contender's."""

    name: str
    form: str
    runtime: str
    batch: int
    median: float
    low: float
    high: float
    ratio: float


@dataclass
class InferenceReport(Report):
    """A run of the benchmark: the machine, the settings, a result for each contender, runtime and batch size."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    contenders: list[dict[str, Any]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)

    def __str__(self) -> str:
        sizes = format_table(
            ["network", "form", "parameters", "multiply-adds", "file, MiB", "peak memory, MiB", "difference"],
            [[c["name"], c["form"], _count(c["parameters"]), _count(c["macs"]), f"{c['bytes'] / 2**20:.1f}",
              ", ".join(f"{peak:.0f} ({runtime})" for runtime, peak in c["peak_mib"].items()) or "-",
              "-" if c["difference"] is None else f"{c['difference']:.0e}"] for c in self.contenders],
        )  # fmt: skip
        times = format_table(
            ["network", "form", "runtime", "batch", "ms", "quartiles", "ratio"],
            [[r.name, r.form, r.runtime, r.batch, f"{r.median:.2f}", f"{r.low:.2f} to {r.high:.2f}", f"{r.ratio:.3f}"]
             for r in self.results],
        )  # fmt: skip
        return f"{sizes}\n\n{times}"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def prepare(
    name: str,
    model: nn.Layer,
    folder: Path,
    shape: tuple[int, int, int],
    forms: Sequence[str] = ("fused",),
    onnx: bool = False,
    bounded: Sequence[str] = (),
) -> Iterator[Contender]:
    """Export a network in `forms` (of `FORMS`, or of its layers) under a folder, with `onnx` as an ONNX file as well,
    and yield a contender for each, with bounds for the precisions in `bounded`.

    Its weights count for nothing: its BNs get the statistics of one batch of noise, since with others the features of
    an untrained network may vanish or overflow, and such numbers take their own time. Raises `WrongImages` where the
    network cannot be run on these, and `ReparamError` where an export is not the same function.
    """
    input_spec = [[None, *shape]]
    inputs = sample_inputs(input_spec, 2, seed=1, like=model)
    with _run_on(name, shape), paddle.no_grad():
        settle_batch_norms(model, input_spec)
        expected = model(*inputs).numpy()
    for form in _named(forms, model, input_spec):
        network = model
        if form != "train form":
            named = None if form in FORMS else form
            fixed = form != "dynamic size"
            network, _ = reparameterize(model, fold_bn=True, input_spec=input_spec, fixed_size=fixed, form=named)
        target = folder / f"{name}-{form}".replace(" ", "_").replace("/", "_")
        export_inference(network, target, input_spec, options=ExportOptions(dynamic_size=form == "dynamic size"))
        if onnx:
            export_onnx(target)
        [output, *_] = LoadedPredictor(target).run(*(x.numpy() for x in inputs))
        difference = relative_error(expected, output)
        if not difference <= 100 * NETWORK_TOLERANCE:
            raise ReparamError(f"{name}, {form}: its export is not the same function, relative error {difference:.1e}")
        # Of images so small that maps have no pixels, this may be the first to notice.
        with _run_on(name, shape):
            size = measure(network, input_spec)
        contender = Contender(name, form, target, shape, size=size, difference=difference)
        for precision in bounded:
            # With weights that nothing has trained, rounding alone may change all of an output; that is no bound.
            with contextlib.suppress(NothingProven):
                bound = rounding_bound(network, [contender.images(2)], precision)
                contender.bounds.update({precision: bound} if bound < LARGEST_BOUND else {})
        yield contender


def _named(forms: Sequence[str], model: nn.Layer, input_spec: InputSpec) -> Iterator[str]:
    """Yield forms by their names, `every form` as those that the layers of a network have."""
    for form in forms:
        if form != "every form":
            yield form
            continue
        fused, _ = reparameterize(model, fold_bn=True, input_spec=input_spec)
        yield from ("fused", *forms_of(fused))


@contextlib.contextmanager
def _run_on(name: str, shape: Sequence[int]) -> Iterator[None]:
    """Raise whatever is raised in the `with` block as `WrongImages`."""
    try:
        with one_sentence("it stopped"):
            yield
    except ReparamError as error:
        raise WrongImages(f"{name} cannot be run on images of {'x'.join(map(str, shape))}: {error}") from error


def run(
    contenders: Sequence[Contender],
    batch_sizes: Sequence[int] = (1,),
    runtimes: Sequence[str] = ("onednn",),
    threads: int = 1,
    rounds: int = 30,
    seconds: float = 60.0,
    peaks: bool = True,
    progress: Callable[[str], None] = print,
) -> InferenceReport:
    """Time exported networks, all of them in turns.

    Each batch size and runtime is a run of its own, of `rounds` rounds, fewer where they would take more than
    `seconds`, but never fewer than five; ratios are to the first contender. `threads` are those of each runtime. With
    `peaks` the memory that each network needs is measured too, which takes seconds for each.
    """
    report = InferenceReport(
        machine_facts(),
        {
            "threads": threads,
            "rounds": rounds,
            "seconds": seconds,
            "runtimes": {name: get_runtime(name).version() for name in runtimes},
        },
        [
            {
                "name": each.name,
                "form": each.form,
                "shape": list(each.shape),
                "bytes": each.bytes,
                "parameters": None if each.size is None else each.size.parameters,
                "macs": None if each.size is None else each.size.macs_per_image,
                "difference": each.difference,
                "peak_mib": {
                    runtime: peak_memory(each.folder, each.images(1), threads, runtime) / 2**20
                    for runtime in (runtimes if peaks else ())
                },
            }
            for each in contenders
        ],
    )
    for runtime in runtimes:
        models = [get_runtime(runtime).load(each.folder, threads) for each in contenders]
        for batch in batch_sizes:
            progress(f"{runtime}, batch {batch}: {len(models)} networks in turns")
            inputs = [each.images(batch) for each in contenders]
            calls = {str(i): lambda m=m, x=x: m.run(x) for i, (m, x) in enumerate(zip(models, inputs))}
            timings = alternate(calls, rounds=rounds, seconds=seconds)
            report.results += [
                _result(each, runtime, batch, timings[str(i)], timings["0"]) for i, each in enumerate(contenders)
            ]
    return report


def _result(contender: Contender, runtime: str, batch: int, timing: Timing, first: Timing) -> Result:
    return Result(
        contender.name, contender.form, runtime, batch, 1000 * timing.median, 1000 * timing.low, 1000 * timing.high,
        timing.median / first.median,
    )  # fmt: skip


def profile_all(
    contenders: Sequence[Contender],
    batch: int = 1,
    threads: int = 1,
    rounds: int = 30,
    progress: Callable[[str], None] = print,
) -> ProfileReport:
    """Return where the time of exported networks goes, the first of them a plain one, and what this machine allows."""
    profiles = []
    for each in contenders:
        progress(f"profile of {each.name}, batch {batch}")
        macs = None if each.size is None else each.size.macs_per_image
        profiles.append(profile(each.folder, each.images(batch), threads, rounds, each.name, macs))
    settings = {"threads": threads, "rounds": rounds, "batch": batch}
    return ProfileReport(machine_facts(), settings, memory_rate(threads), profiles)


def peak_memory(folder: Folder, images: np.ndarray, threads: int = 1, runtime: str = "onednn") -> int:
    """Return the most bytes that a new process holds while it loads an export into a runtime and runs it twice.

    Paddle, which that process imports, is included.
    """
    return in_new_process(_own_peak_after_running, runtime, str(folder), images, threads)


def _own_peak_after_running(runtime: str, folder: str, images: np.ndarray, threads: int) -> int:
    network = get_runtime(runtime).load(folder, threads)
    for _ in range(2):
        network.run(images)
    return own_peak()
