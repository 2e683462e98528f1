"""Measure how fast networks are: exported, by profile, as work grows, in every runtime and precision, and in training.

What is compared is timed in one run and in turns, so that every form meets the same machine; ratios are to the first.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam.deploy.runtimes import RUNTIMES, SERVING, get_runtime
from paddle_reparam.deploy.runtimes.onnx_runtime import ONNX_FILE
from paddle_reparam.errors import exit_code
from paddle_reparam.files import atomic_write
from paddle_reparam.measure import benchmark, charts, steps, ways
from paddle_reparam.measure.benchmark import Contender
from paddle_reparam.measure.sweeps import GROWS
from paddle_reparam.measure.timing import FEWEST_ROUNDS
from paddle_reparam.ppcls import contenders, setup
from paddle_reparam.ppcls.errors import ConfigError
from paddle_reparam.report import Report


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for wrong usage, 1 where a network fails."""
    given = parser_of().parse_args(arguments)
    given.command_line = shlex.join(
        ["python", "tools/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)]
    )
    with exit_code() as result:
        check(given)
        report = given.run(given)
        print(report)
        write(report, given)
    return result[0]


def parser_of() -> argparse.ArgumentParser:
    """Return what reads the command line; `run` is the function that measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    infer = commands.add_parser("infer", help="exported networks, in turns")
    profile = commands.add_parser("profile", help="where the time of exported networks goes, by oneDNN's own log")
    sweep = commands.add_parser("sweep", help="exported networks as their work grows")
    table = commands.add_parser("table", help="networks in every runtime, precision and form, beside an earlier export")
    step = commands.add_parser("step", help="training steps, in turns: forward, backward, AdamW's update")
    for command, run, threads, rounds in (
        (infer, run_infer, 2, 30), (profile, run_profile, 2, 30), (sweep, run_sweep, 2, 30), (table, run_table, 2, 30),
        (step, run_step, 1, 5),
    ):  # fmt: skip
        command.set_defaults(run=run)
        command.add_argument("--threads", type=positive, default=threads, help=f"of Paddle's kernels ({threads})")
        command.add_argument("--rounds", type=enough_rounds, default=rounds, help=f"{FEWEST_ROUNDS} or more ({rounds})")
        command.add_argument("--output", help="a JSON file to write")
    for command in (infer, sweep):
        command.add_argument("--chart", help="a PNG file to draw")
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
    for command, batches, runtimes in ((infer, [1], ["onednn"]), (table, [1, 8], None)):
        command.add_argument("--batch", type=positive, nargs="+", default=batches)
        command.add_argument(
            "--runtime", nargs="+", choices=[each.name for each in RUNTIMES], default=runtimes,
            help="; ".join(f"{each.name}: {each.title}" for each in RUNTIMES),
        )  # fmt: skip
    profile.add_argument("--batch", type=positive, default=1)
    sweep.add_argument(
        "target", nargs="+", help="a network's name; where the kernel size grows, that of a depthwise layer or a SLaK"
    )
    sweep.add_argument("--of", choices=sorted(GROWS), required=True, help="what grows")
    sweep.add_argument("--values", type=positive, nargs="+", required=True)
    sweep.add_argument("--size", type=positive, default=224, help="side of the images, or maps, where it does not grow")
    sweep.add_argument("--channels", type=positive, default=124, help="of the maps of a layer")
    add_table_arguments(table)
    add_step_arguments(step)
    return parser


def add_table_arguments(table: argparse.ArgumentParser) -> None:
    """Add what only `table` takes."""
    table.add_argument(
        "target", nargs="*", default=list(ways.NETWORKS), help="names or configs (.yaml); those of the page unless told"
    )
    table.add_argument(
        "--baseline", type=Path, default=ways.baseline_folder(), metavar="FOLDER",
        help="what the ratios are to: a sub-folder a network, each an export that Paddle Inference runs in float32. "
        f"docs/make/baseline_exports.py writes those of commit {ways.BASELINE[:7]} (%(default)s)",
    )  # fmt: skip
    table.add_argument("--size", type=positive, default=224, help="side of the images, as of the exports (224)")
    table.add_argument("--seconds", type=positive, default=60, help="that timing a network takes, loading aside (60)")


def add_step_arguments(step: argparse.ArgumentParser) -> None:
    """Add what only `step` takes."""
    what = step.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a network of this library, or of paddle.vision.models")
    what.add_argument(
        "--kernels", action="store_true",
        help="depthwise convolutions alone, as Paddle's own and as matrix products, with several kernels and maps",
    )  # fmt: skip
    what.add_argument(
        "--layers", action="store_true",
        help="layers in the place of the convolutions of ResNet18 and MobileNetV2, beside the plain networks",
    )  # fmt: skip
    step.add_argument("--size", type=positive, default=224, help="side of the images (224)")
    step.add_argument("--batch", type=positive, default=2, help="images in a step (2)")
    step.add_argument(
        "--variants", nargs="+", choices=steps.VARIANTS, default=["native", "plain"],
        help="; ".join(f"{name}: {what}" for name, what in steps.VARIANTS.items()),
    )  # fmt: skip
    step.add_argument("--layer", help="that of the variants `replaced` and `replaced_native`")
    step.add_argument("--density", type=float, default=0.6, help="of `sparse`: the share of weights that are not zero")
    step.add_argument("--update-frequency", type=positive, default=100, help="of `sparse`: steps for each mask update")


def positive(text: str) -> int:
    """Return what an option says that takes 1 or more; raises `ValueError`."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


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
    for runtime in getattr(given, "runtime", None) or []:
        with contenders.as_wrong_usage(f"--runtime {runtime}"):
            get_runtime(runtime).require()


def run_infer(given: argparse.Namespace) -> Report:
    """Time the targets, each in its forms."""
    with tempfile.TemporaryDirectory() as folder:
        exported = prepare(given, folder, onnx=any(get_runtime(name).file_name == ONNX_FILE for name in given.runtime))
        return benchmark.run(exported, given.batch, given.runtime, given.threads, given.rounds)


def run_profile(given: argparse.Namespace) -> Report:
    """Return where the time of the targets goes, and how fast they would be at the first one's rate."""
    with tempfile.TemporaryDirectory() as folder:
        return benchmark.profile_all(prepare(given, folder), given.batch, given.threads, given.rounds)


def prepare(given: argparse.Namespace, folder: str, onnx: bool = False) -> list[Contender]:
    """Export the targets, each in its forms, under a folder."""
    quiet()
    shape = contenders.images_of(given.target, given.size)
    return [
        each
        for target in given.target
        for each in contenders.contenders_of(target, Path(folder), shape, given.form, onnx)
    ]


def run_sweep(given: argparse.Namespace) -> Report:
    """Time the targets, fused, with growing work."""
    quiet()
    return contenders.sweep(
        given.target, given.of, given.values, given.size, given.channels, given.threads, given.rounds
    )


def run_table(given: argparse.Namespace) -> Report:
    """Time the targets in every way; those that `--output` holds of a run like this one are left as they are."""
    quiet()
    settings = {key: getattr(given, key) for key in ("threads", "rounds", "seconds", "size")}
    output = Path(given.output) if given.output else None
    runtimes = given.runtime or [each.name for each in SERVING]
    report = ways.begin({**settings, "batches": given.batch}, runtimes, given.command_line, output)
    contenders.time_networks(given.target, given.baseline, report, runtimes, lambda part: write(part, given))
    return report


def run_step(given: argparse.Namespace) -> Report:
    """Time training steps of one network or of several layers, or the kernels of depthwise convolutions."""
    if given.kernels:
        report = steps.measure_kernels(given.batch, given.threads, given.rounds)
    elif given.layers:
        report = steps.measure_layers(given.threads, given.rounds)
    else:
        settings = steps.StepSettings(
            given.model, given.size, given.batch, given.threads, given.rounds, given.variants, given.layer,
            given.density, given.update_frequency,
        )  # fmt: skip
        report = steps.measure_steps(settings)
    report.command = given.command_line
    return report


def quiet() -> None:
    """Make PaddleClas' networks known, and its log no longer than its warnings."""
    setup().utils.logger.init_logger(log_level="WARNING")


def write(report: Report, given: argparse.Namespace) -> None:
    """Write the files that were asked for."""
    if given.output:
        text = report.to_json() + "\n"
        atomic_write(Path(given.output), lambda path: path.write_text(text, encoding="utf-8"))
        print(f"written: {given.output}")
    if getattr(given, "chart", None):
        figure = charts.draw_bars(report) if given.command == "infer" else charts.draw_curves([report.to_dict()])
        atomic_write(Path(given.chart), lambda path: figure.savefig(path, dpi=110, format="png"))
        print(f"written: {given.chart}")


if __name__ == "__main__":
    sys.exit(main())
