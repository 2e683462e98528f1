"""A released folder, read again later and elsewhere: its manifest, its files, and what its network computes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ..errors import MissingFile, ReparamError, UnknownName, one_sentence
from ..files import Folder, digest
from ..forms import Form, Misfit
from ..report import Report, format_table
from ..surgery.tracing import unchanged
from ..surgery.verify import compare_outputs
from ..weights import checkpoints
from .manifest_form import DESCRIPTION_FORM, MANIFEST_FORM
from .outputs import Normalization, OfPixels, OutputSpec, comparable, reference_outputs
from .runtimes import LoadedNetwork, Runtime, get_runtime, proving

MANIFEST = "manifest.json"
PLAIN_WEIGHTS = "plain.pdparams"
PROBE = "probe.npz"

_BATCH = 2
#: Bytes of a manifest at most; that of a network with a thousand kernels and 20,000 labels has a megabyte.
_LARGEST_MANIFEST = 2**26


# ---------------------------------------------------------------------------------------------------------------------
# The manifest, which seals itself


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2, sort_keys=True) + "\n"


def sealed(manifest: Mapping[str, Any], form: Form = MANIFEST_FORM) -> str:
    """Return the text of what describes a release, with the sha256 of all of it but that entry as `seal`.

    The seal notices accidents. It is no signature: who changes a manifest can seal it again. Raises `ReparamError`
    where it would be refused when it is read.
    """
    text = _text(manifest)
    try:
        form(json.loads(text), "")
    except Misfit as misfit:
        raise ReparamError(f"{MANIFEST}: {misfit} is nothing that a manifest can hold") from misfit
    return _text({**manifest, "seal": hashlib.sha256(text.encode()).hexdigest()})


def description_for_a_file(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return what a file of a release says of itself, name -> text, by which it can be used alone."""
    said = ("tool", "versions", "source", "input", "output", "labels", "task")
    return {MANIFEST: sealed({key: manifest[key] for key in said if key in manifest}, DESCRIPTION_FORM)}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write what describes a release, sealed; raises `ReparamError` where `read_manifest` would refuse it."""
    (folder / MANIFEST).write_text(sealed(manifest), encoding="utf-8")


def read_manifest(folder: Folder) -> dict[str, Any]:
    """Return what a release says of itself; raises `ReparamError` for another folder and a manifest that was changed.

    A changed byte anywhere in it is noticed: it is read and written again, and its seal must fit. So must its form,
    `MANIFEST_FORM`: nobody else need look whether an entry is there and what it is.
    """
    path = Path(folder) / MANIFEST
    if not os.path.lexists(folder):
        raise MissingFile(f"{folder} is no release: there is no such folder")
    if path.is_symlink() or not path.is_file():
        raise ReparamError(f"{folder} is no release: it holds no {MANIFEST}")

    try:
        text = path.read_text(encoding="utf-8") if path.stat().st_size <= _LARGEST_MANIFEST else ""
    except (OSError, UnicodeDecodeError):
        text = ""
    return _unsealed(text, f"{path} is not as it was written", "release again")


def manifest_of_onnx(model: LoadedNetwork) -> dict[str, Any]:
    """Return what an ONNX file says of itself: `input`, `output` and `labels` of the manifest of its release.

    Raises `ReparamError` for one that says nothing, and where that was changed.
    """
    text = model.metadata.get(MANIFEST)
    if text is None:
        raise ReparamError(
            f"{model.name}: it does not say what its input and its labels are, as the files of a release do; "
            "give the folder of the release, or such a file"
        )
    return _unsealed(
        text, f"{model.name}: the manifest in it is not as it was written", "release again", DESCRIPTION_FORM
    )


def _unsealed(text: str, what: str, remedy: str, form: Form = MANIFEST_FORM) -> dict[str, Any]:
    place = ""
    try:
        manifest = json.loads(text)
        same = text == _text(manifest)
        seal = manifest.pop("seal")
        same = same and seal == hashlib.sha256(_text(manifest).encode()).hexdigest()
        form(manifest, "")
    except Misfit as misfit:
        same, place = False, f" ({misfit})"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        same = False
    if not same:
        raise ReparamError(f"{what}, or of an older version of this library{place}; {remedy}")
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# The probe: a small input that can be made again everywhere, and the output that the trained network gave for it


def _probe_pixels(shape: Sequence[int]) -> np.ndarray:
    """Return `shape` as scattered integers 0..255 (splitmix64 of their places): the same on each machine for ever."""
    z = (np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) & np.uint64(255)).astype(np.uint8).reshape(shape)


def probe_inputs(description: Mapping[str, Any], scale: float) -> list[np.ndarray]:
    """Return the probe for a manifest's `input`, an array for each: pixels, or numbers of the deviation `scale`."""
    shapes = [[_BATCH, *shape[1:]] for shape in description["shape"]]
    # One after the other out of one row, so that no two are alike.
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    parts = np.split(_probe_pixels([int(ends[-1])]), ends[:-1])
    pixels = [part.reshape(shape) for part, shape in zip(parts, shapes)]
    if description["normalization"] is None:
        pixels = [(part.astype(np.float64) - 127.5) / 73.9 * scale for part in pixels]
    return [part.astype(description["dtype"]) for part in pixels]


def probe_hash(probe: Sequence[np.ndarray]) -> str:
    """Return the sha256 of a probe's numbers."""
    return hashlib.sha256(b"".join(part.tobytes() for part in probe)).hexdigest()


def probe_output(
    model: nn.Layer,
    probe: Sequence[np.ndarray],
    names: Sequence[str] | None,
    output: OutputSpec,
    normalization: Normalization | None,
) -> list[np.ndarray]:
    """Return the arrays that an export of a network in eval mode is to give for the probe.

    `names` are those of its inputs, for a network that takes one dict of them.
    """
    network = model if normalization is None else OfPixels(model, normalization)
    network.eval()
    tensors: list[Any] = [paddle.to_tensor(part) for part in probe]
    with unchanged(model):
        return reference_outputs(network, tensors if names is None else [dict(zip(names, tensors))], output)


def write_probe(folder: Path, outputs: Sequence[np.ndarray]) -> None:
    """Write what `probe_output` gave into a folder."""
    np.savez(folder / PROBE, *outputs)


def _read_probe(path: Path) -> list[np.ndarray]:
    with one_sentence(f"{path}: it cannot be read"):
        with zipfile.ZipFile(path) as file:
            # As `write_probe` writes it, so that what it holds is no larger than the file.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                raise ReparamError(f"{path}: it is no probe that a release wrote")
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[f"arr_{i}"] for i in range(len(arrays.files))]


# ---------------------------------------------------------------------------------------------------------------------
# Checking all of it


@dataclass
class CheckReport(Report):
    """What a check of a released folder found: name of the file -> how many bytes, and way of running it -> how far
    its output for the probe is from that of the trained network, relative, and may be. `not_run` says what was not, and
    why.
    """

    files: dict[str, int]
    tolerances: dict[str, float]
    errors: dict[str, float]
    not_run: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [[name, f"{error:.1e}", f"{self.tolerances[name]:.0e}"] for name, error in self.errors.items()]
        rows += [[name, f"not run: {why}", "-"] for name, why in self.not_run.items()]
        table = format_table(["the trained network's output for the probe, by", "relative error", "tolerance"], rows)
        return f"{len(self.files)} files, {sum(self.files.values()):,} bytes: all as they were written\n{table}"


def check_files(folder: Folder, manifest: Mapping[str, Any]) -> dict[str, int]:
    """Return file -> bytes where a folder holds the files of its manifest, unchanged, and no other.

    Nothing is read but files in the folder itself: a link, wherever it leads, is refused. Raises `ReparamError` with
    the name of the first file that is missing, changed or foreign.
    """
    folder, files = Path(folder), manifest["files"]
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            raise ReparamError(f"{path} is a link, and a release holds none; copy the folder again, with its files")
        if path.name not in files and path.name != MANIFEST:
            raise ReparamError(f"{path} does not belong to the release; {MANIFEST} does not name it")
    for name in sorted(files):
        path = folder / name
        if not path.is_file():
            raise ReparamError(f"{path} is missing; copy the folder again")
        if path.stat().st_size != files[name]["bytes"] or digest(path) != files[name]:
            raise ReparamError(f"{path} is not as it was written ({MANIFEST} has another hash); copy the folder again")
    return {name: entry["bytes"] for name, entry in files.items()}


def _file_for(runtime: Runtime, folder: Path) -> Path:
    """Return the file that a runtime loads; raises `ReparamError` where there is none."""
    file = runtime.file(folder)
    if file is None:
        raise ReparamError(f"{folder} is to be used by {runtime.title}, and holds no file that it loads; release again")
    return file


def check_release(folder: Folder, stock: nn.Layer | None = None) -> CheckReport:
    """Check a released folder: its files, and that each form in it gives the trained network's output for the probe.

    `stock` is the freshly built network that `plain.pdparams` belongs to; without it that file's hash is checked and
    its network not run. Raises `ReparamError` with the name of the file that is missing, foreign, changed, or computes
    something else.
    """
    manifest = read_manifest(folder)
    files = check_files(folder, manifest)
    folder = Path(folder)
    probe, output = manifest["probe"], OutputSpec(manifest["output"]["activation"], tuple(manifest["output"]["keys"]))
    x, expected = probe_inputs(manifest["input"], probe["scale"]), _read_probe(folder / PROBE)
    if probe_hash(x) != probe["input_sha256"]:
        raise ReparamError(f"{folder}: the probe's input is not what it was when {MANIFEST} was written")
    report = CheckReport(files, {}, {})

    def compare(way: str, file: str, outputs: Sequence[np.ndarray], tolerance: float = probe["tolerance"]) -> None:
        error, _ = compare_outputs(comparable(expected, output), comparable(outputs, output), tolerance)
        report.errors[way], report.tolerances[way] = error, tolerance
        if not error <= tolerance:
            raise ReparamError(
                f"{folder / file} computes something else than the network that was released: {way} gives the probe "
                f"with a relative error of {error:.1e} (tolerance {tolerance:.0e})"
            )

    tolerances = {entry["runtime"]: entry["tolerance"] for entry in manifest.get("serving", [])}
    for name in dict.fromkeys([*tolerances, *(runtime.name for runtime in proving(folder))]):
        try:
            runtime = get_runtime(name)
            runtime.require()
        except UnknownName:
            report.not_run[name] = "this version of the library does not know it"
        except ReparamError as missing:
            report.not_run[runtime.title] = str(missing)
        else:
            tolerance = tolerances.get(name, probe["tolerance"])
            if tolerance >= 1.0:
                report.not_run[runtime.title] = "rounding may change all of the probe's output, which proves nothing"
                continue
            compare(runtime.title, _file_for(runtime, folder).name, runtime.load(folder).run(*x), tolerance)
    if PLAIN_WEIGHTS in files:
        if stock is None:
            report.not_run[PLAIN_WEIGHTS] = "the stock network was not given"
            checkpoints.load(folder / PLAIN_WEIGHTS)
        else:
            stock.eval()
            with one_sentence(f"{folder / PLAIN_WEIGHTS}: the stock network cannot load it"):
                checkpoints.load_into(stock, folder / PLAIN_WEIGHTS)
            normalization = Normalization.from_dict(manifest["input"]["normalization"])
            compare(
                PLAIN_WEIGHTS, PLAIN_WEIGHTS, probe_output(stock, x, manifest["input"]["names"], output, normalization)
            )
    return report
