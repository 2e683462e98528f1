"""Images that cannot be read: a run ends, says how many there are, and never counts another in their place."""

import faulthandler
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from PIL import Image
from test_train_tools import PLAIN, Place, fails

from paddle_reparam.ppcls import setup

setup()

from paddle.io.dataloader import dataloader_iter  # noqa: E402
from ppcls.data.dataloader.common_dataset import CommonDataset  # noqa: E402

from paddle_reparam.ppcls import engine, guards  # noqa: E402
from paddle_reparam.ppcls.command import main  # noqa: E402


def ends(function, seconds: int = 60):
    """Run a function that might wait for ever, where Python looks at no signal: that ends the tests, with its place."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        return function()
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("reading"))
    for number in range(40):
        (place.data / f"text_{number}.png").write_text("no image")
    return place


@pytest.fixture(scope="module")
def trained(place):
    assert main("train", place.arguments(place.config(PLAIN), "trained")) == 0
    return place.saved("trained")


def listed(place: Place, name: str, good: int, bad: int) -> str:
    """Write a list with so many images and so many files that are none, mixed."""
    lines = [f"train_{i % 8}.png {i % 2}\n" for i in range(good)]
    step = max(1, len(lines) // max(1, bad))
    for i in range(bad):
        lines.insert(min(len(lines), i * (step + 1)), f"text_{i}.png {i % 2}\n")
    (place.data / name).write_text("".join(lines))
    return str(place.data / name)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_of_which_no_image_can_be_read(place, capsys, workers):
    config = place.config(PLAIN)
    arguments = place.arguments(
        config, "none", "Global.eval_during_train=False", f"DataLoader.Train.loader.num_workers={workers}",
        f"DataLoader.Train.dataset.cls_label_path={listed(place, 'none.txt', 0, 32)}",
    )  # fmt: skip
    assert ends(lambda: main("train", arguments)) == 1
    assert "DataLoader.Train: none of 32 images can be read, the first is" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_with_some_that_cannot_be_read(place, capsys, workers):
    arguments = place.arguments(
        place.config(PLAIN), "some", f"DataLoader.Train.loader.num_workers={workers}",
        f"DataLoader.Train.dataset.cls_label_path={listed(place, 'some.txt', 12, 2)}",
    )  # fmt: skip
    assert ends(lambda: main("train", arguments)) == 1
    error = capsys.readouterr().err
    assert "cannot be read" in error
    assert "text_0.png" in error


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_counts_no_image_in_the_place_of_another(place, trained, capsys, workers):
    arguments = place.arguments(
        place.config(PLAIN), "eval", f"Global.pretrained_model={trained}",
        f"DataLoader.Eval.loader.num_workers={workers}",
        f"DataLoader.Eval.dataset.cls_label_path={listed(place, 'eval.txt', 40, 20)}",
    )  # fmt: skip
    assert ends(lambda: main("eval", arguments)) == 1
    error = capsys.readouterr().err
    assert "20 of 60 images cannot be read" in error
    assert "text_0.png (it is no image)" in error


def test_hundreds_of_them_in_a_process_of_its_own():
    def note() -> None:
        for number in range(4000):
            guards.failures.note(f"image {number}", "a long reason " * 10)

    guards.failures.clear()
    process = multiprocessing.get_context("fork").Process(target=note)
    process.start()
    process.join(60)
    assert process.exitcode == 0, "it waits for a reader"
    assert len(guards.failures.found()) == 4000
    guards.failures.clear()


def test_a_transform_that_fails_for_every_image(place, capsys):
    config = yaml.safe_load(Path(place.config(PLAIN)).read_text())
    config["DataLoader"]["Train"]["dataset"]["transform_ops"].insert(1, {"CropImage": {"size": "x"}})
    path = place.root / "crop.yaml"
    path.write_text(yaml.safe_dump(config))
    assert ends(lambda: main("train", place.arguments(str(path), "crop"))) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_images_of_two_sizes_make_no_batch(place, trained, capsys, workers, mode):
    """Without workers Paddle waits for ever for a batch that its reader could not make."""
    Image.new("RGB", (20, 18)).save(place.data / "wide.png")
    (place.data / "sizes.txt").write_text("".join(f"train_{i}.png 0\n" for i in range(5)) + "wide.png 1\n")
    split = mode.capitalize()
    arguments = place.arguments(
        place.config(PLAIN), "sizes", f"DataLoader.{split}.loader.num_workers={workers}",
        f"Global.pretrained_model={trained}", f"DataLoader.{split}.dataset.cls_label_path={place.data / 'sizes.txt'}",
    )  # fmt: skip
    assert ends(lambda: main(mode, arguments)) == 1
    output = capsys.readouterr().err
    assert f"error: DataLoader.{split}: no batch can be made (ValueError: " in output
    assert "Traceback" not in output


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_vanish_while_it_trains(place, capsys, monkeypatch, workers):
    """All of them, as where a network drive goes away."""
    check = engine.check_samples
    folder = place.root / f"vanishing_{workers}"
    shutil.copytree(place.data, folder)

    def vanish(*arguments):
        check(*arguments)
        shutil.rmtree(folder, ignore_errors=True)

    monkeypatch.setattr(engine, "check_samples", vanish)
    arguments = place.arguments(
        place.config(PLAIN), folder.name, f"DataLoader.Train.loader.num_workers={workers}",
        "Global.eval_during_train=False", f"DataLoader.Train.dataset.image_root={folder}",
    )  # fmt: skip
    assert ends(lambda: main("train", arguments)) == 1
    assert "DataLoader.Train: none of 8 images can be read, the first is" in capsys.readouterr().err


def test_workers_that_are_killed(place, capsys, monkeypatch):
    here, read = os.getpid(), CommonDataset.__getitem__

    def killed(self, number):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, number)

    monkeypatch.setattr(CommonDataset, "__getitem__", killed)
    monkeypatch.setattr(dataloader_iter, "MP_STATUS_CHECK_INTERVAL", 0.5)
    arguments = place.arguments(place.config(PLAIN), "killed", "DataLoader.Train.loader.num_workers=2")
    assert ends(lambda: main("train", arguments)) == 1
    output = capsys.readouterr().err
    assert "error: DataLoader.Train: its workers ended without a word" in output
    assert "Traceback" not in output
    # Nothing of Paddle's raises in the middle of something else when one more of them dies.
    assert not callable(signal.getsignal(signal.SIGCHLD))


def test_every_data_set_of_paddleclas_is_watched():
    unwatched = [
        value.__name__
        for name, module in sys.modules.items()
        if name.startswith("ppcls.data.dataloader.")
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, paddle.io.Dataset) and "__getitem__" in vars(value)
        if value.__module__.startswith("ppcls") and not hasattr(value.__getitem__, "__wrapped__")
    ]
    assert unwatched == []


def test_labelling_goes_on_and_says_what_it_left_out(place, trained, capsys):
    folder = place.root / "photos"
    folder.mkdir()
    given = place.arguments(place.config(PLAIN), "infer", f"Global.pretrained_model={trained}")
    for nothing, message in ((folder, "no images in"), (folder / "x", "there is no"), ("", "Infer.infer_imgs")):
        fails(capsys, 2, message, main, "infer", [*given, "-o", f"Infer.infer_imgs={nothing}"])
    for number in range(3):
        Image.fromarray(np.full((16, 16, 3), 60 * number, np.uint8)).save(folder / f"{number}.png")
    (folder / "9.png").write_text("no image")
    assert main("infer", [*given, "-o", f"Infer.infer_imgs={folder}"]) == 1
    output = capsys.readouterr()
    assert (output.out + place.log("infer", "infer")).count("class_ids") == 3
    assert "an image cannot be read" in output.err
    assert "9.png (" in output.err
    fails(capsys, 1, "1 of 1 images cannot be read", main, "infer", [*given, "-o", f"Infer.infer_imgs={folder}/9.png"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(place, trained, tmp_path, capsys, value):
    state = paddle.load(f"{trained}.pdparams")
    name = next(key for key in state if key.endswith("fc.weight"))
    state[name][0, 0] = value
    paddle.save(state, str(tmp_path / "broken.pdparams"))
    for mode in ("eval", "infer", "train"):
        given = place.arguments(place.config(PLAIN), mode, f"Global.pretrained_model={tmp_path / 'broken'}")
        fails(capsys, 1, f"{name} holds 1 of 512 numbers that are not finite", main, mode, given)


def test_a_network_that_overflows_names_the_layer(place, trained, tmp_path, capsys):
    state = paddle.load(f"{trained}.pdparams")
    name = next(key for key in state if key.endswith("fc.weight"))
    state[name][...] = 3e38
    paddle.save(state, str(tmp_path / "huge.pdparams"))
    for mode in ("eval", "infer"):
        given = place.arguments(place.config(PLAIN), mode, f"Global.pretrained_model={tmp_path / 'huge'}")
        fails(capsys, 1, "output is not finite: it starts at fc", main, mode, given)
