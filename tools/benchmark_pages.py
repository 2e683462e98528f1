"""docs/benchmarks.md: written from docs/measured/benchmarks.json, which `tools/benchmark.py table` measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddle_reparam.profiling import limit_by_operations, limit_by_weights

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "measured" / "benchmarks.json"
PAGE = ROOT / "docs" / "benchmarks.md"
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
LIMITS = """\
## Where a target is missed

What the network would take at batch 1 if it reached a limit of this machine, measured in the same run: its
multiply-adds at the rate of the plain network's, and its weights, once through the memory.
`python tools/benchmark.py profile` prints the same for other networks.

"""
PROFILES = """\
Below is what oneDNN's own log says of a run of each, and of its plain network, in milliseconds an image: the mean of
the middle half of the runs, each network in a process of its own. "The rest" is what is in no primitive of oneDNN:
other operators, the executor's own time, and what the log takes itself; the last row is a run without it. Kinds below
a hundredth of the run are added up.
"""
#: Kinds of primitives that take less of the run than this are not shown on their own.
_SMALLEST_SHARE = 0.01


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
    rows = rows_of(measured)
    table = markdown_table(
        ["network", "plain network", "ratio", "asked for", "ratio, batch 8", "by operations", "ms (quartiles)"],
        [[row.network, row.plain, f"{row.ratio:.3f}", f"{row.most:.2f}", f"{row.ratio_of_eight:.3f}",
          f"{row.by_operations:.2f}", row.milliseconds] for row in rows],
    )  # fmt: skip
    plain = [r for r in measured["results"] if r["batch"] == 1 and r["name"] in {p for _, p, _ in TARGETS}]
    times = ", ".join(f"{r['name']} {r['median']:.1f} ms ({r['low']:.1f} to {r['high']:.1f})" for r in plain)
    parts = [f"{INTRODUCTION}{'; '.join(facts)}.", table, f"The plain networks, batch 1: {times}."]
    missed = [row for row in rows if row.missed]
    if missed:
        parts += [LIMITS + _limits(measured, missed), PROFILES.strip()]
        profiles = {each["name"]: each for each in measured["profiles"]}
        parts += [_profile(profiles[row.network], profiles[row.plain]) for row in missed]
    return "\n\n".join(parts) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table for a page."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [header, ["---"] * len(header), *rows])


def _limits(measured: Mapping[str, Any], missed: Sequence[Row]) -> str:
    """Return the table of what was taken and what the limits are, and the rates that these are made of."""
    macs = {each["name"]: each["macs"] for each in measured["contenders"]}
    times = {each["name"]: each["median"] for each in measured["results"] if each["batch"] == 1}
    weights = {each["name"]: each["weights_bytes"] for each in measured["profiles"]}
    table = markdown_table(
        ["network", "ms", "asked for, ms", "by operations, ms", "weights, MiB", "reading them, ms"],
        [[row.network, f"{times[row.network]:.1f}", f"{row.most * times[row.plain]:.1f}",
          f"{limit_by_operations(macs[row.network], macs[row.plain], times[row.plain]):.1f}",
          f"{weights[row.network] / 2**20:.0f}",
          f"{limit_by_weights(weights[row.network], measured['memory_rate']):.1f}"] for row in missed],
    )  # fmt: skip
    rates = ", ".join(
        f"{name} {macs[name] / times[name] / 1e6:.0f} G/s" for name in dict.fromkeys(row.plain for row in missed)
    )
    return f"{table}\n\nMultiply-adds: {rates}. Reading from memory: {measured['memory_rate'] / 1e9:.1f} GB/s."


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
    return markdown_table(header, [[kind, *columns[0][kind], *columns[1][kind]] for kind in columns[0]])


def _column(profile: Mapping[str, Any], shown: Sequence[str]) -> dict[str, tuple[Any, str]]:
    """Return row -> (calls, milliseconds) of a profile, for the kinds to show, and what is left."""
    shares = {share["kind"]: (share["calls"], share["milliseconds"]) for share in profile["shares"]}
    others = [share for kind, share in shares.items() if kind not in shown]
    rows: dict[str, tuple[Any, float]] = {kind: shares.get(kind, (0, 0.0)) for kind in shown}
    rows["other primitives"] = (sum(calls for calls, _ in others), sum(ms for _, ms in others))
    primitives = sum(ms for _, ms in shares.values())
    rows["all primitives"] = (sum(calls for calls, _ in shares.values()), primitives)
    rows["the rest"] = ("", profile["whole"] - primitives)
    rows["the run"] = ("", profile["whole"])
    rows["without the log"] = ("", profile["without_log"])
    return {kind: (calls, f"{ms:.2f}") for kind, (calls, ms) in rows.items()}
