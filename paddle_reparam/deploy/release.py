"""From a network in train form to a folder that can be shipped: fused, exported, checked at every step, described.

A folder stands under its name only when all of it has been written and checked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle import nn

from ..errors import BY_FORCE, OutputExists, one_sentence
from ..files import Folder, new_folder
from ..measure.memory import give_back, large_blocks_apart, only_new_objects
from ..report import Report, format_table
from ..surgery.flops import ModelSize
from ..surgery.places import RewriteReport
from ..surgery.tracing import InputSpec
from ..surgery.verify import NETWORK_TOLERANCE, VerifyReport
from ..weights import checkpoints
from .export import DEFAULT_OPTIONS, ExportOptions
from .outputs import AS_THE_NETWORK, OutputSpec
from .programs import FILE_NAME, PROGRAM_SUFFIXES, WEIGHTS_SUFFIX
from .released import MANIFEST
from .steps import STEPS, STEPS_IN_A_FOLDER, Step, Work
from .tuning import Tuning, TuningReport

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
    tuned: TuningReport | None = None

    def __str__(self) -> str:
        tuned = "" if self.tuned is None else f"{self.tuned}\n\n"
        return f"{self.fusing}\n\n{self.table()}\n\n{tuned}{self.checks_table()}\n{self._notes()}"

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


@only_new_objects()
@large_blocks_apart()
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
    tuning: Tuning | None = None,
    fuse_something: bool = True,
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
    With `tuning` every form, runtime and precision that it names is tried, and the folder also holds what the fastest
    that holds needs; the manifest says what was found, and `InferenceModel` uses it. `facts` goes into the manifest
    beside what is measured here, and `texts` (name -> content) are more files; `progress` gets one line for each step
    done. Without `fuse_something` a network with nothing to fuse is released as it is. `check_release` checks the
    folder later.

    With `dry_run` nothing is written. A folder that stands there is kept, with `OutputExists`, unless `force`: then
    the old one, which must be a release too, stays whole until the new one takes its place. Raises `ReparamError`
    where any check fails; nothing is then written.
    """
    target = Path(os.path.realpath(folder))
    if not dry_run:
        _refuse_to_replace(target, folder, force)
    work = Work(
        model, weights, input_spec, output, options, load, stock, why_no_stock, texts or {}, facts or {}, tolerance,
        tuning, lambda line: progress(f"    {line}"), fuse_something,
    )  # fmt: skip
    for step in STEPS:
        _do(step, work, progress)
    if not dry_run:
        with new_folder(target, folder, force) as temporary:
            work.folder = temporary
            for step in STEPS_IN_A_FOLDER:
                _do(step, work, progress)
        progress(f"written: {folder}")
    work.manifest["checks"] = {name: report.to_dict() for name, report in work.checks.items()}
    return ReleaseReport(
        work.fusing, work.sizes["train_form"], work.sizes["fused"], work.checks, work.manifest, work.tuned
    )


def _do(step: Step, work: Work, progress: Callable[[str], None]) -> None:
    if not step.when(work):
        return
    started = time.perf_counter()
    with one_sentence(f"could not {step.name}"):
        give_back()
        step.do(work)
    progress(f"{time.perf_counter() - started:6.1f} s  {step.name}")


def _refuse_to_replace(target: Path, folder: Folder, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        raise OutputExists(f"{folder} exists already and is kept; name another folder, or {BY_FORCE}")
    if not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file()):
        raise OutputExists(
            f"{folder} holds no {MANIFEST}, so it is no earlier release and is kept; name another folder"
        )
