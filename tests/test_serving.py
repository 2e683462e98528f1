"""A release by PaddleClas' scripts, PaddleX, onnxruntime and OpenVINO: what Paddle Inference says; docs/serving.md."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest
import yaml
from helpers import missing_for_onnx, relative_error
from paddle import nn
from pages import ROOT, blocks_of, commands_of, cut_short, keep_few, named_files, run, run_here
from PIL import Image
from sklearn.datasets import load_sample_images

from paddle_reparam import InferenceModel, ppcls
from paddle_reparam.deploy.outputs import OutputSpec
from paddle_reparam.deploy.predict import ImageClassifier, preprocess
from paddle_reparam.deploy.released import read_manifest
from paddle_reparam.images import read_rgb
from paddle_reparam.weights import checkpoints

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
WHY_NO_ONNX = missing_for_onnx()
WHY_NO_OPENVINO = "" if importlib.util.find_spec("openvino") else "needs pip install 'paddle-reparam[openvino]'"
#: PaddleX pins another OpenCV, so it has an environment of its own.
PADDLEX = os.environ.get("PADDLEX_PYTHON")
WHY_NO_PADDLEX = "" if PADDLEX else "PADDLEX_PYTHON names no python with paddlex[cv] and Paddle"

CHECKOUT = Path(os.environ.get("PADDLECLAS_HOME", ""))
WHY_NO_CHECKOUT = None if (CHECKOUT / "deploy" / "utils").is_dir() else "PADDLECLAS_HOME names no checkout with deploy"

LABELS = [f"label {i}" for i in range(10)]
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
STEPS = [
    {"ResizeImage": {"resize_short": 40}},
    {"CropImage": {"size": 32}},
    {"NormalizeImage": {"scale": 1 / 255, **IMAGENET, "order": ""}},
    {"ToCHWImage": {}},
]
CONFIG = {
    "Global": {"image_shape": [3, 32, 32], "device": "cpu"},
    "Arch": {"name": "Small", "class_num": 10},
    "DataLoader": {"Train": {}},
    "Infer": {
        "transforms": [{"DecodeImage": {"to_rgb": True, "channel_first": False}}, *STEPS],
        "PostProcess": {"name": "Topk", "topk": 5, "class_id_map_file": "labels.txt"},
    },
}  # fmt: skip
SOFTMAX, SIGMOID, FEATURES = OutputSpec("softmax"), OutputSpec("sigmoid"), OutputSpec(None, ("features",))


def resized(**options):
    """Return the steps without a crop, with other options for the size."""
    return [{"ResizeImage": options}, *STEPS[2:]]


def files(steps, labels=LABELS, output=SOFTMAX, size=(32, 32)):
    from paddle_reparam.ppcls.serving import files_for_others

    return files_for_others(steps, labels, output, size)


def for_paddlex(*arguments, **named):
    """Return the steps and the ending that PaddleX reads, or None."""
    text = files(*arguments, **named).get("inference.yml")
    if text is None:
        return None
    read = yaml.safe_load(text)
    return read["PreProcess"]["transform_ops"], read["PostProcess"]


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def test_the_script_of_paddleclas_gets_the_steps_and_the_names():
    written = files(STEPS, ["a", None])
    assert written["labels.txt"] == "0 a\n1 1\n"
    script = yaml.safe_load(written["predict_cls.yml"])
    assert script["PreProcess"]["transform_ops"] == STEPS
    assert script["PostProcess"] == {"main_indicator": "Topk", "Topk": {"topk": 5, "class_id_map_file": "labels.txt"}}
    script = yaml.safe_load(files(STEPS, None, SIGMOID)["predict_cls.yml"])
    indicator = "MultiLabelThreshOutput"
    assert script["PostProcess"] == {
        "main_indicator": indicator, indicator: {"threshold": 0.5, "class_id_map_file": None}
    }  # fmt: skip
    assert set(files(STEPS, None, FEATURES)) == {"predict_rec.yml"}
    gray = [*STEPS[:3], {"ToGray": {}}, STEPS[3]]
    assert files(gray, None) == {}
    assert files(None, None) == {}


def test_paddlex_gets_the_steps_in_its_own_words():
    steps, ending = for_paddlex(STEPS)
    assert steps == STEPS
    assert ending == {"Topk": {"topk": 5, "label_list": LABELS}}
    assert for_paddlex(STEPS, None)[1] == {"Topk": {"topk": 5}}
    # It takes for granted that axes come last; in a config of PaddleClas they may come first.
    normalize = {key: value for key, value in STEPS[2]["NormalizeImage"].items() if key != "order"}
    for order in ({}, {"order": "chw"}):
        turned = [*STEPS[:2], STEPS[3], {"NormalizeImage": {**normalize, **order}}]
        assert for_paddlex(turned)[0] == STEPS
    # What it is not told to do it does bilinearly by OpenCV, and it has other words for some ways.
    for options, theirs in [
        ({}, {}),
        ({"interpolation": "bilinear", "backend": "cv2", "return_numpy": True}, {}),
        ({"interpolation": "lanczos"}, {"backend": "cv2", "interpolation": "LANCZOS4"}),
        ({"interpolation": "bilinear", "backend": "pil"}, {"backend": "pil", "interpolation": "BILINEAR"}),
    ]:
        assert for_paddlex(resized(size=32, **options))[0][0] == {"ResizeImage": {"size": 32, **theirs}}
    assert for_paddlex(resized(size=32, interpolation="hamming", backend="pil")) is None
    # Images that are not resized have one size.
    assert for_paddlex(STEPS[2:], size=(24, 32))[0][0] == {"ResizeImage": {"size": [32, 24]}}
    assert for_paddlex(STEPS[2:], size=None) is None
    assert for_paddlex(STEPS[1:]) is None
    assert for_paddlex([STEPS[0], STEPS[3]]) is None  # pixels, which it always normalises


def test_paddlex_gets_nothing_that_it_would_read_wrongly():
    whole = resized(size=32)
    assert for_paddlex(whole, LABELS, SIGMOID)[1] == {
        "MultiLabelThreshOutput": {"threshold": 0.5, "label_list": LABELS}
    }
    assert for_paddlex(whole, None, FEATURES)[1] == {"NormalizeFeatures": {}}
    assert for_paddlex(whole, None, SIGMOID) is None
    assert for_paddlex(STEPS, LABELS, SIGMOID) is None
    assert for_paddlex(STEPS, None, FEATURES) is None
    assert for_paddlex(resized(size=32, interpolation="area"), None, FEATURES) is None


def test_what_pil_does_unless_told_is_written_down():
    """It is another thing in 2.4 than in newer versions; whoever runs the release has to do the same."""
    ppcls.setup()
    from ppcls.data.preprocess.ops.operators import ResizeImage

    from paddle_reparam.ppcls.transforms import read_steps

    options = {"size": [30, 20], "backend": "PIL"}
    [step, _] = read_steps({"Infer": {"transforms": [{"ResizeImage": options}]}})
    image = load_sample_images().images[0]
    assert (preprocess(image, [step]) == ResizeImage(**options)(image)).all()


# ---------------------------------------------------------------------------------------------------------------------
# Photographs


def small(class_num, **_):
    """Return a network whose export takes no time; what it computes does not matter here."""
    return nn.Sequential(
        nn.Conv2D(3, 8, 3, stride=2, padding=1), nn.BatchNorm2D(8), nn.ReLU(), nn.AdaptiveAvgPool2D(4), nn.Flatten(),
        nn.Linear(128, class_num),
    )  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with photographs, `release` and `pixels`, a release that takes them as they are."""
    engine = ppcls.setup()
    from paddle_reparam.ppcls.command import read_config
    from paddle_reparam.ppcls.reparam import build_train_form, main

    small.__module__ = "ppcls.arch.backbone.small"
    engine.arch.Small = small
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images").mkdir()
    for name, image in zip(("china.png", "flower.png"), load_sample_images().images):
        Image.fromarray(image).save(folder / "images" / name)
    (folder / "labels.txt").write_text("".join(f"{i} {label}\n" for i, label in enumerate(LABELS)))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    before = Path.cwd()
    os.chdir(folder)
    try:
        paddle.seed(0)
        net = build_train_form(read_config("config.yaml"))
        checkpoints.save(net.state_dict(), "trained.pdparams")
        common = ["-c", "config.yaml", "--weights", "trained.pdparams", "--format", "pdmodel", "--output"]
        assert main([*common, "release"]) == 0
        assert main([*common, "pixels", "--normalize"]) == 0
    finally:
        os.chdir(before)
        del engine.arch.Small
    return folder


def inputs(photos, steps=STEPS):
    return np.stack([preprocess(read_rgb(path), steps) for path in sorted((photos / "images").iterdir())])


def with_files(photos, name, *arguments):
    """Return a copy of the release with the files for other steps, labels or another output."""
    folder = photos / name
    shutil.copytree(photos / "release", folder)
    for file, text in files(*arguments).items():
        (folder / file).write_text(text)
    return folder


def in_python(python, script, *arguments, **variables):
    """Run a script in a process of its own, and return what it printed."""
    done = subprocess.run(
        [python, "-W", "ignore", "-c", script, *map(str, arguments)],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


#: Runs every `SCRIPT=FOLDER` for the images; "command" is PaddleClas' command.
BY_PADDLECLAS = """
import importlib.util, os, runpy, sys
[place] = importlib.util.find_spec("paddleclas").submodule_search_locations
for script, folder in (pair.split("=") for pair in sys.argv[2:]):
    os.chdir(folder)
    print("====", flush=True)
    if script == "command":
        from paddleclas.paddleclas import main
        sys.argv = ["paddleclas", "--inference_model_dir", ".", "--infer_imgs", sys.argv[1], "--resize_short", "40",
                    "--crop_size", "32", "--class_id_map_file", "labels.txt"]
        main()
    else:
        sys.argv = [script, "-c", f"{script}.yml", "-o", "Global.infer_imgs=" + sys.argv[1]]
        sys.path.insert(0, f"{place}/deploy/python")
        runpy.run_path(f"{place}/deploy/python/{script}.py", run_name="__main__")
        sys.argv = ["", sys.argv[-1].split("=")[1]]
"""


def check_scripts(photos, parts):
    """Compare what the scripts printed for the release, the pixels and the features with Paddle Inference."""
    expected = InferenceModel(photos / "release").run(inputs(photos))[0]
    best = np.argsort(-expected, axis=1)[:, :5]
    for part in parts[:2]:
        for name, classes in zip(("china", "flower"), best):
            found = re.findall(rf"{name}.png:\tclass id\(s\): \[(.*?)\].*label_name\(s\): \[(.*?)\]", part)
            assert found == [(", ".join(map(str, classes)), ", ".join(repr(LABELS[i]) for i in classes))]
    found = re.findall(r"(?:china|flower).png:\t\[(.*?)\]", parts[2], re.S)
    features = np.array([[float(number) for number in each.split()] for each in found])
    assert relative_error(features, expected / np.linalg.norm(expected, axis=1, keepdims=True)) < 1e-5
    return expected, best


def test_paddleclas_own_scripts_and_command(photos):
    pairs = [f"predict_cls={photos / 'release'}", f"predict_cls={photos / 'pixels'}",
             f"predict_rec={with_files(photos, 'features', STEPS, None, FEATURES)}",
             f"command={photos / 'release'}"]  # fmt: skip
    _, *parts = in_python(sys.executable, BY_PADDLECLAS, photos / "images", *pairs).split("====")
    expected, best = check_scripts(photos, parts)
    found = re.findall(r"class_ids: (\[.*?\]), scores: (\[.*?\])", parts[3])
    assert [json.loads(classes) for classes, _ in found] == best.tolist()
    for (_, scores), row, classes in zip(found, expected, best):
        assert json.loads(scores) == pytest.approx(row[classes], abs=1e-5)


@pytest.mark.skipif(WHY_NO_CHECKOUT is not None, reason=WHY_NO_CHECKOUT or "a checkout is there")
def test_the_scripts_of_a_checkout(photos, tmp_path):
    # They import it as a package of this name, whose __init__ wants packages for retrieval.
    (tmp_path / "paddleclas").mkdir()
    (tmp_path / "paddleclas" / "__init__.py").write_text("")
    (tmp_path / "paddleclas" / "deploy").symlink_to(CHECKOUT.resolve() / "deploy")
    pairs = [f"predict_cls={photos / 'release'}", f"predict_cls={photos / 'pixels'}",
             f"predict_rec={with_files(photos, 'of_checkout', STEPS, None, FEATURES)}",
             f"predict_cls={with_files(photos, 'several_of_checkout', STEPS, LABELS, SIGMOID)}"]  # fmt: skip
    variables = {"PYTHONPATH": str(tmp_path), "FLAGS_enable_pir_api": "0"}
    _, *parts = in_python(sys.executable, BY_PADDLECLAS, photos / "images", *pairs, **variables).split("====")
    expected, _ = check_scripts(photos, parts)
    found = re.findall(r"(?:china|flower).png:\tclass id\(s\): \[(.*?)\]", parts[3])
    assert found == [", ".join(map(str, np.flatnonzero(row >= 0.5))) for row in expected]


@pytest.mark.skipif(bool(WHY_NO_OPENVINO), reason=WHY_NO_OPENVINO or "OpenVINO is there")
def test_openvino_reads_the_program_of_paddle(photos):
    import openvino

    x = inputs(photos)
    model = openvino.compile_model(photos / "release" / "inference.pdmodel", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert relative_error(model(x)[0], InferenceModel(photos / "release").run(x)[0]) < 1e-5


#: Prints what each `MODEL=FOLDER` makes of the images, a line for each.
BY_PADDLEX = """
import json, sys
from paddlex import create_model
for name, folder in (pair.split("=") for pair in sys.argv[2:]):
    results = create_model(model_name=name, model_dir=folder).predict(sys.argv[1])
    print("FOUND", json.dumps([result.json["res"] for result in results]), flush=True)
"""


@pytest.mark.skipif(bool(WHY_NO_PADDLEX), reason=WHY_NO_PADDLEX or "PaddleX is there")
def test_paddlex_reads_what_is_written_for_it(photos):
    by_pil = resized(size=[32, 32], backend="pil", interpolation="bicubic")
    cases = [
        ("PP-LCNet_x1_0", "as it is", STEPS, LABELS, SOFTMAX),
        ("PP-LCNet_x1_0", "by pil", by_pil, None, SOFTMAX),
        ("PP-LCNet_x1_0_ML", "several", resized(size=32), LABELS, SIGMOID),
        ("PP-ShiTuV2_rec", "of features", resized(size=32), None, FEATURES),
    ]
    pairs = [f"{model}={with_files(photos, *case)}" for model, *case in cases]
    lines = re.findall("^FOUND (.*)$", in_python(PADDLEX, BY_PADDLEX, photos / "images", *pairs), re.M)
    for line, (_, _, steps, labels, output) in zip(lines, cases):
        expected = InferenceModel(photos / "release").run(inputs(photos, steps))[0]
        for found, row in zip(json.loads(line), expected):
            if output == FEATURES:
                assert relative_error(np.array(found["feature"][0]), row / np.linalg.norm(row)) < 1e-4
                continue
            best = [i for i in np.argsort(-row)[:5] if output == SOFTMAX or row[i] > 0.5]
            assert np.ravel(found["class_ids"]).tolist() == best
            assert found["scores"] == pytest.approx(row[best], abs=1e-4)
            assert found["label_names"] == [LABELS[i] if labels else str(i) for i in best]
    assert len(lines) == len(cases)


# ---------------------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The folder in which the commands of the page have run, and what they printed."""
    if os.environ.get("PADDLECLAS_HOME"):
        pytest.skip("a checkout saves the weights that the page names one folder higher")
    folder = tmp_path_factory.mktemp("page")
    (folder / "ppcls_configs").symlink_to(ROOT / "ppcls_configs")
    before = Path.cwd()
    os.chdir(folder)
    printed = []
    try:
        for language, block in blocks_of(PAGE):
            for command in commands_of(block) if language == "bash" else ():
                if WHY_NO_ONNX:
                    if "use_onnx" in command:
                        continue
                    command = command.replace(" --onnx", "")
                if command.startswith("python tools/"):
                    run_here(cut_short(command))
                else:
                    printed.append(run(command, folder))
                if "prepare_data" in command:
                    keep_few(folder)
    finally:
        os.chdir(before)
    return folder, printed


def test_the_scripts_say_what_is_predicted_here(page):
    folder, printed = page
    images = sorted((folder / "dataset" / "digits" / "val" / "3").iterdir())
    classifier = ImageClassifier(folder / "output" / "digits" / "served")
    assert len(printed) == (1 if WHY_NO_ONNX else 2)
    for path in images[:5]:
        [found] = classifier.predict([path])
        best, _ = found.labels[0]
        for text in printed:
            assert re.search(rf"^{path.name}:\tclass id\(s\): \[{best},", text, re.M)


@pytest.mark.parametrize("package", ["onnxruntime", "openvino", "paddlex"])
def test_the_programs_say_what_is_predicted_here(page, package, capsys, monkeypatch):
    why = {"onnxruntime": WHY_NO_ONNX, "openvino": WHY_NO_OPENVINO, "paddlex": WHY_NO_PADDLEX}[package]
    [program] = [block for language, block in blocks_of(PAGE) if language == "python" and package in block]
    assert len([line for line in program.splitlines() if line]) <= 10
    if why:
        pytest.skip(why)
    folder, _ = page
    monkeypatch.chdir(folder)
    image = Path("dataset/digits/val/3/0045.png")
    [found] = ImageClassifier("output/digits/served").predict([image])
    best, probability = found.labels[0]
    if package == "paddlex":
        printed = in_python(PADDLEX, program)
        printed = re.search(rf"^{image} (.*)$", printed, re.M)[1]
    else:
        exec(compile(program, "serving.md", "exec"), {"__name__": "__main__"})
        printed = capsys.readouterr().out
    label, number = printed.split()
    assert label == best
    assert float(number) == pytest.approx(probability, abs=1e-4)
    if package == "onnxruntime":
        # The file says itself what its input and its labels are.
        [alone] = ImageClassifier(shutil.copy("output/digits/served/inference.onnx", "alone.onnx")).predict([image])
        assert alone.labels[0] == (best, pytest.approx(probability, abs=1e-4))


@pytest.mark.skipif(bool(WHY_NO_ONNX), reason=WHY_NO_ONNX or "ONNX is there")
def test_others_load_the_onnx_file_without_a_warning(page, capfd):
    import onnxruntime

    folder = page[0] / "output" / "digits" / "served"
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype("float32")
    expected = InferenceModel(folder).run(x)[0]
    capfd.readouterr()
    [found] = onnxruntime.InferenceSession(folder / "inference.onnx").run(None, {"x": x})
    assert capfd.readouterr().err == ""
    assert relative_error(found, expected) < 1e-5
    if not WHY_NO_OPENVINO:
        import openvino

        hint = {"INFERENCE_PRECISION_HINT": "f32"}
        found = openvino.compile_model(folder / "inference.onnx", "CPU", hint)(x)[0]
        assert relative_error(found, expected) < 1e-5


def test_what_the_page_names_exists(page):
    assert {language for language, _ in blocks_of(PAGE)} == {"bash", "python"}
    assert not [name for name in named_files(PAGE) if not (ROOT / name).exists()]
    written = {path.name for path in (page[0] / "output" / "digits" / "served").iterdir()}
    named = set(re.findall(r"`((?:inference|labels|predict_cls|manifest)\.\w+)`", PAGE))
    assert named - written == {"inference.json", *(["inference.onnx"] if WHY_NO_ONNX else [])}
    assert read_manifest(page[0] / "output" / "digits" / "served")["input"]["preprocessing"]
