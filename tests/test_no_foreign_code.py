"""Files that a user names are data: nothing in them is unpickled, evaluated, or handed to PaddleClas' own loaders."""

import builtins
import json
import pickle
import shutil

import paddle
import pytest
from helpers import randomise_batch_norms
from PIL import Image
from test_released import changed, seal

from paddle_reparam import ppcls, replace
from paddle_reparam.deploy.outputs import OutputSpec
from paddle_reparam.deploy.predict import ImageClassifier, format_predictions
from paddle_reparam.deploy.release import release
from paddle_reparam.deploy.released import read_manifest
from paddle_reparam.deploy.sheet import draw_sheet
from paddle_reparam.errors import ReparamError
from paddle_reparam.weights import checkpoints

ARCH = {"name": "PPLCNet_x0_25", "class_num": 5, "pretrained": False, "use_sync_bn": False}
REC = {
    "name": "RecModel", "infer_output_key": "features", "infer_add_softmax": False,
    "Backbone": {"name": "PPLCNet_x0_25", "pretrained": False},
    "BackboneStopLayer": {"name": "flatten"},
    "Neck": {"name": "FC", "embedding_size": 1280, "class_num": 8},
    "Head": {"name": "ArcMargin", "embedding_size": 8, "class_num": 5, "margin": 0.15, "scale": 30},
}  # fmt: skip
DISTILLATION = {
    "name": "DistillationModel", "infer_model_name": "Student", "freeze_params_list": [True, False],
    "pretrained_list": None, "models": [{"Teacher": dict(ARCH)}, {"Student": dict(ARCH)}],
}  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A release of a stock network, as the command makes it."""
    ppcls.setup()
    from ppcls import arch

    folder = tmp_path_factory.mktemp("releases")
    with paddle.utils.unique_name.guard():
        net, stock = (arch.PPLCNet_x0_25(class_num=5) for _ in range(2))
    replace(net, "RefConv2D", where="conv1*")
    randomise_batch_norms(net)
    for each in (net, stock):
        each.eval()
    checkpoints.save(net.state_dict(), folder / "weights.pdparams")
    facts = {"plain_weights": {"arch": ARCH}, "input": {"preprocessing": [{"ToCHWImage": {}}]}}
    release(
        net, folder / "weights.pdparams", folder / "out", [[None, 3, 32, 32]], output=OutputSpec("softmax"),
        stock=stock, facts=facts, progress=lambda line: None,
    )  # fmt: skip
    return folder / "out"


@pytest.fixture
def copied(original, tmp_path):
    return shutil.copytree(original, tmp_path / "out")


@pytest.fixture
def nothing_foreign(monkeypatch):
    """Make all that would run what a file says raise."""
    ppcls.setup()
    from ppcls.utils import save_load

    def refuse(name):
        def called(*arguments, **named):
            raise AssertionError(f"{name} was called")

        return called

    for module, names in [
        (paddle, ["load"]),
        (pickle, ["load", "loads", "Unpickler"]),
        (builtins, ["eval"]),
        (save_load, [name for name in vars(save_load) if name.startswith("load_dygraph_pretrain")]),
    ]:
        for name in names:
            monkeypatch.setattr(module, name, refuse(f"{module.__name__}.{name}"))


def check(folder):
    from paddle_reparam.ppcls.reparam import main

    return main(["--check", str(folder)])


def test_a_release_is_checked_and_used_as_data(copied, nothing_foreign, capsys):
    assert check(copied) == 0
    assert "plain.pdparams" in capsys.readouterr().out
    image = copied.parent / "image.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(image)
    [prediction] = ImageClassifier(copied).predict([image])
    assert len(prediction.labels) == 5


def test_labels_cannot_steer_a_terminal_or_a_picture(copied):
    image = copied.parent / "image.png"
    Image.new("RGB", (32, 32), (1, 2, 3)).save(image)
    manifest = read_manifest(copied)
    seal(copied, changed({**manifest, "labels": None}, ("labels",), ["\x1b[2J $x", "$\\frac", "c", "d", "e"]))
    predictions = list(ImageClassifier(copied).predict([image]))
    printed = "\n".join(format_predictions(predictions, [image]))
    assert "\x1b" not in printed
    assert r"\x1b[2J $x" in printed
    assert draw_sheet(copied.parent / "sheet.png", predictions) == ""


@pytest.mark.parametrize("arch", [ARCH, REC, DISTILLATION])
def test_what_training_configs_hold_may_be_built(arch):
    ppcls.setup()
    from paddle_reparam.ppcls.stock_arch import check_stock_arch

    check_stock_arch(arch)


@pytest.mark.parametrize(
    "arch",
    [
        {**ARCH, "name": "PPLCNet_x0_26"},
        {**ARCH, "name": "load_dygraph_pretrain"},
        {**ARCH, "name": "build_model"},
        {**ARCH, "name": "print(1)"},
        {**ARCH, "name": "ReparamModel"},
        {**ARCH, "name": ["PPLCNet_x0_25"]},
        {**ARCH, "pretrained": "weights"},
        {**ARCH, "pretrained": True},
        {**ARCH, "pretrained_path": "weights"},
        {**ARCH, "class_num": 10**9},
        {**ARCH, "class_num": float("nan")},
        {**ARCH, "lr_mult_list": "print(1)"},
        {**ARCH, "act": {"name": "relu"}},
        {"name": "ViT_small_patch16_224", "norm_layer": "print"},
        {**REC, "Backbone": {"name": "print"}},
        {**REC, "Backbone": {**ARCH, "pretrained": "weights"}},
        {**REC, "Backbone": None},
        {**REC, "Head": {"name": "print"}},
        {**REC, "Neck": {"name": "FC", "embedding_size": "print(1)"}},
        {**REC, "BackboneStopLayer": {"name": "print()"}},
        {**DISTILLATION, "pretrained_list": ["weights", None]},
        {**DISTILLATION, "models": [{"Teacher": {"name": "print"}}]},
        {**DISTILLATION, "models": {"Teacher": ARCH}},
    ],
)
def test_nothing_else_is_built_from_a_manifest(copied, nothing_foreign, monkeypatch, capsys, arch):
    from ppcls import arch as networks

    monkeypatch.setattr(networks, "build_model", lambda *arguments, **named: pytest.fail("it was built"))
    monkeypatch.setattr("paddle_reparam.ppcls.reparam._build", lambda *arguments: pytest.fail("it was built"))
    seal(copied, changed(read_manifest(copied), ("plain_weights", "arch"), arch))
    assert check(copied) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "not built from a manifest" in error or "is not as it was written" in error


def test_an_arch_that_cannot_be_checked_is_not_put_into_a_manifest():
    ppcls.setup()
    from paddle_reparam.ppcls.reparam import _for_manifest

    assert _for_manifest({"Arch": ARCH}) == ARCH
    assert _for_manifest({"Arch": {**ARCH, "act": {"name": "relu"}}}) is None
    assert _for_manifest(None) is None


def test_json_alone_is_read(copied):
    assert json.loads((copied / "manifest.json").read_text())["plain_weights"]["arch"] == ARCH
    assert not list(copied.glob("*.info"))
    with pytest.raises(ReparamError, match="is no release"):
        read_manifest(copied / "nowhere")
