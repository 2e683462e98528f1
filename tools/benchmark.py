"""Measure how fast networks are: exported and run (`infer`), as work grows (`sweep`), where time goes (`profile`),
training steps (`step`), and the networks of docs/benchmarks.md (`table`).

What is compared is timed in one run and in turns, so that every form meets the same machine; ratios are to the first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from paddle_reparam.deploy.runtimes import RUNTIMES, get_runtime

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam import list_layers, list_models
from paddle_reparam.arithmetic.geometry import ConvGeometry
from paddle_reparam.deploy.programs import program_file
from paddle_reparam.deploy.released import MANIFEST, check_files, read_manifest
from paddle_reparam.errors import ReparamError, UsageError, exit_code
from paddle_reparam.files import atomic_write
from paddle_reparam.measure import benchmark
from paddle_reparam.measure.benchmark import Contender, InferenceReport
from paddle_reparam.measure.timing import FEWEST_ROUNDS
from paddle_reparam.ppcls import setup
from paddle_reparam.ppcls.errors import ConfigError
from paddle_reparam.registry import get_layer
from paddle_reparam.report import Report
from paddle_reparam.style import BLUE, GREY, ORANGE, plain_axes
from paddle_reparam.surgery.flops import ModelSize

import paddle  # isort: skip - paddle_reparam quiets it
from paddle import nn  # isort: skip

from benchmark_pages import (  # isort: skip
    FOR_EVERY_SIZE, GROWS, MEASURED, NETWORKS, PAGE, PICTURE, ROOT, SWEEPS, TARGETS,
    draw_curves, name_of, page_of, read_measured, rows_of, save_picture,
)  # fmt: skip
from benchmark_step import add_step, positive, run_step  # isort: skip

#: `table` times no more rounds of all networks in turns than fit into these, at batch 1 and at batch 8 each.
SECONDS = 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for wrong usage, 1 where a network fails or a target is missed."""
    given = parser_of().parse_args(arguments)
    with exit_code() as result:
        if given.command != "step":
            check(given)
            setup().utils.logger.init_logger(log_level="WARNING")
        result[0] = {
            "infer": run_infer, "sweep": run_sweep, "profile": run_profile, "table": run_table, "step": run_step
        }[given.command](given)  # fmt: skip
    return result[0]


def parser_of() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    infer = commands.add_parser("infer", help="exported networks, in turns")
    profile = commands.add_parser("profile", help="where the time of exported networks goes, by oneDNN's own log")
    for command in (infer, profile):
        command.add_argument(
            "target", nargs="+",
            help="a network's name, a config (.yaml), or an exported folder; ratios and rates are to the first",
        )  # fmt: skip
        command.add_argument(
            "--form", nargs="+", choices=benchmark.FORMS, default=["fused"], help="of names and configs"
        )
        command.add_argument(
            "--size", type=positive, help="side of the images; else that of the folders and configs, or 224"
        )
    infer.add_argument("--batch", type=positive, nargs="+", default=[1])
    infer.add_argument(
        "--runtime", nargs="+", choices=[runtime.name for runtime in RUNTIMES], default=["onednn"],
        help="; ".join(f"{each.name}: {each.title}, {' and '.join(each.precisions)}" for each in RUNTIMES)
        + "; gpu has not been tried yet",
    )  # fmt: skip
    profile.add_argument("--batch", type=positive, default=1)
    sweep = commands.add_parser("sweep", help="networks as their work grows")
    sweep.add_argument(
        "target", nargs="+", help="a network's name; where the kernel size grows, that of a depthwise layer or a SLaK"
    )
    sweep.add_argument("--of", choices=sorted(GROWS), required=True, help="what grows")
    sweep.add_argument("--values", type=positive, nargs="+", required=True)
    sweep.add_argument("--size", type=positive, default=224, help="side of the images, or maps, where it does not grow")
    sweep.add_argument("--channels", type=positive, default=124, help="of the maps of a layer")
    table = commands.add_parser("table", help="everything on docs/benchmarks.md, which it writes")
    table.add_argument("--pages", action="store_true", help="measure nothing, only write the page and its picture anew")
    for command in (infer, sweep, profile, table):
        command.add_argument("--threads", type=positive, default=2)
        command.add_argument("--rounds", type=enough_rounds, default=30, help=f"{FEWEST_ROUNDS} or more")
    for command in (infer, sweep, profile):
        command.add_argument("--output", help="a JSON file to write")
    for command in (infer, sweep):
        command.add_argument("--chart", help="a PNG file to draw")
    add_step(commands)
    return parser


def enough_rounds(text: str) -> int:
    """Return what `--rounds` says; raises `ValueError` below the fewest that quartiles can be made of."""
    number = int(text)
    if number < FEWEST_ROUNDS:
        raise ValueError(text)
    return number


def check(given: argparse.Namespace) -> None:
    """Raise `ConfigError` for what would stop a command only after it has measured."""
    for option in ("output", "chart"):
        file = Path(getattr(given, option, None) or "unnamed")
        if file.is_dir():
            raise ConfigError(f"--{option} {file} is a folder; give the name of a file")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--{option} {file}: its folder cannot be made: {error.strerror}") from error
    for runtime in getattr(given, "runtime", []):
        with as_wrong_usage(f"--runtime {runtime}"):
            get_runtime(runtime).require()


@contextlib.contextmanager
def as_wrong_usage(what: str) -> Iterator[None]:
    """Raise a `ReparamError` of the `with` block as a `ConfigError` that says what of the command line it is about."""
    try:
        yield
    except UsageError:
        raise
    except ReparamError as error:
        raise ConfigError(f"{what}: {error}") from error


def images_of(targets: Sequence[str], size: int | None) -> tuple[int, int, int]:
    """Return the shape of the images that all targets are timed on: of this size, or what folders and configs say.

    Raises `ConfigError` where a folder takes others: times on images of two sizes cannot be compared.
    """
    from paddle_reparam.ppcls.command import read_config
    from paddle_reparam.ppcls.reparam import image_shape

    known: dict[str, tuple[int, ...]] = {}
    for target in targets:
        path = Path(target)
        if path.is_dir() and (path / MANIFEST).is_file():
            with as_wrong_usage(target):
                taken = read_manifest(path)["input"]
            [[_, *shape], *others] = taken["shape"]
            if others:
                raise ConfigError(f"{target}: its network takes several inputs, and is timed on images alone")
            if size is None or taken["size"] == "fixed":
                known[target] = tuple(shape)
        elif path.suffix == ".yaml" and size is None:
            known[target] = tuple(image_shape(read_config(target)))
    shape = (3, size, size) if size is not None else next(iter(known.values()), (3, 224, 224))
    for target, of_target in known.items():
        if of_target != shape:
            asked = f"--size {size} asks for" if size is not None else f"{next(iter(known))} takes"
            raise ConfigError(
                f"{target} takes images of {'x'.join(map(str, of_target))}, and {asked} {'x'.join(map(str, shape))}; "
                "times on images of two sizes cannot be compared"
            )
    return shape


def contenders_of(
    target: str,
    folder: Path,
    shape: tuple[int, int, int],
    forms: Sequence[str] = ("fused",),
    onnx: bool = False,
    **options: Any,
) -> Iterator[Contender]:
    """Yield what is to be timed of a target: an exported folder as it is, or the forms of a network, exported."""
    from paddle_reparam.ppcls.arch import get_builder
    from paddle_reparam.ppcls.command import read_config
    from paddle_reparam.ppcls.reparam import build_train_form

    path = Path(target)
    if path.is_dir():
        known: dict[str, Any] = {}
        with as_wrong_usage(target):
            program_file(path)
            if (path / MANIFEST).is_file():
                manifest = read_manifest(path)
                check_files(path, manifest)
                [[_, *shape]] = manifest["input"]["shape"]
                known = {"dtype": manifest["input"]["dtype"], "size": ModelSize(**manifest["size"]["fused"])}
        yield Contender(path.name, "exported", path, tuple(shape), **known)
        return
    with paddle.utils.unique_name.guard():
        if path.suffix == ".yaml":
            name, model = path.stem, build_train_form(read_config(target))
        else:
            name, build = target, get_builder(target)
            with as_wrong_usage(target):
                model = build(**options)
    try:
        yield from benchmark.prepare(name, model, folder, shape, forms, onnx)
    except benchmark.WrongImages as error:
        raise ConfigError(str(error)) from error


def run_infer(given: argparse.Namespace) -> int:
    """Time the targets, each in its forms."""
    shape = images_of(given.target, given.size)
    with tempfile.TemporaryDirectory() as folder:
        onnx = "onnxruntime" in given.runtime
        contenders = [c for t in given.target for c in contenders_of(t, Path(folder), shape, given.form, onnx)]
        report = benchmark.run(contenders, given.batch, given.runtime, given.threads, given.rounds)
    return _finish(report, given, draw_bars)


def run_sweep(given: argparse.Namespace) -> int:
    """Time networks, fused, with growing work."""
    report = sweep_of(given)
    return _finish(report, given, lambda report: draw_curves([report.to_dict()]))


def sweep_of(given: argparse.Namespace) -> InferenceReport:
    """Return the times of what `sweep` was given, all of them in turns."""
    contenders, batches = [], given.values if given.of == "batch" else [1]
    with tempfile.TemporaryDirectory() as folder:
        for target in given.target:
            for value in [None] if given.of == "batch" else given.values:
                place, size = Path(folder) / str(value), value if given.of == "size" else given.size
                if given.of == "kernel_size":
                    found = of_kernel_size(target, place, size, value, given.channels)
                else:
                    found = contenders_of(target, place, (3, size, size))
                for each in found:
                    each.name = name_of(target, given.of, value)
                    contenders.append(each)
        report = benchmark.run(contenders, batches, ["onednn"], given.threads, given.rounds, peaks=False)
    report.settings.update(
        of=given.of, targets=given.target, values=given.values, size=given.size, channels=given.channels
    )
    return report


def of_kernel_size(target: str, folder: Path, size: int, kernel_size: int, channels: int) -> Iterator[Contender]:
    """Yield a layer of this library, or a SLaK, with kernels of a size."""
    slaks = list_models("SLaK*")
    if target not in [*list_layers(), *slaks]:
        raise ConfigError(
            f"{target}: no kernel size can be chosen for it, but for {', '.join(slaks)} and single layers"
        )
    if target in slaks:
        # On the maps of the last stage, 7x7 for images of 224, a kernel of 13 meets everything.
        sizes = [kernel_size, kernel_size, kernel_size, min(kernel_size, 13), 5]
        yield from contenders_of(target, folder, (3, size, size), kernel_size=sizes)
        return
    k = kernel_size
    geometry = ConvGeometry(channels, channels, (k, k), padding=(k // 2,) * 4, groups=channels)
    with as_wrong_usage(f"{target} with a kernel of {k}"):
        layer = get_layer(target).layer.build(geometry)
    yield from benchmark.prepare(target, nn.Sequential(layer), folder, (channels, size, size))


def run_profile(given: argparse.Namespace) -> int:
    """Show where the time of the targets goes, and how fast they would be at the first one's rate."""
    shape = images_of(given.target, given.size)
    with tempfile.TemporaryDirectory() as folder:
        contenders = [c for t in given.target for c in contenders_of(t, Path(folder), shape, given.form)]
        report = benchmark.profile_all(contenders, given.batch, given.threads, given.rounds)
    return _finish(report, given)


def run_table(given: argparse.Namespace) -> int:
    """Measure everything on docs/benchmarks.md and write it; 1 where a target is missed."""
    if not given.pages:
        measure_networks(given)
        for stem, arguments in SWEEPS.items():
            settings = ["--threads", str(given.threads), "--rounds", str(given.rounds)]
            text = sweep_of(parser_of().parse_args(["sweep", *arguments.split(), *settings])).to_json() + "\n"
            atomic_write(MEASURED / f"{stem}.json", lambda path, text=text: path.write_text(text, encoding="utf-8"))
    measured, sweeps = read_measured()
    atomic_write(PICTURE, lambda path: save_picture(sweeps, path))
    atomic_write(PAGE, lambda path: path.write_text(page_of(measured, sweeps), encoding="utf-8"))
    missed = [f"missed: {row.network}" for row in rows_of(measured) if row.missed]
    print(f"written: {PAGE.relative_to(ROOT)}", *missed, sep="\n")
    return int(bool(missed))


def measure_networks(given: argparse.Namespace) -> None:
    """Time the networks of `TARGETS`, profile those that miss theirs, and write what was measured."""
    names = list(dict.fromkeys([*(plain for _, plain, _ in TARGETS), *(target for target, _, _ in TARGETS)]))
    with tempfile.TemporaryDirectory() as folder:
        contenders = []
        for name in tqdm(names, unit=" networks"):
            forms = ("fused", "dynamic size") if name in FOR_EVERY_SIZE else ("fused",)
            contenders += contenders_of(
                name if "/" not in name else str(ROOT / name), Path(folder), (3, 224, 224), forms
            )
        report = benchmark.run(contenders, (1, 8), ["onednn"], given.threads, given.rounds, seconds=SECONDS)
        measured = report.to_dict()
        missed = [row for row in rows_of(measured) if row.missed]
        to_profile = {name for row in missed for name in (row.plain, row.network)}
        profiles = benchmark.profile_all(
            [each for each in contenders if each.form == "fused" and each.name in to_profile],
            1,
            given.threads,
            given.rounds,
        ).to_dict()
    measured.update(memory_rate=profiles["memory_rate"], profiles=profiles["profiles"])
    text = json.dumps(measured, indent=2, sort_keys=True) + "\n"
    atomic_write(MEASURED / NETWORKS, lambda path: path.write_text(text, encoding="utf-8"))
    print(report)


def _finish(report: Report, given: argparse.Namespace, draw: Callable[[Any], Figure] | None = None) -> int:
    print(report)
    if given.output:
        atomic_write(Path(given.output), lambda path: path.write_text(report.to_json() + "\n", encoding="utf-8"))
        print(f"written: {given.output}")
    if draw is not None and given.chart:
        atomic_write(Path(given.chart), lambda path: draw(report).savefig(path, dpi=110, format="png"))
        print(f"written: {given.chart}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Charts


def draw_bars(report: InferenceReport) -> Figure:
    """Draw a bar for each network, form, runtime and batch, with the quartiles."""
    figure = Figure(figsize=(9, 1.4 + 0.32 * len(report.results)), facecolor="white", layout="constrained")
    axes = figure.subplots()
    labels = [f"{r.name}, {r.form}, {r.runtime}, batch {r.batch}" for r in report.results]
    medians = np.array([r.median for r in report.results])
    spread = np.array([[r.median - r.low, r.high - r.median] for r in report.results]).T
    colors = [ORANGE if r.form == "train form" else BLUE for r in report.results]
    axes.barh(np.arange(len(labels)), medians, xerr=spread, color=colors, ecolor=GREY, capsize=2)
    axes.set_yticks(np.arange(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    plain_axes(axes, "median of a batch, and its quartiles", x="milliseconds")
    return figure


if __name__ == "__main__":
    sys.exit(main())
