"""Methods compared by one command, on images of 16 pixels that the tests draw."""

import io
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_train_tools import PLAIN, Place, fails

from paddle_reparam.deploy import checks
from paddle_reparam.deploy.runtimes import proving
from paddle_reparam.errors import UnknownName
from paddle_reparam.files import create, digest
from paddle_reparam.ppcls import setup
from paddle_reparam.training.claims import Claims
from paddle_reparam.weights import checkpoints

ppcls = setup()

from paddle_reparam.measure import timing  # noqa: E402
from paddle_reparam.ppcls import compare, costs, engine, methods, tasks, trainings  # noqa: E402
from paddle_reparam.ppcls.command import read_config  # noqa: E402
from paddle_reparam.ppcls.errors import ConfigError  # noqa: E402
from paddle_reparam.ppcls.tasks import Task  # noqa: E402

METHODS = ["RefConv2D(init=zero)"]
NAMES = ["plain", "retrain", *METHODS]
OVERRIDES = ["Global.epochs=2", "Global.save_interval=1000"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def config(place):
    return place.config(PLAIN)


@pytest.fixture(scope="module")
def command(place, config):
    def run(output, *arguments):
        given = ["--output", str(place.root / output), *(f"-o{each}" for each in OVERRIDES), *arguments]
        return compare.main(["-c", config, "--methods", *METHODS, *given])

    return run


@pytest.fixture(scope="module")
def in_this_process():
    """What is measured is measured quickly, and not in processes of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "in_process_of", lambda threads, function, *arguments: function(*arguments))
        patch.setattr(costs, "_ROUNDS", timing.FEWEST_ROUNDS)
        patch.setattr(timing, "PAUSE", 0.0)
        # Two runtimes take most of the time, and test_released.py runs them.
        patch.setattr(checks, "proving", lambda folder, *given: proving(folder, *given)[:1])
        patch.setattr(tasks, "ship", ship_first_seed)
        yield patch


_shipped: dict[str, tuple] = {}


def ship_first_seed(plain, config, weights, folder, progress):
    """Release what was trained; of a second seed the first one's release stands for it, which has the same sizes."""
    name = folder.parent.name.rpartition("-")[0]
    if name not in _shipped:
        _shipped[name] = trainings.ship(plain, config, weights, folder, progress), folder
    report, place = _shipped[name]
    if not folder.exists():
        shutil.copytree(place, folder)
    return report


@pytest.fixture(scope="module")
def compared(place, command, in_this_process):
    """The folder of a comparison with two seeds, which was stopped twice on its way: in its first run and its third."""
    check_loss, calls = engine.check_loss, []

    def stopping(losses, epoch, step):
        calls.append(step)
        # A training has two epochs of two steps. The first stops in its second epoch, which is then done anew.
        if len(calls) in (3, 10):
            raise KeyboardInterrupt
        return check_loss(losses, epoch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "check_loss", stopping)
        assert command("compared", "--seeds", "2") == 130
        assert command("compared", "--seeds", "2") == 130
        assert len(list((place.root / "compared").rglob("runs/*/result.json"))) == 2
        assert command("compared", "--seeds", "2") == 0
    # 4 steps of 6 runs, and the two that were interrupted again: none of a finished epoch.
    assert len(calls) == 4 * 6 + 2
    return place.root / "compared"


@pytest.fixture(scope="module")
def result(compared):
    return json.loads((compared / "result.json").read_text())


def weights_of(folder, run):
    place = folder / "runs" / run
    return checkpoints.load(place / json.loads((place / "result.json").read_text())["weights"]["name"])


def without_checks(runs):
    """Return the runs without what each process measures of its export, which is compared in fewer runtimes here."""
    return [{key: value for key, value in run.items() if key != "checks"} for run in runs]


def run_of(name, seed):
    [method] = [each for each in methods.read_methods(METHODS) if each.name == name]
    return f"{method.folder}-{seed}"


# ---------------------------------------------------------------------------------------------------------------------
# What is named


def test_methods_and_their_options():
    read = methods.read_methods(["DCDConv2D", "RefConv2D(map_k=5, where='*.depthwise*',init = zero)"], where="blocks.*")
    plain, dcd, control, refconv = read
    assert (plain.name, plain.layer, plain.trainings, plain.control) == ("plain", None, 1, None)
    assert (dcd.name, dcd.layer, dcd.where, dcd.trainings) == ("DCDConv2D", {"name": "DCDConv2D"}, "blocks.*", 1)
    assert (control.name, control.layer, control.trainings) == ("retrain", None, 2)
    assert refconv.name == "RefConv2D(init=zero, map_k=5, where=*.depthwise*)"
    assert refconv.layer == {"name": "RefConv2D", "map_k": 5, "init": "zero"}
    assert (refconv.where, refconv.trainings, refconv.control) == ("*.depthwise*", 2, "retrain")
    # Each has a folder of its own, which every file system can make.
    other = methods.read_methods(["RefConv2D(init=zero, map_k=5, where=*-depthwise*)"])[-1]
    assert len({each.folder for each in [*read, other]}) == 5
    assert all(set(each.folder) <= set("=._-") | {c for c in each.folder if c.isalnum()} for each in [*read, other])
    [several] = methods.read_methods(["RepMLP(where=[a.*, b.*], sizes=[3, 5])"])[1:]
    assert (several.where, several.layer["sizes"]) == (["a.*", "b.*"], [3, 5])
    # Named or not, the plain network is first, and once.
    assert [each.name for each in methods.read_methods(["retrain", "plain"])] == ["plain", "retrain"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["RefConv"], "no method named 'RefConv'; did you mean RefConv2D"),
        (["plain"], "nothing to compare the plain network with"),
        (["RefConv2D", "RefConv2D"], "RefConv2D is given twice"),
        (["RefConv2D(map_k=3)", "RefConv2D(map_k = 3)"], "given twice"),
        (["RefConv2D(map_k)"], "'map_k' is no option"),
        (["RefConv2D(map_k=3, map_k=5)"], "'map_k=5' is no option; write each once"),
        (["RefConv2D(map_k=3"], "is no method; write a name, with options as in"),
        (["retrain(rate=2)"], "retrain has no options"),
    ],
)
def test_methods_that_are_none(names, message):
    with pytest.raises((ConfigError, UnknownName), match=message.replace("(", r"\(")):
        methods.read_methods(names)


@pytest.mark.parametrize(
    ("code", "arguments", "message"),
    [
        (2, ["--methods", "SPConv2D"], "SPConv2D: SPConv2D was put in the place of no convolution of MobileNet"),
        (2, ["--methods", "RefConv2D(inti=zero)"], "no option of RefConv2D named 'inti'; did you mean init"),
        (2, ["--methods", "RefConv2D(where=head.*)"], "no convolution's path matches"),
        (2, ["-o", "Arch.layer.init=zero"], "Arch.layer is one layer for all"),
        (2, ["-o", "Arch.name=MobileNetV9"], "did you mean MobileNetV"),
        (2, ["-o", "Global.image_shape=None"], "Global.image_shape is None"),
        (2, ["-o", "Global.image_shape=[1,16,16]"], "it cannot be run on images of 1x16x16"),
        (2, ["-o", "Global.checkpoints=auto"], "Global.checkpoints must be null"),
        (2, ["-o", "Metric.Eval=None"], "needs DataLoader.Eval and Metric.Eval"),
        (2, ["-o", "Optimizer.name=Momentun"], "did you mean Momentum"),
        (2, ["-o", "DataLoader.Train.dataset.cls_label_path=no/such"], "there is no no/such"),
        (1, ["-o", "Arch.class_num=1"], "labels are none of 0 to 0"),
        (2, ["--output", "/proc/version/x"], "is not a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(place, command, capsys, code, arguments, message):
    fails(capsys, code, message, command, "refused", *arguments)
    assert not (place.root / "refused").exists()


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--jobs", "nan"], ["--seeds", "1.5"]])
def test_numbers_that_are_none(command, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        command("refused", *arguments)
    assert ended.value.code == 2
    assert "takes a whole number of 1 or more" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


def test_every_method_is_trained_with_every_seed_by_one_recipe(compared, result, config):
    assert {(run["method"], run["seed"]) for run in result["runs"]} == {(n, s) for n in NAMES for s in (0, 1)}
    plain = trainings.plain_config(read_config(config, OVERRIDES), "")
    made = tasks.tasks_of(plain, methods.read_methods(METHODS), [0, 1], compared)
    assert [task.title for task in made[:-1]] == [f"{name}, seed {seed}" for seed in (0, 1) for name in NAMES]
    for task in made[:-1]:
        recipe = task.config
        assert recipe["Global"]["seed"] == task.seed
        start = str(compared / "runs" / f"plain-{task.seed}" / "training")
        if task.method.name == "retrain":
            assert recipe["Arch"] == PLAIN
            assert str(recipe["Global"]["pretrained_model"]).startswith(start)
        elif task.method.layer:
            assert recipe["Arch"]["layer"] == {"name": "RefConv2D", "init": "zero"}
            assert recipe["Arch"]["pretrained"].startswith(start)
        else:
            assert recipe["Arch"] == PLAIN
        for section in ("Optimizer", "DataLoader", "Loss", "Metric"):
            assert recipe[section] == plain[section]
    # Seeds differ, and what a method starts from is the plain network of its own.
    for name in NAMES:
        first, second = (weights_of(compared, run_of(name, seed)) for seed in (0, 1))
        assert any(not np.array_equal(first[key], second[key]) for key in first)
    for seed in (0, 1):
        base, refocused = weights_of(compared, f"plain-{seed}"), weights_of(compared, run_of(METHODS[0], seed))
        kept = [key.replace("convmap.weight", "weight") for key in refocused if "convmap" in key]
        assert len(kept) == 14
        assert all(np.array_equal(base[key], refocused[key]) for key in kept)


def test_what_is_reported(compared, result, config):
    told = [result[key] for key in ("network", "metric", "seeds", "epochs")]
    assert told == [PLAIN["name"], "top-1", [0, 1], 2]
    assert result["failed"] == {}
    assert result["source"]["config"]["sha256"] == digest(Path(config))["sha256"]
    by_name = {each["method"]: each for each in result["methods"]}
    assert by_name.keys() == set(NAMES)
    for name, each in by_name.items():
        assert each["accuracy"] == {str(r["seed"]): 100 * r["accuracy"] for r in result["runs"] if r["method"] == name}
        assert each["step"]["low"] <= each["step"]["ratio"] <= each["step"]["high"]
        assert each["latency"]["ratio"] > 0
        assert each["memory"] > 1e8
        # All of them ship the plain network.
        assert each["at_no_cost"]
        assert each["shipped_parameters"] == by_name["plain"]["shipped_parameters"]
    refconv, plain = by_name[METHODS[0]], by_name["plain"]
    assert (plain["step"]["ratio"], plain["to_plain"], plain["trainings"], refconv["trainings"]) == (1.0, None, 1, 2)
    assert refconv["trainable_parameters"] > plain["trainable_parameters"] > plain["shipped_parameters"]
    assert (refconv["to_plain"]["of"], refconv["to_control"]["of"]) == ("plain", "retrain")
    assert by_name["retrain"]["to_control"] is None
    for run in result["runs"]:
        # The log has five digits.
        assert abs(run["curve"][-1]["eval_top1"] - run["accuracy"]) < 1e-5
        assert {"fused network"} < run["checks"].keys()
        assert (compared / "runs" / run_of(run["method"], run["seed"]) / "shipped" / "manifest.json").is_file()
    assert result["sentence"].startswith("Of 3 differences over 2 seeds, ")
    table = (compared / "table.md").read_text()
    assert all(f"| {name} |" in table for name in NAMES)
    assert result["sentence"] in table
    for picture in ("cost.png", "curves.png"):
        with Image.open(compared / picture) as drawn:
            assert drawn.width > 900


def test_the_same_command_again_repeats_nothing(compared, command, capsys, in_this_process):
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (compared / "runs").rglob("*")}
    assert command("compared", "--seeds", "2") == 0
    assert {path: path.stat().st_mtime_ns for path in (compared / "runs").rglob("*")} == before
    printed = capsys.readouterr().out
    assert "7 runs, 7 of them done before" in printed
    assert "begun" not in printed
    assert "| " not in printed
    assert all(name in printed for name in NAMES)


def test_what_stands_there_is_kept(place, compared, command, capsys):
    fails(capsys, 2, "holds a comparison of another config", command, "compared", "-o", "Global.epochs=3")
    (place.root / "mine").mkdir()
    (place.root / "mine" / "notes.txt").write_text("mine")
    fails(capsys, 2, "exists already and is kept", command, "mine")
    assert [path.name for path in (place.root / "mine").iterdir()] == ["notes.txt"]


def test_what_was_stopped_is_what_it_would_have_been(compared, config, tmp_path):
    plain = trainings.plain_config(read_config(config, OVERRIDES), "")
    base, _, refconv = tasks.tasks_of(plain, methods.read_methods(METHODS), [0], compared)[:3]
    for task in (base, refconv):
        expected = checkpoints.load(trainings.train(task.config, tmp_path / task.method.name))
        found = weights_of(compared, task.folder.name)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in expected), task.title


def test_two_processes_end_what_is_left(place, compared, result, command, capsys):
    folder = place.root / "shared"
    shutil.copytree(compared, folder)
    for name in ("runs/retrain-1/result.json", "result.json"):
        (folder / name).unlink()
    capsys.readouterr()
    assert command("shared", "--seeds", "2", "--jobs", "2") == 0
    printed = capsys.readouterr().out
    assert "7 runs, 6 of them done before" in printed
    assert "retrain, seed 1: begun" in printed
    runs = json.loads((folder / "result.json").read_text())["runs"]
    assert without_checks(runs) == without_checks(result["runs"])
    # Neither process was this one, and one of them alone had the run.
    [_, claim] = sorted((folder / "runs" / "retrain-1").glob("claim.*.json"))
    assert json.loads(claim.read_text())["process"] != os.getpid()


def test_seeds_and_methods_are_added_or_left_out(compared, command):
    """One seed of the two is a comparison as well; nothing is trained for it."""
    whole = (compared / "result.json").read_bytes()
    assert command("compared", "--seeds", "1") == 0
    result = json.loads((compared / "result.json").read_text())
    assert [run["method"] for run in result["runs"]] == NAMES
    assert result["sentence"].startswith("One seed says nothing of the spread")
    assert all(each["to_plain"]["low"] is None for each in result["methods"] if each["to_plain"])
    (compared / "result.json").write_bytes(whole)


def test_a_run_that_fails_is_told_and_tried_again(place, compared, result, command, monkeypatch, capsys):
    folder = place.root / "failing"
    shutil.copytree(compared, folder)
    (folder / "runs" / "retrain-0" / "result.json").unlink()
    ship = tasks.ship

    def fail(*given, **options):
        raise OSError("no space left")

    monkeypatch.setattr(tasks, "ship", fail)
    capsys.readouterr()
    assert command("failing", "--seeds", "2") == 1
    printed = capsys.readouterr()
    assert (
        "error: 1 of the runs failed, and the same command tries them again; retrain, seed 0: no space" in printed.err
    )
    assert "retrain, seed 0: failed: no space left" in printed.out
    told = json.loads((folder / "result.json").read_text())
    assert told["failed"] == {"retrain, seed 0": "no space left"}
    assert len(told["runs"]) == 5
    monkeypatch.setattr(tasks, "ship", ship)
    assert command("failing", "--seeds", "2") == 0
    assert not list(folder.rglob("failed.json"))
    runs = json.loads((folder / "result.json").read_text())["runs"]
    assert without_checks(runs) == without_checks(result["runs"])


def test_what_starts_from_a_network_that_failed_fails_too(config, tmp_path):
    plain = trainings.plain_config(read_config(config), "")
    base, control, refconv, costs_of_all = tasks.tasks_of(plain, methods.read_methods(METHODS), [0], tmp_path)
    assert not control.is_ready
    base._write("failed.json", {"why": "no space left"})
    assert control.is_ready
    for task in (control, refconv, costs_of_all):
        task.do(lambda share: None)
    assert control.why_failed == "it starts from plain, seed 0, which failed"
    assert costs_of_all.why_failed == "there is no plain network to measure the others beside"
    # The next command tries all of them again.
    assert not any(each.has_ended for each in tasks.tasks_of(plain, methods.read_methods(METHODS), [0], tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Shared


class Noted(Task):
    """A task that takes a moment, and notes in a file that it was done."""

    def _done(self, watch):
        watch(0.5)
        time.sleep(0.01)
        with (self.folder.parent / "done.txt").open("a") as file:
            file.write(f"{self.title}\n")
        return {}


def test_several_share_the_tasks_and_do_each_once(tmp_path):
    def make():
        first = [Noted(tmp_path / str(number), str(number)) for number in range(10)]
        return [*first, Noted(tmp_path / "last", "last", first)]

    threads = [threading.Thread(target=compare.work, args=(make(), Claims())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = (tmp_path / "done.txt").read_text().split()
    assert sorted(done) == sorted([*map(str, range(10)), "last"])
    assert done[-1] == "last"


def test_a_bar_shows_what_all_have_done_and_the_time_left(tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    first, second = (Noted(tmp_path / name, name) for name in ("first", "second"))
    first.do(lambda share: None)
    drawn = Terminal()
    monkeypatch.setattr(sys, "stderr", drawn)
    monkeypatch.setattr(compare, "_LOOK", 0.01)
    with compare._Shown([first, second], Claims()), Claims(beat=0.01).take(second.folder) as claim:
        claim.tell(0.5)
        deadline = time.monotonic() + 20
        while "1.5 of 2 runs" not in drawn.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "1.0 of 2 runs" in drawn.getvalue()
    assert " left" in drawn.getvalue()
    assert capsys.readouterr().out.splitlines()[0] == "2 runs, 1 of them done before"


def test_one_of_several_creates_a_file(tmp_path, monkeypatch):
    assert create(tmp_path / "new" / "file.json", "first")
    assert not create(tmp_path / "new" / "file.json", "second")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.json"]
    assert (tmp_path / "new" / "file.json").read_text() == "first"

    def no_links(*_):
        raise OSError("no links")

    monkeypatch.setattr(os, "link", no_links)
    assert create(tmp_path / "file.json", "first")
    assert not create(tmp_path / "file.json", "second")
    assert (tmp_path / "file.json").read_text() == "first"
