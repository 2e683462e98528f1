"""Runs that are killed, and that meet what no training can go on with: what is saved stays whole, and says so."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from paddle import nn
from test_train_tools import IN_A_CHECKOUT, PLAIN, Place, config_of, train_as_a_process_of_its_own
from visualdl import LogReader, LogWriter

from paddle_reparam.errors import CheckpointError
from paddle_reparam.ppcls import saving, setup
from paddle_reparam.surgery.masks import STEP, SUFFIX
from paddle_reparam.training.datasets import write_digits
from paddle_reparam.weights import checkpoints

EPOCHS = 4
SPARSITY = {"density": 0.6, "distribution": "erk", "update_frequency": 3, "prune_rate": 0.5, "growth": "gradient"}
ROOT = Path(__file__).resolve().parents[1]
#: Trains, and kills itself with SIGKILL: at the given training step, or when the given file of a set is put in place.
KILLED = """
import os, signal, sys
from paddle_reparam.ppcls import setup
setup()
import paddle
from paddle_reparam.ppcls import engine, saving
from paddle_reparam.ppcls.command import main
kind, count = sys.argv[1], int(sys.argv[2])
calls = 0
def counted(function):
    def run(*arguments):
        global calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return run
if kind == "step":
    engine.check_loss = counted(engine.check_loss)
elif kind == "link":
    saving._link = counted(saving._link)
else:
    paddle.save = counted(paddle.save)
sys.exit(main("train", sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def config(place):
    """Two batches an epoch, in an order that is drawn, and images that are flipped at random."""
    sections = config_of(place.data, PLAIN)
    train = sections["DataLoader"]["Train"]
    train["sampler"]["shuffle"] = True
    train["dataset"]["transform_ops"].insert(1, {"RandFlipImage": {"flip_code": 1}})
    sections["Global"].update(epochs=EPOCHS, save_interval=1000)
    sections["Optimizer"]["lr"] = {"name": "Cosine", "learning_rate": 0.05}
    return place.config(PLAIN, **{k: v for k, v in sections.items() if k != "Arch"}, Sparsity=SPARSITY)


@pytest.fixture(scope="module")
def uninterrupted(place, config):
    return train_whole(place, config, "uninterrupted")


@pytest.fixture(scope="module")
def slak(place):
    """The library's own config, on eight of the digits; an epoch has two steps, and every other step is an update."""
    digits = place.root / "digits"
    write_digits(digits)
    sections = yaml.safe_load((ROOT / "ppcls_configs" / "digits" / "slak" / "SLaK_micro.yaml").read_text())
    for split, name, count in (("Train", "train_list.txt", 8), ("Eval", "val_list.txt", 5)):
        lines = (digits / name).read_text().splitlines(keepends=True)
        (digits / name).write_text("".join(lines[:: len(lines) // count][:count]))
        dataset = sections["DataLoader"][split]["dataset"]
        dataset.update(image_root=str(digits), cls_label_path=str(digits / name))
        sections["DataLoader"][split]["sampler"]["batch_size"] = 4
    sections["Global"].update(epochs=EPOCHS, save_interval=1)
    sections["Sparsity"]["update_frequency"] = 2
    return place.config(sections.pop("Arch"), **sections)


@pytest.fixture(scope="module")
def uninterrupted_slak(place, slak):
    return train_whole(place, slak, "uninterrupted_slak")


def train_whole(place, config, run):
    assert train_as_a_process_of_its_own(place.arguments(config, run)) == 0
    return checkpoints.load(f"{place.saved(run)}.pdparams")


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


def masks_of(state):
    return {name: value for name, value in state.items() if name.endswith(SUFFIX)}


def assert_exactly_sparse(state):
    masks = masks_of(state)
    weights = {n: v for n, v in state.items() if v.ndim in (2, 4) and n not in masks}
    kept = sum(int(masks.get(f"{name}{SUFFIX}", np.ones(w.shape)).sum()) for name, w in weights.items())
    assert kept == round(0.6 * sum(w.size for w in weights.values()))
    for name, mask in masks.items():
        assert not state[name[: -len(SUFFIX)]][mask == 0].any()


def test_a_sparse_run_has_exactly_its_density(uninterrupted):
    assert_exactly_sparse(uninterrupted)
    assert uninterrupted[STEP].tolist() == [2 * EPOCHS]


def test_a_sparse_slak_has_exactly_its_density_after_every_update(place, uninterrupted_slak):
    epochs = [
        checkpoints.load(f"{place.saved('uninterrupted_slak', f'epoch_{i + 1}')}.pdparams") for i in range(EPOCHS)
    ]
    for i, state in enumerate(epochs):
        assert_exactly_sparse(state)
        assert state[STEP].tolist() == [2 * (i + 1)]
    # The last step is no update: what grew in it would never learn.
    moved = [any((a[n] != b[n]).any() for n in masks_of(b)) for a, b in zip(epochs, epochs[1:])]
    assert moved == [True, True, False]


@pytest.mark.parametrize(("kind", "count"), [("link", 1), ("link", 6), ("link", 7), ("save", 9)])
def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_been(place, config, uninterrupted, kind, count):
    kill_and_go_on(place, config, f"killed_{kind}_{count}", "uninterrupted", kind, count)


@pytest.mark.parametrize(("kind", "count"), [("step", 6), ("save", 5)])
def test_a_sparse_slak_goes_on_as_if_it_had_not_been_killed(place, slak, uninterrupted_slak, kind, count):
    before = kill_and_go_on(place, slak, f"killed_slak_{kind}", "uninterrupted_slak", kind, count)
    if kind == "step":
        assert before.epoch == 2


def kill_and_go_on(place, config, run, whole, kind, count, *overrides):
    """Return the newest whole set of a run that killed itself, after it has gone on to the end from there.

    Its weights and its curves are then those of the run `whole`, which nobody killed.
    """
    script = place.root / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), kind, str(count), *place.arguments(config, run, *overrides)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=place.root)
    assert done.returncode == -signal.SIGKILL, done.stdout[-2000:] + done.stderr[-2000:]
    before = saving.newest(place.root / run)
    arguments = place.arguments(config, run, *overrides, "Global.checkpoints=auto")
    assert train_as_a_process_of_its_own(arguments) == 0
    assert (before is None) == ("goes on from" not in place.log(run))
    assert_same(*(checkpoints.load(f"{place.saved(each)}.pdparams") for each in (run, whole)))
    assert not list((place.root / run).rglob("*.partial"))
    assert not list((place.root / run).rglob("*.new"))
    assert ".partial" not in place.log(run)
    assert shown_curves(place.root / run) == shown_curves(place.root / whole)
    return before


def shown_curves(folder):
    """Return tag -> [(step, value)] of the scalars that VisualDL shows of a run: it picks one file of a folder."""
    picked = LogReader()
    picked.dir = [str(folder)]
    [(folder, file)] = picked.logs().items()
    reader = LogReader(file_path=os.path.join(folder, file))
    curves = {tag: reader.get_data("scalar", tag) for tag in reader.get_tags()["scalar"]}
    return {tag: [(each.id, each.value) for each in curve] for tag, curve in curves.items()}


def test_mixed_precision_moves_the_masks_too(place, config):
    """PaddleClas 2.4 calls the optimizer by another name then."""
    scaling = ["AMP.level=O1", "AMP.scale_loss=128.0", "AMP.use_dynamic_loss_scaling=True"]
    assert train_as_a_process_of_its_own(place.arguments(config, "amp", *scaling)) == 0
    state = checkpoints.load(f"{place.saved('amp')}.pdparams")
    assert_exactly_sparse(state)
    assert state[STEP].tolist() == [2 * EPOCHS]


@IN_A_CHECKOUT
def test_gathered_gradients_are_one_step(place, config):
    """Five batches, of which two make a step and one is left over in every epoch."""
    overrides = ["DataLoader.Train.sampler.batch_size=2", "Global.update_freq=2"]
    listed = place.root / "ten.txt"
    lines = (place.data / "train.txt").read_text().splitlines(keepends=True)
    listed.write_text("".join([*lines, *lines[:2]]))
    overrides += [f"DataLoader.Train.dataset.cls_label_path={listed}", "Global.save_interval=1"]
    overrides.append("Sparsity.update_frequency=2")
    assert train_as_a_process_of_its_own(place.arguments(config, "gathered", *overrides)) == 0
    whole = checkpoints.load(f"{place.saved('gathered')}.pdparams")
    assert whole[STEP].tolist() == [2 * EPOCHS]
    # The last step is known as such: it is no update.
    assert_same(masks_of(whole), masks_of(checkpoints.load(f"{place.saved('gathered', 'epoch_3')}.pdparams")))
    assert saving.read_states(f"{place.saved('gathered')}.pdstates")["global_step"] == 4 * EPOCHS
    before = kill_and_go_on(place, config, "gathered_killed", "gathered", "step", 10, *overrides)
    assert (before.epoch, before.step) == (2, 8)


@IN_A_CHECKOUT
def test_a_moving_average_is_sparse_and_goes_on(place, config):
    assert train_as_a_process_of_its_own(place.arguments(config, "ema", "EMA.decay=0.5")) == 0
    average, trained = (checkpoints.load(place.saved("ema") + suffix) for suffix in (".pdparams", ".pdema"))
    assert_exactly_sparse(average)
    assert_same(masks_of(average), masks_of(trained))
    assert any((average[name] != value).any() for name, value in trained.items())
    kill_and_go_on(place, config, "ema_killed", "ema", "step", 6, "EMA.decay=0.5")


def test_the_best_metric_and_the_step_survive(place, config, uninterrupted):
    states = saving.read_states(f"{place.saved('uninterrupted')}.pdstates")
    assert states["global_step"] == 2 * EPOCHS
    assert states["best"]["metric"] >= states["metric"]
    arguments = place.arguments(
        config, "again", f"Global.checkpoints={place.saved('uninterrupted')}", f"Global.epochs={EPOCHS + 1}"
    )
    assert train_as_a_process_of_its_own(arguments) == 0
    again = saving.read_states(f"{place.saved('again')}.pdstates")
    assert again["global_step"] == 2 * EPOCHS + 2
    assert again["best"]["metric"] >= states["best"]["metric"]
    assert again["epoch"] == EPOCHS + 1
    # In a folder of its own it shows what was recorded in the first one, too.
    shown = shown_curves(place.root / "again")
    for tag, curve in shown_curves(place.root / "uninterrupted").items():
        last = [EPOCHS + 1] if tag.startswith("eval_") else [2 * EPOCHS + 1, 2 * EPOCHS + 2]
        assert shown[tag][: len(curve)] == curve
        assert [step for step, _ in shown[tag][len(curve) :]] == last


def test_a_log_goes_on_where_its_checkpoint_was_saved(tmp_path):
    """What came later is dropped, a record that was cut short too; what is no log is a new one."""
    setup()
    from paddle_reparam.ppcls import curves

    (tmp_path / "run" / "vdl").mkdir(parents=True)
    first = LogWriter(str(tmp_path / "run" / "vdl"), file_name="vdlrecords.0000000001.log")
    log = curves.Log(first)
    log.add_scalar("train_loss", 2.0, 1)
    log.add_evaluation("eval_acc", 0.5, 1)
    log.add_scalar("eval_acc", 0.5, 1)
    before = log.position()
    log.add_scalar("train_loss", 1.0, 2)
    log.close()
    odd = [None, 3, {}, {"file": "../vdl/vdlrecords.0000000001.log", "bytes": 9}, {**before, "bytes": -1},
           {**before, "bytes": "9"}, {**before, "file": "vdlrecords.0000000002.log"}]  # fmt: skip
    place = (str(tmp_path / "run" / "Net" / "latest"), str(tmp_path / "new"))
    for size, kept in ((before["bytes"], 2), (before["bytes"] - 1, 1)):
        resumed = curves.Log(LogWriter(str(tmp_path / "new" / "vdl"), file_name=f"vdlrecords.{size:010}.log"))
        assert not any(resumed.go_on(each, *place) for each in odd)
        assert resumed.go_on({**before, "bytes": size}, *place)
        resumed.add_scalar("train_loss", 4.0, 2)
        resumed.close()
        assert shown_curves(tmp_path / "new") == {
            "train_loss": [(1, 2.0), (2, 4.0)], **({"eval_acc": [(1, 0.5)]} if kept == 2 else {}),
        }  # fmt: skip
        shutil.rmtree(tmp_path / "new")


def test_without_the_section_a_sparse_network_becomes_a_dense_one(place, slak, uninterrupted_slak):
    overrides = ["Sparsity=null", f"Global.pretrained_model={place.saved('uninterrupted_slak')}", "Global.epochs=1"]
    assert train_as_a_process_of_its_own(place.arguments(slak, "dense", *overrides)) == 0
    assert "the weights carry masks and the config has no Sparsity" in place.log("dense")
    dense, masks = checkpoints.load(f"{place.saved('dense')}.pdparams"), masks_of(uninterrupted_slak)
    assert set(dense) == set(uninterrupted_slak) - set(masks) - {STEP}
    assert any(dense[name.removesuffix(SUFFIX)][mask == 0].any() for name, mask in masks.items())


def test_a_set_whose_files_do_not_belong_together_is_refused(place, config, uninterrupted, capsys):
    assert train_as_a_process_of_its_own(place.arguments(config, "mixed", "Global.epochs=2")) == 0
    prefix = Path(place.saved("mixed"))
    best = saving.newest(place.root / "mixed")
    weights = prefix.with_suffix(".pdparams")
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    # A copy, not the file itself: a record's file and its place may be one.
    weights.unlink()
    weights.write_bytes(data)
    assert saving.newest(place.root / "mixed") != best
    arguments = place.arguments(config, "mixed", f"Global.checkpoints={prefix}")
    assert train_as_a_process_of_its_own(arguments) == 1
    assert "were not saved together, or are damaged; the newest whole one is" in capsys.readouterr().err


def test_the_state_of_another_optimizer_is_refused(place, config, uninterrupted, capsys):
    sections = yaml.safe_load(Path(config).read_text())
    learning_rate = {"name": "Constant", "learning_rate": 0.01}
    other = place.config(
        sections.pop("Arch"), **{**sections, "Optimizer": {"name": "AdamW", "weight_decay": 0.05, "lr": learning_rate}}
    )
    resume = (f"Global.checkpoints={place.saved('uninterrupted')}", f"Global.epochs={EPOCHS + 1}")
    sentence = fails(place, other, "another", capsys, *resume)
    assert "latest.pdopt: it is of another optimizer than the config's: it has " in sentence
    assert "velocity_0, which AdamW does not use; resume with the Optimizer that it was saved with" in sentence


@pytest.mark.parametrize("saved", ["SGD", "Momentum", "Adam", "AdamW", "RMSProp"])
@pytest.mark.parametrize("used", ["SGD", "Momentum", "Adam", "AdamW", "RMSProp"])
def test_which_states_are_of_another_optimizer(saved, used):
    setup()
    from paddle_reparam.ppcls import resuming

    layer = nn.Linear(2, 2)
    by_name = {
        name: getattr(paddle.optimizer, name)(
            learning_rate=paddle.optimizer.lr.CosineAnnealingDecay(0.1, 3), parameters=layer.parameters()
        )
        for name in {saved, used}
    }
    layer(paddle.ones([1, 2])).sum().backward()
    by_name[saved].step()
    state = {k: v.numpy() if isinstance(v, paddle.Tensor) else v for k, v in by_name[saved].state_dict().items()}
    if saved == used or {saved, used} == {"Adam", "AdamW"}:
        resuming.load_optimizer("latest.pdopt", by_name[used], state)
    else:
        with pytest.raises(CheckpointError, match="it is of another optimizer than the config's"):
            resuming.load_optimizer("latest.pdopt", by_name[used], state)


def test_a_resumed_run_needs_no_unpickling(place, config, uninterrupted, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("paddle.load runs what a file says")

    monkeypatch.setattr(paddle, "load", refuse)
    prefix = place.saved("uninterrupted")
    arguments = place.arguments(config, "safe", f"Global.checkpoints={prefix}", f"Global.epochs={EPOCHS + 1}")
    assert train_as_a_process_of_its_own(arguments) == 0


# ---------------------------------------------------------------------------------------------------------------------
# What no training can go on with


def fails(place, config, run, capsys, *overrides):
    """Return the one sentence with which a training ends."""
    assert train_as_a_process_of_its_own(place.arguments(config, run, *overrides)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("batch_size", "text"),
    [(4, "the CELoss is nan in epoch 1, at step 2"), (8, "numbers that are not finite, and nothing is saved")],
)
def test_what_is_no_number_ends_the_run_before_it_is_saved(place, config, capsys, batch_size, text):
    """In the middle of an epoch the next loss tells; after its last step only the weights do."""
    overrides = ["Optimizer.lr.learning_rate=1e39", f"DataLoader.Train.sampler.batch_size={batch_size}"]
    message = fails(place, config, f"nan_{batch_size}", capsys, *overrides)
    assert text in message
    assert "smaller learning rate" in message
    assert saving.newest(place.root / f"nan_{batch_size}") is None


def test_labels_without_an_output_are_named(place, config, capsys):
    listed = place.root / "labels.txt"
    listed.write_text((place.data / "train.txt").read_text().replace("train_3.png 1", "train_3.png 7"))
    message = fails(place, config, "labels", capsys, f"DataLoader.Train.dataset.cls_label_path={listed}")
    assert "DataLoader.Train: 1 of 8 labels are none of 0 to 1, the first is 7" in message
    assert "train_3.png" in message


def test_an_empty_list_is_named(place, config, capsys):
    listed = place.root / "empty.txt"
    listed.write_text("")
    message = fails(place, config, "empty", capsys, f"DataLoader.Train.dataset.cls_label_path={listed}")
    assert "DataLoader.Train" in message
    assert "empty" in message


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_ends_the_run(place, config, capsys, workers):
    (place.data / "broken.png").write_bytes(b"no image")
    listed = place.root / "broken.txt"
    listed.write_text((place.data / "train.txt").read_text() + "broken.png 0\n")
    message = fails(
        place, config, f"broken_{workers}", capsys, f"DataLoader.Train.dataset.cls_label_path={listed}",
        f"DataLoader.Train.loader.num_workers={workers}",
    )  # fmt: skip
    assert "an image cannot be read" in message
    assert "broken.png" in message


def test_an_image_that_cannot_be_evaluated_ends_the_run_before_its_metric_is_saved(place, config, capsys):
    (place.data / "broken.png").write_bytes(b"no image")
    listed = place.root / "broken_val.txt"
    listed.write_text((place.data / "val.txt").read_text() + "broken.png 0\n")
    message = fails(place, config, "broken_val", capsys, f"DataLoader.Eval.dataset.cls_label_path={listed}")
    assert "1 of 6 images cannot be read" in message
    assert saving.newest(place.root / "broken_val") is None


def test_a_full_disk_leaves_the_last_checkpoint(place, config, capsys, monkeypatch):
    assert train_as_a_process_of_its_own(place.arguments(config, "full", "Global.epochs=1")) == 0
    before = saving.newest(place.root / "full")
    capsys.readouterr()
    save, calls = paddle.save, []

    def full(state, path, *arguments, **options):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"cut")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path, *arguments, **options)

    monkeypatch.setattr(paddle, "save", full)
    message = fails(place, config, "full", capsys, "Global.checkpoints=auto")
    assert "No space left on device" in message
    assert "the one before it is unchanged" in message
    assert saving.newest(place.root / "full") == before
    assert not list((place.root / "full").rglob("*.partial"))


def test_a_section_that_means_nothing_is_refused(place, capsys):
    for section, text in (
        ({"density": 0.6, "frequency": 3}, "Sparsity has no frequency; it takes density"),
        ({"density": 0.6, "growth": "hope"}, "Sparsity.growth is 'hope'; it takes one of random, gradient"),
    ):
        config = place.config(PLAIN, Sparsity=section)
        assert train_as_a_process_of_its_own(place.arguments(config, "refused")) == 2
        assert text in capsys.readouterr().err


def test_records_are_what_they_say(place, uninterrupted):
    [record] = (place.root / "uninterrupted").rglob(f"latest{saving.RECORD}")
    content = json.loads(record.read_text())
    assert (content["epoch"], content["step"]) == (EPOCHS, 2 * EPOCHS)
    assert sorted(Path(name).suffix for name in content["files"]) == sorted(saving.SUFFIXES)


def inodes(prefix):
    return [os.stat(prefix + suffix).st_ino for suffix in (".pdparams", ".pdopt")]


def test_what_an_epoch_saved_is_on_the_disk_once(place, uninterrupted_slak):
    latest, *epochs = (place.saved("uninterrupted_slak", name) for name in ("latest", "epoch_4", "epoch_3", "epoch_2"))
    assert inodes(latest) == inodes(epochs[0])
    assert len({inode for prefix in epochs for inode in inodes(prefix)}) == 6
    best = place.saved("uninterrupted_slak", "best_model")
    epoch = saving.read_states(f"{best}.pdstates")["epoch"]
    assert inodes(best) == inodes(place.saved("uninterrupted_slak", f"epoch_{epoch}"))


def test_files_are_linked_by_what_they_hold(tmp_path, monkeypatch):
    from paddle_reparam.ppcls.written_once import Files

    layer, files = nn.Linear(2, 2), Files()

    def write(net, optimizer, states, folder, prefix):
        for name, content in ((f"{prefix}.pdparams", net.state_dict()), (f"{prefix}.pdopt", [optimizer])):
            paddle.save(content, f"{folder}/{name}")

    def save(prefix, optimizer):
        saving.save_whole(write, layer, optimizer, {"epoch": 1}, str(tmp_path), files, prefix=prefix)
        assert saving.newest(tmp_path) is not None
        return inodes(str(tmp_path / prefix))

    velocity = paddle.ones([2])
    first = save("first", {"velocity": velocity})
    assert save("second", {"velocity": velocity}) == first
    velocity.set_value(velocity + 1)
    third = save("third", {"velocity": velocity})
    assert third[0] == first[0]
    assert third[1] != first[1]
    # What another program wrote into a file in place is not what was saved there.
    with (tmp_path / "third.pdparams").open("r+b") as file:
        file.write(b"another")
    assert save("fourth", {})[0] != first[0]
    layer.weight.set_value(layer.weight + 1)
    fifth = save("fifth", {})[0]
    assert_same(checkpoints.load(tmp_path / "fifth.pdparams"), {k: v.numpy() for k, v in layer.state_dict().items()})

    def without_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", without_links)
    assert save("sixth", {})[0] != fifth
    assert_same(checkpoints.load(tmp_path / "sixth.pdparams"), checkpoints.load(tmp_path / "fifth.pdparams"))


def test_a_set_that_is_half_in_place_is_put_there_again(tmp_path):
    staged, place = tmp_path / "staged", tmp_path / "latest.pdparams"
    staged.write_bytes(b"numbers")
    for _ in range(2):
        saving._link(staged, place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest.pdparams", "staged"]


def test_the_sizes_of_checkpoints_are_said_before_the_first_step(place, uninterrupted, uninterrupted_slak):
    for run, kept in (("uninterrupted", 2), ("uninterrupted_slak", 4)):
        line, step = (place.log(run).index(text) for text in ("a checkpoint takes ", "[Train][Epoch 1/4][Iter: 0/2]"))
        assert line < step
        found = re.match(
            r"a checkpoint takes ([\d.]+) MB, of it ([\d.]+) MB for weights and ([\d.]+) MB for the optimizer; "
            r"the run keeps (\d) at most, ([\d.]+) MB; the disk has room for [\d.]+ GB",
            place.log(run)[line:],
        )
        one, weights, optimizer, count, total = map(float, found.groups())
        sizes = [os.path.getsize(place.saved(run) + suffix) / 1e6 for suffix in (".pdparams", ".pdopt")]
        for said, size in zip((weights, optimizer), sizes):
            assert said == pytest.approx(size, rel=0.1)
        assert (one, count) == (pytest.approx(sum(sizes), rel=0.1), kept)
        files = {path.stat().st_ino: path.stat().st_size for path in (place.root / run).rglob("*.pd*")}
        assert sum(files.values()) / 1e6 <= total * 1.1


def test_a_disk_without_room_is_told_before_the_first_step(place, config, capsys, monkeypatch):
    usage = shutil.disk_usage(place.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100_000))
    message = fails(place, config, "no_room", capsys)
    assert "a checkpoint takes 1.9 MB" in message
    assert "the disk has room for 0.1 MB; free some, or set Global.output_dir" in message
    assert "[Iter: 0/2]" not in place.log("no_room")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=4_000_000))
    overrides = ["Global.save_interval=1", "Global.epochs=2"]
    assert train_as_a_process_of_its_own(place.arguments(config, "little_room", *overrides)) == 0
    assert "room for 2 checkpoints, and this run may keep 2 and write the next one" in place.log("little_room")


def record_for(folder, files):
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    path = folder / f"latest{saving.RECORD}"
    path.write_text(json.dumps({"epoch": 1, "step": 1, "files": digests}))
    return path


def test_a_record_names_files_below_its_folder_alone(tmp_path):
    folder = tmp_path / "run"
    (folder / "net").mkdir(parents=True)
    names = ["net/latest.pdparams", "net/latest.pdopt", "net/latest.pdstates"]
    for name in names:
        (folder / name).write_bytes(b"numbers")
        shutil.copy(folder / name, tmp_path / Path(name).name)
    record_for(folder, names)
    assert saving.newest(folder).prefix == folder / "net" / "latest"
    for place in ("..", str(tmp_path)):
        record_for(folder, [f"{place}/{Path(name).name}" for name in names])
        assert saving.newest(folder) is None
    (folder / "link").symlink_to(folder / "net")
    (folder / "net" / "other.pdopt").symlink_to(tmp_path / "latest.pdopt")
    for linked in (["link/latest.pdparams", "link/latest.pdopt"], [*names, "net/other.pdopt"]):
        record_for(folder, linked)
        assert saving.newest(folder) is None
    # A pipe is read for ever.
    os.mkfifo(folder / "net" / "pipe.pdopt")
    (folder / f"pipe{saving.RECORD}").write_text(
        json.dumps({"epoch": 1, "step": 1, "files": {"net/pipe.pdopt": hashlib.sha256(b"").hexdigest()}})
    )
    os.mkfifo(folder / f"another{saving.RECORD}")
    assert saving.newest(folder) is None
    for content in ("[]", "{}", '{"epoch": "1", "step": 1, "files": {}}', '{"epoch": 1, "step": 1, "files": []}'):
        (folder / f"latest{saving.RECORD}").write_text(content)
        assert saving.newest(folder) is None
