"""The steps of a release, each a function of what is at work; a check is a row that compares with the train form."""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from .. import __version__
from ..arithmetic.geometry import BATCH_NORMS
from ..errors import BY_TUNING, NothingProven, NothingToFuse, ReparamError
from ..files import Folder, digest
from ..measure.memory import give_back
from ..surgery.flops import ModelSize, measure
from ..surgery.places import RewriteReport, copy_model
from ..surgery.rewrite import forms_of, reparameterize
from ..surgery.tracing import InputSpec, input_shapes, sample_inputs, unchanged, walk
from ..surgery.verify import VerifyReport, compare_outputs, verify
from ..weights import checkpoints
from .checks import check_export
from .export import ExportOptions, export_inference, input_names
from .onnx_export import export_onnx, onnx_versions
from .outputs import LARGEST_SHARE, OutputSpec, comparable, left_out
from .precision import rounding_bound
from .quantization import quantization_report
from .released import (
    PLAIN_WEIGHTS,
    PROBE,
    description_for_a_file,
    probe_hash,
    probe_inputs,
    probe_output,
    write_manifest,
    write_probe,
)
from .runtimes import get_runtime
from .tuning import BASELINE, Tuner, Tuning, TuningReport, manifest_of


@dataclass
class Work:
    """What a release was asked for, and, from `source` on, what its steps have made of it so far."""

    model: nn.Layer
    weights: Folder
    input_spec: InputSpec
    output: OutputSpec
    options: ExportOptions
    load: Callable[[nn.Layer, Folder], Any]
    stock: nn.Layer | None
    #: Why there is no plain weight file; None where there is one.
    why_no_plain: str | None
    texts: Mapping[str, str]
    facts: Mapping[str, Any]
    tolerance: float
    tuning: Tuning | None
    progress: Callable[[str], None]
    #: Whether a network with nothing to fuse is an error, where it is not tuned.
    fuse_something: bool = True
    source: dict[str, Any] = field(default_factory=dict)
    #: What the network puts out and the export does not.
    left_out: list[str] = field(default_factory=list)
    fused: nn.Layer | None = None
    fusing: RewriteReport = field(default_factory=RewriteReport)
    sizes: dict[str, ModelSize] = field(default_factory=dict)
    plain: dict[str, paddle.Tensor] | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    #: The folder that is being filled.
    folder: Path = Path()
    #: File of the folder -> its size and hash.
    written: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: What was tried besides the float32 export, and the form that was chosen by it.
    tuned: TuningReport | None = None
    form: str | None = None
    checks: dict[str, VerifyReport] = field(default_factory=dict)
    #: Those of the checks that ran what was exported: the probe has the scale of their inputs, and their tolerance.
    of_export: dict[str, VerifyReport] = field(default_factory=dict)

    @property
    def names(self) -> list[str] | None:
        """The names of the inputs, for a network that takes one dict of them."""
        return input_names(self.input_spec) if isinstance(self.input_spec, Mapping) else None

    @property
    def tolerance_of_output(self) -> float:
        """How far what was exported may be off; of the numbers of classes, the share that may be others."""
        return LARGEST_SHARE if self.output.activation == "argmax" else self.tolerance

    def rounding_bound(self, network: nn.Layer, inputs: Sequence[np.ndarray], precision: str) -> float:
        """Return what the rounding of a precision may do to what the fused network puts out for inputs."""
        return rounding_bound(network, inputs, precision, self.names, self.output, self.options.normalization)

    @property
    def second(self) -> InputSpec | None:
        """Larger images of another shape, as large as every network's strides divide; None for one size only."""
        if not self.options.dynamic_size:
            return None
        larger = {
            name: [*shape[:2], *(size + 32 * more for more, size in enumerate(shape[2:], 1))]
            for name, shape in input_shapes(self.input_spec).items()
        }
        return larger if isinstance(self.input_spec, Mapping) else list(larger.values())


@dataclass(frozen=True)
class Step:
    """What is done, the function that does it, and whether there is anything to do."""

    name: str
    do: Callable[[Work], None]
    when: Callable[[Work], bool] = lambda work: True


def check(
    name: str, compare: Callable[[Work], Mapping[str, VerifyReport]], when: Callable[[Work], bool] = lambda work: True
) -> Step:
    """Return the step that fails where one of the reports of a comparison says so, and keeps them otherwise."""

    def do(work: Work) -> None:
        for what, report in compare(work).items():
            report.raise_if_failed(what)
            work.checks[what] = report

    return Step(name, do, when)


# ---------------------------------------------------------------------------------------------------------------------
# Making


def load_weights(work: Work) -> None:
    """Load the weight file, which must be the same before and after."""
    before = digest(Path(work.weights))
    work.load(work.model, work.weights)
    work.source = digest(Path(work.weights))
    if before != work.source:
        raise ReparamError(f"{work.weights}: it changed while it was read; wait until it is written and run again")
    work.model.eval()


def run_network(work: Work) -> None:
    """Find out which of the network's outputs are exported."""
    with paddle.no_grad(), unchanged(work.model):
        outputs = work.model(*sample_inputs(work.input_spec, 1, seed=0, like=work.model))
        work.left_out = left_out(outputs, work.output)


def fused_form(work: Work, form: str | None = None) -> tuple[nn.Layer, RewriteReport]:
    """Return the network as it is exported, in a form of `forms_of` or its layers' own choice.

    Where there is nothing to fuse it is the network itself, if it is to ship in another runtime or precision, or as it
    is.
    """
    fixed_size = not work.options.dynamic_size
    try:
        return reparameterize(work.model, fold_bn=True, input_spec=work.input_spec, fixed_size=fixed_size, form=form)
    except NothingToFuse as error:
        if work.tuning is None and work.fuse_something:
            raise NothingToFuse(f"{error}; {BY_TUNING}") from error
        network = copy_model(work.model)
        network.eval()
        return network, RewriteReport()


def fuse(work: Work) -> None:
    """Fuse the network."""
    work.fused, work.fusing = fused_form(work)


def count(work: Work) -> None:
    """Count both forms."""
    forms = {"train_form": work.model, "fused": work.fused}
    work.sizes = {form: measure(network, work.input_spec) for form, network in forms.items()}


def fuse_plain(work: Work) -> None:
    """Keep the fused network's state with its BNs where it is one of the stock network's, or say why it is not."""
    work.plain, work.why_no_plain = plain_weights(work.model, work.stock)


def plain_weights(model: nn.Layer, stock: nn.Layer) -> tuple[dict[str, paddle.Tensor] | None, str | None]:
    """Return the fused network's state with its BNs kept where it is one of `stock`; else None and the reason."""
    fused, _ = reparameterize(model, fold_bn=False)
    state = fused.state_dict()
    ours = {name: list(tensor.shape) for name, tensor in state.items()}
    theirs = {name: list(tensor.shape) for name, tensor in stock.state_dict().items()}
    different = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    if different:
        name = different[0]
        return None, (
            f"{len(different)} entries of the fused network are not those of the stock one, the first is {name} "
            f"(fused {ours.get(name, 'has none')}, stock {theirs.get(name, 'has none')})"
        )
    return state, None


def describe(work: Work) -> None:
    """Say in the manifest what the network is and what was done to it."""
    options, norms = work.options, {id(layer): layer for _, layer in walk(work.model) if isinstance(layer, BATCH_NORMS)}
    work.manifest = {
        "tool": {"name": "paddle-reparam", "version": __version__},
        "versions": {
            "python": platform.python_version(), "paddle": paddle.__version__, "numpy": np.__version__,
            **(onnx_versions() if options.onnx else {}),
        },
        "source": {"weights": {"name": str(work.weights), **work.source}},
        "input": {
            "shape": list(input_shapes(work.input_spec).values()),
            "names": work.names,
            "dtype": options.input_dtype(work.model),
            "size": "dynamic" if options.dynamic_size else "fixed",
            "normalization": None if options.normalization is None else asdict(options.normalization),
        },
        "output": {
            "activation": work.output.activation, "keys": list(work.output.keys), "left_out": work.left_out,
        },
        "batch_norm_epsilons": dict(Counter(repr(float(norm._epsilon)) for norm in norms.values())),
        "size": {form: asdict(size) for form, size in work.sizes.items()},
        "fusing": work.fusing.to_dict(),
        "quantization": quantization_report(work.fused).to_dict(),
        "plain_weights": {"file": PLAIN_WEIGHTS if work.plain else None, "why_none": work.why_no_plain},
    }  # fmt: skip
    _merge(work.manifest, work.facts)


def _merge(manifest: dict[str, Any], facts: Mapping[str, Any]) -> None:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            _merge(manifest.setdefault(key, {}), value)
        else:
            manifest[key] = value


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def export(work: Work) -> None:
    """Write the fused network; its layers are then let go, since what was exported is about to be here as well."""
    export_inference(work.fused, work.folder, work.input_spec, work.output, work.options)
    work.fused = None


def tune(work: Work) -> None:
    """Export each form, try every way of running it, and move what the best form ships as into the folder."""
    with tempfile.TemporaryDirectory(dir=work.folder) as temporary:
        place, tuning = Path(temporary), work.tuning
        tuner = Tuner(tuning, work.output, work.sizes["fused"].macs_per_image, place, work.progress)
        forms = [None] if work.options.dynamic_size else [None, *forms_of(work.fused)]
        folders = {form: place / f"form{number}" for number, form in enumerate(forms)}
        bounds: dict[tuple[str | None, str], float] = {}

        def bound(form: str | None, precision: str) -> float:
            if (form, precision) not in bounds:
                network = fused_form(work, form)[0]
                bounds[form, precision] = work.rounding_bound(network, [tuner.some_images], precision)
            return bounds[form, precision]

        for form, folder in folders.items():
            if form is not None:
                work.form, work.fused = form, fused_form(work, form)[0]
                COMPARE_FUSED.do(work)
            export_inference(work.fused, folder, work.input_spec, work.output, work.options)
            work.fused = None
            if tuner.reads_onnx() or work.options.onnx:
                # Without ONNX there are fewer ways, each of which says so.
                with contextlib.nullcontext() if work.options.onnx else contextlib.suppress(ReparamError):
                    export_onnx(folder, description_for_a_file(work.manifest))
        tuner.start(folders[None])
        # Ranges of int8 are measured on many images, which takes long: so for the best form alone.
        counts = [(each, 1 if each.precision == "int8" else len(forms)) for each in tuner.runtimes()]
        for runtime, number in tuning.watch([(each, number) for each, count in counts for number in range(count)]):
            form = tuner.best_form() if runtime.precision == "int8" else forms[number]
            if (runtime.name, form) != (BASELINE, None):
                tuner.attempt(form, runtime, folders[form], functools.partial(bound, form))
        work.form, work.tuned = tuner.choose().form, tuner.report
        for file in tuner.files_to_ship(folders[work.form], work.options.onnx):
            file.rename(work.folder / file.name)


def convert(work: Work) -> None:
    """Write the ONNX file, which says what a user of it has to know."""
    export_onnx(work.folder, description_for_a_file(work.manifest))


def write_files(work: Work) -> None:
    """Write the plain weight file and the texts, and keep the hashes of all that is there."""
    if work.plain is not None:
        checkpoints.save(work.plain, work.folder / PLAIN_WEIGHTS)
    for name, text in work.texts.items():
        (work.folder / name).write_text(text, encoding="utf-8")
    work.written = {path.name: digest(path) for path in sorted(work.folder.iterdir())}


def seal(work: Work) -> None:
    """Write the probe with what the train form gives for it, and the manifest; no file has changed since it was
    written.
    """
    manifest, normalization = work.manifest, work.options.normalization
    scale = 1.0 if normalization else next(iter(work.of_export.values())).input_scale
    probe = probe_inputs(manifest["input"], scale)
    expected = probe_output(work.model, probe, work.names, work.output, normalization)
    write_probe(work.folder, expected)
    work.written[PROBE] = digest(work.folder / PROBE)
    manifest["probe"] = {
        "scale": scale,
        "input_sha256": probe_hash(probe),
        "tolerance": max(report.tolerance for report in work.of_export.values()),
    }
    if work.tuned is not None:
        manifest["tuning"] = {"form": work.form, **manifest_of(work.tuned)}
        manifest["serving"] = serving(work, probe, expected)
    manifest["files"] = work.written
    manifest["checks"] = {name: report.to_dict() for name, report in work.checks.items()}
    write_manifest(work.folder, manifest)
    changed = [name for name, written in work.written.items() if digest(work.folder / name) != written]
    if changed:
        raise ReparamError(f"{changed[0]}: the file changed after it was written; the disk may be failing, run again")


def serving(work: Work, probe: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Return by which runtimes the release is to be used, and how far each may be off for the probe.

    Below float32 that is what rounding does to images, or twice what it is off by here, if that is more: the probe is
    noise, of which a network need make nothing, and what serves has been proven on images.
    """
    entries = []
    for way in work.tuned.serving:
        runtime = get_runtime(way.runtime)
        network = runtime.load(work.folder)
        give_back()  # what loading took beside
        outputs = network.run(*probe)
        error, _ = compare_outputs(comparable(expected, work.output), comparable(outputs, work.output), tolerance=1.0)
        tolerance = work.manifest["probe"]["tolerance"]
        if runtime.precision != "float32":
            tolerance = max(way.bound, 2 * error)
        if not error <= tolerance < math.inf:
            raise ReparamError(
                f"{runtime.file(work.folder).name}: {runtime.title} gives the probe with a relative error of "
                f"{error:.1e} (tolerance {tolerance:.0e})"
            )
        entries.append({"runtime": way.runtime, "tolerance": tolerance})
        del network
        give_back()
    return entries


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def compare_fused(work: Work) -> dict[str, VerifyReport]:
    """Compare the fused network with the train form, layer by layer."""
    name = "fused network" if work.form is None else f"fused network, {work.form}"
    return {name: verify(work.model, work.fused, work.input_spec, tolerance=work.tolerance)}


def compare_fused_larger(work: Work) -> dict[str, VerifyReport]:
    """Compare the fused network with the train form on larger images."""
    size = size_of(work.second)
    try:
        return {f"fused network, {size}": verify(work.model, work.fused, work.second, tolerance=work.tolerance)}
    except ReparamError as error:
        raise error.at(f"could not compare at a second size, {size}") from error


def compare_stock(work: Work) -> dict[str, VerifyReport]:
    """Compare the stock network, which loads the plain weight file, with the train form."""
    checkpoints.load_into(work.stock, work.folder / PLAIN_WEIGHTS)
    report = verify(work.model, work.stock, work.input_spec, tolerance=work.tolerance)
    return {"stock network, plain weights": report}


def compare_export(work: Work) -> dict[str, VerifyReport]:
    """Compare what was exported with the train form, in every runtime.

    The probabilities of an untrained network are often the same for every input, and so are the numbers of the largest.
    Then, and for such numbers always, a second export, which puts the logits out, is compared as well: it differs from
    the first in nothing else, and is thrown away.
    """
    how = {"tolerance": work.tolerance, "normalization": work.options.normalization}
    if work.output.activation != "argmax":
        try:
            work.of_export = check_export(work.folder, work.model, work.input_spec, work.output, **how)
            return work.of_export
        except NothingProven:
            if work.output.activation is None:
                raise
    logits = OutputSpec("identity", work.output.keys)
    with tempfile.TemporaryDirectory() as second:
        export_inference(fused_form(work)[0], second, work.input_spec, logits, work.options)
        if work.options.onnx:
            export_onnx(second)
        reports = check_export(second, work.model, work.input_spec, logits, **how)
    reports = {f"{name}, logits": report for name, report in reports.items()}
    how["tolerance"] = work.tolerance_of_output
    work.of_export = check_export(work.folder, work.model, work.input_spec, work.output, must_depend=False, **how)
    return {**reports, **work.of_export}


def compare_export_larger(work: Work) -> dict[str, VerifyReport]:
    """Compare what was exported with the train form on larger images, in every runtime."""
    how = {"normalization": work.options.normalization, "must_depend": False, "tolerance": work.tolerance_of_output}
    reports = check_export(work.folder, work.model, work.second, work.output, (2,), **how)
    return {f"{name}, {size_of(work.second)}": report for name, report in reports.items()}


def size_of(input_spec: InputSpec) -> str:
    """Return the sizes of images, for reports."""
    return ", ".join("x".join(map(str, shape[2:])) for shape in input_shapes(input_spec).values() if shape[2:])


# ---------------------------------------------------------------------------------------------------------------------
# In order

COMPARE_FUSED = check("compare with the train form, layer by layer", compare_fused)

STEPS = (
    Step("load the weights", load_weights),
    Step("run the network", run_network),
    Step("fuse", fuse),
    COMPARE_FUSED,
    check("compare with the train form on larger images", compare_fused_larger, lambda work: work.second is not None),
    Step("count parameters and multiply-adds", count),
    Step("fuse without folding BNs, for the plain weight file", fuse_plain, lambda work: work.stock is not None),
    Step("describe it", describe),
)

STEPS_IN_A_FOLDER = (
    Step("export for Paddle Inference", export, lambda work: work.tuning is None),
    Step("convert to ONNX", convert, lambda work: work.tuning is None and work.options.onnx),
    Step("export, and try what is faster", tune, lambda work: work.tuning is not None),
    Step("write the other files", write_files),
    check("compare with the stock network, plain weights", compare_stock, lambda work: work.plain is not None),
    check("compare with what was exported, in every runtime", compare_export),
    check("compare with it on larger images", compare_export_larger, lambda work: work.second is not None),
    Step("write the probe and the manifest", seal),
)
