"""PaddleClas' tasks, each through every command: either what comes out is right, or one sentence says why not.

Several labels an image, recognition by features, distillation, one channel, two classes, and no Metric in the config.
"""

import copy
import functools
import importlib.util
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from helpers import missing_for_onnx, relative_error
from paddle import nn
from pages import ROOT, blocks_of, commands_of, cut_short, keep_few, named_files, run_here
from PIL import Image
from test_train_tools import config_of

from paddle_reparam import InferenceModel
from paddle_reparam.deploy.released import PLAIN_WEIGHTS, read_manifest
from paddle_reparam.deploy.runtimes.onnx_runtime import OnnxModel
from paddle_reparam.ppcls import setup
from paddle_reparam.weights import checkpoints

ppcls = setup()

from ppcls.arch import TheseusLayer  # noqa: E402

from paddle_reparam.ppcls import quantize, refocus, reparam  # noqa: E402
from paddle_reparam.ppcls.command import main, read_config  # noqa: E402
from paddle_reparam.ppcls.engine import Engine  # noqa: E402

WHY_NO_ONNX = missing_for_onnx()
TASKS = ("several labels", "recognition", "distillation", "one channel", "two classes", "no metric")
#: Infer.PostProcess of several labels, which has another name in newer versions.
SEVERAL = "MultiLabelTopk" if hasattr(ppcls.data.postprocess, "MultiLabelTopk") else "MultiLabelThreshOutput"


class Tiny(TheseusLayer):
    """Two convolutions with BNs and a classifier."""

    def __init__(self, class_num=2, channels=3, pretrained=False, **_):
        super().__init__()
        self.stem = nn.Conv2D(channels, 8, 3, stride=2, padding=1, bias_attr=False)
        self.stem_bn = nn.BatchNorm2D(8)
        self.body = nn.Conv2D(8, 8, 3, stride=2, padding=1, bias_attr=False)
        self.body_bn = nn.BatchNorm2D(8)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(128, class_num)

    def forward(self, x):
        x = nn.functional.relu(self.stem_bn(self.stem(x)))
        x = nn.functional.relu(self.body_bn(self.body(x)))
        return self.fc(self.flatten(x))


@pytest.fixture(scope="module", autouse=True)
def known_network():
    """Let PaddleClas know the network as one of its own."""
    ppcls.arch.Tiny = lambda **options: Tiny(**options)
    ppcls.arch.Tiny.__module__ = "ppcls.arch.backbone.tiny"
    yield
    del ppcls.arch.Tiny


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def draw_data(folder):
    """Write 16 images to train on and 12 to evaluate; red, green and blue are there or not, and red is the class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 12)):
        one, several = [], []
        for i in range(count):
            labels = [i % 2, i // 2 % 2, i // 4 % 2]
            pixels = generator.integers(0, 64, (16, 16, 3)) + 160 * np.array(labels)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{split}_{i:02}.png")
            one.append(f"{split}_{i:02}.png {i % 2}\n")
            several.append(f"{split}_{i:02}.png\t{','.join(map(str, labels))}\n")
        (folder / f"{split}.txt").write_text("".join(one))
        (folder / f"{split}_several.txt").write_text("".join(several))
    (folder / "labels.txt").write_text("0 green\n1 red\n")


def layered(**backbone):
    return {"name": "ReparamModel", "backbone": {"name": "Tiny", **backbone},
            "layer": {"name": "RefConv2D", "base": "random"}}  # fmt: skip


def config_for(task, data):
    arch = layered(class_num=2)
    arch["class_num"] = 2
    config = config_of(data, arch)
    config["Global"].update(epochs=3, use_visualdl=False)
    config["Optimizer"]["lr"]["learning_rate"] = 0.05
    config["Infer"].update(infer_imgs=str(data / "val_01.png"))
    config["Infer"]["PostProcess"].update(topk=5, class_id_map_file=str(data / "labels.txt"))
    metric, loss, eval_loader = config["Metric"], config["Loss"], config["DataLoader"]["Eval"]
    if task == "several labels":
        config["Arch"] = {**layered(class_num=3), "class_num": 3}
        config["Global"]["use_multilabel"] = True
        config["Infer"]["PostProcess"] = {"name": SEVERAL, "class_id_map_file": str(data / "labels.txt")}
        config["Metric"] = {"Eval": [{"HammingDistance": {}}, {"AccuracyScore": {"base": "label"}}]}
        loss["Train"] = [{"MultiLabelLoss": {"weight": 1.0, "weight_ratio": True, "size_sum": True}}]
        loss["Eval"] = [{"MultiLabelLoss": {"weight": 1.0, "size_sum": True}}]
        for part, split in (("Train", "train"), ("Eval", "val")):
            dataset = config["DataLoader"][part]["dataset"]
            dataset.update(name="MultiLabelDataset", cls_label_path=str(data / f"{split}_several.txt"))
        config["DataLoader"]["Train"]["dataset"]["label_ratio"] = True
    elif task == "recognition":
        config["Arch"] = {
            "name": "RecModel", "infer_output_key": "features", "infer_add_softmax": False, "Backbone": layered(),
            "BackboneStopLayer": {"name": "flatten"}, "Neck": {"name": "FC", "embedding_size": 128, "class_num": 6},
            "Head": {"name": "ArcMargin", "embedding_size": 6, "class_num": 2, "margin": 0.1, "scale": 8},
        }  # fmt: skip
        config["Global"]["eval_mode"] = "retrieval"
        query = copy.deepcopy(eval_loader)
        query["dataset"]["cls_label_path"] = str(data / "train.txt")
        config["DataLoader"]["Eval"] = {"Gallery": eval_loader, "Query": query}
        metric["Eval"] = [{"Recallk": {"topk": [1]}}, {"mAP": {}}, {"mINP": {}}]
    elif task == "distillation":
        config["Arch"] = {
            "name": "DistillationModel", "infer_model_name": "Student", "freeze_params_list": [True, False],
            "models": [{"Teacher": {"name": "Tiny", "class_num": 2}}, {"Student": layered(class_num=2)}],
        }  # fmt: skip
        loss["Train"] = [
            {"DistillationCELoss": {"weight": 0.5, "model_name_pairs": [["Student", "Teacher"]]}},
            {"DistillationGTCELoss": {"weight": 1.0, "model_names": ["Student"]}},
        ]
        metric["Train"] = [{"DistillationTopkAcc": {"model_key": "Student", "topk": [1, 5]}}]
        config["Infer"]["PostProcess"].update(name="DistillationPostProcess", func="Topk")
    elif task == "one channel":
        config["Arch"]["backbone"]["channels"] = 1
        config["Global"]["image_shape"] = [1, 16, 16]
        for steps in (*(loader["dataset"]["transform_ops"] for loader in config["DataLoader"].values()),
                      config["Infer"]["transforms"]):  # fmt: skip
            place = next(i for i, step in enumerate(steps) if "NormalizeImage" in step)
            if {"ToGray": None} not in steps:
                steps.insert(place + 1, {"ToGray": None})
    elif task == "two classes":
        for part in metric:
            metric[part] = [{"TopkAcc": {"topk": [1, 5]}}]
    elif task == "no metric":
        del config["Metric"]
        config["Global"]["eval_during_train"] = False
    return config


class Walk:
    """A task's config, and what the commands make of it."""

    def __init__(self, task, root):
        self.task, self.root, self.data = task, root, root / "data"
        self.data.mkdir()
        draw_data(self.data)
        self.config = json.loads(json.dumps(config_for(task, self.data)))
        self.path = root / "config.yaml"
        self.path.write_text(yaml.safe_dump(self.config))

    def run(self, mode, *overrides, config=None):
        given = [f"Global.output_dir={self.root / mode}", f"Global.save_inference_dir={self.root / mode / 'inference'}"]
        overrides = [part for each in (*given, *overrides) for part in ("-o", each)]
        with paddle.utils.unique_name.guard():
            return main(mode, ["-c", str(config or self.path), *overrides])

    def log(self, mode):
        (path,) = self.root.joinpath(mode).rglob(f"{mode}.log")
        return path.read_text()

    @functools.cached_property
    def weights(self):
        """The weights of the training, without suffix."""
        assert self.run("train") == 0
        (path,) = self.root.joinpath("train").rglob("latest.pdparams")
        return str(path)[: -len(".pdparams")]

    @functools.cached_property
    def released(self):
        """The folder of a release."""
        folder = self.root / "released"
        onnx = [] if WHY_NO_ONNX else ["--onnx"]
        arguments = ["-c", str(self.path), "--weights", self.weights, "--output", str(folder), *onnx]
        assert reparam.main(arguments) == 0
        return folder

    def images(self, split="val"):
        """Return what the network takes of all images of a split, by numpy, and their labels."""
        several = self.task == "several labels"
        lines = (self.data / f"{split}{'_several' if several else ''}.txt").read_text().splitlines()
        pixels, labels = [], []
        for line in lines:
            name, label = re.split(r"[\t ]", line)
            image = np.asarray(Image.open(self.data / name)).astype(np.float32) / 255
            image = (image - 0.5) / 0.5
            if self.task == "one channel":
                image = image @ np.float32([[0.299], [0.587], [0.114]])
            pixels.append(image.transpose(2, 0, 1))
            labels.append([int(each) for each in label.split(",")])
        return np.stack(pixels).astype("float32"), np.squeeze(np.array(labels), 1 if not several else ())

    def network(self):
        """Return the trained network, without any fusing: all of it."""
        model = self.network_untrained()
        checkpoints.load_into(model, f"{self.weights}.pdparams")
        model.eval()
        return model

    def network_untrained(self):
        return ppcls.arch.build_model({"Arch": self.config["Arch"], "Global": {"device": "cpu"}})

    def outputs(self, images):
        """Return what is exported, by the trained network."""
        out = self.network()(paddle.to_tensor(images))
        if self.task == "recognition":
            return out["features"].numpy()
        out = out["Student"] if self.task == "distillation" else out
        return (nn.functional.sigmoid if self.task == "several labels" else nn.functional.softmax)(out).numpy()


@pytest.fixture(scope="module", params=TASKS)
def walk(request, tmp_path_factory):
    return Walk(request.param, tmp_path_factory.mktemp("task"))


def refused(capsys, code, message, command, *arguments, **named):
    capsys.readouterr()
    assert command(*arguments, **named) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert message in error


def test_train(walk):
    state = checkpoints.load(f"{walk.weights}.pdparams")
    assert all(np.isfinite(np.asarray(value)).all() for value in state.values())
    assert "[Train][Epoch 3/3][Avg]" in walk.log("train")
    assert ("[Eval][Epoch 3][Avg]" in walk.log("train")) == (walk.task != "no metric")


def measured(walk, *names):
    line = [line for line in walk.log("eval").splitlines() if "[Eval][Epoch 0][Avg]" in line][-1]
    return [float(re.search(rf"\b{name}: ([\d.]+)", line)[1]) for name in names]


def test_eval(walk, capsys):
    arguments = ("eval", f"Global.pretrained_model={walk.weights}")
    if walk.task == "no metric":
        refused(capsys, 2, "Metric.Eval is missing, so an evaluation would measure nothing", walk.run, *arguments)
        return
    assert walk.run(*arguments) == 0
    images, labels = walk.images()
    answers = walk.outputs(images)
    if walk.task == "several labels":
        right = ((answers >= 0.5) == labels).mean()
        assert measured(walk, "HammingDistance", "AccuracyScore") == pytest.approx([1 - right, right], abs=1e-4)
    elif walk.task == "recognition":
        queries, sought = walk.images("train")
        features = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (walk.outputs(queries), answers)]
        order = np.argsort(-(features[0] @ features[1].T), axis=1, kind="stable")
        found = labels[order] == sought[:, None]
        precision = np.cumsum(found, axis=1) / np.arange(1, found.shape[1] + 1)
        expected = [found[:, 0].mean(), ((precision * found).sum(1) / found.sum(1)).mean()]
        assert measured(walk, "recall1", "mAP") == pytest.approx(expected, abs=1e-4)
    else:
        assert measured(walk, "top1") == pytest.approx([(answers.argmax(1) == labels).mean()], abs=1e-4)


def test_infer(walk, capsys):
    arguments = ("infer", f"Global.pretrained_model={walk.weights}")
    if walk.task == "recognition":
        refused(capsys, 2, "infer prints classes, and Global.eval_mode is retrieval", walk.run, *arguments)
        return
    assert walk.run(*arguments) == 0
    out = capsys.readouterr().out + walk.log("infer")
    scores = walk.outputs(walk.images()[0][1:2])[0]
    best = np.flatnonzero(scores >= 0.5) if walk.task == "several labels" else np.argsort(-scores)
    assert f"'class_ids': {best.tolist()}" in out
    found = json.loads(re.search(r"'scores': (\[.*?\])", out)[1])
    assert found == pytest.approx(scores[best].tolist(), abs=1e-4)


def test_export_and_release_put_out_what_was_trained(walk):
    assert walk.run("export", f"Global.pretrained_model={walk.weights}") == 0
    images, _ = walk.images()
    expected = walk.outputs(images)
    exported = paddle.jit.load(str(walk.root / "export" / "inference" / "inference"))
    exported.eval()
    of_paddleclas = exported(paddle.to_tensor(images))
    if walk.task != "several labels" or SEVERAL != "MultiLabelTopk":
        # 2.4 puts a softmax behind several labels, unless they are measured by ATTRMetric.
        assert relative_error(of_paddleclas, expected) < 1e-5
    outputs = InferenceModel(walk.released).run(images)
    assert len(outputs) == 1
    assert relative_error(outputs[0], expected) < 1e-5


def test_check(walk):
    manifest = read_manifest(walk.released)
    assert reparam.main(["--check", str(walk.released)]) == 0
    assert (walk.released / PLAIN_WEIGHTS).is_file()
    activation = {"several labels": "sigmoid", "recognition": None}.get(walk.task, "softmax")
    assert manifest["output"]["activation"] == activation


def test_predict(walk, capsys):
    predict = tool("predict")
    arguments = [str(walk.released), str(walk.data)]
    if walk.task == "recognition":
        refused(capsys, 2, "a recognition network compares two images, and 1 places are given", predict, arguments)
        return
    images, _ = walk.images()
    for more, floor in ([], 0.5), (["--threshold", "0.2"], 0.2):
        if more and walk.task != "several labels":
            refused(capsys, 2, "exclude each other, so no threshold applies", predict, [*arguments, *more])
            continue
        capsys.readouterr()
        assert predict([*arguments, *more]) == 0
        printed = capsys.readouterr().out
        check_labels(printed, walk.outputs(images), floor if walk.task == "several labels" else 0.0)


def check_labels(printed, outputs, floor):
    """Compare a table of `predict` with the probabilities of the images `val_NN.png`."""
    names = {0: "green", 1: "red", 2: "2"}
    for i, scores in enumerate(outputs):
        best = [k for k in np.argsort(-scores, kind="stable") if scores[k] >= floor]
        rows = printed[printed.index(f"val_{i:02}.png") :].splitlines()
        found = [tuple(row.split()[-2:]) for row in rows[: max(len(best), 1)]]
        assert found == ([(f"{scores[k]:.2%}", names[k]) for k in best] or [("-", "none")])


@pytest.mark.skipif(bool(WHY_NO_ONNX), reason=WHY_NO_ONNX or "ONNX is there")
def test_quantize(walk, capsys):
    target = walk.root / "int8.onnx"
    arguments = ["-c", str(walk.path), "--release", str(walk.released), "--output", str(target), "--largest-drop", "60"]
    if walk.task == "recognition":
        refused(capsys, 2, "its network puts out features", quantize.main, arguments)
        return
    assert quantize.main(arguments) == 0
    printed = capsys.readouterr().out
    images, labels = walk.images()
    scores = walk.outputs(images)
    several = walk.task == "several labels"
    accuracy = ((scores >= 0.5) == labels).mean() if several else (scores.argmax(1) == labels).mean()
    assert re.search(rf"float32 +{accuracy:.2%}", printed)
    assert ("label accuracy" if several else "top-1") in printed
    assert ", on 12 images" in printed
    image = walk.config["Infer"]["infer_imgs"]
    [_, _, *typed] = shlex.split(printed.splitlines()[-1])
    assert typed == [str(target), image]
    # The file says all that is needed, wherever it is.
    alone = walk.root / "alone" / "elsewhere.onnx"
    alone.parent.mkdir()
    target.rename(alone)
    assert tool("predict")([str(alone), str(walk.data)]) == 0
    check_labels(capsys.readouterr().out, OnnxModel(alone).run(images)[0], 0.5 if several else 0.0)


def test_refocus(walk, capsys):
    config = copy.deepcopy(walk.config)
    arch = config["Arch"]
    if walk.task == "recognition":
        arch["Backbone"] = arch["Backbone"]["backbone"]
    elif walk.task != "distillation":
        config["Arch"] = {**arch["backbone"], "class_num": arch["class_num"]}
    path = walk.root / "plain.yaml"
    path.write_text(yaml.safe_dump(config))
    folder = walk.root / "refocus"
    arguments = ["-c", str(path), "--output", str(folder), "-o", "Global.epochs=1"]
    if walk.task in ("distillation", "no metric"):
        message = "of several networks" if walk.task == "distillation" else "needs DataLoader.Eval and Metric.Eval"
        refused(capsys, 2, message, refocus.main, arguments)
        return
    assert refocus.main(arguments) == 0
    result = json.loads((folder / "result.json").read_text())
    assert set(result["accuracy"]) == {"baseline", "refocus"}
    if walk.task == "several labels":
        # Of a distance, which is better the smaller it is, the rest to 1.
        last = {name: curve[-1] for name, curve in result["curves"].items()}
        assert result["accuracy"] == pytest.approx({k: v["eval_AccuracyScore"] for k, v in last.items()}, abs=1e-5)
    second = read_config(str(folder / "stage_two.yaml"))
    (weights,) = folder.joinpath("stage_two").rglob("latest.pdparams")
    if walk.task == "recognition":
        # The margin of its head is for the labels, which it must get in the second training as well.
        running = copy.deepcopy(second)
        running["Global"].update(pretrained_model=str(weights), checkpoints=None)
        assert Engine(running, mode="eval").is_rec
    # The plain network computes with the plain weights what the trained one does.
    trained, plain = reparam.build_train_form(second), reparam.build_train_form(read_config(str(path)))
    checkpoints.load_into(trained, weights)
    checkpoints.load_into(plain, folder / PLAIN_WEIGHTS)
    images = paddle.to_tensor(walk.images()[0])
    outputs = [net(images)["logits"] if walk.task == "recognition" else net(images) for net in (trained, plain)]
    assert relative_error(*outputs) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# What only one task has


def walk_of(task, folder, change=None):
    """Return a walk with a changed config, whose lists of images and config may be changed again."""
    folder.mkdir(exist_ok=True)
    walk = Walk(task, folder)
    if change is not None:
        change(walk.config)
        walk.path.write_text(yaml.safe_dump(walk.config))
    return walk


def test_a_distillation_ships_its_student_and_takes_the_students_weights_alone(tmp_path):
    walk = walk_of("distillation", tmp_path)
    (student,) = Path(walk.weights).parent.glob("best_model_student.pdparams")
    state = checkpoints.load(student)
    assert not any(name.startswith("Student.") for name in state)
    folder = tmp_path / "released"
    assert reparam.main(["-c", str(walk.path), "--weights", str(student), "--output", str(folder)]) == 0
    manifest = read_manifest(folder)
    assert manifest["plain_weights"]["arch"]["name"] == "Tiny"
    assert manifest["size"]["fused"]["trainable_parameters"] == 8 * 27 + 8 + 8 * 72 + 8 + 128 * 2 + 2
    assert manifest["size"]["train_form"]["frozen_parameters"] == 8 * 27 + 8 * 72
    stock = Tiny()
    checkpoints.load_into(stock, folder / PLAIN_WEIGHTS)
    stock.eval()
    images, labels = walk.images()
    network = reparam.build_train_form(read_config(str(walk.path)))
    checkpoints.load_into(network, state)
    logits = stock(paddle.to_tensor(images))
    assert relative_error(logits, network(paddle.to_tensor(images))) < 1e-5
    for mode in ("eval", "export", "infer"):
        assert walk.run(mode, f"Global.pretrained_model={str(student)[: -len('.pdparams')]}") == 0
    assert measured(walk, "top1") == pytest.approx([(logits.numpy().argmax(1) == labels).mean()], abs=1e-4)
    exported = paddle.jit.load(str(tmp_path / "export" / "inference" / "inference"))
    assert relative_error(exported(paddle.to_tensor(images)), nn.functional.softmax(logits)) < 1e-5


def test_a_distillation_says_which_network_is_exported(tmp_path, capsys):
    walk = walk_of("distillation", tmp_path, lambda config: config["Arch"].update(infer_model_name="Pupil"))
    arguments = ["-c", str(walk.path), "--weights", str(walk.path), "--output", str(tmp_path / "out")]
    refused(capsys, 2, "infer_model_name is 'Pupil'; name the network", reparam.main, arguments)


def test_weights_of_a_distillation_must_fit_its_student(tmp_path, capsys):
    walk = walk_of("distillation", tmp_path)
    state = walk.network_untrained().state_dict()
    for lacking, more in (["Student.fc.weight"], []), ([], ["Student.other"]), ([], ["loose"]):
        wrong = {name: value for name, value in state.items() if name not in lacking}
        wrong.update((name, state["Student.fc.bias"]) for name in more)
        checkpoints.save(wrong, tmp_path / "wrong.pdparams")
        arguments = ["-c", str(walk.path), "--weights", str(tmp_path / "wrong.pdparams")]
        name = (lacking or more)[0].replace("Student.", "")
        refused(capsys, 1, name, reparam.main, [*arguments, "--output", str(tmp_path / "out")])


def test_the_head_alone_is_left_out_of_a_recognition_networks_export(tmp_path, capsys):
    walk = walk_of("recognition", tmp_path)
    state = walk.network_untrained().state_dict()
    assert "head.weight" in state
    for name in ("head.other", "neck.other"):
        checkpoints.save({**state, name: state["neck.fc.bias"]}, tmp_path / "wrong.pdparams")
        arguments = ("export", f"Global.pretrained_model={tmp_path / 'wrong'}")
        refused(capsys, 1, name, walk.run, *arguments)


@pytest.mark.parametrize("line", ["val_00.png\t1,0\n", "val_00.png\t1,0,1,0\n", "val_00.png\t1,0,3\n"])
def test_lists_with_another_number_of_labels(tmp_path, capsys, line):
    walk = walk_of("several labels", tmp_path)
    with (walk.data / "val_several.txt").open("a") as file:
        file.write(line)
    found = [int(each) for each in line.split("\t")[1].split(",")]
    message = f"1 of 13 images have not 3 labels, each 0, 1, or -1 for not known; the first is {found}"
    refused(capsys, 1, message, walk.run, "train")


def test_attributes_are_measured_and_released(tmp_path):
    def measured_by_attributes(config):
        config["Metric"] = {"Eval": [{"ATTRMetric": {"threshold": 0.5}}]}
        config["DataLoader"]["Eval"]["dataset"]["label_ratio"] = True
        config["Loss"]["Eval"] = config["Loss"]["Train"]  # which reads the ratio
        config["Global"]["use_multilabel"] = True

    walk = walk_of("several labels", tmp_path, measured_by_attributes)
    assert walk.run("eval", f"Global.pretrained_model={walk.weights}") == 0
    images, labels = walk.images()
    answers = walk.network()(paddle.to_tensor(images)).numpy() > 0.5  # of what the network puts out, as PaddleClas does
    recalls = [(answers == labels)[:, i][labels[:, i] == k].mean() for i in range(3) for k in (0, 1)]
    line = re.findall(r"evalres: ma: ([\d.]+)", walk.log("eval"))
    assert float(line[-1]) == pytest.approx(np.mean(recalls), abs=1e-4)
    # Of all of PaddleClas' versions this is the metric whose export ends in a sigmoid.
    assert walk.run("export", f"Global.pretrained_model={walk.weights}") == 0
    exported = paddle.jit.load(str(tmp_path / "export" / "inference" / "inference"))(paddle.to_tensor(images))
    assert relative_error(exported, walk.outputs(images)) < 1e-5


def test_weighted_loss_of_several_labels_counts_what_is_known():
    from ppcls.loss.multilabelloss import MultiLabelLoss

    generator = np.random.default_rng(0)
    logits, ratio = generator.standard_normal((4, 3)), np.tile([0.2, 0.5, 0.9], (4, 1))
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 1]], float)
    logits, labels, ratio = (each.astype("float32") for each in (logits, labels, ratio))
    given = paddle.to_tensor(np.stack([labels, ratio], axis=1))
    loss = MultiLabelLoss(weight_ratio=True, size_sum=True)(paddle.to_tensor(logits), given)["MultiLabelLoss"]
    entropy = np.logaddexp(0, logits) - labels * logits
    weights = np.exp(np.where(labels == 1, 1 - ratio, ratio))
    assert relative_error(loss, (weights * entropy).sum(1).mean()) < 1e-6
    unknown = paddle.to_tensor(np.stack([-np.ones_like(labels), ratio], axis=1))
    assert float(MultiLabelLoss(weight_ratio=True)(paddle.to_tensor(logits), unknown)["MultiLabelLoss"]) == 0


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_images_of_three_channels_for_a_network_of_one(tmp_path, capsys, mode):
    def without_gray(config):
        for loader in config["DataLoader"].values():
            steps = loader["dataset"]["transform_ops"]
            loader["dataset"]["transform_ops"] = [step for step in steps if "ToGray" not in step]

    walk = walk_of("one channel", tmp_path, without_gray)
    checkpoints.save(walk_of("one channel", tmp_path / "net").network_untrained().state_dict(), tmp_path / "w.pdparams")
    message = "makes images of 3 channels, and Global.image_shape says 1; ToGray: {} behind NormalizeImage makes one"
    refused(
        capsys, 1, message, walk.run, mode, *([f"Global.pretrained_model={tmp_path / 'w'}"] if mode == "eval" else [])
    )


def test_a_training_that_evaluates_needs_a_metric(tmp_path, capsys):
    walk = walk_of("no metric", tmp_path, lambda config: config["Global"].update(eval_during_train=True))
    refused(capsys, 2, "Metric.Eval is missing", walk.run, "train")
    for nothing in ("Metric=None", "Metric.Eval=[]"):
        refused(capsys, 2, "Metric.Eval is missing", walk.run, "train", nothing)


# ---------------------------------------------------------------------------------------------------------------------
# docs/tasks.md

PAGE = (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_the_page_shows_the_networks_of_the_configs():
    blocks = [yaml.safe_load(block)["Arch"] for language, block in blocks_of(PAGE) if language == "yaml"]
    configs = sorted((ROOT / "ppcls_configs" / "tasks").iterdir(), reverse=True)
    # Those of faces have a page of their own.
    faces = (ROOT / "docs" / "faces.md").read_text(encoding="utf-8")
    configs = [path for path in configs if path.name not in faces]
    assert [path.stem for path in configs] == ["recognition", "distillation"]
    assert blocks == [yaml.safe_load(path.read_text(encoding="utf-8"))["Arch"] for path in configs]
    assert not [name for name in named_files(PAGE) if not (ROOT / name).exists()]


@pytest.mark.skipif(
    bool(os.environ.get("PADDLECLAS_HOME")), reason="a checkout saves the weights that the page names one folder higher"
)
def test_every_block_of_the_page_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ppcls_configs").symlink_to(ROOT / "ppcls_configs")
    for language, block in blocks_of(PAGE):
        if language == "python":
            capsys.readouterr()
            exec(compile(block, "tasks.md", "exec"), {"__name__": "__main__"})
            assert (
                len(
                    re.findall(r"dataset/\S+ is like dataset/digits/train/\d/\d+.png [01]\.\d", capsys.readouterr().out)
                )
                == 5
            )
        for command in commands_of(block) if language == "bash" else ():
            run_here(cut_short(command))
            if "prepare_data" in command:
                keep_few(tmp_path)
    assert re.search(r"dataset/digits/val/3/\d+.png +[\d.]+% +\d", capsys.readouterr().out)
    assert read_manifest("output/tasks/features")["output"]["keys"] == ["features"]
    assert read_manifest("output/tasks/student")["plain_weights"]["arch"]["name"] == "PPLCNet_x0_25"
