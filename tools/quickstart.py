"""From scanned digits to a checked, exported network in minutes on a CPU, with the commands that a user would type."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam import InferenceModel
from paddle_reparam.deploy.export import export_inference
from paddle_reparam.deploy.outputs import OutputSpec
from paddle_reparam.errors import ReparamError, exit_code
from paddle_reparam.measure.timing import alternate
from paddle_reparam.ppcls.images import Images, read_validation_images
from paddle_reparam.report import format_table
from paddle_reparam.style import BLUE, GREY, ORANGE, plain_axes
from paddle_reparam.surgery.flops import measure
from paddle_reparam.surgery.rewrite import reparameterize
from paddle_reparam.weights import checkpoints

import paddle  # isort: skip - paddle_reparam quiets it

ROOT = Path(__file__).resolve().parents[1]
BASELINE_CONFIG = "ppcls_configs/digits/refconv/PPLCNet_x0_25.yaml"
REFCONV_CONFIG = "ppcls_configs/digits/refconv/PPLCNet_x0_25_RefConv.yaml"
#: What a run makes in its output folder, and the next run replaces.
OWN = ("data", "baseline", "refconv", "exported", "logs", "result.txt", "quickstart.png")


class StageFailed(ReparamError):
    """A stage of the quick start that did not do what it promises."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the quick start and return its exit code: 1 with one sentence where a stage fails, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, help="epochs of both trainings; without it those of the configs")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "quickstart", help="folder for all results")
    given = parser.parse_args(arguments)
    if given.epochs is not None and given.epochs < 1:
        parser.error(f"--epochs is {given.epochs}; it is 1 or more")
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with exit_code() as result:
            run(given.output.resolve(), given.epochs)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return result[0]


def run(output: Path, epochs: int | None = None) -> None:
    """Do everything, into `output`; raises `StageFailed` or `ReparamError` for the first thing that goes wrong."""
    started = time.perf_counter()
    clear(output)
    data, baseline, refconv, exported = (output / name for name in OWN[:4])
    common = [f"DataLoader.{mode}.dataset.{key}={shown(data)}/{name}"
              for mode, labels in (("Train", "train_list.txt"), ("Eval", "val_list.txt"))
              for key, name in (("image_root", ""), ("cls_label_path", labels))]  # fmt: skip
    common += [] if epochs is None else [f"Global.epochs={epochs}"]

    numbers = itertools.count(1)

    def stage(title: str, script: str, *arguments: str) -> None:
        number = next(numbers)
        command = [sys.executable, f"tools/{script}.py", *arguments]
        print(f"\n[{number}/6] {title}\n$ {as_typed(command)}", flush=True)
        run_command(command, title, output / "logs" / f"{number}-{script}.log")

    stage("Write scikit-learn's scanned digits as PNG files", "prepare_data", "digits", "--output", shown(data))
    into = f"Global.output_dir={shown(baseline)}"
    stage("Train a small plain network, the baseline", "train", "-c", BASELINE_CONFIG, *overrides(into, *common))
    weights = last_epoch(baseline)
    into, start = f"Global.output_dir={shown(refconv)}", f"Arch.pretrained={shown(weights)}"
    stage("Refocus it: RefConv in the place of its convolutions, from those weights", "train", "-c", REFCONV_CONFIG,
          *overrides(into, start, *common))  # fmt: skip
    refocused = last_epoch(refconv)
    stage("Fuse it into plain convolutions, export it, check every step", "reparam", "-c", REFCONV_CONFIG,
          "--weights", shown(refocused), "--output", shown(exported))  # fmt: skip

    print("\n[5/6] Run the exported network on every validation image and compare it with the trained one", flush=True)
    absolute = [value.replace(f"={shown(data)}", f"={data}") for value in common]
    images = read_images(str(ROOT / BASELINE_CONFIG), absolute)
    rows, probabilities = compare(images, absolute, weights, refocused, exported)
    print(f"the same class for all {len(images.labels)} images")
    table = format_results(rows)
    (output / "result.txt").write_text(f"{table}\n")

    print("\n[6/6] Draw what happened", flush=True)
    picture = output / "quickstart.png"
    draw(picture, {"baseline": read_curve(baseline), "RefConv": read_curve(refconv)}, images, probabilities)
    print(f"{shown(picture)}\n\n{table}\n\n{explain(len(images.labels))}")
    print(f"\nDone in {time.perf_counter() - started:.0f} s; all of it is in {shown(output)}. Next:\n")
    following = [
        ["make visualdl", "both trainings, curve by curve"],
        [f"less {shown(exported / 'manifest.json')}", "what was exported and how it was checked"],
        [f"{shown(Path(sys.executable))} tools/prepare_data.py folder --root dataset/own_photos",
         "own photos, in dataset/own_photos/<class>: the first of README's five commands"],
    ]  # fmt: skip
    width = max(len(command) for command, _ in following)
    print("\n".join(f"  {command:{width}}  # {why}" for command, why in following))


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def clear(output: Path) -> None:
    """Remove what an earlier run made in `output`, and nothing else."""
    for path in (output / name for name in OWN):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (output / "logs").mkdir(parents=True)


def shown(path: Path) -> str:
    """Return a path as it is typed in the project's folder, which is where the commands run."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def overrides(*values: str) -> list[str]:
    """Return the options that replace values of a config."""
    return [part for value in values for part in ("-o", value)]


def as_typed(command: Sequence[str]) -> str:
    """Return a command for a shell; a long one has each option on a line of its own."""
    line = shlex.join([shown(Path(command[0])), *command[1:]])
    return re.sub(" (-o|--[a-z]+) ", r" \\\n    \1 ", line) if len(line) > 110 else line


def run_command(command: Sequence[str], title: str, log: Path) -> None:
    """Run a command in the project's folder with one progress line, its output in `log`; none of its processes stays.

    Raises `StageFailed` with its own sentence, or the last line that it printed, where it fails.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, errors="replace", start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    reason, is_sentence = "it printed nothing", False
    interval = 0.1 if sys.stderr.isatty() else 10
    form = "{percentage:3.0f}% |{bar:30}| {elapsed} so far, {remaining} to go{postfix}"
    try:
        with log.open("w") as file, tqdm(total=100, bar_format=form, mininterval=interval, miniters=0) as bar:
            for line in process.stdout:
                file.write(line)
                if line.startswith("error: ") or (line.strip() and not is_sentence):
                    reason, is_sentence = line.strip(), line.startswith("error: ")
                progress = read_progress(line)
                if progress.share is not None:
                    bar.update(100 * progress.share - bar.n)
                if progress.note:
                    bar.set_postfix_str(progress.note, refresh=False)
            code = process.wait()
            if code == 0:
                bar.update(100 - bar.n)
    finally:
        end(process)
    if code != 0:
        raise StageFailed(f"{title!r} failed with exit code {code}: {reason}; its whole output is in {shown(log)}")


def end(process: subprocess.Popen) -> None:
    """End a command and every process that it started."""
    for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            break
    process.stdout.close()


@dataclass
class Progress:
    """What a line of output says: the share of the work that is done (None: nothing), and a note."""

    share: float | None = None
    note: str = ""


def read_progress(line: str) -> Progress:
    """Read the lines with which PaddleClas' training and `tools/reparam.py` tell how far they are."""
    if found := re.search(r"\[Train\]\[Epoch (\d+)/(\d+)\]\[Iter: (\d+)/(\d+)\]", line):
        epoch, epochs, iteration, iterations = map(int, found.groups())
        return Progress(min(1.0, ((epoch - 1) + (iteration + 1) / iterations) / epochs))
    if found := re.search(r"\[Eval\]\[Epoch (\d+)\]\[Avg\].*?\btop1: ([\d.]+)", line):
        return Progress(note=f"epoch {found[1]}: validation top-1 {float(found[2]):.1%}")
    if found := re.match(r" *\d+\.\d s  (.+)", line):
        return Progress(STEPS.get(found[1]), found[1])
    return Progress()


#: Steps of tools/reparam.py -> share of its time that has passed when the step is done.
STEPS = {
    "load the weights": 0.1,
    "fuse": 0.25,
    "compare with the train form, layer by layer": 0.35,
    "fuse without folding BNs, for the plain weight file": 0.5,
    "export for Paddle Inference": 0.7,
    "compare with what was exported, in every runtime": 0.95,
    "write the probe and the manifest": 1.0,
}


def last_epoch(folder: Path) -> Path:
    """Return the weights after the last epoch; the best epoch would be chosen on the images it is measured on."""
    found = sorted(folder.rglob("latest.pdparams"))
    if len(found) != 1:
        raise StageFailed(f"the training left {len(found)} files latest.pdparams in {folder}, not one")
    return found[0]


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


@dataclass
class Row:
    """One form of the network: top-1 as a share, parameters, bytes of its export, median milliseconds an image, and
    the largest difference of a probability from the train form."""

    name: str
    top1: float
    parameters: int
    size: int
    milliseconds: float
    difference: float | None


def read_images(config: str, changes: Sequence[str]) -> Images:
    """Return the validation images of a config, read and transformed by PaddleClas."""
    return read_validation_images(_read_config(config, changes))


def _read_config(config: str, changes: Sequence[str]) -> dict[str, Any]:
    from paddle_reparam.ppcls import setup

    setup().utils.logger.init_logger(log_level="WARNING")
    from paddle_reparam.ppcls.command import read_config

    return read_config(config, changes)


def compare(
    images: Images, changes: Sequence[str], baseline: Path, refocused: Path, exported: Path
) -> tuple[list[Row], np.ndarray]:
    """Return the rows of the table, and the probabilities `[N, classes]` that the exported network gives.

    All three forms are timed as exports, in one run. Raises `StageFailed` where the exported network and the trained
    one, run without any fusing, do not give the same class for every image.
    """
    from paddle_reparam.ppcls.reparam import build_train_form

    spec = [[None, *images.pixels.shape[1:]]]
    networks, sizes, exports = {}, {}, {}
    for name, config, weights in (("baseline", BASELINE_CONFIG, baseline), ("refconv", REFCONV_CONFIG, refocused)):
        networks[name] = build_train_form(_read_config(str(ROOT / config), changes))
        checkpoints.load_into(networks[name], weights)
    fused, _ = reparameterize(networks["baseline"], fold_bn=True, input_spec=spec)
    sizes["baseline"], sizes["refconv"] = measure(fused, spec).parameters, measure(networks["refconv"], spec).parameters
    for name, network in (("baseline", fused), ("refconv", networks["refconv"])):
        exports[name] = refocused.parent / f"export_of_{name}"
        export_inference(network, exports[name], spec, OutputSpec("softmax"))
    exports["exported"] = exported
    manifest = json.loads((exported / "manifest.json").read_text())
    fused_size = manifest["size"]["fused"]
    sizes["exported"] = fused_size["trainable_parameters"] + fused_size["frozen_parameters"]

    predictors = {name: InferenceModel(folder) for name, folder in exports.items()}
    probabilities = {name: predict(network, images.pixels) for name, network in networks.items()}
    probabilities["exported"] = in_batches(lambda x: predictors["exported"].run(x)[0], images.pixels)
    require_same_classes(probabilities["refconv"], probabilities["exported"], images.names)
    image = images.pixels[:1]
    timings = alternate({name: lambda p=predictor: p.run(image) for name, predictor in predictors.items()}, rounds=300)
    difference = float(np.abs(probabilities["exported"] - probabilities["refconv"]).max())
    rows = [
        Row(title, float((probabilities[name].argmax(1) == images.labels).mean()), sizes[name],
            sum(path.stat().st_size for path in exports[name].glob("inference.*")), 1000 * timings[name].median, apart)
        for name, title, apart in (
            ("baseline", "baseline", None),
            ("refconv", "RefConv, as trained", None),
            ("exported", "RefConv, fused and exported", difference),
        )
    ]  # fmt: skip
    return rows, probabilities["exported"]


def predict(network: paddle.nn.Layer, pixels: np.ndarray) -> np.ndarray:
    """Return the probabilities `[N, classes]` that a network gives in dygraph."""
    with paddle.no_grad():
        return in_batches(lambda x: paddle.nn.functional.softmax(network(paddle.to_tensor(x))).numpy(), pixels)


def in_batches(function: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, size: int = 64) -> np.ndarray:
    """Return what a function of `[n, C, H, W]` gives for all images."""
    return np.concatenate([function(pixels[i : i + size]) for i in range(0, len(pixels), size)])


def require_same_classes(trained: np.ndarray, exported: np.ndarray, names: Sequence[str]) -> None:
    """Raise `StageFailed` unless both `[N, classes]` have the same largest class for every image."""
    ours, theirs = exported.argmax(1), trained.argmax(1)
    different = np.flatnonzero((ours != theirs) | ~np.isfinite(exported).all(1) | ~np.isfinite(trained).all(1))
    if len(different):
        first = different[0]
        raise StageFailed(
            f"the exported network and the trained one differ on {len(different)} of {len(names)} images, first on "
            f"{names[first]}: exported {ours[first]}, trained {theirs[first]}"
        )


def format_results(rows: Sequence[Row]) -> str:
    """Return the table of the quick start."""
    header = ["network", "top-1", "parameters", "export, KiB", "ms an image", "max difference"]
    cells = [
        [row.name, f"{row.top1:.2%}", f"{row.parameters:,}", f"{row.size / 1024:,.0f}", f"{row.milliseconds:.2f}",
         "-" if row.difference is None else f"{row.difference:.0e}"]
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    aligned = [
        [line[0], *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))] for line in [header, *cells]
    ]
    return format_table(aligned[0], aligned[1:])


def explain(count: int) -> str:
    """Return what the columns of the table mean."""
    return (
        f"top-1: of {count} validation images; ms: median of one image at a time, all three in turns, in Paddle\n"
        "Inference on one thread; difference: of a probability, from the network as it was trained, without any fusing"
    )


# ---------------------------------------------------------------------------------------------------------------------
# The picture


@dataclass
class Curve:
    """What VisualDL recorded: (step, training loss) and (epoch, validation top-1)."""

    loss: list[tuple[int, float]]
    top1: list[tuple[int, float]]


def read_curve(folder: Path) -> Curve:
    """Read a training's VisualDL log back; raises `StageFailed` where there is none."""
    from visualdl import LogReader

    files = sorted(folder.rglob("vdlrecords.*.log"))
    if len(files) != 1:
        raise StageFailed(f"the training left {len(files)} VisualDL logs in {folder}, not one")
    reader = LogReader(file_path=str(files[0]))
    loss, top1 = ([(r.id, r.value) for r in reader.get_data("scalar", tag)] for tag in ("train_loss", "eval_acc"))
    return Curve(loss, top1)


def draw(path: Path, curves: dict[str, Curve], images: Images, probabilities: np.ndarray) -> None:
    """Write the picture: the curves of the trainings, one after the other, and digits with what the export says."""
    figure = Figure(figsize=(11, 7.6), facecolor="white", layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 0.8))
    above.suptitle("A plain network, then RefConv from its weights", x=0.01, ha="left", fontsize=14, weight="bold")
    loss, top1 = above.subplots(1, 2)
    begin = 0
    for (name, curve), color in zip(curves.items(), (BLUE, ORANGE)):
        epochs = max(step for step, _ in curve.top1)
        per_epoch = max(step for step, _ in curve.loss) / epochs
        for axes, points, scale, unit, marker in (
            (loss, curve.loss, 1 / per_epoch, 1, ""), (top1, curve.top1, 1, 100, "o")
        ):  # fmt: skip
            x, y = zip(*((begin + step * scale, value * unit) for step, value in points))
            axes.plot(x, y, marker, ls="-", color=color, label=name, lw=2, ms=4)
            if begin:
                axes.axvline(begin, color=GREY, lw=0.8, ls=":")
        begin += epochs
    for axes, title in ((loss, "training loss"), (top1, "validation top-1, %")):
        plain_axes(axes, title, x="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, loc="upper right" if axes is loss else "lower right")
    loss.set_ylim(0, None)
    _draw_digits(below, images, probabilities)
    figure.savefig(path, dpi=110)


def _draw_digits(figure: Any, images: Images, probabilities: np.ndarray) -> None:
    """Draw one image of each class, and below them those that the network gives the smallest probability."""
    figure.suptitle("What the exported network says", x=0.01, ha="left", fontsize=14, weight="bold")
    classes = np.unique(images.labels)
    of_truth = probabilities[np.arange(len(images.labels)), images.labels]
    rows = {
        "one of each": [int(np.flatnonzero(images.labels == label)[0]) for label in classes],
        "the hardest": np.argsort(of_truth)[: len(classes)].tolist(),
    }
    grid = figure.subplots(2, len(classes), squeeze=False)
    for axes_of_row, (title, chosen) in zip(grid, rows.items()):
        axes_of_row[0].set_ylabel(title, fontsize=11)
        for axes, index in zip(axes_of_row, chosen):
            said, truth = int(probabilities[index].argmax()), int(images.labels[index])
            axes.imshow(images.pixels[index].mean(axis=0), cmap="gray_r")
            right = said == truth
            axes.set_xlabel(f"{said}  ({probabilities[index].max():.0%})" + ("" if right else f"\nis a {truth}"),
                            color="#2d6a4f" if right else "#c1121f", weight="normal" if right else "bold")  # fmt: skip
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_color("#cccccc")


if __name__ == "__main__":
    sys.exit(main())
