"""Several processes on a CPU, joined by gloo: the same training as one with larger batches, and what ends them all."""

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pages
import pytest
from paddle.distributed.launch.context.args_envs import parse_args
from pages import ROOT
from ppcls.data.dataloader.imagenet_dataset import ImageNetDataset
from test_survival import shown_curves
from test_train_tools import PLAIN, REFCONV, TOOLS, Place, config_of, train_as_a_process_of_its_own
from visualdl import LogReader

from paddle_reparam.ppcls import agreement, saving
from paddle_reparam.ppcls.command import read_config
from paddle_reparam.surgery import masks
from paddle_reparam.weights import checkpoints

SLAK = {
    "name": "SLaK_micro", "class_num": 2, "depths": [1, 1, 1, 1], "dims": [8, 8, 12, 12],
    "kernel_size": [7, 5, 3, 3, 3], "patch_size": 4, "layer_scale_init_value": 1.0,
}  # fmt: skip
#: Moves the masks after the first of two steps, to where the gradient over all images is largest.
SPARSITY = {"density": 0.6, "distribution": "snip", "update_frequency": 1, "prune_rate": 0.3, "growth": "gradient"}
NETWORKS = {
    "refconv": ({**REFCONV, "layer": {"name": "RefConv2D", "init": "zero"}}, {}),
    "spconv": ({"name": "ResNet20_SPConv", "class_num": 2}, {}),
    "slak": (SLAK, {"Sparsity": SPARSITY}),
    "backbone": (PLAIN, {"Sparsity": SPARSITY}),
    "repmlp": ({"name": "RepMLPNet_micro", "class_num": 2, "image_size": 16, "patch_size": 2}, {}),
    # What changes from one epoch to the next is among its layers.
    "every": ({"name": "OfEveryLayer", "class_num": 2}, {}),
}
#: Kind of run -> processes, and which networks they train.
PROCESSES = {"one": (1, list(NETWORKS)), "two": (2, list(NETWORKS)), "four": (4, ["refconv", "slak", "every"])}
EPOCHS = {"every": 2, "repmlp": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """16 images to train on: two steps for two processes with four images each, and for one with eight."""
    place = Place(tmp_path_factory.mktemp("processes"))
    lines = (place.data / "train.txt").read_text().splitlines(keepends=True)
    (place.data / "train.txt").write_text("".join([*lines, *lines[::-1]]))
    return place


@pytest.fixture(scope="module")
def baseline(place):
    """A plain backbone whose batch norms know its images, and that has learnt nothing yet."""
    overrides = ["Global.epochs=12", "Global.save_interval=1000", "Global.eval_during_train=False"]
    overrides += ["DataLoader.Train.sampler.batch_size=8", "Optimizer.lr.learning_rate=1e-9"]
    assert train_as_a_process_of_its_own(place.arguments(place.config(PLAIN), "baseline", *overrides)) == 0
    return place.saved("baseline")


def commands_of(place, baseline, kind):
    """Return what trains the networks of a kind of run, watched where there are two, and evaluates the baseline."""
    count, names = PROCESSES[kind]
    found = []
    for name in names:
        arch, sections = NETWORKS[name]
        overrides = [f"DataLoader.Train.sampler.batch_size={8 // count}", f"Global.epochs={EPOCHS.get(name, 1)}"]
        if kind == "two":
            overrides.append("Monitor.interval=1")
        if name in ("refconv", "backbone"):
            overrides.append(f"Global.pretrained_model={baseline}")
        found.append(("train", place.arguments(place.config(arch, **sections), f"{kind}_{name}", *overrides)))
    weights = f"Global.pretrained_model={baseline}"
    return [*found, ("eval", place.arguments(place.config(PLAIN), f"{kind}_eval", weights))]


@pytest.fixture(scope="module")
def alone(place, baseline):
    """Everything trained by one process; the path of a sparse network among it."""
    assert set(commands.run(commands_of(place, baseline, "one"))) == {0}
    return place.saved("one_backbone")


@pytest.fixture(scope="module")
def uninterrupted(place):
    """Return the arguments of a sparse training with everything that is drawn anew in each epoch."""
    sections = config_of(place.data, PLAIN)
    train = sections["DataLoader"]["Train"]
    train["sampler"]["shuffle"] = True
    train["dataset"]["transform_ops"].insert(1, {"RandFlipImage": {"flip_code": 1}})
    sections["Global"].update(epochs=12, save_interval=1000)
    sections["Optimizer"]["lr"] = {"name": "Cosine", "learning_rate": 0.002}
    sparsity = {**SPARSITY, "distribution": "erk", "update_frequency": 3}
    config = place.config(PLAIN, **{k: v for k, v in sections.items() if k != "Arch"}, Sparsity=sparsity)
    return place.arguments(config, "uninterrupted")


@pytest.fixture(scope="module")
def together(place, baseline, alone, uninterrupted):
    """Everything trained by two processes, and then what they refuse: commands, checkpoints and masks of their own."""
    wanted = commands_of(place, baseline, "two")
    plain, sparse = place.config(PLAIN), place.config(PLAIN, Sparsity=SPARSITY)
    draws = ["Global.seed=RANK", f"Global.pretrained_model={baseline}", "Sparsity.distribution=erk"]
    grows = ["Global.seed=RANK", f"Global.pretrained_model={alone}", "Sparsity.growth=random"]
    wanted += [("train", place.arguments(sparse, "draws", *draws)), ("train", place.arguments(sparse, "grows", *grows))]
    wanted.append(("train", place.arguments(plain, "differs", "Optimizer.lr.learning_rate=0.01RANK")))
    shutil.copytree(place.root / "one_backbone", place.root / "copy_0")
    wanted.append(("train", place.arguments(sparse, "copy_RANK", "Global.checkpoints=auto", "Global.epochs=2")))
    return run_commands(place, "together", 2, [*wanted, ("train as it is", uninterrupted)])


@pytest.fixture(scope="module")
def four(place, baseline, alone):
    return run_commands(place, "four", 4, commands_of(place, baseline, "four"))


def run_commands(place, run, count, wanted):
    """Run commands in several processes, the last of which must succeed; return the output of each process."""
    file = place.root / f"{run}.json"
    file.write_text(json.dumps(wanted))
    done = run_processes(place, run, count, commands.__file__, str(file))
    assert done.returncode == 0, done.stdout[-3000:]
    return [(place.root / f"{run}_logs" / f"workerlog.{rank}").read_text() for rank in range(count)]


def run_processes(place: Place, run: str, count: int, *command: str) -> subprocess.CompletedProcess:
    """Run a script in several processes from another folder; whatever is left of it afterwards is ended."""
    launcher = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", str(count)]
    command = [*launcher, "--log_dir", str(place.root / f"{run}_logs"), *command]
    process = start(command, place.data, {})
    output = ended(process)
    return subprocess.CompletedProcess(command, process.returncode, output)


def start(command, folder, environment):
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def ended(process):
    """Return what a process says until its end, which comes in time; whatever it started ends with it."""
    try:
        return process.communicate(timeout=150)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in ("two", "four") for name in PROCESSES[kind][1]])
def test_several_processes_are_one_with_larger_batches(place, alone, request, kind, name):
    request.getfixturevalue({"two": "together", "four": "four"}[kind])
    start, one, several = (
        checkpoints.load(path)
        for path in (
            place.root / f"{kind}_{name}" / "start.pdparams",
            f"{place.saved(f'one_{name}')}.pdparams",
            f"{place.saved(f'{kind}_{name}')}.pdparams",
        )
    )
    assert one.keys() == several.keys()
    changes = {key: np.abs(value - start[key]).max() for key, value in one.items() if key in start}
    # It is no weight: it falls by a schedule.
    learned = max(change for key, change in changes.items() if not key.endswith("temperature"))
    assert learned > 1e-3
    for key, value in one.items():
        if value.dtype == np.float32:
            np.testing.assert_allclose(several[key], value, rtol=1e-5, atol=1e-5 * learned, err_msg=key)
        else:
            np.testing.assert_array_equal(several[key], value, err_msg=key)
    if "Sparsity" in NETWORKS[name][1]:
        assert several[masks.STEP].tolist() == [2]
        assert any(key.endswith(masks.SUFFIX) for key in several)
    if name == "every":
        still = {key for key, change in changes.items() if not change and not key.endswith(("_mean", "_variance"))}
        assert len(still) == 1, f"but for RefConv's base every layer trains, and {still} did not"


@pytest.mark.parametrize("kind", ["two", "four"])
def test_several_processes_evaluate_and_save_once(place, alone, request, kind):
    request.getfixturevalue({"two": "together", "four": "four"}[kind])
    names = PROCESSES[kind][1]
    for name in names:
        log = place.log(f"{kind}_{name}")
        # Four batches of two or four for each process alone, two when the images are shared.
        assert f"[Train][Epoch 1/{EPOCHS.get(name, 1)}][Iter: 1/2]" in log
        # What other runs of the process did after this one is in its log as well.
        saved = [line for line in log.splitlines() if " INFO: saved: " in line and f"/{kind}_{name}/" in line]
        assert len(saved) - sum("best_model" in line for line in saved) == 2 * EPOCHS.get(name, 1)
    for run, mode in (*((name, "train") for name in names), ("eval", "eval")):
        one, several = (first_average(place.log(f"{each}_{run}", mode)) for each in ("one", kind))
        assert one.keys() == several.keys() >= {"loss", "top1"}
        # A log has five digits.
        np.testing.assert_allclose(list(several.values()), list(one.values()), rtol=1e-5, atol=1e-5)


def test_the_first_process_alone_writes_what_the_layers_do(place, together):
    for name, tag in (("refconv", "refconv_relative_change"), ("spconv", "spconv_gate"), ("slak", "mask_churn")):
        [file] = (place.root / f"two_{name}").rglob("vdlrecords*.log")
        reader = LogReader(file_path=str(file))
        curves = [reader.get_data("scalar", each) for each in reader.get_tags()["scalar"] if each.startswith(tag)]
        steps = [1, 2] if name == "slak" else [0, 1, 2]
        assert [[each.id for each in curve] for curve in curves] == [steps] * len(curves) != []


def first_average(log):
    """Return what the first evaluation gave."""
    line = next(line for line in log.splitlines() if "[Eval]" in line and "[Avg]" in line)
    return {name: float(value) for name, value in re.findall(r"(\w+): ([\d.]+)", line.split("[Avg]")[1])}


def test_what_differs_stops_both_processes(place, together):
    for log in together:
        codes = re.search("exit codes ([0-9 ]+)", log)[1].split()
        assert codes == [*"0" * (len(NETWORKS) + 1), *"11", *"22", "0"]
        assert "error: the masks of the processes differ after step 0" in log
        assert "error: the masks of the processes differ after step 1" in log
        assert "error: the processes of this training differ in Optimizer: every machine needs the same" in log
        assert "error: the processes of this training do not go on from the same checkpoint" in log
    assert "copy_0" in together[0].split("the same checkpoint;")[1].split(". The first")[0]
    assert "this one would from none" in together[1]
    for run in ("draws", "grows", "differs"):
        assert saving.newest(place.root / run) is None


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("Global.output_dir=elsewhere", True),
        ("Arch.pretrained=elsewhere", True),
        ("DataLoader.Train.dataset.image_root=moved", True),
        ("DataLoader.Train.dataset.cls_label_path=reversed.txt", False),
        ("DataLoader.Train.sampler.batch_size=2", False),
        ("Global.epochs=2", False),
        ("Arch.class_num=3", False),
    ],
)
def test_what_the_processes_must_have_alike(place, monkeypatch, override, same):
    lines = (place.data / "train.txt").read_text().splitlines(keepends=True)
    (place.root / "reversed.txt").write_text("".join(reversed(lines[:-1])) + lines[-1])
    shutil.copytree(place.data, place.root / "moved", dirs_exist_ok=True)
    monkeypatch.chdir(place.root)
    monkeypatch.setattr(agreement.paddle.distributed, "get_world_size", lambda: 2)
    compared = []
    monkeypatch.setattr(agreement, "differing", lambda digests: compared.append(digests) or [])
    for given in ([], [override]):
        config = read_config(place.config(PLAIN), ["Arch.pretrained=here", *given])
        dataset = config["DataLoader"]["Train"]["dataset"]
        loader = SimpleNamespace(dataset=ImageNetDataset(dataset["image_root"], dataset["cls_label_path"]))
        agreement.check_agreement(SimpleNamespace(config=config, train_dataloader=loader))
    assert (compared[:2] == compared[2:]) == same


def test_all_wait_for_what_the_first_one_saves(together):
    saved = max(map(float, re.findall(r"^saves at ([\d.]+)$", together[0], re.M)))
    assert "saves at" not in together[1]
    for log in together:
        assert float(re.search(r"^epoch 2 begins at ([\d.]+)$", log, re.M)[1]) > saved


def test_what_is_measured_is_what_is_saved(place, together, uninterrupted):
    """Each process has counted the statistics of its own images, and the first one's are saved."""
    weights = f"Global.pretrained_model={place.saved('uninterrupted')}"
    assert commands.run([("eval", [*uninterrupted, *place.arguments("", "measured", weights)[2:]])]) == [0]
    while_training, afterwards = (place.log("uninterrupted"), place.log("measured", "eval"))
    measured = first_average(while_training.split("[Train][Epoch 12/12][Avg]")[1])
    assert measured == first_average(afterwards)
    # Neither nothing nor as much as a logarithm can be.
    assert 0.01 < measured["loss"] < 30


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_both(place, alone, rank):
    """The first one cannot write its checkpoint, or the second cannot read an image; neither waits for the other."""
    run = place.root / f"ends_{rank}"
    shutil.copytree(place.root / "one_backbone", run)
    before = saving.newest(run)
    overrides = ["Global.checkpoints=auto", "Global.epochs=3"]
    if rank == 0:
        # Not a folder, as a staged checkpoint would be.
        (run / ".latest.partial").write_text("")
        message = "the checkpoint cannot be written"
    else:
        lines = (place.data / "train.txt").read_text().splitlines(keepends=True)
        (place.data / "broken.png").write_bytes(b"no image")
        # The second process has the second four images.
        (place.root / "broken.txt").write_text("".join([*lines[:5], "broken.png 0\n", *lines[6:]]))
        overrides.append(f"DataLoader.Train.dataset.cls_label_path={place.root / 'broken.txt'}")
        message = "an image cannot be read"
    config = place.config(PLAIN, Sparsity=SPARSITY)
    arguments = place.arguments(config, run.name, *overrides)
    done = run_processes(place, run.name, 2, str(TOOLS / "train.py"), *arguments)
    assert done.returncode > 0
    logs = [(place.root / f"{run.name}_logs" / f"workerlog.{r}").read_text() for r in (0, 1)]
    assert [message in log for log in logs] == [rank == 0, rank == 1]
    assert saving.newest(run) == before


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_process_that_cannot_start_ends_the_other(place):
    """As on two machines: no launcher sees both."""
    port = free_port()
    shared = {"PADDLE_TRAINERS_NUM": "2", "PADDLE_MASTER": f"127.0.0.1:{port}", "PADDLE_DISTRI_BACKEND": "gloo"}
    shared["PADDLE_TRAINER_ENDPOINTS"] = f"127.0.0.1:{port},127.0.0.1:{free_port()}"
    started = []
    for rank, more in enumerate(([], ["DataLoader.Train.dataset.cls_label_path=nowhere.txt"])):
        own = {
            "PADDLE_TRAINER_ID": str(rank),
            "PADDLE_CURRENT_ENDPOINT": shared["PADDLE_TRAINER_ENDPOINTS"].split(",")[rank],
        }
        command = [sys.executable, str(TOOLS / "train.py"), *place.arguments(place.config(PLAIN), "starts", *more)]
        started.append(start(command, place.data, {**shared, **own}))
    said = [ended(process) for process in started]
    assert [process.returncode for process in started] == [1, 2], said
    assert "error: DataLoader.Train.dataset.cls_label_path: there is no nowhere.txt" in said[1]
    assert "error: train cannot start: another process of this training has ended" in said[0]


# ---------------------------------------------------------------------------------------------------------------------
# docs/machines.md


PAGE = (ROOT / "docs" / "machines.md").read_text(encoding="utf-8")


def test_a_killed_process_of_one_of_two_machines(place, together, uninterrupted):
    """Both type the page's loop; it goes on from a checkpoint, to what it would have come to by itself."""
    [loop] = [block for _, block in pages.blocks_of(PAGE) if block.startswith("until ")]
    run = place.root / "killed"
    overrides = [f"Global.output_dir={run}", "Global.checkpoints=auto"]
    given = [*uninterrupted, *(part for each in overrides for part in ("-o", each))]
    for old, new in (
        ("10.0.0.1:8090", f"127.0.0.1:{free_port()}"),
        ("tools/train.py -c ppcls_configs/digits/slak/SLaK_micro.yaml", shlex.join([str(TOOLS / "train.py"), *given])),
        ("sleep 10", "sleep 1"),
    ):
        assert old in loop
        loop = loop.replace(old, new)
    path = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    machines = [place.root / name for name in ("machine_a", "machine_b")]
    for folder in machines:
        folder.mkdir()
    started = [start(["bash", "-c", loop], folder, path) for folder in machines]
    killed = False
    while not killed and all(process.poll() is None for process in started):
        time.sleep(0.02)
        if run.exists() and (saved := saving.newest(run)) and saved.epoch >= 3:
            first = next(process for folder in machines for process, rank in workers(folder) if rank == "0")
            os.kill(first, 9)
            killed = True
    said = [ended(process) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert killed
    logs = "".join((folder / "log" / "workerlog.0").read_text() for folder in machines)
    assert "training goes on from" in logs
    assert any("Exit code -9" in each for each in said)
    whole, resumed = (checkpoints.load(f"{place.saved(name)}.pdparams") for name in ("uninterrupted", "killed"))
    assert whole.keys() == resumed.keys()
    for key, value in whole.items():
        np.testing.assert_array_equal(resumed[key], value, err_msg=key)
    states = [saving.read_states(f"{place.saved(name)}.pdstates") for name in ("uninterrupted", "killed")]
    assert states[0]["best"] == states[1]["best"]
    assert shown_curves(run) == shown_curves(place.root / "uninterrupted")


def workers(folder):
    """Return (process, its number in the training) for what a launcher in a folder has started."""
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            entries = dict(entry.split("=", 1) for entry in place.read_text().split("\0") if "=" in entry)
            if entries.get("PADDLE_LOG_DIR") == str(folder / "log") and "PADDLE_TRAINER_ID" in entries:
                found.append((int(place.parent.name), entries["PADDLE_TRAINER_ID"]))
    return found


def test_the_launcher_knows_every_option_of_the_page(monkeypatch):
    """Of one that it does not know it takes the value for the script, or starts an older launcher."""
    lines = [
        line
        for _, block in pages.blocks_of(PAGE)
        for line in pages.commands_of(block)
        if "paddle.distributed.launch" in line
    ]
    assert len(lines) == 5
    for line in lines:
        command = re.search(r"paddle\.distributed\.launch (.*?)( \|\| .*)?$", line)[1]
        monkeypatch.setattr(sys, "argv", ["launch", *shlex.split(command)])
        known, unknown = parse_args()
        assert (known.training_script, unknown) == ("tools/train.py", [])
        mode, config, *_ = known.training_script_args
        assert mode == "-c"
        assert (ROOT / config).is_file()
