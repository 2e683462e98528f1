"""Photographs through a released folder: the labels are those of the network that was trained."""

import importlib.util
import os
import re
import tracemalloc
import warnings
from pathlib import Path

import cv2
import numpy as np
import paddle
import pytest
import yaml
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from odd_images import READ, REFUSED
from pages import ROOT
from PIL import Image
from sklearn.datasets import load_sample_images

from paddle_reparam import ppcls
from paddle_reparam.deploy.predict import ImageClassifier, find_images, preprocess
from paddle_reparam.deploy.released import read_manifest, write_manifest
from paddle_reparam.errors import ReparamError
from paddle_reparam.images import read_rgb
from paddle_reparam.report import shown_width
from paddle_reparam.weights import checkpoints

LABELS = [f"label {i}" for i in range(10)]
CONFIG = {
    "Global": {"image_shape": [3, 32, 32], "device": "cpu"},
    "Arch": {
        "name": "ReparamModel", "class_num": 10, "backbone": {"name": "MobileNetV1_x0_25"},
        "layer": {"name": "RefConv2D"}, "where": "conv.conv",
    },
    "DataLoader": {"Train": {}},
    "Infer": {
        "transforms": [
            {"DecodeImage": {"to_rgb": True, "channel_first": False}},
            {"ResizeImage": {"resize_short": 40}},
            {"CropImage": {"size": 32}},
            {"NormalizeImage": {"scale": "1.0/255.0", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "order": ""}},
            {"ToCHWImage": None},
        ],
        "PostProcess": {"name": "Topk", "topk": 5, "class_id_map_file": "labels.txt"},
    },
}  # fmt: skip


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with photographs, a release of a network, one of it that takes pixels, and what dygraph says."""
    ppcls.setup()
    from ppcls.data.preprocess.ops import operators

    from paddle_reparam.ppcls.command import read_config
    from paddle_reparam.ppcls.reparam import build_train_form, main

    folder = tmp_path_factory.mktemp("project")
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
        net.train()
        for _ in range(20):
            net(paddle.randn([16, 3, 32, 32]))
        net.eval()
        checkpoints.save(net.state_dict(), "trained.pdparams")
        common = ["-c", "config.yaml", "--weights", "trained.pdparams", "--output"]
        assert main([*common, "plain"]) == 0
        assert main([*common, "pixels", "--normalize"]) == 0
        assert main([*common, "floats", "--normalize", "float32"]) == 0
    finally:
        os.chdir(before)
    expected = {}
    for path in sorted((folder / "images").iterdir()):
        data = path.read_bytes()
        for step in CONFIG["Infer"]["transforms"]:
            [(name, options)] = step.items()
            data = getattr(operators, name)(**(options or {}))(data)
        expected[path.name] = paddle.nn.functional.softmax(net(paddle.to_tensor(data[None])))[0].numpy()
    assert expected["china.png"].argmax() != expected["flower.png"].argmax() or (
        np.abs(expected["china.png"] - expected["flower.png"]).max() > 1e-3
    )
    return folder, expected


@pytest.mark.parametrize("release", ["plain", "pixels", "floats"])
def test_photographs_get_the_trained_networks_probabilities(project, release):
    folder, expected = project
    classifier = ImageClassifier(folder / release)
    for prediction in classifier.predict(find_images([folder / "images"]), top=10):
        found, right = dict(prediction.labels), expected[prediction.path.name]
        np.testing.assert_allclose([found[label] for label in LABELS], right, rtol=1e-4, atol=1e-6)
        assert prediction.labels[0][0] == LABELS[right.argmax()]


def test_the_command_prints_a_table_and_draws_a_sheet(project, tmp_path, capsys):
    folder, expected = project
    predict = tool("predict").main
    sheet = tmp_path / "sheet.png"
    assert predict([str(folder / "plain"), str(folder / "images"), "--top", "2", "--sheet", str(sheet)]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"[\d.]+%  label \d", printed)) == 4
    best = expected["china.png"].argmax()
    assert re.search(rf"china.png +{expected['china.png'][best]:.2%} +label {best}", printed)
    with Image.open(sheet) as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 1000


def test_what_is_wrong_is_one_sentence(project, tmp_path, capsys):
    folder, _ = project
    predict = tool("predict").main
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "none.jpg").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.png").mkdir()
    for release, images, message in [
        (tmp_path, folder / "images", "is no release"),
        (folder / "plain", tmp_path / "bad.jpg", "bad.jpg: it is no image"),
        (folder / "plain", tmp_path / "none.jpg", "none.jpg: it is empty"),
        (folder / "plain", tmp_path / "empty", "empty holds no image"),
        (folder / "plain", tmp_path / "nowhere", "there is no image and no folder"),
    ]:
        assert predict([str(release), str(images)]) == (1 if images.exists() else 2)
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    for wrong in (
        ["--top", "0"],
        ["--sheet", str(tmp_path / "nowhere" / "a.png")],
        ["--sheet", "a.txt"],
        ["--sheet", str(tmp_path / "folder.png")],
    ):
        with pytest.raises(SystemExit, match="2"):
            predict([str(folder / "plain"), str(folder / "images"), *wrong])


def test_what_cannot_be_read_is_counted_and_the_rest_is_labelled(project, tmp_path, capsys):
    folder, _ = project
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "b.png").write_bytes((folder / "images" / "china.png").read_bytes())
    (tmp_path / "c.png").write_bytes(b"")
    assert tool("predict").main([str(folder / "plain"), str(tmp_path), "--top", "1"]) == 1
    out, error = capsys.readouterr()
    assert re.search(r"b.png .*label \d", out)
    assert "a.png" not in out
    assert error.startswith("error: 2 of 3 are not labelled:\n")
    for name, why in (("a.png", "it is no image"), ("c.png", "it is empty")):
        assert f"\n  {tmp_path / name}: {why}\n" in error


def test_several_places_and_every_kind_of_image(project, tmp_path, capsys):
    folder, _ = project
    for name, (data, _) in {**READ, **REFUSED}.items():
        (tmp_path / name).write_bytes(data)
    for name in ("a.heic", "b.HEIC", "notes.txt"):
        (tmp_path / name).write_bytes(b"what is not read")
    (tmp_path / "empty").mkdir()
    china, flower = (folder / "images" / name for name in ("china.png", "flower.png"))
    places = [flower, tmp_path, china, tmp_path / "empty", folder / "images"]
    assert tool("predict").main([str(folder / "plain"), *map(str, places), "--top", "1"]) == 1
    out, error = capsys.readouterr()
    rows = out.splitlines()[2:]
    assert sorted(row.split("  ")[0] for row in rows) == sorted(
        map(str, [china, flower, *(tmp_path / n for n in READ)])
    )
    assert rows[0].startswith(str(flower))
    # Of which a Chinese character takes two.
    assert len({shown_width(row[: row.index("%")]) for row in rows}) == 1
    assert error.startswith("left out, as no images that are read here: 2 .heic, 1 .txt\n")
    assert f"error: {len(REFUSED) + 1} of {len(READ) + len(REFUSED) + 3} are not labelled:" in error
    for name, (_, why) in {**REFUSED, "empty": (b"", "holds no image")}.items():
        assert re.search(rf"\n  {re.escape(str(tmp_path / name))}:? .*{why}", error)


def test_images_are_labelled_as_they_are_read_and_none_is_kept(project, tmp_path, monkeypatch, capsys):
    folder, _ = project
    picture = np.zeros([500, 700, 3], np.uint8)
    data = cv2.imencode(".png", picture)[1].tobytes()
    for number in range(24):
        (tmp_path / f"{number:02}.png").write_bytes(data)
    predict = tool("predict").main
    predict([str(folder / "pixels"), str(tmp_path / "00.png"), "--top", "1"])  # what is imported is no image
    tracemalloc.start()
    assert predict([str(folder / "pixels"), str(tmp_path), "--top", "1"]) == 0
    assert tracemalloc.get_traced_memory()[1] < 8 * picture.nbytes
    tracemalloc.stop()
    assert len(capsys.readouterr().out.splitlines()) == 2 + 1 + 2 + 24
    read = []
    monkeypatch.setattr("paddle_reparam.deploy.predict.read_rgb", lambda path: [read.append(path), read_rgb(path)][1])
    predictions = ImageClassifier(folder / "pixels").predict(find_images([tmp_path]))
    next(predictions)
    assert len(read) < 20
    assert len(list(predictions)) == 23


# ---------------------------------------------------------------------------------------------------------------------
# The sheet


def font_of(characters, file):
    """Write a font in which each of these characters is a box, and nothing else is there."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "box"])
    builder.setupCharacterMap(dict.fromkeys(map(ord, characters), "box"))
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for corner in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder.setupGlyf({".notdef": pen.glyph(), "box": pen.glyph()})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", "box"], (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(file)


@pytest.mark.parametrize("installed", ["", "猫", "猫的照片"])
def test_a_sheet_has_names_and_labels_in_every_script(project, tmp_path, monkeypatch, capsys, installed):
    folder, _ = project
    photos = tmp_path / "photos"
    photos.mkdir()
    usual = [entry for entry in font_manager.fontManager.ttflist if entry.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", usual)
    monkeypatch.setattr(
        font_manager, "findSystemFonts", lambda: [str(tmp_path / "no font"), str(tmp_path / "boxes.ttf")]
    )
    (tmp_path / "no font").write_bytes(b"no font")
    if installed:
        font_of(installed, tmp_path / "boxes.ttf")
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: [figures.append(self), save(self, *a, **k)])
    monkeypatch.setattr(
        "paddle_reparam.deploy.predict.ImageClassifier._label", lambda self, number: "猫 costs $2 or $3"
    )
    name = f"a name that is longer than a picture is wide, {'x' * 60} $1.png"
    for path in (photos / name, photos / "猫的照片.png"):
        path.write_bytes((folder / "images" / "china.png").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments = [str(folder / "plain"), str(photos), "--sheet", str(tmp_path / "sheet.png")]
        assert tool("predict").main(arguments) == 0
    out, error = capsys.readouterr()
    assert out.endswith(f"written: {tmp_path / 'sheet.png'}, 2 images\n")
    texts = [text for axes in figures[0].axes for text in (axes.title, *axes.texts)]
    assert not any(text.get_parse_math() for text in texts)
    label, shortened, _, name = (text.get_text() for text in texts)
    assert re.fullmatch(r"a name that .{,4}…x+ \$1\.png", shortened)
    cat = "猫" if installed else r"\u732b"
    assert label.startswith(f"{cat} costs $2 or $3\n")
    assert name == {"": r"\u732b\u7684…\u7247.png", "猫": r"猫\u7684\u7167\u7247.png"}.get(installed, "猫的照片.png")
    if installed == "猫的照片":
        assert error == ""
    else:
        assert error.count("\n") == 1
        assert re.match("no font here has .*照片.*, such as Noto Sans CJK", error)


def test_a_sheet_has_so_many_images_and_says_so(project, tmp_path, monkeypatch, capsys):
    folder, _ = project
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes((folder / "images" / "china.png").read_bytes())
    predict = tool("predict")
    monkeypatch.setattr(predict, "ON_A_SHEET", 2)
    sheet = tmp_path / "nothing" / "sheet.png"
    sheet.parent.mkdir()
    assert predict.main([str(folder / "plain"), str(tmp_path), "--sheet", str(sheet)]) == 0
    assert f"written: {sheet}, the first 2 of 3 images" in capsys.readouterr().out


def test_labels_of_all_classes_are_given_and_odd_files_are_refused(tmp_path):
    from paddle_reparam.ppcls.errors import ConfigError
    from paddle_reparam.ppcls.transforms import read_labels

    file = tmp_path / "labels.txt"
    config = {"Arch": {"class_num": 4}, "Infer": {"PostProcess": {"class_id_map_file": str(file)}}}
    file.write_text("0 a cat\n2 dog\n")
    assert read_labels(config, tmp_path) == ["a cat", None, "dog", None]
    assert read_labels({**config, "Arch": {}}, tmp_path) == ["a cat", None, "dog"]
    for content, message in [
        (b"cat\n", "line 1: 'cat' is no class number and label"),
        (b"0 cat\n99999999999 dog\n", "line 2"),
        ("\u00b2 cat\n".encode(), "line 1"),
        (b"0 \xff\xfe\n", "is no text in UTF-8"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_labels(config, tmp_path)


def test_an_image_of_another_size_and_a_release_without_steps_are_refused(project, tmp_path):
    folder, _ = project
    copy = tmp_path / "out"
    copy.mkdir()
    for path in (folder / "plain").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    manifest = read_manifest(copy)
    manifest["input"]["preprocessing"] = manifest["input"]["preprocessing"][2:]
    write_manifest(copy, manifest)
    with pytest.raises(ReparamError, match=r"china.png: the network takes images of \[3, 32, 32\], this one is"):
        next(ImageClassifier(copy).predict([folder / "images" / "china.png"]))
    manifest["input"]["preprocessing"] = None
    write_manifest(copy, manifest)
    with pytest.raises(ReparamError, match="does not say how its input is made"):
        ImageClassifier(copy)


@pytest.mark.parametrize(
    "steps",
    [
        [{"ResizeImage": {"size": 24}}],
        [{"ResizeImage": {"size": [30, 20], "interpolation": "bicubic", "backend": "pil"}}],
        [{"ResizeImage": {"resize_short": 50, "interpolation": "area"}}, {"CropImage": {"size": [30, 40]}}],
    ],
)
def test_steps_are_those_of_paddleclas(project, steps):
    from ppcls.data.preprocess.ops import operators

    image = load_sample_images().images[0]
    expected = image
    for step in steps:
        [(name, options)] = step.items()
        expected = getattr(operators, name)(**options)(expected)
    assert (preprocess(image, steps) == expected).all()
    assert cv2.resize(image, (5, 5)).shape == (5, 5, 3)
