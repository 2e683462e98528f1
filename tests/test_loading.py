"""Weight files wherever a config names one: read without running them, strictly, and for another number of classes."""

import importlib
import pickle
import sys

import numpy as np
import paddle
import pytest
from test_train_tools import Place, train_as_a_process_of_its_own

from paddle_reparam.errors import CheckpointError
from paddle_reparam.ppcls import loading, refocus, setup
from paddle_reparam.ppcls.command import main, read_config
from paddle_reparam.ppcls.errors import ConfigError
from paddle_reparam.weights import checkpoints

ppcls = setup()
STOCK = {"name": "MobileNetV1_x0_25"}
REGISTERED = {"name": "ResNet20_SPConv"}
REFCONV = {"name": "RefConv2D", "init": "zero"}
HEAD = ["fc.weight", "fc.bias"]


def build(arch):
    with paddle.utils.unique_name.guard():
        return ppcls.arch.build_model({"Arch": arch, "Global": {"device": "cpu"}})


#: Where a file is named: (the Arch, what of the model it goes into, the network that the file is of).
PLACES = {
    "stock": (lambda w: {**STOCK, **w}, "", STOCK),
    "registered": (lambda w: {**REGISTERED, **w}, "", REGISTERED),
    "reparam": (lambda w: {"name": "ReparamModel", "backbone": STOCK, "layer": REFCONV, **w}, "", STOCK),
    "backbone of reparam": (
        lambda w: {"name": "ReparamModel", "backbone": {**STOCK, **w}, "layer": REFCONV}, "", STOCK,
    ),
    "backbone of a RecModel": (lambda w: {"name": "RecModel", "Backbone": {**STOCK, **w}}, "backbone.", STOCK),
    "student": (
        lambda w: {"name": "DistillationModel", "models": [{"Teacher": dict(STOCK)}, {"Student": {**STOCK, **w}}]},
        "Student.", STOCK,
    ),
    "list": (
        lambda w: {
            "name": "DistillationModel", "pretrained_list": [None, w["pretrained"]],
            "models": [
                {"Teacher": dict(STOCK)}, {"Student": {**STOCK, **{k: v for k, v in w.items() if k != "pretrained"}}}
            ],
        },
        "Student.", STOCK,
    ),
}  # fmt: skip


def with_classes(arch, classes):
    """Return an Arch whose networks all have a number of classes."""
    if isinstance(arch, list):
        return [with_classes(entry, classes) for entry in arch]
    if not isinstance(arch, dict):
        return arch
    inside = {key: with_classes(value, classes) for key, value in arch.items() if key != "layer"}
    named = "name" in arch and "models" not in arch and "Backbone" not in arch
    return {**arch, **inside, **({"class_num": classes} if named else {})}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weight files of networks of two classes by name, without their suffix."""
    folder = tmp_path_factory.mktemp("weights")
    for network in (STOCK, REGISTERED):
        checkpoints.save(build({**network, "class_num": 2}).state_dict(), folder / f"{network['name']}.pdparams")
    return folder


def loaded(model, prefix, file):
    """Return the names of a file's entries that a model has, at `prefix`, with the same numbers."""
    own = model.state_dict()
    return {
        name
        for name, array in checkpoints.load(f"{file}.pdparams").items()
        if list(own[prefix + name].shape) == list(array.shape) and np.array_equal(own[prefix + name].numpy(), array)
    }


@pytest.mark.parametrize("place", PLACES)
def test_what_is_named_is_loaded_strictly(files, tmp_path, place):
    arch, prefix, network = PLACES[place]
    file = files / network["name"]
    names = set(checkpoints.load(f"{file}.pdparams"))
    model = build(with_classes(arch({"pretrained": str(file)}), 2))
    assert loaded(model, prefix, file) == names
    checkpoints.save({"of.another.network": np.ones(3)}, tmp_path / "other.pdparams")
    for other in ("other", "other.pdparams"):
        with pytest.raises(CheckpointError, match=f"0 of the model's {len(names)} entries fit"):
            build(with_classes(arch({"pretrained": str(tmp_path / other)}), 2))
    with pytest.raises(CheckpointError, match="there is no weight file no/such or no/such.pdparams"):
        build(with_classes(arch({"pretrained": "no/such"}), 2))
    with pytest.raises(CheckpointError, match="is a folder and no weight file; name a file, such as .*other.pdparams"):
        build(with_classes(arch({"pretrained": str(tmp_path)}), 2))


class Printing:
    """A pickle that would print something."""

    def __reduce__(self):
        return print, ("was run",)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_named_is_not_run(tmp_path, capsys, place):
    (tmp_path / "weights.pdparams").write_bytes(pickle.dumps({"w": Printing()}))
    with pytest.raises(CheckpointError, match="builtins.print.* and nothing was run"):
        build(with_classes(PLACES[place][0]({"pretrained": str(tmp_path / "weights")}), 2))
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize("place", PLACES)
def test_another_number_of_classes(files, place, caplog):
    arch, prefix, network = PLACES[place]
    file = files / network["name"]
    names = set(checkpoints.load(f"{file}.pdparams"))
    head = {"linear.weight", "linear.bias"} & names or {"fc.weight", "fc.bias"} & names
    with pytest.raises(
        CheckpointError, match="pdparams: it is of 2 classes and the model of 3: fresh=True .*Arch.fresh"
    ):
        build(with_classes(arch({"pretrained": str(file)}), 3))
    for fresh in (True, [f"{next(iter(head)).split('.')[0]}.*"]):
        model = build(with_classes(arch({"pretrained": str(file), "fresh": fresh}), 3))
        # A bias that was drawn is zero in both.
        assert loaded(model, prefix, file) == names - head
    with pytest.raises(CheckpointError, match="there is no classifier to leave fresh"):
        build(with_classes(arch({"pretrained": str(file), "fresh": True}), 2))
    with pytest.raises(CheckpointError, match="fresh 'heads.*' is the name of no entry"):
        build(with_classes(arch({"pretrained": str(file), "fresh": "heads.*"}), 2))


@pytest.mark.parametrize("place", [place for place in PLACES if place != "list"])
def test_fresh_without_weights(place):
    with pytest.raises(ConfigError, match=r"fresh .*goes with .*pretrained"):
        build(with_classes(PLACES[place][0]({"fresh": True}), 2))
    with pytest.raises(ConfigError, match=r"fresh.* is 3; give True for the classifier, or patterns"):
        build(with_classes(PLACES[place][0]({"fresh": 3}), 2))


def test_no_module_of_paddleclas_keeps_its_own_loader():
    importlib.import_module("ppcls.utils.feature_maps_visualization.resnet")
    names = ("load_dygraph_pretrain", "load_dygraph_pretrain_from_url", "init_model", "load_distillation_model")
    held = {
        (module, name, getattr(sys.modules[module], name).__module__)
        for module in sys.modules
        if module.partition(".")[0] == "ppcls"
        for name in names
        if hasattr(sys.modules[module], name)
    }
    assert len(held) > 40
    assert {owner for _, _, owner in held} == {"paddle_reparam.ppcls.loading"}
    with pytest.raises(ValueError, match="set Global.checkpoints, or Arch.pretrained_list"):
        ppcls.utils.save_load.init_model({"checkpoints": "x"}, None)


def test_addresses_are_downloaded_and_read_here(files, monkeypatch):
    from ppcls.utils import download

    asked = []

    def download_it(address, folder, decompress):
        asked.append(address)
        assert not decompress
        return str(files / f"{STOCK['name']}.pdparams")

    monkeypatch.setattr(download, "get_path_from_url", download_it)
    for options in ({"pretrained": True}, {"pretrained": "https://host/a_pretrained.pdparams"}):
        assert loaded(build({**STOCK, "class_num": 2, **options}), "", files / STOCK["name"])
    build({**STOCK, "class_num": 3, "pretrained": True, "use_ssld": True, "fresh": True})
    assert [address.split("/")[-1] for address in asked] == [
        f"{STOCK['name']}_pretrained.pdparams", "a_pretrained.pdparams", f"{STOCK['name']}_ssld_pretrained.pdparams",
    ]  # fmt: skip

    def fail(*arguments, **options):
        raise RuntimeError("Downloading failed with code 404!")

    monkeypatch.setattr(download, "get_path_from_url", fail)
    with pytest.raises(
        ValueError, match="_pretrained.pdparams cannot be downloaded, and is not in .*weights: .*code 404"
    ):
        build({**STOCK, "class_num": 2, "pretrained": True})


# ---------------------------------------------------------------------------------------------------------------------
# Distillation


def distillation(classes=2, **options):
    models = [{"Teacher": {**STOCK, "class_num": classes}}, {"Student": {**STOCK, "class_num": classes}}]
    return {"name": "DistillationModel", "models": models, "infer_model_name": "Student", **options}


def test_weights_of_the_student_alone(tmp_path):
    model = build(distillation())
    checkpoints.save(build({**STOCK, "class_num": 2}).state_dict(), tmp_path / "best_model_student.pdparams")
    file = str(tmp_path / "best_model_student")
    for mode in ("eval", "infer", "export"):
        loading.load_weights(model, file, {"Arch": distillation()}, mode)
        assert loaded(model, "Student.", file) == set(checkpoints.load(f"{file}.pdparams"))
    for mode, of in (("train", "Student"), ("eval", "Teacher")):
        with pytest.raises(CheckpointError, match="0 of the model's"):
            loading.load_weights(model, file, {"Arch": distillation(infer_model_name=of)}, mode)


def test_a_list_of_the_teachers_and_the_students_weights(tmp_path):
    from paddle_reparam.ppcls.validation import check_run

    place = Place(tmp_path)
    config = place.config(distillation(freeze_params_list=[True, False]))
    for order in (["Teacher", "Student"], ["Student", "Teacher"]):
        given = read_config(config, ["Global.pretrained_model=['t','s']"])
        given["Arch"]["models"] = [{name: dict(STOCK)} for name in order]
        check_run(given, "train")
        wanted = {"Teacher": "t", "Student": "s"}
        assert given["Arch"]["pretrained_list"] == [wanted[name] for name in order]
        assert given["Global"]["pretrained_model"] is None
    with pytest.raises(ConfigError, match="is a list of 2 files, and Arch has 0 models"):
        check_run(read_config(place.config(STOCK), ["Global.pretrained_model=['t','s']"]), "train")
    with pytest.raises(ConfigError, match="pretrained_list has 1 entries for 2 models"):
        build(distillation(pretrained_list=["t"]))


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("loading"))


@pytest.fixture
def nothing_foreign(monkeypatch):
    """Make whatever runs a file raise."""

    def refuse(*arguments, **options):
        raise AssertionError("a file was unpickled")

    for owner, name in ((paddle, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)


def test_commands_that_name_weights(place, files, nothing_foreign):
    """Train with a new classifier, evaluate, label, export and go on; nothing of a file is run."""
    stock, registered = (str(files / network["name"]) for network in (STOCK, REGISTERED))
    three = with_classes({**STOCK, "pretrained": stock, "fresh": True}, 3)
    config = place.config(three)
    assert train_as_a_process_of_its_own(place.arguments(config, "three")) == 0
    assert f"{stock}.pdparams: not taken from it but fresh, as the network drew them: fc.weight" in place.log("three")
    trained = place.saved("three")
    of_run = ["-o", f"Global.pretrained_model={trained}"]
    for mode in ("eval", "infer", "export"):
        assert main(mode, [*place.arguments(config, "three"), *of_run]) == 0
    # What training began with is not asked for when it goes on.
    going_on = ["-o", f"Global.checkpoints={trained}", "-o", "Global.epochs=2", "-o", "Arch.pretrained=moved/away"]
    assert train_as_a_process_of_its_own([*place.arguments(config, "three"), *going_on]) == 0
    # The other places.
    reparam = {"name": "ReparamModel", "backbone": STOCK, "layer": REFCONV, "pretrained": trained, "class_num": 2}
    overrides = ["-o", "Arch.fresh=True"]
    assert main("train", [*place.arguments(place.config(reparam), "reparam"), *overrides]) == 0
    config = place.config(with_classes(REGISTERED, 3))
    overrides = ["-o", f"Global.pretrained_model={registered}", "-o", "Global.fresh=True"]
    assert main("train", [*place.arguments(config, "registered"), *overrides]) == 0
    assert f"{registered}.pdparams: not taken from it but fresh" in place.log("registered")


def test_refocusing_names_weights(place, files, nothing_foreign, tmp_path):
    stock = files / STOCK["name"]
    config = read_config(place.config(with_classes(STOCK, 2)), [f"Arch.pretrained={stock}"])
    refocus._save_pretrained(config, tmp_path / "baseline.pdparams")
    assert loaded(build(with_classes({**STOCK, "pretrained": str(stock)}, 2)), "", tmp_path / "baseline")


def test_fresh_is_for_training(place, files, capsys):
    config = place.config(with_classes({**STOCK, "pretrained": str(files / STOCK["name"]), "fresh": True}, 3))
    assert main("eval", place.arguments(config, "fresh")) == 2
    assert "Arch.fresh leaves a classifier untrained: for eval set Global.pretrained_model" in capsys.readouterr().err
    config = place.config(with_classes(STOCK, 3))
    given = [*place.arguments(config, "fresh"), "-o", f"Global.pretrained_model={files / STOCK['name']}"]
    assert main("eval", [*given, "-o", "Global.fresh=True"]) == 1
    assert "fc.weight (file [256, 2], model [256, 3])" in capsys.readouterr().err
    assert main("train", [*place.arguments(config, "fresh"), "-o", "Global.fresh=True"]) == 2
    assert "Global.fresh goes with Global.pretrained_model" in capsys.readouterr().err
    for key in ("pretrained", "fresh"):
        arch = {"name": "RecModel", "Backbone": with_classes(STOCK, 3), key: True}
        assert main("train", place.arguments(place.config(arch), "fresh")) == 2
        assert f"RecModel has no {key} of its own; give it to the network inside" in capsys.readouterr().err


def test_masks_of_another_number_of_classes(place):
    """Masks come with the weights; that of a new classifier is drawn, exactly as dense as the old one."""
    arch = {"name": "SLaK_micro", "dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "kernel_size": [7, 7, 7, 7, 3]}
    sparse = {"Sparsity": {"density": 0.5, "distribution": "uniform", "update_frequency": 2}}
    assert main("train", place.arguments(place.config(with_classes(arch, 2), **sparse), "sparse")) == 0
    old = checkpoints.load(f"{place.saved('sparse')}.pdparams")
    config = place.config(with_classes(arch, 5), **sparse)
    overrides = ["-o", f"Global.pretrained_model={place.saved('sparse')}", "-o", "Global.fresh=True"]
    assert main("train", [*place.arguments(config, "sparse5"), *overrides]) == 0
    new = checkpoints.load(f"{place.saved('sparse5')}.pdparams")
    assert set(new) == set(old)
    head, counts = old["head.weight_mask"], {name: int(old[name].sum()) for name in old if name.endswith("_mask")}
    assert 0 < counts["head.weight_mask"] < head.size
    counts["head.weight_mask"] = round(head.mean() * new["head.weight"].size)
    assert {name: int(new[name].sum()) for name in counts} == counts
    assert not new["head.weight"][~new["head.weight_mask"]].any()


def test_a_host_that_never_answers_is_not_waited_for_without_end():
    from ppcls.utils import download

    assert download.requests.get.keywords["timeout"] > 0
