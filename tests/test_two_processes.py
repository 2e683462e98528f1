"""Two processes on a CPU, joined by gloo: the same training as one with batches twice as large, and what ends both."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import commands
import numpy as np
import pytest
from test_train_tools import PLAIN, REFCONV, TOOLS, Place, train_as_a_process_of_its_own
from visualdl import LogReader

from paddle_reparam.ppcls import saving
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
}


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


def commands_of(place, baseline, kind, batch_size):
    """Return what trains every network, watched where there are two processes, and evaluates the baseline."""
    found = []
    for name, (arch, sections) in NETWORKS.items():
        overrides = [f"DataLoader.Train.sampler.batch_size={batch_size}"]
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
    assert commands.run(commands_of(place, baseline, "one", 8)) == [0] * 5
    return place.saved("one_backbone")


@pytest.fixture(scope="module")
def together(place, baseline, alone):
    """Everything trained by two processes, and then what they refuse: seeds, and so masks, of their own."""
    wanted = commands_of(place, baseline, "two", 4)
    sparse = place.config(PLAIN, Sparsity=SPARSITY)
    draws = ["Global.seed=RANK", f"Global.pretrained_model={baseline}", "Sparsity.distribution=erk"]
    grows = ["Global.seed=RANK", f"Global.pretrained_model={alone}", "Sparsity.growth=random"]
    wanted += [("train", place.arguments(sparse, "draws", *draws)), ("train", place.arguments(sparse, "grows", *grows))]
    file = place.root / "together.json"
    file.write_text(json.dumps([*wanted, wanted[4]]))
    done = run_two_processes(place, "together", commands.__file__, str(file))
    assert done.returncode == 0, done.stdout[-3000:]
    return [(place.root / "together_logs" / f"workerlog.{rank}").read_text() for rank in (0, 1)]


def run_two_processes(place: Place, run: str, *command: str) -> subprocess.CompletedProcess:
    """Run a script in two processes from another folder; whatever is left of it afterwards is ended."""
    launcher = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node", "2"]
    root = str(Path(__file__).resolve().parents[1])
    process = subprocess.Popen(
        [*launcher, "--log_dir", str(place.root / f"{run}_logs"), *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place.data, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PADDLE_DISTRI_BACKEND": "gloo", "PYTHONPATH": root},
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=150)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, output)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_are_one_with_batches_twice_as_large(place, alone, together, name):
    start, one, two = (
        checkpoints.load(path)
        for path in (
            place.root / f"two_{name}" / "start.pdparams",
            f"{place.saved(f'one_{name}')}.pdparams",
            f"{place.saved(f'two_{name}')}.pdparams",
        )
    )
    assert one.keys() == two.keys()
    learned = max(np.abs(value - start[key]).max() for key, value in one.items() if key in start)
    assert learned > 1e-3
    for key, value in one.items():
        if value.dtype == np.float32:
            np.testing.assert_allclose(two[key], value, rtol=1e-5, atol=1e-5 * learned, err_msg=key)
        else:
            np.testing.assert_array_equal(two[key], value, err_msg=key)
    if "Sparsity" in NETWORKS[name][1]:
        assert two[masks.STEP].tolist() == [2]
        assert any(key.endswith(masks.SUFFIX) for key in two)


def test_two_processes_evaluate_and_save_once(place, alone, together):
    for name in NETWORKS:
        log = place.log(f"two_{name}")
        # Four batches of four for each process alone, two when the images are shared.
        assert "[Train][Epoch 1/1][Iter: 1/2]" in log
        # What other runs of the process did after this one is in its log as well.
        assert sum(" INFO: saved: " in line and f"/two_{name}/" in line for line in log.splitlines()) == 3
    for run, mode in (*((name, "train") for name in NETWORKS), ("eval", "eval")):
        one, two = (first_average(place.log(f"{kind}_{run}", mode)) for kind in ("one", "two"))
        assert one.keys() == two.keys() >= {"loss", "top1"}
        # A log has five digits.
        np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5, atol=1e-5)


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


def test_masks_that_differ_stop_both_processes(place, together):
    for log in together:
        assert "exit codes 0 0 0 0 0 1 1 0" in log
        assert "error: the masks of the processes differ after step 0" in log
        assert "error: the masks of the processes differ after step 1" in log
    assert saving.newest(place.root / "draws") is None
    assert saving.newest(place.root / "grows") is None


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
    done = run_two_processes(place, run.name, str(TOOLS / "train.py"), *arguments)
    assert done.returncode > 0
    logs = [(place.root / f"{run.name}_logs" / f"workerlog.{r}").read_text() for r in (0, 1)]
    assert [message in log for log in logs] == [rank == 0, rank == 1]
    assert saving.newest(run) == before
