"""README's five commands for own photos, in one process, on a few images of every kind that people have."""

import json
import os
import re
import runpy
import shlex
import sys

import numpy as np
import paddle
import pytest
from odd_images import READ
from pages import ROOT, blocks_of, commands_of, copy_project

from paddle_reparam import ppcls
from paddle_reparam.ppcls import locate
from paddle_reparam.weights import checkpoints

README = (ROOT / "README.md").read_text(encoding="utf-8")
[COMMANDS] = [commands_of(block) for _, block in blocks_of(README) if "own_photos" in block]
if os.environ.get(locate.HOME):
    # A checkout saves weights one folder higher.
    COMMANDS = [command.replace("/ReparamModel/latest", "/latest") for command in COMMANDS]
[WEIGHTS] = {match[1] for command in COMMANDS for match in re.finditer(r"--weights (\S+)", command)}
LABELS = ["a b", "vélo", "猫 和 狗"]
#: What makes the configs small.
SMALLER = {
    "size: 224": "size: 32",
    "[3, 224, 224]": "[3, 32, 32]",
    "resize_short: 256": "resize_short: 36",
    "batch_size: 16": "batch_size: 8",
    "epochs: 20": "epochs: 1",
    "num_workers: 2": "num_workers: 0",
    "{name: ResNet18,": "{name: MobileNetV1_x0_25,",
}


def typed(command: str) -> int:
    """Run a command as it is typed, in this process; return its exit code."""
    _, script, *arguments = shlex.split(command)
    before, sys.argv = sys.argv, [script, *arguments]
    try:
        # Named from the start, as in a process of its own.
        with paddle.utils.unique_name.guard():
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    raise AssertionError(f"{script} ends without an exit code")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The working directory: what a user has, with photos, and weights where PaddleClas puts what it downloads."""
    folder = tmp_path_factory.mktemp("project")
    copy_project(folder)
    for path in (folder / "ppcls_configs" / "own_photos").rglob("*.yaml"):
        text = path.read_text()
        for large, small in SMALLER.items():
            text = text.replace(large, small)
        path.write_text(text)
    for number, (name, (data, _)) in enumerate(READ.items()):
        path = folder / "dataset" / "own_photos" / LABELS[number % len(LABELS)] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ppcls.setup()
        from ppcls.arch import MobileNetV1_x0_25
        from ppcls.utils import download

        patch.setattr(download, "WEIGHTS_HOME", str(folder / "weights"))
        with paddle.utils.unique_name.guard():
            checkpoints.save(
                MobileNetV1_x0_25().state_dict(), folder / "weights" / "MobileNetV1_x0_25_pretrained.pdparams"
            )
        yield folder


def test_the_five_commands(project, capfd):
    printed = []
    for command in COMMANDS:
        assert typed(command) == 0, command
        printed.append(capfd.readouterr().out)
    assert len(COMMANDS) == 5
    prepared, _, _, _, predicted = printed
    assert f"3 classes, {len(READ) - 5} images for training, 5 for validation" in prepared
    log = next(project.rglob("train.log")).read_text()
    assert "not taken from it but fresh, as the network drew them: fc.weight, fc.bias" in log
    manifest = json.loads((project / "output/own_photos/shipped/manifest.json").read_text())
    assert manifest["labels"] == LABELS
    for name in READ:
        assert name in predicted
    assert len(re.findall(rf"%\s+({'|'.join(LABELS)})", predicted)) == len(READ)
    assert (project / "output/own_photos/sheet.png").is_file()


def test_training_evaluation_and_prediction_see_the_same_pixels(project):
    """For each kind of file, from the list as from the released folder."""
    from ppcls.data import build_dataloader

    from paddle_reparam.deploy.predict import preprocess
    from paddle_reparam.images import read_rgb
    from paddle_reparam.ppcls.command import read_config
    from paddle_reparam.ppcls.transforms import read_steps

    config = read_config("ppcls_configs/own_photos/refconv/ResNet18_RefConv.yaml")
    # What a training draws at random set aside.
    config["DataLoader"]["Train"]["dataset"]["transform_ops"] = config["DataLoader"]["Eval"]["dataset"]["transform_ops"]
    steps = [step for step in read_steps(config) if "DecodeImage" not in step]
    seen = 0
    for mode in ("Train", "Eval"):
        dataset = build_dataloader(config["DataLoader"], mode, paddle.set_device("cpu")).dataset
        for number, path in enumerate(dataset.images):
            np.testing.assert_array_equal(dataset[number][0], preprocess(read_rgb(path), steps), path)
            seen += 1
    assert seen == len(READ)


def test_a_list_that_is_read_with_another_delimiter_is_explained(project, capfd):
    given = "-o Arch.class_num=3 -o DataLoader.Train.dataset.delimiter=null"
    assert typed(f"python tools/train.py -c ppcls_configs/own_photos/refconv/ResNet18_RefConv.yaml {given}") == 1
    error = capfd.readouterr().err
    assert re.search(
        r"line 1 is '.*\\t\d'; it takes a path, ' ' and a whole number, or in the data set delimiter: \"\\t\"", error
    )


def test_too_few_classes_are_said(project, capfd):
    assert typed("python tools/train.py -c ppcls_configs/own_photos/refconv/ResNet18_RefConv.yaml") == 1
    assert re.search(r"labels are none of 0 to 1, .*; set Arch.class_num", capfd.readouterr().err)


def test_infer_takes_what_prepare_data_takes(project, capfd):
    config = "ppcls_configs/own_photos/refconv/ResNet18_RefConv.yaml"
    given = f"-o Arch.class_num=3 -o Global.pretrained_model={WEIGHTS}"
    assert typed(f"python tools/infer.py -c {config} {given}") == 0
    # Newer Engines log what 2.4 prints.
    printed = capfd.readouterr().out + next(project.rglob("infer.log")).read_text()
    assert printed.count("class_ids") >= len(READ)
    assert not [name for name in READ if name not in printed]


FAMILIES = ["dcd/ResNet10_DCD", "repmlp/RepMLPNet_micro", "slak/SLaK_micro", "spconv/ResNet20_SPConv"]


@pytest.mark.parametrize("small", FAMILIES)
def test_of_each_family_only_the_classifier_is_drawn_anew(small, project):
    """Of the networks in own_photos small ones of their kind; RefConv is in the five commands."""
    from ppcls.arch import build_model

    from paddle_reparam.ppcls.command import read_config

    def build(**changes):
        config = read_config(f"ppcls_configs/digits/{small}.yaml")
        config["Arch"].update(changes)
        with paddle.utils.unique_name.guard():
            return {name: value.numpy() for name, value in build_model(config, "train").state_dict().items()}

    published = build(class_num=1000)
    checkpoints.save(published, project / "published.pdparams")
    own = build(class_num=3, pretrained="./published", fresh=True)
    other = sorted(name for name in own if not np.array_equal(own[name], published[name]))
    assert other
    assert all(name.startswith(("fc.", "head.", "classifier.")) for name in other)
