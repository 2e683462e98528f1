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
import paddle
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam import benchmark
from paddle_reparam.benchmark import Contender, InferenceReport
from paddle_reparam.checkpoints import atomic_write
from paddle_reparam.errors import ReparamError, UnknownName
from paddle_reparam.export import program_file
from paddle_reparam.flops import ModelSize
from paddle_reparam.ppcls import setup
from paddle_reparam.ppcls.command import exit_code
from paddle_reparam.ppcls.errors import ConfigError
from paddle_reparam.released import MANIFEST, read_manifest
from paddle_reparam.report import Report
from paddle_reparam.timing import FEWEST_ROUNDS

from benchmark_pages import MEASURED, PAGE, ROOT, TARGETS, page_of, rows_of  # isort: skip
from benchmark_step import add_step, positive, run_step  # isort: skip
from style import BLUE, GREY, ORANGE, plain_axes  # isort: skip

#: `table` times no more rounds of all networks in turns than fit into these, at batch 1 and at batch 8 each.
SECONDS = 120.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for wrong usage, 1 where a network fails or a target is missed."""
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
            "--form", nargs="+", choices=("train form", "fused"), default=["fused"], help="of names and configs"
        )
        command.add_argument("--size", type=positive, default=224, help="side of the images, for names")
    infer.add_argument("--batch", type=positive, nargs="+", default=[1])
    infer.add_argument(
        "--runtime", nargs="+", choices=sorted(benchmark.RUNTIMES), default=["onednn"],
        help="onednn and plain are Paddle Inference on the CPU, with oneDNN and without; gpu has not been tried yet",
    )  # fmt: skip
    profile.add_argument("--batch", type=positive, default=1)
    sweep = commands.add_parser("sweep", help="one network as its work grows")
    sweep.add_argument("target", help="a network's name")
    sweep.add_argument("--of", choices=("size", "batch", "kernel_size"), required=True, help="what grows")
    sweep.add_argument("--values", type=positive, nargs="+", required=True)
    sweep.add_argument("--size", type=positive, default=224, help="side of the images, where it does not grow")
    table = commands.add_parser("table", help="the networks of docs/benchmarks.md, which it writes")
    for command in (infer, sweep, profile, table):
        command.add_argument("--threads", type=positive, default=2)
        command.add_argument("--rounds", type=enough_rounds, default=30, help=f"{FEWEST_ROUNDS} or more")
    for command in (infer, sweep, profile):
        command.add_argument("--output", help="a JSON file to write")
    for command in (infer, sweep):
        command.add_argument("--chart", help="a PNG file to draw")
    add_step(commands)
    given = parser.parse_args(arguments)
    try:
        with exit_code() as result:
            if given.command != "step":
                check(given)
                setup().utils.logger.init_logger(log_level="WARNING")
            result[0] = {
                "infer": run_infer, "sweep": run_sweep, "profile": run_profile, "table": run_table, "step": run_step
            }[given.command](given)  # fmt: skip
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return result[0]


def enough_rounds(text: str) -> int:
    """Return what `--rounds` says; raises `ValueError` below the fewest that quartiles can be made of."""
    number = int(text)
    if number < FEWEST_ROUNDS:
        raise ValueError(text)
    return number


def check(given: argparse.Namespace) -> None:
    """Raise `ConfigError` for what would stop a command only after it has measured."""
    for option in ("output", "chart"):
        folder = Path(getattr(given, option, None) or ".").parent
        if not folder.is_dir():
            raise ConfigError(f"--{option} {getattr(given, option)}: there is no folder {folder}")
    for runtime in getattr(given, "runtime", []):
        with as_wrong_usage(f"--runtime {runtime}"):
            benchmark.check_runtime(runtime)


@contextlib.contextmanager
def as_wrong_usage(what: str) -> Iterator[None]:
    """Raise a `ReparamError` of the `with` block as a `ConfigError` that says what of the command line it is about."""
    try:
        yield
    except (ConfigError, UnknownName):
        raise
    except ReparamError as error:
        raise ConfigError(f"{what}: {error}") from error


def contenders_of(
    target: str, folder: Path, size: int, forms: Sequence[str] = ("fused",), onnx: bool = False, **options: Any
) -> Iterator[Contender]:
    """Yield what is to be timed of a target: an exported folder as it is, or the forms of a network, exported."""
    from paddle_reparam.ppcls.arch import get_builder
    from paddle_reparam.ppcls.command import read_config
    from paddle_reparam.ppcls.reparam import build_train_form

    path, shape = Path(target), (3, size, size)
    if path.is_dir():
        known: dict[str, Any] = {}
        with as_wrong_usage(target):
            program_file(path)
            if (path / MANIFEST).is_file():
                manifest = read_manifest(path)
                [[_, *shape]] = manifest["input"]["shape"]
                known = {"dtype": manifest["input"]["dtype"], "size": ModelSize(**manifest["size"]["fused"])}
        yield Contender(path.name, "exported", path, tuple(shape), **known)
        return
    with paddle.utils.unique_name.guard():
        if path.suffix == ".yaml":
            name, model = path.stem, build_train_form(read_config(target))
        else:
            name, model = target, get_builder(target)(**options)
    try:
        yield from benchmark.prepare(name, model, folder, shape, forms, onnx)
    except benchmark.WrongImages as error:
        raise ConfigError(str(error)) from error


def run_infer(given: argparse.Namespace) -> int:
    """Time the targets, each in its forms."""
    with tempfile.TemporaryDirectory() as folder:
        onnx = "onnxruntime" in given.runtime
        contenders = [c for t in given.target for c in contenders_of(t, Path(folder), given.size, given.form, onnx)]
        report = benchmark.run(contenders, given.batch, given.runtime, given.threads, given.rounds)
    return _finish(report, given, draw_bars)


def run_sweep(given: argparse.Namespace) -> int:
    """Time one network, fused, with growing work."""
    contenders, batches = [], given.values if given.of == "batch" else [1]
    with tempfile.TemporaryDirectory() as folder:
        for value in [given.size] if given.of == "batch" else given.values:
            size = value if given.of == "size" else given.size
            # Of SLaK; on the maps of its last stage, 7x7 for images of 224, a kernel of 13 meets everything.
            options = {"kernel_size": [value, value, value, min(value, 13), 5]} if given.of == "kernel_size" else {}
            [contender] = contenders_of(given.target, Path(folder) / str(value), size, **options)
            contender.name = f"{given.target}, {given.of} {value}" if given.of != "batch" else given.target
            contenders.append(contender)
        report = benchmark.run(contenders, batches, ["onednn"], given.threads, given.rounds)
    report.settings.update(of=given.of, values=given.values)
    return _finish(report, given, draw_curve)


def run_profile(given: argparse.Namespace) -> int:
    """Show where the time of the targets goes, and how fast they would be at the first one's rate."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = [c for t in given.target for c in contenders_of(t, Path(folder), given.size, given.form)]
        report = benchmark.profile_all(contenders, given.batch, given.threads, given.rounds)
    return _finish(report, given)


def run_table(given: argparse.Namespace) -> int:
    """Measure everything on docs/benchmarks.md and write it; 1 where a target is missed."""
    names = list(dict.fromkeys([*(plain for _, plain, _ in TARGETS), *(target for target, _, _ in TARGETS)]))
    with tempfile.TemporaryDirectory() as folder:
        contenders = []
        for name in tqdm(names, unit=" networks"):
            contenders += contenders_of(name if "/" not in name else str(ROOT / name), Path(folder), 224)
        report = benchmark.run(contenders, (1, 8), ["onednn"], given.threads, given.rounds, seconds=SECONDS)
        measured = report.to_dict()
        missed = [row for row in rows_of(measured) if row.missed]
        to_profile = {name for row in missed for name in (row.plain, row.network)}
        profiles = benchmark.profile_all(
            [each for each in contenders if each.name in to_profile], 1, given.threads, given.rounds
        ).to_dict()
    measured.update(memory_rate=profiles["memory_rate"], profiles=profiles["profiles"])
    text = json.dumps(measured, indent=2, sort_keys=True) + "\n"
    atomic_write(MEASURED, lambda path: path.write_text(text, encoding="utf-8"))
    atomic_write(PAGE, lambda path: path.write_text(page_of(measured), encoding="utf-8"))
    print(report, f"written: {PAGE.relative_to(ROOT)}", *(f"missed: {row.network}" for row in missed), sep="\n")
    return int(bool(missed))


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


def draw_curve(report: InferenceReport) -> Figure:
    """Draw the time of a batch over what grows."""
    figure = Figure(figsize=(6, 3.6), facecolor="white", layout="constrained")
    axes = figure.subplots()
    values = report.settings["values"]
    medians = [r.median for r in report.results]
    axes.plot(values, medians, "o-", color=BLUE, lw=1.5, ms=4)
    axes.fill_between(values, [r.low for r in report.results], [r.high for r in report.results], color=BLUE, alpha=0.2)
    plain_axes(axes, report.contenders[0]["name"].split(",")[0], x=report.settings["of"], y="milliseconds a batch")
    axes.set_ylim(0, None)
    return figure


if __name__ == "__main__":
    sys.exit(main())
