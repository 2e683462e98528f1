"""From a network in train form to a folder that can be shipped: fused, exported, checked at every step, described.

A folder stands under its name only when all of it has been written and checked.
"""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from .. import __version__
from ..arithmetic.geometry import BATCH_NORMS
from ..errors import BY_FORCE, NothingProven, OutputExists, ReparamError, one_sentence
from ..files import Folder, digest, new_folder
from ..measure.memory import give_back
from ..report import Report, format_table
from ..surgery.flops import ModelSize, measure
from ..surgery.places import RewriteReport
from ..surgery.rewrite import reparameterize
from ..surgery.tracing import InputSpec, input_shapes, sample_inputs, unchanged, walk
from ..surgery.verify import NETWORK_TOLERANCE, VerifyReport, verify
from ..weights import checkpoints
from .export import (
    AS_THE_NETWORK,
    DEFAULT_OPTIONS,
    FILE_NAME,
    PROGRAM_SUFFIXES,
    WEIGHTS_SUFFIX,
    ExportOptions,
    OutputSpec,
    check_export,
    export_inference,
    input_names,
    left_out,
)
from .onnx_export import ONNX_FILE, OnnxModel, export_onnx, onnx_versions
from .quantization import quantization_report
from .released import (
    MANIFEST,
    PLAIN_WEIGHTS,
    PROBE,
    probe_hash,
    probe_inputs,
    probe_output,
    write_manifest,
    write_probe,
)

#: The files that Paddle Inference needs.
_EXPORTED = {f"{FILE_NAME}{suffix}" for suffix in (*PROGRAM_SUFFIXES, WEIGHTS_SUFFIX)}

_NO_STOCK_NETWORK = "no stock network was given that the fused weights could belong to"


@dataclass
class ReleaseReport(Report):
    """What a release did. `manifest` is what its `manifest.json` says; without `files` in a dry run."""

    fusing: RewriteReport
    train: ModelSize
    fused: ModelSize
    checks: dict[str, VerifyReport]
    manifest: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.fusing}\n\n{self.table()}\n\n{self.checks_table()}\n{self._notes()}"

    def table(self) -> str:
        """Return train form and fused form side by side."""
        sizes = {name: entry["bytes"] for name, entry in self.manifest.get("files", {}).items()}
        exported = sum(size for name, size in sizes.items() if name in _EXPORTED)
        rows = [
            ["trainable parameters", self.train.trainable_parameters, self.fused.trainable_parameters],
            ["frozen parameters", self.train.frozen_parameters, self.fused.frozen_parameters],
            ["multiply-adds per image", self.train.macs_per_image, self.fused.macs_per_image],
            ["multiply-adds per pass, on weights alone", self.train.macs_per_pass, self.fused.macs_per_pass],
            ["layers", self.train.layers, self.fused.layers],
            ["file, bytes", self.manifest["source"]["weights"]["bytes"], exported],
        ]
        width = max(len(f"{value:,}") for row in rows for value in row[1:])
        cells = [[name, *(f"{value:,}".rjust(width) if value or name != "file, bytes" else "-".rjust(width)
                          for value in values)] for name, *values in rows]  # fmt: skip
        return format_table(["", "train form".rjust(width), "fused".rjust(width)], cells)

    def checks_table(self) -> str:
        """Return the errors that were measured, one check a row."""
        return format_table(
            ["the train form against", "relative error", "tolerance", "top-1 agreement", "samples", "layers compared"],
            [
                [
                    name,
                    f"{check.relative_error:.1e}",
                    f"{check.tolerance:.1e}",
                    "-" if check.top1_agreement is None else f"{check.top1_agreement:.1%}",
                    check.samples,
                    check.layers or "-",
                ]
                for name, check in self.checks.items()
            ],
        )

    def _notes(self) -> str:
        notes = [f"largest relative error {max(c.relative_error for c in self.checks.values()):.1e}"]
        plain = self.manifest["plain_weights"]
        left_out = self.manifest["output"]["left_out"]
        notes += [f"put out by the network, but not by the export: {', '.join(left_out)}"] if left_out else []
        notes += [f"no plain weight file: {plain['why_none']}"] if plain["why_none"] else []
        for form, size in (("train form", self.train), ("fused", self.fused)):
            notes += [f"not counted, {form}: {', '.join(size.uncounted)}"] if size.uncounted else []
        return "\n".join(notes)


def release(
    model: nn.Layer,
    weights: Folder,
    folder: Folder,
    input_spec: InputSpec,
    *,
    output: OutputSpec = AS_THE_NETWORK,
    load: Callable[[nn.Layer, Folder], Any] = checkpoints.load_into,
    stock: nn.Layer | None = None,
    why_no_stock: str = _NO_STOCK_NETWORK,
    options: ExportOptions = DEFAULT_OPTIONS,
    facts: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    force: bool = False,
    dry_run: bool = False,
    tolerance: float = NETWORK_TOLERANCE,
    progress: Callable[[str], None] = print,
) -> ReleaseReport:
    """Load weights into a model in train form, fuse it, export it and put all of it in a new folder, checked.

    The folder gets the files of Paddle Inference, `plain.pdparams` (where the fused network, BNs kept, has the entries
    and shapes of `stock`, the freshly built network without layers of this library) and `manifest.json`. The weights
    must fit the model strictly, or what `load` puts into it of them. The train form is compared with the fused network
    layer by layer, with `stock` loaded from `plain.pdparams`, and with what was exported: by Paddle's Executor and by
    the Predictor, with and without oneDNN, at batch sizes 1 and 3. `input_spec` holds the shape of each input with None
    for the batch, by name for a network that takes one dict; the export takes images of that size, and layers take the
    form that is fastest for it, unless `options` ask for a dynamic size: then all is compared at a second, larger size
    too. All that the network puts out is exported, unless `output` picks from it; the manifest says what was left out.
    `facts` goes into the manifest beside what is measured here, and `texts` (name -> content) are more files;
    `progress` gets one line for each step done. `check_release` checks the folder later.

    With `dry_run` nothing is written. A folder that stands there is kept, with `OutputExists`, unless `force`: then
    the old one, which must be a release too, stays whole until the new one takes its place. Raises `ReparamError`
    where any check fails; nothing is then written.
    """
    target = Path(os.path.realpath(folder))
    if not dry_run:
        _refuse_to_replace(target, folder, force)
    step = _steps(progress)

    with step("load the weights"):
        before = digest(Path(weights))
        load(model, weights)
        source = digest(Path(weights))
        if before != source:
            raise ReparamError(f"{weights}: it changed while it was read; wait until it is written and run again")
        model.eval()

    with step("run the network"), paddle.no_grad(), unchanged(model):
        unused = left_out(model(*sample_inputs(input_spec, 1, seed=0, like=model)), output)

    def fuse() -> tuple[nn.Layer, RewriteReport]:
        return reparameterize(model, fold_bn=True, input_spec=input_spec, fixed_size=not options.dynamic_size)

    with step("fuse"):
        fused, fusing = fuse()
    checks: dict[str, VerifyReport] = {}

    def check(name: str, report: VerifyReport) -> None:
        report.raise_if_failed(name)
        checks[name] = report

    with step("compare with the train form, layer by layer"):
        check("fused network", verify(model, fused, input_spec, tolerance=tolerance))
    second = _larger(input_spec) if options.dynamic_size else None
    if second is not None:
        with step(f"compare at a second size, {_size(second)}"):
            try:
                check(f"fused network, {_size(second)}", verify(model, fused, second, tolerance=tolerance))
            except ReparamError as error:
                raise error.at(f"could not compare at a second size, {_size(second)}") from error
    with step("count parameters and multiply-adds"):
        train_size, fused_size = measure(model, input_spec), measure(fused, input_spec)
    plain, why_no_plain = None, why_no_stock
    if stock is not None:
        with step("fuse without folding BNs, for the plain weight file"):
            plain, why_no_plain = _plain_weights(model, stock)

    manifest = {
        "tool": {"name": "paddle-reparam", "version": __version__},
        "versions": {
            "python": platform.python_version(), "paddle": paddle.__version__, "numpy": np.__version__,
            **(onnx_versions() if options.onnx else {}),
        },
        "source": {"weights": {"name": str(weights), **source}},
        "input": {
            "shape": list(input_shapes(input_spec).values()),
            "names": input_names(input_spec) if isinstance(input_spec, Mapping) else None,
            "dtype": options.input_dtype(model),
            "size": "dynamic" if options.dynamic_size else "fixed",
            "normalization": None if options.normalization is None else asdict(options.normalization),
        },
        "output": {"activation": output.activation, "keys": list(output.keys), "left_out": unused},
        "batch_norm_epsilons": _epsilons(model),
        "size": {"train_form": asdict(train_size), "fused": asdict(fused_size)},
        "fusing": fusing.to_dict(),
        "quantization": quantization_report(fused).to_dict(),
        "plain_weights": {"file": PLAIN_WEIGHTS if plain else None, "why_none": None if plain else why_no_plain},
    }  # fmt: skip
    _merge(manifest, facts or {})
    result = ReleaseReport(fusing, train_size, fused_size, checks, manifest)
    if dry_run:
        manifest["checks"] = {name: report.to_dict() for name, report in checks.items()}
        return result

    with new_folder(target, folder, force) as temporary:
        with step("export for Paddle Inference"):
            export_inference(fused, temporary, input_spec, output, options)
        del fused  # what was exported is about to be here as well
        if options.onnx:
            with step("convert to ONNX"):
                export_onnx(temporary)
        if plain is not None:
            checkpoints.save(plain, temporary / PLAIN_WEIGHTS)
        for name, text in (texts or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        written = {path.name: digest(path) for path in sorted(temporary.iterdir())}
        if plain is not None:
            with step("compare with the stock network that loads the plain weight file"):
                checkpoints.load_into(stock, temporary / PLAIN_WEIGHTS)
                check("stock network, plain weights", verify(model, stock, input_spec, tolerance=tolerance))
        with step("compare with what was exported, loaded in three ways"):
            for name, report in _check_export(temporary, model, fuse, input_spec, output, options, tolerance).items():
                check(name, report)
            if second is not None:
                loose = {"must_depend": False, **_ways(temporary, options)}
                for name, report in check_export(temporary, model, second, output, (2,), tolerance, **loose).items():
                    check(f"{name}, {_size(second)}", report)
        scale = 1.0 if options.normalization else checks[_LAST_CHECK].input_scale
        probe = probe_inputs(manifest["input"], scale)
        of_network = probe_output(model, probe, manifest["input"]["names"], output, options.normalization)
        write_probe(temporary, of_network)
        written[PROBE] = digest(temporary / PROBE)
        manifest["probe"] = {
            "scale": scale,
            "input_sha256": probe_hash(probe),
            "tolerance": max(report.tolerance for report in checks.values()),
        }
        manifest["files"] = written
        manifest["checks"] = {name: report.to_dict() for name, report in checks.items()}
        write_manifest(temporary, manifest)
        if {name: digest(temporary / name) for name in written} != written:
            raise ReparamError(f"{folder}: a file changed after it was written; the disk may be failing, run again")
    progress(f"written: {folder}")
    return result


#: Of the checks of an export, the one whose inputs' scale the probe gets.
_LAST_CHECK = "Predictor, no oneDNN, batch 3"


def _larger(input_spec: InputSpec) -> InputSpec:
    """Return the spec of larger images of another shape, as large as every network's strides divide."""
    larger = {
        name: [*shape[:2], *(size + 32 * more for more, size in enumerate(shape[2:], 1))]
        for name, shape in input_shapes(input_spec).items()
    }
    return larger if isinstance(input_spec, Mapping) else list(larger.values())


def _size(input_spec: InputSpec) -> str:
    return ", ".join("x".join(map(str, shape[2:])) for shape in input_shapes(input_spec).values() if shape[2:])


def _ways(folder: Folder, options: ExportOptions) -> dict[str, Any]:
    """Return what `check_export` is told of how an export was written."""
    more = {"onnxruntime": lambda: OnnxModel(Path(folder) / ONNX_FILE)} if options.onnx else None
    return {"normalization": options.normalization, "more": more}


def _check_export(
    folder: Folder,
    model: nn.Layer,
    fuse: Callable[[], tuple[nn.Layer, RewriteReport]],
    input_spec: InputSpec,
    output: OutputSpec,
    options: ExportOptions,
    tolerance: float,
) -> dict[str, VerifyReport]:
    """Compare an export of the fused network with the model.

    The probabilities of an untrained network are often the same for every input. Then a second export, which puts the
    logits out, is compared as well: it differs from the first in nothing else, and is thrown away.
    """
    common = {"tolerance": tolerance, **_ways(folder, options)}
    try:
        return check_export(folder, model, input_spec, output, **common)
    except NothingProven:
        if output.activation is None:
            raise
    logits = OutputSpec("identity", output.keys)
    with tempfile.TemporaryDirectory() as second:
        export_inference(fuse()[0], second, input_spec, logits, options)
        if options.onnx:
            export_onnx(second)
        of_logits = {"tolerance": tolerance, **_ways(second, options)}
        reports = check_export(second, model, input_spec, logits, **of_logits)
    reports = {f"{name}, logits": report for name, report in reports.items()}
    return {**reports, **check_export(folder, model, input_spec, output, must_depend=False, **common)}


def _steps(progress: Callable[[str], None]) -> Callable[[str], contextlib.AbstractContextManager]:
    @contextlib.contextmanager
    def step(name: str) -> Iterator[None]:
        started = time.perf_counter()
        with one_sentence(f"could not {name}"):
            give_back()
            yield
        progress(f"{time.perf_counter() - started:6.1f} s  {name}")

    return step


def _epsilons(model: nn.Layer) -> dict[str, int]:
    """Return epsilon -> number of BNs with it."""
    norms = {id(layer): layer for _, layer in walk(model) if isinstance(layer, BATCH_NORMS)}
    return dict(Counter(repr(float(norm._epsilon)) for norm in norms.values()))


def _merge(manifest: dict[str, Any], facts: Mapping[str, Any]) -> None:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            _merge(manifest.setdefault(key, {}), value)
        else:
            manifest[key] = value


def _plain_weights(model: nn.Layer, stock: nn.Layer) -> tuple[dict[str, paddle.Tensor] | None, str | None]:
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


def _refuse_to_replace(target: Path, folder: Folder, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputExists(f"{folder} exists already and is kept; name another folder, or {BY_FORCE}")
    if not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file()):
        raise OutputExists(
            f"{folder} holds no {MANIFEST}, so it is no earlier release and is kept; name another folder"
        )
