"""How long a training step takes: forward, backward and AdamW's update, of variants of one network in turns."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.vision import models

from ..errors import UsageError
from ..layers.toeplitz import DepthwiseConv2D, formulation, product_pays
from ..registry import create_model, list_models
from ..report import Report, format_table
from ..surgery.rewrite import replace
from ..training.sparsity import SparseTraining, add_masks
from . import timing
from .memory import own_peak
from .processors import MKL_CODE, let_amd_multiply_fast
from .timing import in_new_process

#: Name -> what it is.
VARIANTS = {
    "plain": "the network as it is",
    "native": "Paddle's own convolutions only, no matrix products in their place",
    "sparse": "with masks of a density, updated now and then",
    "replaced": "with a layer in the place of its convolutions",
    "replaced_native": "with that layer by Paddle's own convolutions only, each branch on its own",
}
_REPLACED = {"replaced", "replaced_native"}
#: What is measured of layers: a network, the side of its images, how many are in a step, and the layer in it.
LAYERS = (
    *(("resnet18", 32, 64, layer) for layer in ("RefConv2D", "DBB2D", "ACB2D", "RepVGG2D", "MobileOne2D")),
    ("resnet18", 224, 8, "RefConv2D"), ("resnet18", 224, 8, "DBB2D"), ("mobilenet_v2", 224, 8, "RefConv2D"),
)  # fmt: skip
#: Layers that train by other convolutions than their branches are, which are measured as well.
_MERGED = {"DBB2D"}
#: What is measured of kernels: heights and widths, and sides and channels of maps as in the stages of a network.
KERNELS = ((3, 3), (5, 5), (7, 7), (9, 9), (13, 13), (31, 31), (51, 5), (5, 51))
MAPS = {7: 768, 14: 384, 28: 192, 56: 96, 112: 48}

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class StepSettings:
    """What is trained, and how: the name of a network of this library or of paddle.vision.models, the side of its
    images and how many are in a step, threads of Paddle's kernels, timed rounds, and variants (of `VARIANTS`).

    `layer` is that of the variants `replaced` and `replaced_native`; of `sparse`, `density` is the share of the weights
    that are not zero, and masks are updated after `update_frequency` steps.
    """

    model: str
    size: int = 224
    batch: int = 2
    threads: int = 1
    rounds: int = timing.FEWEST_ROUNDS
    variants: Sequence[str] = ("native", "plain")
    layer: str | None = None
    density: float = 0.6
    update_frequency: int = 100


@dataclass
class MeasuredReport(Report):
    """What was measured, on which machine and with which settings; `command` is one that measures the same."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    command: str = ""

    def columns(self) -> list[str]:
        """Return the heads of the table."""
        raise NotImplementedError

    def rows(self) -> list[list[str]]:
        """Return the rows of the table."""
        raise NotImplementedError

    def conditions(self) -> str:
        """Return what it was measured on and with, as a sentence."""
        mkl = self.machine[MKL_CODE]
        measured_on = timing.conditions(self.machine, self.settings["threads"])
        return f"{self.settings['rounds']} rounds, {measured_on}, " + (
            f"{MKL_CODE}={mkl}." if mkl else f"no {MKL_CODE}."
        )

    def __str__(self) -> str:
        return f"{format_table(self.columns(), self.rows())}\n\n{self.conditions()}"


@dataclass
class StepReport(MeasuredReport):
    """Steps of each variant: seconds (median and quartiles), the ratio to the first variant, and the most memory in GB
    that a process has in two of them."""

    variants: list[dict[str, Any]] = field(default_factory=list)

    def columns(self) -> list[str]:
        return ["variant", "step, s", "quartiles", "times the first", "peak memory, GB"]

    def rows(self) -> list[list[str]]:
        return [
            [each["name"], f"{each['median']:.3f}", f"{each['low']:.3f} to {each['high']:.3f}", f"{each['ratio']:.3f}",
             f"{each['peak_gb']:.2f}"]
            for each in self.variants
        ]  # fmt: skip


@dataclass
class KernelReport(MeasuredReport):
    """Depthwise kernels on maps: the median of Paddle's convolution over that of the product, and whether the layers'
    rule chooses the product, which the table shows by a star."""

    kernels: list[dict[str, Any]] = field(default_factory=list)

    def columns(self) -> list[str]:
        return ["kernel", *(f"{each['side']}x{each['side']}" for each in self.kernels[0]["maps"])]

    def rows(self) -> list[list[str]]:
        return [
            [row["kernel"], *(f"{each['ratio']:.1f}{' *' if each['pays'] else ''}" for each in row["maps"])]
            for row in self.kernels
        ]


@dataclass
class LayersReport(MeasuredReport):
    """Layers in the place of a network's convolutions larger than 1x1: their steps over the plain network's, with
    quartiles, and where branches are merged while they train the step with each branch on its own as well."""

    layers: list[dict[str, Any]] = field(default_factory=list)

    def columns(self) -> list[str]:
        return ["network", "images", "layer", "plain step, s", "step, x plain", "quartiles", "each branch alone"]

    def rows(self) -> list[list[str]]:
        found = []
        for each in self.layers:
            plain, layer, *alone = each["variants"]
            quartiles = [layer[key] / plain["median"] for key in ("low", "high")]
            found.append([
                each["model"], f"{each['batch']} of {each['size']}x{each['size']}", each["layer"],
                f"{plain['median']:.3f}", f"{layer['ratio']:.2f}", "{:.2f} to {:.2f}".format(*quartiles),
                f"{alone[0]['ratio']:.2f}" if alone else "-",
            ])  # fmt: skip
        return found


def measure_steps(settings: StepSettings) -> StepReport:
    """Time steps in a new process, then measure the memory of each variant in one of its own.

    Raises `UsageError` for a layer without its variant, or the variant without its layer.
    """
    if bool(_REPLACED.intersection(settings.variants)) != bool(settings.layer):
        raise UsageError("a layer and the variant `replaced` go together; give both, or neither")
    report = in_process_of(settings.threads, time_variants, settings)
    for each in report.variants:
        each["peak_gb"] = in_process_of(settings.threads, memory_of_two_steps, settings, each["name"])
    return report


def measure_kernels(batch: int, threads: int = 1, rounds: int = timing.FEWEST_ROUNDS) -> KernelReport:
    """Time each of `KERNELS` on each of `MAPS`, forward and backward, as Paddle's convolution and as a matrix product
    in turns, in a new process."""
    return in_process_of(threads, time_kernels, batch, threads, rounds)


def measure_layers(threads: int = 1, rounds: int = timing.FEWEST_ROUNDS) -> LayersReport:
    """Time a step of each of `LAYERS` beside the plain network's in turns, each in a new process."""
    report = None
    for model, size, batch, layer in LAYERS:
        variants = ["plain", "replaced", *(["replaced_native"] if layer in _MERGED else [])]
        settings = StepSettings(model, size, batch, threads, rounds, variants, layer)
        timed = in_process_of(threads, time_variants, settings)
        report = report or LayersReport(timed.machine, {"threads": threads, "rounds": rounds})
        entry = {"model": model, "size": size, "batch": batch, "layer": layer, "variants": timed.variants}
        report.layers.append(entry)
    return report


def in_process_of(threads: int, function: Callable[..., Returned], *arguments: Any) -> Returned:
    """Call a function in a process whose kernels have so many threads: Paddle reads that when it is imported."""
    before = dict(os.environ)
    let_amd_multiply_fast()
    os.environ.update(OMP_NUM_THREADS=str(threads), FLAGS_paddle_num_threads=str(threads))
    try:
        return in_new_process(function, *arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)


# ---------------------------------------------------------------------------------------------------------------------
# In the new process


@dataclass
class Step:
    """One variant, ready to be trained: `run` does a step, `update` moves the masks where there are any."""

    run: Callable[[], None]
    update: Callable[[], None] | None = None


def make_step(settings: StepSettings, variant: str) -> Step:
    """Build a variant's network and optimizer."""
    model = build_model(settings.model)
    if variant in _REPLACED:
        replace(model, settings.layer)
    model.train()
    images, labels = paddle.randn([settings.batch, 3, settings.size, settings.size]), paddle.arange(settings.batch) % 10
    optimizer = paddle.optimizer.AdamW(1e-4, parameters=model.parameters())

    def step() -> None:
        with formulation("native" if variant.endswith("native") else "auto"):
            F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.clear_grad()

    if variant != "sparse":
        return Step(step)
    add_masks(model, settings.density)
    never = 1 << 40
    return Step(step, SparseTraining(model, optimizer, never, update_frequency=never).update_masks)


def build_model(name: str) -> nn.Layer:
    """Return a network of this library or of paddle.vision.models, with random weights."""
    paddle.seed(0)
    if name not in list_models() and name in models.__all__:
        return getattr(models, name)()
    return create_model(name)


def time_variants(settings: StepSettings) -> StepReport:
    """Time the steps of all variants in turns; ratios are to the first one.

    A mask update is timed on its own, and its share of `update_frequency` steps is added to a sparse step.
    """
    report = StepReport(_machine(), asdict(settings))
    steps = {name: make_step(settings, name) for name in settings.variants}
    timings = timing.alternate({name: step.run for name, step in steps.items()}, settings.rounds, warm_up=1)
    for name, step in steps.items():
        variant = {"name": name, **asdict(timings[name])}
        if step.update:
            update = timing.alternate({name: step.update}, timing.FEWEST_ROUNDS, warm_up=1)[name].median
            for key in ("median", "low", "high"):
                variant[key] += update / settings.update_frequency
            variant["mask_update"] = update
        report.variants.append(variant)
    for each in report.variants:
        each["ratio"] = each["median"] / report.variants[0]["median"]
    return report


def time_kernels(batch: int, threads: int, rounds: int) -> KernelReport:
    """Time each of `KERNELS` on each of `MAPS` in this process."""
    report = KernelReport(_machine(), {"batch": batch, "threads": threads, "rounds": rounds})
    for height, width in KERNELS:
        maps = []
        for side, channels in MAPS.items():
            padding = [height // 2, width // 2]
            conv = DepthwiseConv2D(channels, channels, [height, width], padding=padding, groups=channels)
            x = paddle.randn([batch, channels, side, side])
            x.stop_gradient = False

            def run(name: str, conv: DepthwiseConv2D = conv, x: paddle.Tensor = x) -> None:
                with formulation(name):
                    conv(x).sum().backward()

            names = ("native", "product")
            timings = timing.alternate({n: lambda n=n: run(n) for n in names}, rounds, warm_up=1)
            ratio = timings["native"].median / timings["product"].median
            pays = product_pays((height, width), x.shape, report.machine["device"])
            maps.append({"side": side, "ratio": ratio, "pays": pays})
        report.kernels.append({"kernel": f"{height}x{width}", "maps": maps})
    return report


def memory_of_two_steps(settings: StepSettings, variant: str) -> float:
    """Train for two steps and return the most memory, in GB, that this process ever had."""
    step = make_step(settings, variant)
    for _ in range(2):
        step.run()
    return own_peak() / 1e9


def _machine() -> dict[str, Any]:
    """Return what a result was measured on."""
    facts = {**timing.machine_facts(), "device": paddle.get_device(), "load": round(os.getloadavg()[0], 1)}
    return {**facts, MKL_CODE: os.environ.get(MKL_CODE)}
