"""Tasks that several processes share out: each is done once, and a dead process's are done by another."""

import json
import os
import signal
import subprocess
import threading
import time

import pytest

from paddle_reparam.training import claims
from paddle_reparam.training.claims import Claims


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def of_another_machine(folder, beat, **changes):
    """Write a claim as a process of another machine does."""
    folder.mkdir(exist_ok=True)
    owner = {"host": "far", "machine": "another", "process": 1, "started": "1", "done": 0.5, "left": False}
    (folder / "claim.1.json").write_text(json.dumps({**owner, "beat": beat, **changes}))


def test_one_of_many_gets_a_task(tmp_path):
    taken, ready = [], threading.Barrier(8)

    def take():
        mine = Claims()
        ready.wait()
        for number in range(20):
            if mine.take(tmp_path / str(number)) is not None:
                taken.append(number)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(20))
    # Nothing is left of what the others tried.
    assert {path.name for path in tmp_path.rglob("*.*")} == {"claim.1.json"}


def test_a_task_that_was_left_is_taken_again(tmp_path):
    with Claims(beat=0.01).take(tmp_path) as claim:
        claim.tell(0.25)
        assert Claims().take(tmp_path) is None
        deadline = time.monotonic() + 20
        while Claims().holder(tmp_path)["done"] != 0.25:
            assert time.monotonic() < deadline
    assert Claims().holder(tmp_path) is None
    assert Claims().take(tmp_path).number == 2
    assert Claims().take(tmp_path) is None


def test_a_process_that_ended_has_lost_its_task_at_once(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as process:
        owner = {**claims.this_process(), "process": process.pid, "started": claims._started(process.pid)}
        claim = {**owner, "beat": 1, "done": 0.5, "left": False}
        (tmp_path / "claim.1.json").write_text(json.dumps(claim))
        assert Claims().holder(tmp_path) == claim
        process.kill()
    if claims._machine() is None:
        pytest.skip("this system does not say which processes run")
    assert Claims().holder(tmp_path) is None
    # Another process may have got the number since.
    (tmp_path / "claim.1.json").write_text(json.dumps({**claim, "process": os.getpid()}))
    assert Claims().holder(tmp_path) is None


def test_another_machine_is_dead_when_it_is_silent_for_long(tmp_path):
    clock = Clock()
    mine = Claims(patience=90, clock=clock)
    for beat, seconds in enumerate((80, 80, 80)):
        of_another_machine(tmp_path, beat)
        assert mine.take(tmp_path) is None
        clock.now += seconds
    # It is silent as of now, whatever its own clock says.
    assert mine.holder(tmp_path)["host"] == "far"
    clock.now += 11
    assert mine.holder(tmp_path) is None
    assert mine.take(tmp_path).number == 2


def test_a_claim_that_is_cut_short_is_somebody_s_until_nothing_more_comes(tmp_path):
    clock = Clock()
    mine = Claims(patience=90, clock=clock)
    (tmp_path / "claim.3.json").write_text('{"host":')
    assert mine.take(tmp_path) is None
    clock.now = 91
    assert mine.take(tmp_path).number == 4


def test_two_that_find_a_dead_one_do_not_both_take_over(tmp_path, monkeypatch):
    of_another_machine(tmp_path, 1, left=True)
    first, second = Claims(), Claims()
    look = second._look

    def looks_before_the_other_takes(folder):
        seen = look(folder)
        assert first.take(folder) is not None
        return seen

    monkeypatch.setattr(second, "_look", looks_before_the_other_takes)
    assert second.take(tmp_path) is None


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def test_who_lost_a_task_while_it_slept_is_interrupted(tmp_path, handler):
    """Also where interrupts are ignored, as they are by what a script starts in the background."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        lose_a_task(tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)


def lose_a_task(tmp_path):
    claim, interrupted = Claims(beat=0.01).take(tmp_path), False
    try:
        with claim:
            (tmp_path / "claim.2.json").write_text("{}")
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                time.sleep(0.01)
    except KeyboardInterrupt:
        interrupted = True
    assert interrupted
    assert claim.lost
    assert (tmp_path / "claim.2.json").read_text() == "{}"
    assert json.loads((tmp_path / "claim.1.json").read_text())["left"] is False
