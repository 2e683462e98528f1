"""Recognition from a config to two images compared: each command of docs/faces.md, and what its numbers must be."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import paddle
import position_prior
import pytest
from helpers import relative_error
from network_contract import count
from pages import ROOT, blocks_of, commands_of, keep_few, named_files, run_here
from test_exit_codes import run

from paddle_reparam.deploy.pairs import best_threshold, folds_of, measure_pairs, read_pairs
from paddle_reparam.deploy.recognition import FeatureExtractor, read_gallery
from paddle_reparam.deploy.released import read_manifest
from paddle_reparam.errors import MissingFile, NothingProven, ReparamError
from paddle_reparam.layers.repmlp import RepMLP
from paddle_reparam.ppcls import setup
from paddle_reparam.weights import checkpoints

setup()

from paddle_reparam.ppcls.command import read_config  # noqa: E402
from paddle_reparam.ppcls.engine import Engine  # noqa: E402
from paddle_reparam.ppcls.reparam import build_train_form  # noqa: E402

PAGE = (ROOT / "docs" / "faces.md").read_text(encoding="utf-8")
RELEASE, CONFIG = "output/tasks/faces_release", "ppcls_configs/tasks/faces_digits.yaml"


def raised(error):
    raise error


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder in which all commands of the page ran, with few images."""
    folder = tmp_path_factory.mktemp("faces")
    (folder / "ppcls_configs").symlink_to(ROOT / "ppcls_configs")
    before = os.getcwd()
    os.chdir(folder)
    try:
        for _, block in blocks_of(PAGE):
            for command in commands_of(block):
                # Of two images of a class there is one pair. After a single step all features are alike.
                command = command.replace("--count 400", "--count 20")
                if command.startswith("python tools/train.py"):
                    command += " -o Global.epochs=6 -o DataLoader.Train.sampler.batch_size=8"
                run_here(command)
                if "prepare_data.py digits" in command:
                    keep_few(folder)
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def images(project):
    return sorted(project.joinpath("dataset/digits/val").glob("*/*.png"))[::40]


@pytest.fixture(scope="module")
def expected(project, images):
    """What the trained network, without fusing, makes of some images, divided by the length."""
    network = build_train_form(read_config(CONFIG))
    checkpoints.load_into(network, "output/tasks/faces_digits/RecModel/latest.pdparams")
    network.eval()
    from paddle_reparam.deploy.predict import preprocess
    from paddle_reparam.images import read_rgb

    steps = read_manifest(RELEASE)["input"]["preprocessing"]
    pixels = np.stack([preprocess(read_rgb(path), steps) for path in images])
    features = network(paddle.to_tensor(pixels))["features"].numpy().astype(np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def test_the_page_names_what_is_there():
    assert not [name for name in named_files(PAGE) if not (ROOT / name).exists()]


def test_paddleclas_measured_it(project):
    [log] = project.joinpath("output/tasks/faces_digits").rglob("train.log")
    assert re.search(r"\[Eval\]\[Epoch 6\]\[Avg\]recall1: [\d.]+, recall5: [\d.]+, mAP: [\d.]+", log.read_text())


def test_the_release_gives_the_trained_networks_features_of_length_1(project, images, expected):
    manifest = read_manifest(RELEASE)
    assert manifest["output"]["activation"] == "l2"
    assert manifest["output"]["keys"] == ["features"]
    extractor = FeatureExtractor(RELEASE)
    [raw] = extractor._network.run(
        np.stack([read.taken for [read] in (next(extractor.batches([p], raised)) for p in images)])
    )
    assert relative_error(np.linalg.norm(raw.astype(np.float64), axis=1), np.ones(len(images))) < 1e-6
    assert relative_error(raw, expected) < 1e-5
    found = dict(extractor.features(images, raised))
    assert relative_error(np.stack([found[path] for path in images]), expected) < 1e-5


def test_two_images(project, images, expected, capsys):
    two = [str(images[0]), str(images[3])]
    cosine = float(expected[0] @ expected[3])
    assert run("predict", RELEASE, *two) == 0
    assert float(re.fullmatch(r"cosine (-?[\d.]+)\n", capsys.readouterr().out)[1]) == pytest.approx(cosine, abs=1e-4)
    for threshold, said in (("0", "the same" if cosine >= 0 else "another"), ("1", "another")):
        assert run("predict", RELEASE, *two, "--threshold", threshold) == 0
        assert capsys.readouterr().out.endswith(f"  {said}\n")


def test_a_gallery_is_the_same_by_its_folder_and_its_index(project, images, expected, capsys):
    extractor = FeatureExtractor(RELEASE)
    by_index = read_gallery("output/gallery.npz", extractor, raised)
    assert len(by_index.names) == 1437
    cosines = expected @ expected.T
    assert cosines.min() < 0.9, "features so alike show nothing"
    folder = project / "few"
    folder.mkdir()
    for number, path in enumerate(images):
        (folder / f"{number}.png").write_bytes(path.read_bytes())
    assert run("predict", RELEASE, str(images[0]), "--gallery", "few", "--top", "2", "--index", "few.npz") == 0
    order = np.argsort(-(expected @ expected[0]))
    printed = capsys.readouterr().out
    assert printed.startswith(f"written: few.npz, {len(images)} images\n")
    assert re.findall(r"(\d+)\.png\n", printed.partition("\n")[2]) == [str(i) for i in order[:2]]
    assert run("predict", RELEASE, str(images[0]), "--gallery", "few.npz", "--top", "2") == 0
    assert capsys.readouterr().out == printed.partition("\n")[2]


def test_what_is_no_index_is_one_sentence(project, images, capsys):
    image = str(images[0])
    whole = np.load("output/gallery.npz")
    entries = {name: whole[name] for name in whole.files}
    other = np.frombuffer(b"0" * 64, np.uint8)
    wrong = {
        "other.npz": ({**entries, "network": other}, "other.npz was made by another network, whose features"),
        "short.npz": ({**entries, "features": entries["features"][1:]}, "short.npz is no index file"),
        "lacks.npz": ({"features": entries["features"]}, "lacks.npz is no index file"),
        "names.npz": ({**entries, "names": other[:3]}, "names.npz is no index file"),
        "object.npz": ({**entries, "features": np.array([{}], object)}, "object.npz is no index file"),
    }
    for name, (content, message) in wrong.items():
        np.savez(name, **content)
        assert run("predict", RELEASE, image, "--gallery", name) == 1
        assert message in capsys.readouterr().err
    (project / "cut.npz").write_bytes((project / "output/gallery.npz").read_bytes()[:-100])
    (project / "text.npz").write_text("no index")
    for name in ("cut.npz", "text.npz"):
        assert run("predict", RELEASE, image, "--gallery", name) == 1
        assert capsys.readouterr().err.startswith(f"error: {name} is no index file of this version")


def test_wrong_usage_is_one_sentence(project, images, capsys):
    one, two = str(images[0]), str(images[1])
    for arguments, code, message in (
        ([one], 2, "compares two images, and 1 places are given"),
        ([one, two, "--top", "3"], 2, "compares two images"),
        ([one, "missing.png"], 2, "there is no image missing.png"),
        ([one, "--gallery", "missing"], 2, "there is no folder and no index file missing"),
        ([one, "--gallery", "few", "--threshold", "0.5"], 2, "--threshold is for two images"),
        ([one, "--gallery", "dataset/digits/train/0", "--index", "x.txt"], 2, "an index file ends with .npz"),
        ([one, "--index", "x.npz"], 2, "--index is made of a folder"),
        ([], 2, "give images"),
    ):
        assert run("predict", RELEASE, *arguments) == code
        assert message in capsys.readouterr().err
    (project / "broken").mkdir()
    (project / "broken" / "a.png").write_bytes(b"no image")
    (project / "broken" / "b.png").write_bytes(images[0].read_bytes())
    assert run("predict", RELEASE, "--gallery", "broken", "--index", "broken.npz") == 1
    assert "broken/a.png" in capsys.readouterr().err
    assert not (project / "broken.npz").exists()
    for more, message in (
        (["-o", "Global.feature_normalize=False"], "the features were measured as they are"),
        (["-o", "Arch.infer_add_softmax=True"], "--normalize-features is for features"),
    ):
        arguments = ["-c", CONFIG, "--weights", "output/tasks/faces_digits/RecModel/latest", "--output", "no"]
        assert run("reparam", *arguments, "--normalize-features", *more) == 2
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def test_pairs_are_measured_as_numpy_does(project):
    result = json.loads((project / "output/pairs.json").read_text())
    pairs = read_pairs("dataset/digits/pairs.txt", "dataset/digits")
    assert (len(pairs), sum(pair.same for pair in pairs)) == (20, 10)
    assert all((pair.first.parent == pair.second.parent) == pair.same for pair in pairs)
    assert len({frozenset((pair.first, pair.second)) for pair in pairs}) == 20
    extractor = FeatureExtractor(RELEASE)
    features = dict(extractor.features({p: 0 for pair in pairs for p in (pair.first, pair.second)}, raised))
    cosines = [float(features[pair.first] @ features[pair.second]) for pair in pairs]
    shares = []
    for fold in range(10):
        # A pair of the same and another, in the order of the list, which has those of the same first.
        here = {fold, 10 + fold}
        others = [i for i in range(20) if i not in here]

        def right(threshold, places):
            return sum((cosines[i] >= threshold) == pairs[i].same for i in places)

        most = max(right(threshold, others) for threshold in [*cosines, 2.0])
        assert right(result["thresholds"][fold], others) == most
        shares.append(right(result["thresholds"][fold], here) / 2)
    assert result["accuracies"] == pytest.approx(shares)
    assert result["accuracy"] == pytest.approx(np.mean(shares))
    assert result["standard_error"] == pytest.approx(np.std(shares, ddof=1) / np.sqrt(10))


def test_the_threshold_is_chosen_on_the_other_folds():
    """Were a fold's own pairs among those that choose, the second one here would be all right."""
    cosines = np.array([0.8, 0.2, 0.8, 0.2, 0.35, 0.3])
    same = np.array([True, False] * 3)
    report = measure_pairs(cosines, same, np.array([0, 0, 1, 1, 2, 2]))
    assert report.accuracies == [1.0, 1.0, 0.5]
    assert report.thresholds == pytest.approx([0.325, 0.325, 0.5])
    assert report.threshold == pytest.approx(0.325)
    assert report.standard_error == pytest.approx(1 / 6)
    assert best_threshold(np.array([0.5, 0.5]), np.array([True, False])) == 0.5
    assert best_threshold(np.array([0.1, 0.7]), np.array([False, False])) > 0.7


def test_lfws_own_list(tmp_path):
    for name in ("A_B", "C"):
        (tmp_path / name).mkdir()
        for number in (1, 2, 3):
            suffix = ".png" if number == 3 else ".jpg"
            (tmp_path / name / f"{name}_{number:04}{suffix}").write_bytes(b"")
    lines = ["2\t1", "A_B\t1\t3", "A_B\t1\tC\t2", "C\t1\t2", "C\t3\tA_B\t2", ""]
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    pairs = read_pairs(tmp_path / "pairs.txt", tmp_path)
    assert [(pair.first.name, pair.second.name, pair.same, pair.fold) for pair in pairs] == [
        ("A_B_0001.jpg", "A_B_0003.png", True, 0), ("A_B_0001.jpg", "C_0002.jpg", False, 0),
        ("C_0001.jpg", "C_0002.jpg", True, 1), ("C_0003.png", "A_B_0002.jpg", False, 1),
    ]  # fmt: skip
    assert folds_of(pairs).tolist() == [0, 0, 1, 1]
    with pytest.raises(NothingProven, match="2 pairs of the same and 0 of others fill no folds with both"):
        folds_of([pair for pair in pairs if pair.same])


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ReparamError, "holds no pair"),
        ("a.png\tb.png\n", ReparamError, "line 1: it is no PATH, PATH and 1 or 0"),
        ("a.png\ta.png\t1\na.png\ta.png\t2\n", ReparamError, "line 2: it is no PATH"),
        ("a.png\tmissing.png\t1\n", MissingFile, "line 1: there is no image .*missing.png"),
        ("10\t300\nA\tx\t2\n", ReparamError, "line 2: it is no NAME 1 2, or NAME 1 OTHER 2"),
        ("10\t300\nA\t1\t2\n", MissingFile, "line 2: there is no image .*A_0001.jpg"),
    ],
)
def test_lists_that_are_none(tmp_path, text, error, message):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(error, match=message):
        read_pairs(tmp_path / "pairs.txt", tmp_path)


def test_pairs_cannot_be_drawn_of_too_few(project, capsys):
    (project / "few.txt").write_text("a.png\t0\nb.png\t0\nc.png\t1\n")
    for arguments, code, message in (
        (["--list", "few.txt", "--output", "p.txt", "--count", "4"], 1, "there are 1 pairs of one class, not 2"),
        (["--list", "missing", "--output", "p.txt"], 2, "there is no list file missing"),
        (["--list", "few.txt", "--output", "few.txt", "--count", "2"], 2, "few.txt exists already and is kept"),
        (["--list", "few.txt", "--output", "p.txt", "--count", "3"], 2, "--count is 3; it is an even number"),
    ):
        assert run("prepare_data", "pairs", *arguments) == code
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The config for faces


def test_the_config_for_faces_takes_a_step(tmp_path, monkeypatch):
    """With narrower RepMLPs and few classes, as that of the paper takes a GPU."""
    monkeypatch.chdir(tmp_path)
    config = read_config(str(ROOT / "ppcls_configs/tasks/faces.yaml"))
    folder = tmp_path / "dataset" / "faces"
    folder.mkdir(parents=True)
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(generator.integers(0, 256, (96, 96, 3), np.uint8)).save(folder / f"{number}.png")
    for name in ("train", "gallery", "query"):
        (folder / f"{name}_list.txt").write_text("".join(f"{i}.png\t{i % 2}\n" for i in range(4)))
    config["Global"].update(device="cpu", use_visualdl=False)
    config["Arch"]["Backbone"].update(fc3_groups=8, reduction={"c2": 16, "c3": 16, "c4": 32}, class_num=8)
    config["Arch"]["Neck"]["num_features"] = 8
    config["Arch"]["Head"].update(embedding_size=8, class_num=2)
    config["DataLoader"]["Train"]["sampler"]["batch_size"] = 2
    for part in (config["DataLoader"]["Train"], *config["DataLoader"]["Eval"].values()):
        part["loader"].update(num_workers=0, use_shared_memory=False)
    with paddle.utils.unique_name.guard():
        engine = Engine(config, mode="train")
    pixels, labels = next(iter(engine.train_dataloader))[:2]
    assert pixels.shape == [2, 3, 96, 96]
    engine.model.train()
    losses = engine.train_loss_func(engine.model(pixels, labels.reshape([-1, 1])), labels.reshape([-1, 1]))
    losses["loss"].backward()
    assert np.isfinite(float(losses["loss"]))
    assert all(parameter.grad is not None for parameter in engine.model.parameters() if not parameter.stop_gradient)


# ---------------------------------------------------------------------------------------------------------------------
# The position prior


def test_digits_are_in_the_middle_or_anywhere_else():
    digits = np.arange(1.0, 65.0, dtype=np.float32).reshape(1, 8, 8)
    for top, left in ((4, 4), (0, 8)):
        [[field]] = position_prior._placed(digits, np.array([[top, left]]))
        assert np.array_equal(field[top : top + 8, left : left + 8], digits[0])
        assert field.sum() == digits.sum()


def test_the_position_prior_is_measured_by_its_command(tmp_path, capsys):
    file = tmp_path / "measured.json"
    assert run("position_prior", "--seeds", "1", "--epochs", "1", "--output", str(file)) == 0
    measured = json.loads(file.read_text())
    shares = measured["position_prior"]
    assert len(re.findall(r"^(aligned|shifted), (convolutions|RepMLP), seed 0: ", capsys.readouterr().out, re.M)) == 4
    assert all(0 < share < 1 for each in shares.values() for [share] in each.values())
    rich = position_prior._build("RepMLP")
    assert sum(isinstance(layer, RepMLP) for layer in rich.sublayers()) == 2
    assert measured["parameters"]["RepMLP"] == count(rich) == 156_730
    gain = 100 * (shares["shifted"]["RepMLP"][0] - shares["shifted"]["convolutions"][0])
    assert f"shifted {gain:+.2f} points, by seed {gain:+.2f}." in position_prior.to_markdown(measured)
