"""Methods compared by the accuracies of several seeds: differences with their intervals, and what they can say.

Everything is paired: a difference is that of two trainings of one seed. Its interval is Student's, for the mean of
normal differences of unknown spread: mean -+ t(0.975, n - 1) * s / sqrt(n), with n seeds and s the standard deviation
of their differences (divided by n - 1). A difference is larger than the spread where its interval is without 0.

How many seeds would show a difference d of standard deviation s, with a chance of 80 % and at the 5 % level: the
smallest n >= 2 with n >= ((t(0.975, n - 1) + t(0.8, n - 1)) * s / d)^2. It supposes that d and s are what they were
seen to be, which of few seeds they hardly are.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..report import Report, format_markdown, format_table

#: The level of the intervals, the chance to see a difference, and the seeds beyond which it is not worth counting.
LEVEL, POWER, MOST_SEEDS = 0.05, 0.8, 1000
#: A network that is another than the plain one ships at its cost if it is so much larger at most, as by biases where
#: the plain one has none, and needs so much more time at most.
_BIASES, _NOISE_OF_TIME = 1.01, 1.05
PLAIN = "plain"


def t_cumulative(t: float, freedom: int) -> float:
    """Return the probability that Student's t of so many degrees of freedom is at most t.

    By the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    term, total = 1.0, 1.0
    square = math.cos(angle) ** 2
    odd = freedom % 2
    for k in range(2 + odd, freedom, 2):
        term *= square * (k - 1) / k
        total += term
    if not odd:
        return 0.5 + 0.5 * math.sin(angle) * total
    inside = angle + (math.sin(angle) * math.cos(angle) * total if freedom > 1 else 0.0)
    return 0.5 + inside / math.pi


@functools.cache
def t_quantile(probability: float, freedom: int) -> float:
    """Return the t that Student's t of so many degrees of freedom is at most with a probability between 0.5 and 1."""
    low, high = 0.0, 1.0
    while t_cumulative(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cumulative(middle, freedom) < probability else (low, middle)
    return high


@dataclass(frozen=True)
class Difference:
    """What a method has more than another one, seed by seed, in points: its mean, its standard deviation and its 95 %
    interval (None for one seed), with how many of the seeds it is ahead, and how many would show such a difference
    (None: not known, or more than `MOST_SEEDS`)."""

    of: str
    seeds: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    wins: int
    seeds_needed: int | None

    @property
    def is_larger_than_the_spread(self) -> bool:
        """Whether the interval is without 0."""
        return self.low is not None and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        interval = "n/a" if self.low is None else f"{self.low:+.2f} to {self.high:+.2f}"
        return f"{self.mean:+.2f} ({interval})"


def difference(of: str, first: Mapping[Any, float], second: Mapping[Any, float]) -> Difference | None:
    """Return what the first accuracies have more than those of `of`, the second; None where they share no seed."""
    each = [first[seed] - second[seed] for seed in first if seed in second]
    if not each:
        return None
    count, mean, wins = len(each), statistics.fmean(each), sum(value > 0 for value in each)
    if count == 1:
        return Difference(of, 1, mean, None, None, None, wins, None)
    deviation = statistics.stdev(each)
    reach = t_quantile(1 - LEVEL / 2, count - 1) * deviation / math.sqrt(count)
    return Difference(of, count, mean, deviation, mean - reach, mean + reach, wins, seeds_needed(mean, deviation))


def seeds_needed(mean: float, deviation: float) -> int | None:
    """Return how many seeds show a mean difference of such a standard deviation; None: more than `MOST_SEEDS`."""
    if mean == 0:
        return None
    # Of the normal distribution, which t has with ever more seeds, and above which it always is.
    limit = statistics.NormalDist()
    fewest = ((limit.inv_cdf(1 - LEVEL / 2) + limit.inv_cdf(POWER)) * deviation / mean) ** 2
    if fewest > MOST_SEEDS:
        return None
    for count in range(max(2, math.ceil(fewest)), MOST_SEEDS + 1):
        reach = t_quantile(1 - LEVEL / 2, count - 1) + t_quantile(POWER, count - 1)
        if count >= (reach * deviation / mean) ** 2:
            return count
    return None


@dataclass
class MethodResult:
    """A method: its accuracy of each seed in percent, what it differs by, what it costs to train and to ship.

    `trainings`: how many a network of it needs, one after the other. `step` and `latency` are shares of the plain
    network's, with quartiles; `memory` is in bytes. `at_no_cost`: what ships is hardly larger and no slower than the
    plain network. What was not measured is None.
    """

    method: str
    trainings: int
    accuracy: dict[int, float]
    mean: float | None = None
    deviation: float | None = None
    to_plain: Difference | None = None
    to_control: Difference | None = None
    trainable_parameters: int | None = None
    shipped_parameters: int | None = None
    shipped_macs: int | None = None
    step: dict[str, float] | None = None
    latency: dict[str, float] | None = None
    memory: float | None = None
    at_no_cost: bool = False


@dataclass
class ComparisonReport(Report):
    """Methods on one network and data, those that ship at the plain network's cost first, each group by accuracy.

    `runs` has every training: its accuracy and, epoch by epoch, its curve. `failed`: what did not end, and why.
    """

    network: str
    metric: str
    seeds: list[int]
    epochs: int
    methods: list[MethodResult]
    runs: list[dict[str, Any]]
    failed: dict[str, str]
    costs: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    sentence: str = ""

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> ComparisonReport:
        """Return the report that `to_dict` wrote."""
        return cls(**{**written, "methods": [_method_from(each) for each in written["methods"]]})

    def columns(self) -> list[str]:
        """Return the heads of the table."""
        return [
            "method", f"{self.metric}, %", "deviation", "to plain, points (95 %)", "wins", "to control, points (95 %)",
            "wins", "trainings", "trained parameters", "shipped parameters", "step, x plain", "latency, x plain",
            "memory, MB", "ships at plain's cost",
        ]  # fmt: skip

    def rows(self) -> list[list[str]]:
        """Return the rows of the table."""
        return [
            [
                each.method, _number(each.mean, ".2f"), _number(each.deviation, ".2f"), *_against(each.to_plain),
                *_against(each.to_control), str(each.trainings), _number(each.trainable_parameters, ","),
                _number(each.shipped_parameters, ","), _share(each.step), _share(each.latency),
                "n/a" if each.memory is None else f"{each.memory / 1e6:.0f}",
                "n/a" if each.latency is None else "yes" if each.at_no_cost else "no",
            ]
            for each in self.methods
        ]  # fmt: skip

    def markdown(self) -> str:
        """Return the table in Markdown, and what can be said of it."""
        return f"{format_markdown(self.columns(), self.rows())}\n\n{self.sentence}\n"

    def __str__(self) -> str:
        return f"{format_table(self.columns(), self.rows())}\n\n{self.sentence}"


def _method_from(written: Mapping[str, Any]) -> MethodResult:
    accuracy = {int(seed): value for seed, value in written["accuracy"].items()}
    both = {key: written[key] and Difference(**written[key]) for key in ("to_plain", "to_control")}
    return MethodResult(**{**written, "accuracy": accuracy, **both})


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def _share(value: Mapping[str, float] | None) -> str:
    return "n/a" if value is None else f"{value['ratio']:.2f}"


def _against(found: Difference | None) -> list[str]:
    return ["-", "-"] if found is None else [str(found), f"{found.wins} of {found.seeds}"]


def complete(results: Sequence[MethodResult], controls: Mapping[str, str]) -> list[MethodResult]:
    """Fill in what follows from the accuracies and costs of the results, and return them in the order of the table.

    `controls`: method -> the one that it is compared with besides the plain network. The results have those of `PLAIN`.
    """
    by_name = {each.method: each for each in results}
    plain = by_name[PLAIN]
    for each in results:
        values = list(each.accuracy.values())
        each.mean = statistics.fmean(values) if values else None
        each.deviation = statistics.stdev(values) if len(values) > 1 else None
        if each is not plain:
            each.to_plain = difference(PLAIN, each.accuracy, plain.accuracy)
        if each.method in controls:
            control = by_name[controls[each.method]]
            each.to_control = difference(control.method, each.accuracy, control.accuracy)
        each.at_no_cost = _is_at_no_cost(each, plain)
    return sorted(results, key=lambda each: (not each.at_no_cost, math.inf if each.mean is None else -each.mean))


def _is_at_no_cost(result: MethodResult, plain: MethodResult) -> bool:
    """Tell whether what ships is hardly larger than the plain network, and the same network or no slower one."""
    if None in (result.shipped_parameters, plain.shipped_parameters, result.latency):
        return False
    sizes = [(each.shipped_parameters, each.shipped_macs) for each in (result, plain)]
    if sizes[0] == sizes[1]:
        return True
    return all(here <= _BIASES * there for here, there in zip(*sizes)) and result.latency["low"] <= _NOISE_OF_TIME


def in_a_sentence(results: Sequence[MethodResult]) -> str:
    """Return which differences are larger than the spread, and how many seeds more the others would need."""
    found = [(each.method, each.to_plain) for each in results if each.to_plain]
    found += [(each.method, each.to_control) for each in results if each.to_control]
    most = max((each.seeds for _, each in found), default=0)
    if not found:
        return "Nothing can be compared: no method has a seed in common with the plain network."
    if most < 2:
        return (
            "One seed says nothing of the spread between seeds, so no difference can be told from it; give more seeds."
        )
    there = [(name, each) for name, each in found if each.low is not None]
    larger = [f"{name} to {each.of} {each}" for name, each in there if each.is_larger_than_the_spread]
    rest = [f"{name} to {each.of} {_more(each)}" for name, each in there if not each.is_larger_than_the_spread]
    by_chance = LEVEL * len(there)
    told = (
        f"Of {len(there)} differences over {most} seeds, {len(larger)} "
        f"{'is' if len(larger) == 1 else 'are'} larger than the spread (the 95 % interval is without 0, which chance "
        f"alone would make of {by_chance:.1f} of them)"
    )
    told += f": {', '.join(larger)}" if larger else ""
    if rest:
        told += (
            "; for the rest, were they as they were seen, so many seeds more would show it in 80 % of cases: "
            + ", ".join(rest)
        )
    return f"{told}."


def _more(found: Difference) -> str:
    if found.seeds_needed is None:
        return f"more than {MOST_SEEDS}"
    return str(max(found.seeds_needed - found.seeds, 1))
