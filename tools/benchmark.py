"""Measure how fast networks are: exported and run (`infer`), as work grows (`sweep`), against targets (`table`).

What is compared is timed in one run and in turns, so that every form meets the same machine; ratios are to the first.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from paddle_reparam.ppcls import setup
from paddle_reparam.ppcls.errors import ConfigError
from paddle_reparam.release import MANIFEST

from benchmark_step import add_step, positive, run_step  # isort: skip
from style import BLUE, GREY, ORANGE, plain_axes  # isort: skip

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "measured" / "benchmarks.json"
TABLE = ROOT / "docs" / "benchmarks.md"
REFCONV = "ppcls_configs/imagenet/refconv"
#: (network, the plain network beside it, how many times as long it may take at most), exported for images of 224.
TARGETS = [
    ("SLaK_tiny", "ResNet50", 3.0),
    ("RepMLPNet_T224", "ResNet50", 1.0),
    ("RepMLPResNet50_light_224", "ResNet50", 1.0),
    ("RepMLPResNet50_bottleneck_224", "ResNet50", 1.3),
    ("ResNet50_DCD", "ResNet50", 1.25),
    ("MobileNetV2_x1_0_DCD", "MobileNetV2", 1.6),
    ("ResNet50_SPConv", "ResNet50", 0.85),
    (f"{REFCONV}/ResNet50_RefConv.yaml", "ResNet50", 1.02),
    (f"{REFCONV}/MobileNetV3_large_x1_0_RefConv.yaml", "MobileNetV3_large_x1_0", 1.02),
]
INTRODUCTION = """\
# Benchmarks

Written by `python tools/benchmark.py table`; do not edit. Every network was fused, exported for images of 224 pixels,
compared with its train form, and run by Paddle Inference with oneDNN; all of them in turns in one process, each beside
its plain network, whose BNs were folded and which was exported in the same way. A ratio is the median of the network
over the median of the plain one. "By operations" is the ratio of their multiply-adds: what the network would take if
its operations ran as fast as the plain network's. Weights are random: speed does not depend on them.

"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for wrong usage, 1 where a network fails or a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    infer = commands.add_parser("infer", help="exported networks, in turns")
    infer.add_argument(
        "target", nargs="+",
        help="a network's name, a config (.yaml), or an exported folder; ratios are to the first",
    )  # fmt: skip
    infer.add_argument(
        "--form", nargs="+", choices=("train form", "fused"), default=["fused"], help="of names and configs"
    )
    infer.add_argument("--size", type=positive, default=224, help="side of the images, for names")
    infer.add_argument("--batch", type=positive, nargs="+", default=[1])
    infer.add_argument("--runtime", nargs="+", choices=sorted(benchmark.RUNTIMES), default=["onednn"])
    sweep = commands.add_parser("sweep", help="one network as its work grows")
    sweep.add_argument("target", help="a network's name")
    sweep.add_argument("--of", choices=("size", "batch", "kernel_size"), required=True, help="what grows")
    sweep.add_argument("--values", type=positive, nargs="+", required=True)
    sweep.add_argument("--size", type=positive, default=224, help="side of the images, where it does not grow")
    table = commands.add_parser("table", help="the networks of docs/benchmarks.md, which it writes")
    for command in (infer, sweep, table):
        command.add_argument("--threads", type=positive, default=2)
        command.add_argument("--rounds", type=positive, default=30)
    for command in (infer, sweep):
        command.add_argument("--output", help="a JSON file to write")
        command.add_argument("--chart", help="a PNG file to draw")
    add_step(commands)
    given = parser.parse_args(arguments)
    try:
        if given.command == "step":
            return run_step(given)
        setup().utils.logger.init_logger(log_level="WARNING")
        return {"infer": run_infer, "sweep": run_sweep, "table": run_table}[given.command](given)
    except (ReparamError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ConfigError, UnknownName)) else 1


def contenders_of(
    target: str, folder: Path, size: int, forms: Sequence[str] = ("fused",), onnx: bool = False, **options: Any
) -> Iterator[Contender]:
    """Yield what is to be timed of a target: an exported folder as it is, or the forms of a network, exported."""
    from paddle_reparam.ppcls.arch import get_builder
    from paddle_reparam.ppcls.command import read_config
    from paddle_reparam.ppcls.reparam import build_train_form

    path, shape = Path(target), (3, size, size)
    if path.is_dir():
        manifest = path / MANIFEST
        if manifest.is_file():
            [[_, *shape]] = json.loads(manifest.read_text(encoding="utf-8"))["input"]["shape"]
        yield Contender(path.name, "exported", path, tuple(shape))
        return
    with paddle.utils.unique_name.guard():
        if path.suffix == ".yaml":
            name, model = path.stem, build_train_form(read_config(target))
        else:
            name, model = target, get_builder(target)(**options)
    yield from benchmark.prepare(name, model, folder, shape, forms, onnx)


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


def run_table(given: argparse.Namespace) -> int:
    """Time the networks of docs/benchmarks.md beside their plain ones and write it; 1 where a target is missed."""
    names = list(dict.fromkeys([*(plain for _, plain, _ in TARGETS), *(target for target, _, _ in TARGETS)]))
    with tempfile.TemporaryDirectory() as folder:
        contenders = []
        for name in tqdm(names, unit=" networks"):
            contenders += contenders_of(name if "/" not in name else str(ROOT / name), Path(folder), 224)
        report = benchmark.run(contenders, (1, 8), ["onednn"], given.threads, given.rounds, seconds=600.0)
    atomic_write(MEASURED, lambda path: path.write_text(report.to_json() + "\n", encoding="utf-8"))
    measured = json.loads(report.to_json())
    atomic_write(TABLE, lambda path: path.write_text(page_of(measured), encoding="utf-8"))
    missed = [row.network for row in rows_of(measured) if row.ratio > row.most]
    print(report, f"written: {TABLE.relative_to(ROOT)}", *(f"missed: {name}" for name in missed), sep="\n")
    return int(bool(missed))


def _finish(report: InferenceReport, given: argparse.Namespace, draw: Callable[[InferenceReport], Figure]) -> int:
    print(report)
    if given.output:
        atomic_write(Path(given.output), lambda path: path.write_text(report.to_json() + "\n", encoding="utf-8"))
        print(f"written: {given.output}")
    if given.chart:
        atomic_write(Path(given.chart), lambda path: draw(report).savefig(path, dpi=110, format="png"))
        print(f"written: {given.chart}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# docs/benchmarks.md


@dataclass
class Row:
    """A network beside its plain one: ratios at batch 1 and 8, what was asked for, and the ratio of multiply-adds."""

    network: str
    plain: str
    most: float
    ratio: float
    ratio_of_eight: float
    by_operations: float
    milliseconds: str


def rows_of(measured: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the table from what a run wrote."""
    macs = {each["name"]: each["macs"] for each in measured["contenders"]}
    times = {(each["name"], each["batch"]): each for each in measured["results"]}

    def ratio(name: str, plain: str, batch: int) -> float:
        return times[name, batch]["median"] / times[plain, batch]["median"]

    rows = []
    for target, plain, most in TARGETS:
        name = Path(target).stem
        one = times[name, 1]
        rows.append(
            Row(name, plain, most, ratio(name, plain, 1), ratio(name, plain, 8), macs[name] / macs[plain],
                f"{one['median']:.1f} ({one['low']:.1f} to {one['high']:.1f})")
        )  # fmt: skip
    return rows


def page_of(measured: Mapping[str, Any]) -> str:
    """Return docs/benchmarks.md for what a run wrote."""
    machine, settings = measured["machine"], measured["settings"]
    facts = [f"{settings['threads']} threads", f"at most {settings['rounds']} rounds"]
    facts += [f"{key}: {value}" for key, value in machine.items()]
    header = ["network", "plain network", "ratio", "asked for", "ratio, batch 8", "by operations", "ms (quartiles)"]
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for row in rows_of(measured):
        lines.append(
            f"| {row.network} | {row.plain} | {row.ratio:.3f} | {row.most:.2f} | {row.ratio_of_eight:.3f} | "
            f"{row.by_operations:.2f} | {row.milliseconds} |"
        )
    plain = [r for r in measured["results"] if r["batch"] == 1 and r["name"] in {p for _, p, _ in TARGETS}]
    lines += ["", "The plain networks, batch 1: "]
    lines[-1] += ", ".join(f"{r['name']} {r['median']:.1f} ms ({r['low']:.1f} to {r['high']:.1f})" for r in plain) + "."
    return f"{INTRODUCTION}{'; '.join(facts)}.\n\n" + "\n".join(lines) + "\n"


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
