"""Write docs/benchmarks.md and its picture from docs/measured/; --measure times all that is on it first.

The exit code is 1 where a network takes longer than it was asked to.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddle_reparam.errors import exit_code
from paddle_reparam.files import atomic_write
from paddle_reparam.measure import benchmark
from paddle_reparam.measure.charts import draw_curves
from paddle_reparam.measure.profiling import limit_by_operations, limit_by_weights
from paddle_reparam.measure.sweeps import GROWS, points_of
from paddle_reparam.ppcls import contenders, setup
from paddle_reparam.report import format_markdown
from paddle_reparam.style import digest_of, save_with_digest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
PICTURE = ROOT / "docs" / "images" / "benchmarks.png"
MEASURED = ROOT / "docs" / "measured"
NETWORKS = "benchmarks.json"
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
#: The shape of an image: channels, height, width.
IMAGES = (3, 224, 224)
#: Of these the form for images of every size is timed as well.
FOR_EVERY_SIZE = ["SLaK_tiny", "ResNet50_SPConv"]
#: With what is measured: threads of Paddle's kernels, and rounds in turns.
THREADS, ROUNDS = 2, 30
#: No more rounds of all networks in turns than fit into so many seconds, at batch 1 and at batch 8 each.
SECONDS = 120.0
#: File in docs/measured -> the sweep in it.
SWEEPS: dict[str, dict[str, Any]] = {
    "sweep_kernel_size": {
        "targets": ["ReparamLargeKernelConv2D", "DecomposedLargeKernelConv2D"],
        "of": "kernel_size", "values": [7, 13, 21, 31, 41, 51, 61], "size": 56, "channels": 124,
    },
    "sweep_size": {"targets": ["ResNet50", "ResNet50_SPConv"], "of": "size", "values": [128, 192, 224, 256, 320]},
    "sweep_batch": {"targets": ["ResNet50", "ResNet50_SPConv"], "of": "batch", "values": [1, 2, 4, 8, 16]},
}  # fmt: skip
INTRODUCTION = """\
# Benchmarks

English | [简体中文](ch/benchmarks.md)

Written by `python docs/make/benchmark_pages.py`; do not edit. Every network was fused, exported for images of 224
pixels, compared with its train form, and run by Paddle Inference with oneDNN; all of them in turns in one process, each
beside its plain network, whose BNs were folded and which was exported in the same way. A ratio is the median of the
network over the median of the plain one. "By operations" is the ratio of their multiply-adds: what the network would
take if its operations ran as fast as the plain network's. Weights are random: speed does not depend on them.

"""
LIMITS = """\
## Where a target is missed

What the network would take at batch 1 if it reached a limit of this machine, measured in the same run: its
multiply-adds at the rate of the plain network's, and its weights, once through the memory. To these comes what lies
around its primitives, which no layer can be rid of but by having fewer of them: see below. Layers that are dynamic, or
split their input, have many small ones. `python tools/benchmark.py profile` prints the same for other networks.

"""
PROFILES = """\
Below is what oneDNN's own log says of a run of each, and of its plain network, in milliseconds an image: the mean of
the middle half of the runs, each network in a process of its own. "The rest" is what is in no primitive of oneDNN:
other operators, the executor's own time, and what the log takes itself; the last row is a run without it. Kinds below
a hundredth of the run are added up.
"""
EVERY_SIZE = """\
## One size, or every size

Where there is a choice of forms, layers choose by rules that were measured once. Whether the choice that is left to the
user, `tools/reparam.py --size`, costs time: the fused form for images of every size over the one for images of 224, in
the same run. `python tools/benchmark.py infer NAME --form fused "dynamic size"` tells it for other networks.

"""
GROWTH = f"""\
## As work grows

![Three curves](images/{PICTURE.name})

Milliseconds an image, with quartiles; ratios are to the first. Kernel sizes are those of one layer, exported alone, on
maps of SLaK_tiny's first stage: of the layers for large kernels, `ReparamLargeKernelConv2D` ships a dense kernel and
`DecomposedLargeKernelConv2D` two bands of it. Each network was exported for each size of the images.
"""
#: Kinds of primitives that take less of the run than this are not shown on their own.
_SMALLEST_SHARE = 0.01


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 where a network fails, or misses its target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="time all networks and sweeps first")
    given = parser.parse_args(arguments)
    with exit_code() as result:
        if given.measure:
            measure()
        measured, sweeps = read_measured()
        atomic_write(PICTURE, lambda path: save_picture(sweeps, path))
        atomic_write(PAGE, lambda path: path.write_text(page_of(measured, sweeps), encoding="utf-8"))
        missed = [f"missed: {row.network}" for row in rows_of(measured) if row.missed]
        print(f"written: {PAGE.relative_to(ROOT)}", *missed, sep="\n")
        result[0] = int(bool(missed))
    return result[0]


def measure() -> None:
    """Measure the networks and the sweeps, and write a file for each."""
    setup().utils.logger.init_logger(log_level="WARNING")
    _write(NETWORKS, measure_networks())
    for stem, sweep in SWEEPS.items():
        _write(f"{stem}.json", contenders.sweep(**sweep, threads=THREADS, rounds=ROUNDS).to_dict())


def measure_networks() -> dict[str, Any]:
    """Time the networks of `TARGETS` and profile those that miss theirs; return what was measured."""
    names = list(dict.fromkeys([*(plain for _, plain, _ in TARGETS), *(target for target, _, _ in TARGETS)]))
    with tempfile.TemporaryDirectory() as folder:
        exported = []
        for name in tqdm(names, unit=" networks"):
            forms = ("fused", "dynamic size") if name in FOR_EVERY_SIZE else ("fused",)
            target = str(ROOT / name) if "/" in name else name
            exported += contenders.contenders_of(target, Path(folder), IMAGES, forms)
        report = benchmark.run(exported, (1, 8), ["onednn"], THREADS, ROUNDS, seconds=SECONDS)
        measured = report.to_dict()
        missed = [row for row in rows_of(measured) if row.missed]
        of_them = {name for row in missed for name in (row.plain, row.network)}
        to_profile = [each for each in exported if each.form == "fused" and each.name in of_them]
        profiles = benchmark.profile_all(to_profile, 1, THREADS, ROUNDS).to_dict()
    print(report)
    return {**measured, "memory_rate": profiles["memory_rate"], "profiles": profiles["profiles"]}


def _write(name: str, measured: Mapping[str, Any]) -> None:
    text = json.dumps(measured, indent=2, sort_keys=True) + "\n"
    atomic_write(MEASURED / name, lambda path: path.write_text(text, encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# The page


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

    @property
    def missed(self) -> bool:
        """Whether the network takes longer than was asked for."""
        return self.ratio > self.most


def rows_of(measured: Mapping[str, Any]) -> list[Row]:
    """Return the rows of the table from what a run wrote."""
    macs = {each["name"]: each["macs"] for each in measured["contenders"]}
    times = {(each["name"], each["batch"]): each for each in measured["results"] if each["form"] == "fused"}

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


def read_measured() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return what was measured of the networks, and file -> what was measured of each sweep."""
    networks, *sweeps = (
        json.loads((MEASURED / name).read_text(encoding="utf-8"))
        for name in (NETWORKS, *(f"{stem}.json" for stem in SWEEPS))
    )
    return networks, dict(zip(SWEEPS, sweeps))


def page_of(measured: Mapping[str, Any], sweeps: Mapping[str, Mapping[str, Any]]) -> str:
    """Return docs/benchmarks.md for what was measured."""
    rows = rows_of(measured)
    table = format_markdown(
        ["network", "plain network", "ratio", "asked for", "ratio, batch 8", "by operations", "ms (quartiles)"],
        [[row.network, row.plain, f"{row.ratio:.3f}", f"{row.most:.2f}", f"{row.ratio_of_eight:.3f}",
          f"{row.by_operations:.2f}", row.milliseconds] for row in rows],
    )  # fmt: skip
    one = [each for each in measured["results"] if each["batch"] == 1]
    plain = [r for r in one if r["name"] in {p for _, p, _ in TARGETS}]
    times = ", ".join(f"{r['name']} {r['median']:.1f} ms ({r['low']:.1f} to {r['high']:.1f})" for r in plain)
    of_plain = f"The plain networks, batch 1: {times}."
    parts = [INTRODUCTION.strip(), _generated("networks", _conditions(measured), table, of_plain)]
    missed = [row for row in rows if row.missed]
    if missed:
        profiles = {each["name"]: each for each in measured["profiles"]}
        tables = [_profile(profiles[row.network], profiles[row.plain]) for row in missed]
        parts += [LIMITS.strip(), _generated("limits", _limits(measured, missed))]
        parts += [PROFILES.strip(), _generated("profiles", *tables)]
    every_size = _for_every_size(measured)
    parts += [EVERY_SIZE.strip(), _generated("every size", every_size)] if every_size else []
    parts.append(GROWTH.strip())
    for stem, sweep in sweeps.items():
        parts.append(_generated(stem, f"`{command_of(stem)}`", _sweep_table(sweep), _conditions(sweep)))
    return "\n\n".join(parts) + "\n"


def _generated(name: str, *parts: str) -> str:
    """Return parts of a page between the lines that say that they are the same in every language."""
    return "\n".join([f"<!-- {name} -->", "\n\n".join(parts), "<!-- end -->"])


def _for_every_size(measured: Mapping[str, Any]) -> str:
    """Return the table of the networks that were timed in both forms; nothing where there is none."""
    times = {(each["name"], each["form"], each["batch"]): each["median"] for each in measured["results"]}
    rows = []
    for name in FOR_EVERY_SIZE:
        ratios = [
            f"{times[name, 'dynamic size', batch] / times[name, 'fused', batch]:.3f}"
            for batch in (1, 8)
            if (name, "dynamic size", batch) in times
        ]
        rows += [[name, *ratios]] if ratios else []
    return format_markdown(["network", "ratio", "ratio, batch 8"], rows) if rows else ""


def _limits(measured: Mapping[str, Any], missed: Sequence[Row]) -> str:
    """Return the table of what was taken and what the limits are, and the rates that these are made of."""
    macs = {each["name"]: each["macs"] for each in measured["contenders"]}
    times = {r["name"]: r["median"] for r in measured["results"] if r["batch"] == 1 and r["form"] == "fused"}
    weights = {each["name"]: each["weights_bytes"] for each in measured["profiles"]}
    calls = {each["name"]: sum(share["calls"] for share in each["shares"]) for each in measured["profiles"]}
    rest = {each["name"]: _rest(each) for each in measured["profiles"]}
    table = format_markdown(
        ["network", "ms", "asked for, ms", "by operations, ms", "weights, MiB", "reading them, ms", "primitives",
         "around them, ms"],
        [[row.network, f"{times[row.network]:.1f}", f"{row.most * times[row.plain]:.1f}",
          f"{limit_by_operations(macs[row.network], macs[row.plain], times[row.plain]):.1f}",
          f"{weights[row.network] / 2**20:.0f}",
          f"{limit_by_weights(weights[row.network], measured['memory_rate']):.1f}", calls[row.network],
          f"{rest[row.network]:.1f}"] for row in missed],
    )  # fmt: skip
    rates = ", ".join(
        f"{name} {macs[name] / times[name] / 1e6:.0f} G/s" for name in dict.fromkeys(row.plain for row in missed)
    )
    around = ", ".join(
        f"{name} {1000 * rest[name] / calls[name]:.0f} us"
        for name in dict.fromkeys([*(row.plain for row in missed), *(row.network for row in missed)])
    )
    rates = f"{rates}. Around a primitive, on average: {around}"
    return f"{table}\n\nMultiply-adds: {rates}. Reading from memory: {measured['memory_rate'] / 1e9:.1f} GB/s."


def _rest(profile: Mapping[str, Any]) -> float:
    """Return the milliseconds of a profiled run that are in no primitive."""
    return profile["whole"] - sum(share["milliseconds"] for share in profile["shares"])


def _profile(network: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """Return a network's profile beside that of its plain one."""
    shown = [
        share["kind"]
        for each in (network, plain)
        for share in each["shares"]
        if share["milliseconds"] >= _SMALLEST_SHARE * each["whole"]
    ]
    columns = [_column(each, list(dict.fromkeys(shown))) for each in (network, plain)]
    header = [network["name"], "calls", "ms", f"calls, {plain['name']}", f"ms, {plain['name']}"]
    return format_markdown(header, [[kind, *columns[0][kind], *columns[1][kind]] for kind in columns[0]])


def _column(profile: Mapping[str, Any], shown: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """Return row -> (calls, milliseconds) of a profile, for the kinds to show, and what is left."""
    shares = {share["kind"]: (share["calls"], share["milliseconds"]) for share in profile["shares"]}
    others = [share for kind, share in shares.items() if kind not in shown]
    rows: dict[str, tuple[Any, float]] = {kind: shares.get(kind, (0, 0.0)) for kind in shown}
    rows["other primitives"] = (sum(calls for calls, _ in others), sum(ms for _, ms in others))
    rest = _rest(profile)
    rows["all primitives"] = (sum(calls for calls, _ in shares.values()), profile["whole"] - rest)
    rows["the rest"] = ("", rest)
    rows["the run"] = ("", profile["whole"])
    rows["without the log"] = ("", profile["without_log"])
    return {kind: (calls, f"{ms:.2f}") for kind, (calls, ms) in rows.items()}


# ---------------------------------------------------------------------------------------------------------------------
# As work grows


def command_of(stem: str) -> str:
    """Return the command that measures a sweep."""
    words = ["python tools/benchmark.py sweep"]
    for key, value in SWEEPS[stem].items():
        words += [] if key == "targets" else [f"--{key}"]
        words += map(str, value if isinstance(value, list) else [value])
    return " ".join(words)


def save_picture(sweeps: Mapping[str, Any], path: Path) -> None:
    """Draw all sweeps into a PNG file that says what it was drawn of."""
    save_with_digest(draw_curves(list(sweeps.values())), path, digest_of(sweeps))


def _sweep_table(sweep: Mapping[str, Any]) -> str:
    settings, points = sweep["settings"], points_of(sweep)
    first, *others = points
    rows = []
    for i, value in enumerate(settings["values"]):
        times = [f"{at[i]['median']:.2f} ({at[i]['low']:.2f} to {at[i]['high']:.2f})" for at in points.values()]
        ratios = [f"{points[other][i]['median'] / points[first][i]['median']:.3f}" for other in others]
        rows.append([value, *times, *ratios])
    return format_markdown([GROWS[settings["of"]], *points, *(f"ratio, {other}" for other in others)], rows)


def _conditions(measured: Mapping[str, Any]) -> str:
    """Return what something was measured with and on, as a sentence."""
    machine, settings = measured["machine"], measured["settings"]
    facts = [f"{settings['threads']} threads", f"at most {settings['rounds']} rounds"]
    return "; ".join([*facts, *(f"{key}: {value}" for key, value in machine.items())]) + "."


if __name__ == "__main__":
    sys.exit(main())
