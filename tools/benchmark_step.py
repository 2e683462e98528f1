"""Time training steps in turns, and put what was measured into the documentation: `tools/benchmark.py step`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paddle_reparam import create_model, list_models, replace
from paddle_reparam.files import atomic_write
from paddle_reparam.layers.toeplitz import DepthwiseConv2D, formulation, product_pays
from paddle_reparam.measure import timing
from paddle_reparam.measure.memory import own_peak
from paddle_reparam.measure.processors import MKL_CODE, let_amd_multiply_fast
from paddle_reparam.measure.timing import in_new_process
from paddle_reparam.report import format_table
from paddle_reparam.training.sparsity import SparseTraining, add_masks

import paddle  # isort: skip - paddle_reparam quiets it
import paddle.nn.functional as F  # isort: skip
from paddle.vision import models  # isort: skip

DOCS = Path(__file__).resolve().parents[1] / "docs"
#: A page shows `measured/<name>.json` between these lines.
BEGIN, END = "<!-- measured/{}.json -->", "<!-- end -->"

VARIANTS = {
    "plain": "the network as it is",
    "native": "Paddle's own convolutions only, no matrix products in their place",
    "sparse": "with masks: --density, --update-frequency",
    "replaced": "with --layer in the place of its convolutions",
}
#: What `--kernels` measures: heights and widths of kernels, sides and channels of maps as in the stages of a network.
KERNELS = ((3, 3), (5, 5), (7, 7), (9, 9), (13, 13), (31, 31), (51, 5), (5, 51))
MAPS = {7: 768, 14: 384, 28: 192, 56: 96, 112: 48}
COLUMNS = ["variant", "step, s", "quartiles", "times the first", "peak memory, GB"]


def add_step(commands: Any) -> None:
    """Add the subcommand to those of a parser."""
    parser = commands.add_parser("step", help="training steps, in turns: forward, backward, AdamW's update")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a network of this library, or of paddle.vision.models")
    what.add_argument(
        "--kernels", action="store_true",
        help="depthwise convolutions alone, as Paddle's own and as matrix products, with several kernels and maps",
    )  # fmt: skip
    what.add_argument("--pages", action="store_true", help="only write the tables of docs/ anew from docs/measured/")
    parser.add_argument("--size", type=positive, default=224, help="side of the images (default 224)")
    parser.add_argument("--batch", type=positive, default=2, help="images in a step (default 2)")
    parser.add_argument("--threads", type=positive, default=1, help="threads of Paddle's kernels (default 1)")
    parser.add_argument("--rounds", type=positive, default=5, help="timed rounds, 5 or more, after one that is not")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["native", "plain"],
        help="what to compare with the first one; " + "; ".join(f"{name}: {what}" for name, what in VARIANTS.items()),
    )  # fmt: skip
    parser.add_argument("--layer", help="the layer of the variant `replaced`")
    parser.add_argument("--density", type=float, default=0.6, help="share of the weights of `sparse` that are not zero")
    parser.add_argument("--update-frequency", type=positive, default=100, help="steps of `sparse` for each mask update")
    parser.add_argument("--output", help="the JSON file to write")


def positive(text: str) -> int:
    """Return what an option says that takes 1 or more; raises `ValueError`."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def run_step(given: argparse.Namespace) -> int:
    """Measure, print the table and write the file; return the exit code, 2 where arguments do not fit each other."""
    if given.pages:
        print("\n".join(write_pages(DOCS)))
        return 0
    if ("replaced" in given.variants) != bool(given.layer):
        print("error: --layer and the variant `replaced` go together", file=sys.stderr)
        return 2
    # Paddle reads how many threads it may use when it is imported: a process of its own imports it anew.
    let_amd_multiply_fast()
    os.environ.update(OMP_NUM_THREADS=str(given.threads), FLAGS_paddle_num_threads=str(given.threads))
    result = {"command": command_of(given), **in_new_process(measure_kernels if given.kernels else measure, given)}
    for name, each in result.get("variants", {}).items():
        each["peak memory, GB"] = in_new_process(memory_of_two_steps, given, name)
    print(show(result))
    if given.output:
        text = json.dumps(result, indent=2) + "\n"
        atomic_write(given.output, lambda path: path.write_text(text, encoding="utf-8"))
    return 0


def command_of(given: argparse.Namespace) -> str:
    """Return the command that measures the same."""
    words = ["python tools/benchmark.py step"]
    if given.kernels:
        words, names = [*words, "--kernels"], ["batch", "threads", "rounds"]
    else:
        names = ["model", "size", "batch", "threads", "rounds", "variants"]
        names += ["layer"] if given.layer else []
        names += ["density", "update_frequency"] if "sparse" in given.variants else []
    for name in [*names, "output"] if given.output else names:
        value = getattr(given, name)
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@dataclass
class Step:
    """One variant, ready to be trained: `run` does a step, `update` moves the masks where there are any."""

    run: Callable[[], None]
    update: Callable[[], None] | None = None


def make_step(given: argparse.Namespace, variant: str) -> Step:
    """Build a variant's network and optimizer."""
    model = build_model(given.model)
    if variant == "replaced":
        replace(model, given.layer)
    model.train()
    images, labels = paddle.randn([given.batch, 3, given.size, given.size]), paddle.arange(given.batch) % 10
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=model.parameters())

    def step() -> None:
        with formulation("native" if variant == "native" else "auto"):
            F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.clear_grad()

    if variant != "sparse":
        return Step(step)
    add_masks(model, given.density)
    never = 1 << 40
    return Step(step, SparseTraining(model, optimizer, never, update_frequency=never).update_masks)


def build_model(name: str) -> Any:
    """Return a network of this library or of paddle.vision.models, with random weights."""
    paddle.seed(0)
    if name not in list_models() and name in models.__all__:
        return getattr(models, name)()
    return create_model(name)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Time the steps of all variants in turns; ratios are to the first one.

    A mask update is timed on its own, and its share of `update_frequency` steps is added to a sparse step.
    """
    facts = facts_of(given)
    steps = {name: make_step(given, name) for name in given.variants}
    timings = timing.alternate({name: step.run for name, step in steps.items()}, given.rounds, warm_up=1)
    variants = {name: asdict(each) for name, each in timings.items()}
    for name, step in steps.items():
        if step.update:
            update = timing.alternate({name: step.update}, timing.FEWEST_ROUNDS, warm_up=1)[name].median
            for key in ("median", "low", "high"):
                variants[name][key] += update / given.update_frequency
            variants[name]["mask update"] = update
    del steps
    for each in variants.values():
        each["ratio"] = each["median"] / variants[given.variants[0]]["median"]
    return {**facts, "variants": variants}


def facts_of(given: argparse.Namespace) -> dict[str, Any]:
    """Return what a result was measured on and with."""
    machine = {**timing.machine_facts(), "device": paddle.get_device(), "load": round(os.getloadavg()[0], 1)}
    machine[MKL_CODE] = os.environ.get(MKL_CODE)
    return {"machine": machine, "settings": {"rounds": given.rounds, "threads": given.threads}}


def measure_kernels(given: argparse.Namespace) -> dict[str, Any]:
    """Time each kernel on each map, forward and backward, in both formulations in turns.

    `kernels` holds, for each kernel and map, the median of the native convolution over that of the product, and whether
    `product_pays`.
    """
    facts, kernels = facts_of(given), {}
    for height, width in KERNELS:
        row = kernels[f"{height}x{width}"] = {}
        for side, channels in MAPS.items():
            padding = [height // 2, width // 2]
            conv = DepthwiseConv2D(channels, channels, [height, width], padding=padding, groups=channels)
            x = paddle.randn([given.batch, channels, side, side])
            x.stop_gradient = False

            def run(name: str, conv: DepthwiseConv2D = conv, x: paddle.Tensor = x) -> None:
                with formulation(name):
                    conv(x).sum().backward()

            names = ("native", "product")
            timings = timing.alternate({n: lambda n=n: run(n) for n in names}, given.rounds, warm_up=1)
            ratio = timings["native"].median / timings["product"].median
            row[str(side)] = {
                "ratio": ratio,
                "pays": product_pays((height, width), x.shape, facts["machine"]["device"]),
            }
    return {**facts, "kernels": kernels}


def memory_of_two_steps(given: argparse.Namespace, variant: str) -> float:
    """Train for two steps and return the most memory, in GB, that this process ever had."""
    step = make_step(given, variant)
    for _ in range(2):
        step.run()
    return own_peak() / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def columns_of(result: dict[str, Any]) -> list[str]:
    """Return the heads of the table that shows a result."""
    if "kernels" not in result:
        return COLUMNS
    [sides, *_] = result["kernels"].values()
    return ["kernel", *(f"{side}x{side}" for side in sides)]


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """Return a row for each variant, or for each kernel, with a star where the rule chooses the product."""
    if "kernels" in result:
        return [
            [kernel, *(f"{each['ratio']:.1f}{' *' if each['pays'] else ''}" for each in row.values())]
            for kernel, row in result["kernels"].items()
        ]
    return [
        [name, f"{each['median']:.3f}", f"{each['low']:.3f} to {each['high']:.3f}", f"{each['ratio']:.3f}",
         f"{each['peak memory, GB']:.2f}"]
        for name, each in result["variants"].items()
    ]  # fmt: skip


def conditions(result: dict[str, Any]) -> str:
    """Return what a result was measured on and with, as a sentence."""
    facts, settings = result["machine"], result["settings"]
    mkl = facts[MKL_CODE]
    return (
        f"{settings['rounds']} rounds, threads: {settings['threads']}, on {facts['processor']} with {facts['cores']} "
        f"cores (load before: {facts['load']}), Paddle {facts['paddle']} on {facts['device']}, "
        + (f"{MKL_CODE}={mkl}." if mkl else f"no {MKL_CODE}.")
    )


def show(result: dict[str, Any]) -> str:
    """Return a result as plain text."""
    return f"{format_table(columns_of(result), rows_of(result))}\n\n{conditions(result)}"


def to_markdown(result: dict[str, Any]) -> str:
    """Return a result as a table for a page, with the command that wrote it."""
    columns = columns_of(result)
    lines = [columns, ["---"] * len(columns), *rows_of(result)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"`{result['command']}`\n\n{table}\n\n{conditions(result)}"


def write_pages(folder: Path) -> list[str]:
    """Write every table of a folder's pages anew; return the pages that have any."""
    found = []
    for page in sorted(folder.glob("*.md")):
        old = new = page.read_text(encoding="utf-8")
        for file in sorted((folder / "measured").glob("step_*.json")):
            before, begin, rest = new.partition(BEGIN.format(file.stem))
            if begin:
                table = to_markdown(json.loads(file.read_text(encoding="utf-8")))
                new = f"{before}{begin}\n{table}\n{END}{rest.partition(END)[2]}"
                found.append(page.name)
        if new != old:
            atomic_write(page, lambda path, new=new: path.write_text(new, encoding="utf-8"))
    return sorted(set(found))
