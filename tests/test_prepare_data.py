"""tools/prepare_data.py: what it writes, and every sentence with which it refuses."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from odd_images import READ, REFUSED
from PIL import Image

from paddle_reparam.errors import ReparamError
from paddle_reparam.training import datasets

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "prepare_data.py"


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *arguments: module.main([str(argument) for argument in arguments])


@pytest.fixture
def tree(tmp_path):
    """Two classes; the folder of the validation images is called test, one image lies deeper."""
    root = tmp_path / "images"
    for path in ("train/cat/2.jpg", "train/cat/10.PNG", "train/ant/more/1.jpeg", "test/cat/3.jpg", "test/ant/4.bmp"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), "red").save(root / path)
    (root / "train/cat/notes.txt").write_text("no image")
    (root / "train/.hidden").mkdir()
    return root


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def lists(root):
    return {
        name: (root / name).read_text().splitlines() for name in ("train_list.txt", "val_list.txt", "label_names.txt")
    }


@pytest.fixture
def few_digits(monkeypatch):
    """Let there be 60 digits, which are sooner written."""
    from sklearn import datasets as theirs

    digits = theirs.load_digits()
    digits.images, digits.target = digits.images[:60], digits.target[:60]
    monkeypatch.setattr(theirs, "load_digits", lambda: digits)


def test_digits_are_the_images_of_scikit_learn(prepare, tmp_path, capsys):
    from sklearn.datasets import load_digits

    assert prepare("digits", "--output", tmp_path / "made" / "digits") == 0
    assert "10 classes, 1437 images for training, 360 for validation" in capsys.readouterr().out
    root = tmp_path / "made" / "digits"
    written = lists(root)
    assert written["label_names.txt"] == [f"{i} {i}" for i in range(10)]
    assert [len(written[name]) for name in ("train_list.txt", "val_list.txt")] == [1437, 360]
    lines = written["train_list.txt"] + written["val_list.txt"]
    digits = load_digits()
    for line in lines:
        path, label = line.split("\t")
        index = int(Path(path).stem)
        assert int(label) == digits.target[index] == int(Path(path).parent.name)
        np.testing.assert_array_equal(np.asarray(Image.open(root / path)), np.rint(digits.images[index] * 255 / 16))
    assert sorted(int(Path(line.split("\t")[0]).stem) for line in lines) == list(range(1797))
    counts = np.bincount([int(line.split("\t")[1]) for line in written["val_list.txt"]])
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert [p.name for p in root.parent.iterdir()] == ["digits"], "something was left beside the folder"


@pytest.mark.usefixtures("few_digits")
def test_digits_are_the_same_each_time(prepare, tmp_path):
    for name in ("one", "two"):
        assert prepare("digits", "--output", tmp_path / name) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.usefixtures("few_digits")
def test_digits_replace_only_their_own(prepare, tmp_path, capsys):
    output = tmp_path / "digits"
    output.mkdir()
    assert prepare("digits", "--output", output) == 0, "an empty folder is free"
    good = contents(output)
    lost = output / "train_list.txt"
    lost.unlink()
    assert prepare("digits", "--output", output) == 2
    assert "exists already and is kept" in capsys.readouterr().err
    assert not lost.exists()
    assert prepare("digits", "--output", output, "--force") == 0
    assert contents(output) == good

    theirs = tmp_path / "theirs"
    (theirs / "train").mkdir(parents=True)
    (theirs / "val_list.txt").write_text("val/dog/1.png 0\n")
    assert prepare("digits", "--output", theirs, "--force") == 2
    assert "not what this command wrote" in capsys.readouterr().err
    assert (theirs / "val_list.txt").read_text() == "val/dog/1.png 0\n"

    file = tmp_path / "file"
    file.write_text("mine")
    assert prepare("digits", "--output", file, "--force") == 2
    assert file.read_text() == "mine"


@pytest.mark.usefixtures("few_digits")
def test_digits_that_fail_leave_nothing(prepare, tmp_path, monkeypatch, capsys):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    assert prepare("digits", "--output", tmp_path / "digits") == 0
    before = contents(tmp_path)
    monkeypatch.setattr(datasets, "_write_whole", full_disk)
    assert prepare("digits", "--output", tmp_path / "digits", "--force") == 1
    assert prepare("digits", "--output", tmp_path / "other") == 1
    assert "No space left" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["digits"]


def test_folder(prepare, tree, capsys):
    assert prepare("folder", "--root", tree) == 0
    assert "2 classes, 3 images for training, 2 for validation" in capsys.readouterr().out
    assert lists(tree) == {
        "train_list.txt": ["train/ant/more/1.jpeg\t0", "train/cat/10.PNG\t1", "train/cat/2.jpg\t1"],
        "val_list.txt": ["test/ant/4.bmp\t0", "test/cat/3.jpg\t1"],
        "label_names.txt": ["0 ant", "1 cat"],
    }


def test_folder_takes_val_before_test(prepare, tree):
    (tree / "val").mkdir()
    for name in ("ant", "cat"):
        (tree / "val" / name).mkdir()
        Image.new("L", (4, 4)).save(tree / "val" / name / "5.png")
    assert prepare("folder", "--root", tree) == 0
    assert lists(tree)["val_list.txt"] == ["val/ant/5.png\t0", "val/cat/5.png\t1"]


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (["Training", "Testing"], ("Training", "Testing")),
        (["train", "valid", "test"], ("train", "valid")),
        (["TRAIN", "Val"], ("TRAIN", "Val")),
    ],
)
def test_parts_have_the_names_that_people_give_them(prepare, tmp_path, names, used):
    """As classes they would be told from each other, by what nobody knows."""
    for name in names:
        for kind in ("ant", "cat"):
            (tmp_path / name / kind).mkdir(parents=True)
            (tmp_path / name / kind / "1.png").write_bytes(READ["rgb.png"][0])
    assert prepare("folder", "--root", tmp_path) == 0
    for listed, part in zip(("train_list.txt", "val_list.txt"), used):
        assert lists(tmp_path)[listed] == [f"{part}/ant/1.png\t0", f"{part}/cat/1.png\t1"]


@pytest.fixture
def photos(tmp_path):
    """One folder of classes: 23, 5, 2 and 1 images of every kind, with names that people give them."""
    root = tmp_path / "my photos"
    files = [(name, data) for name, (data, _) in READ.items()]
    for name, count in ((" kept", 5), ("train", 2), ("one", 1), ("猫 和 狗", len(files))):
        (root / name).mkdir(parents=True)
        for file, data in files[-count:]:
            (root / name / file).write_bytes(data)
    for name in ("one/.DS_Store", "one/notes.txt", "train/a.GIF", "train/b.gif", "train/README"):
        (root / name).write_text("no image")
    return root


def test_one_folder_of_classes_is_split(prepare, photos, capsys):
    assert prepare("folder", "--root", photos) == 0
    count = len(READ)
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"{photos}: 4 classes, {count + 1} images for training, 7 for validation; a class has 1 to {count}",
        'wrote train_list.txt, val_list.txt, label_names.txt; a config for them has class_num: 4 and delimiter: "\\t"',
        "without an image for validation, as they have one only: one",
        "left out, as no images that are read here: 2 .gif, 1 .txt, 1 README",
    ]
    written = lists(photos)
    assert written["label_names.txt"] == ["0  kept", "1 one", "2 train", "3 猫 和 狗"]
    shares = [[line.split("\t")[1] for line in written[name]] for name in ("train_list.txt", "val_list.txt")]
    assert [[labels.count(str(i)) for i in range(4)] for labels in shares] == [[4, 1, 1, count - 5], [1, 0, 1, 5]]
    lines = written["train_list.txt"] + written["val_list.txt"]
    assert len(set(lines)) == len(lines) == count + 8
    for line in lines:
        # As PaddleClas reads it.
        path, label = line.strip().split("\t")
        assert (photos / path).is_file()
        assert (photos / path).parent.name == written["label_names.txt"][int(label)].partition(" ")[2]


def test_a_split_is_the_same_again_and_nearly_so_with_more_images(prepare, photos):
    assert prepare("folder", "--root", photos, "--val-share", "0.5") == 0
    before = lists(photos)
    assert prepare("folder", "--root", photos, "--val-share", "0.5", "--force") == 0
    assert lists(photos) == before
    for number in range(4):
        (photos / "猫 和 狗" / f"new {number}.png").write_bytes(READ["rgb.png"][0])
    assert prepare("folder", "--root", photos, "--val-share", "0.5", "--force") == 0
    moved = set(before["val_list.txt"]) ^ {line for line in lists(photos)["val_list.txt"] if "new" not in line}
    assert len(moved) <= 4


def test_every_broken_image_is_named_with_what_is_wrong(prepare, photos, capsys):
    for name, (data, _) in REFUSED.items():
        (photos / "one" / name).write_bytes(data)
    before = contents(photos)
    assert prepare("folder", "--root", photos) == 1
    sentence, *named = capsys.readouterr().err.partition("error: ")[2].splitlines()
    assert sentence == f"{len(REFUSED)} of {len(READ) + 8 + len(REFUSED)} images cannot be read; replace or remove:"
    for line, (name, (_, reason)) in zip(named, sorted(REFUSED.items())):
        assert re.search(rf"one/{name}: .*{reason}", line)
    assert contents(photos) == before


def test_folder_keeps_lists_unless_forced(prepare, tree, capsys):
    (tree / "label_names.txt").write_text("0 mine\n")
    before = contents(tree)
    assert prepare("folder", "--root", tree) == 2
    assert "label_names.txt exists already and is kept" in capsys.readouterr().err
    assert contents(tree) == before
    assert prepare("folder", "--root", tree, "--force") == 0
    assert lists(tree)["label_names.txt"] == ["0 ant", "1 cat"]


def test_a_folder_that_cannot_be_written_is_a_sentence(tree, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(ReparamError, match=r"train_list.txt: it cannot be written \(Permission denied\)"):
        datasets.list_folder(tree)


def cut_short(root):
    Image.effect_noise((64, 64), 50).save(root / "train/cat/2.jpg")
    data = (root / "train/cat/2.jpg").read_bytes()
    (root / "train/cat/2.jpg").write_bytes(data[: len(data) // 2])


def two_that_are_none(root):
    for path in ("train/cat/2.jpg", "test/cat/3.jpg"):
        (root / path).write_text("<html>not found</html>")


def names_that_no_list_can_hold(root):
    for name in ("a\tb", "a\nb", "a\u2028b", "a\udcffb"):
        (root / "test/cat/3.jpg").rename(root / f"test/cat/{name}.jpg")
        (root / "test/cat/3.jpg").write_bytes((root / f"test/cat/{name}.jpg").read_bytes())


def one_class_more(root):
    (root / "test/dog").mkdir()
    Image.new("L", (4, 4)).save(root / "test/dog/1.png")


def without_images(root):
    (root / "test/cat/3.jpg").unlink()


def without_classes(root):
    for path in sorted((root / "train").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def without_validation(root):
    (root / "test").rename(root / "other")


def one_class(root):
    for part in ("train", "test"):
        shutil.rmtree(root / part / "ant")


def one_image_each(root):
    shutil.rmtree(root / "train")
    (root / "test/ant").rename(root / "ant")
    (root / "test/cat").rename(root / "cat")
    (root / "test").rmdir()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (cut_short, r"train/cat/2\.jpg: it is damaged \(image file is truncated"),
        (
            two_that_are_none,
            r"2 of 5 images cannot be read; replace or remove:\n.*test/cat/3\.jpg: it is no image\n.*train/cat/2\.jpg",
        ),
        (names_that_no_list_can_hold, r"4 paths hold a tab, .* rename:\n(.*test/cat/a\\\S+b\.jpg\n){4}"),
        (one_class_more, r"the classes differ: only \S*test has dog"),
        (without_images, r"test/cat holds no images \(\.jpg, .*\); fill it"),
        (without_classes, r"train holds no folders; it needs one for each class"),
        (
            without_validation,
            r"has the folder train with folders in it, and needs both train and val; .* give \S*train itself",
        ),
        (one_class, r"train holds one folder only, cat; .* give two"),
        (one_image_each, r"no class has two images, .*; add images"),
    ],
)
def test_folder_refuses(prepare, tree, capsys, spoil, sentence):
    spoil(tree)
    before = contents(tree)
    assert prepare("folder", "--root", tree) == 1
    error = capsys.readouterr().err.partition("error: ")[2]
    assert re.search(sentence, error), error
    assert contents(tree) == before


def test_folder_without_the_check_takes_what_it_finds(prepare, tree):
    two_that_are_none(tree)
    assert prepare("folder", "--root", tree, "--skip-check") == 0


def test_folder_that_is_none(prepare, tmp_path, capsys):
    assert prepare("folder", "--root", tmp_path / "nowhere") == 2
    assert "nowhere is no folder" in capsys.readouterr().err


def test_the_command_as_it_is_typed(tmp_path):
    """Wrong usage is exit code 2, and an error is one sentence."""
    usage = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert usage.returncode == 2
    assert "usage" in usage.stderr
    failed = subprocess.run([sys.executable, SCRIPT, "folder", "--root", tmp_path], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in failed.stderr


def test_scenes_have_the_class_of_each_pixel(prepare, few_digits, tmp_path, capsys):
    from paddle_reparam.training import scenes

    root = tmp_path / "scenes"
    assert str(scenes.write_scenes(root, train=4, val=2)).startswith(f"{root}: 4 scenes for training, 2")
    names = (root / "class_names.txt").read_text().split()
    assert names == ["background", *"0123456789"]
    for part, count in (("train", 4), ("val", 2)):
        pairs = [line.split() for line in (root / f"{part}.txt").read_text().splitlines()]
        assert len(pairs) == count
        for image, mask in pairs:
            picture, classes = (np.asarray(Image.open(root / path)) for path in (image, mask))
            assert (picture.shape, classes.shape) == ((64, 64, 3), (64, 64))
            assert 0 in classes
            assert 1 < len(np.unique(classes)) <= 11
            # Ink is bright, the background is dark, whatever colours a scene has.
            assert picture[classes > 0].mean() > picture[classes == 0].mean() + 50
        found = json.loads((root / f"{part}.json").read_text())
        assert [each["name"] for each in found["categories"]] == names[1:]
        masks = [np.asarray(Image.open(root / path)) for _, path in pairs]
        for box in found["annotations"]:
            left, top, width, height = box["bbox"]
            inside = masks[box["image_id"]][top : top + height, left : left + width] == box["category_id"]
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            assert inside[0].any()
            assert inside[-1].any()
        for number, mask in enumerate(masks):
            boxes = [box for box in found["annotations"] if box["image_id"] == number]
            assert {box["category_id"] for box in boxes} == set(np.unique(mask)) - {0}
    before = contents(root)
    assert prepare("scenes", "--output", root) == 2
    assert "exists already" in capsys.readouterr().err
    assert contents(root) == before
    scenes.write_scenes(root, force=True, train=4, val=2)
    assert contents(root) == before


def test_scenes_replace_nothing_else(prepare, tree, capsys):
    before = contents(tree)
    assert prepare("scenes", "--output", tree, "--force") == 2
    assert "is kept" in capsys.readouterr().err
    assert contents(tree) == before
