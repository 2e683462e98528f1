"""Timing in turns: who is called how often and in which order, and what is made of it."""

import pytest

from paddle_reparam.errors import ReparamError
from paddle_reparam.measure import timing
from paddle_reparam.measure.timing import PAUSE, alternate, machine_facts, time_beside


class Clock:
    """A clock that only the timed functions move."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def takes(self, name, durations):
        durations = iter(durations)

        def call():
            self.calls.append(name)
            self.now += next(durations)

        return call


def test_medians_and_quartiles_are_those_of_the_timed_rounds():
    clock = Clock()
    functions = {"a": clock.takes("a", [100, 1, 2, 3, 4, 5]), "b": clock.takes("b", [100, 10, 10, 10, 10, 10])}
    timings = alternate(functions, rounds=5, warm_up=1, clock=clock)
    assert (timings["a"].low, timings["a"].median, timings["a"].high, timings["a"].rounds) == (2, 3, 4, 5)
    assert (timings["b"].low, timings["b"].median, timings["b"].high) == (10, 10, 10)


def test_all_are_called_in_turns_and_every_second_round_backwards():
    clock = Clock()
    alternate({n: clock.takes(n, [1] * 6) for n in "ab"}, rounds=5, warm_up=1, clock=clock)
    assert "".join(clock.calls) == "ab" + "ab" + "ba" + "ab" + "ba" + "ab"


def test_rounds_end_with_the_time_but_not_before_five():
    clock = Clock()
    assert alternate({"a": clock.takes("a", [1] * 20)}, rounds=20, warm_up=0, seconds=7.5, clock=clock)["a"].rounds == 8
    clock = Clock()
    assert alternate({"a": clock.takes("a", [9] * 20)}, rounds=20, warm_up=0, seconds=1, clock=clock)["a"].rounds == 5


@pytest.mark.parametrize(("functions", "rounds"), [({}, 30), ({"a": int}, 4)])
def test_what_says_nothing_is_refused(functions, rounds):
    with pytest.raises(ReparamError, match="give one or more, and 5 rounds"):
        alternate(functions, rounds=rounds)


def test_a_turn_beside_another_is_a_pause_a_call_and_three_timed_ones_or_one_of_what_takes_long(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: clock.calls.append(f"pause {seconds}"))
    quick, slow = (clock.takes(name, [took] * 100) for name, took in (("quick", 0.05), ("slow", 0.2)))
    found = time_beside(quick, slow, rounds=5, clock=clock)
    turns = [turn.split() for turn in " ".join(clock.calls).split(f"pause {PAUSE}")[1:]]
    assert turns[:4] == [["quick"] * 4, ["slow"] * 2] * 2
    assert [found[key] for key in ("ratio", "low", "high")] == pytest.approx([4.0] * 3)
    assert (found["milliseconds_of_first"], found["milliseconds"]) == pytest.approx((50.0, 200.0))


def test_the_machine_is_named():
    facts = machine_facts()
    assert facts["processor"]
    assert facts["cores"] >= 1
