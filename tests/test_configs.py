"""Every YAML file of ppcls_configs: PaddleClas' own builders make of it what a training, an evaluation and a prediction
need, and everything written in it is read by something."""

import copy
import inspect
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import paddle
import pytest
import yaml

from paddle_reparam import ppcls
from paddle_reparam.errors import UnknownName
from paddle_reparam.ppcls import locate
from paddle_reparam.ppcls.command import read_config
from paddle_reparam.registry import get_model, list_models
from paddle_reparam.weights import checkpoints

ROOT = Path(__file__).resolve().parents[1] / "ppcls_configs"
#: Those of papers; test_tasks.py has those of tasks.
PATHS = [p.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("*/*/*.yaml"))]
TRAINED = ("Train", "Eval")

#: What the Engines of 2.4 and 2.6 read from Global, as far as it means something for these networks. AMP is no section
#: of these files.
GLOBAL = {
    "output_dir", "device", "seed", "epochs", "eval_during_train", "eval_interval", "save_interval",
    "print_batch_step", "use_visualdl", "pretrained_model", "checkpoints", "image_shape", "save_inference_dir",
}  # fmt: skip
SECTIONS = {"Global", "Arch", "Loss", "Optimizer", "DataLoader", "Metric", "Infer"}
WRAPPED = {"name", "class_num", "backbone", "layer", "pretrained"}
CLASSES = {"digits": 10, "cifar10": 10, "imagenet": 1000, "own_photos": 2}
#: Those whose lists tools/prepare_data.py writes; ImageNet has its own.
DELIMITED = {dataset: [] if dataset == "imagenet" else ["delimiter"] for dataset in CLASSES}
#: What a network has that starts from published weights, whatever their number of classes.
FINE_TUNED = {"pretrained", "fresh"}


class Recipe(NamedTuple):
    """What a recipe says in figures; `cards` is on how many of them its batch is spread."""

    batch: int
    cards: int
    epochs: int
    rate: float
    decay: float
    optimizer: str = "Momentum"


#: Start of a path -> its recipe. Where several fit, the longest counts, here and in the other tables.
RECIPES = {
    "digits/refconv": Recipe(16, 1, 10, 0.05, 4e-5),
    "digits/spconv": Recipe(16, 1, 4, 0.05, 5e-4),
    "digits/dcd": Recipe(32, 1, 4, 0.05, 1e-4),
    "digits/slak": Recipe(16, 1, 4, 2e-3, 0.05, "AdamW"),
    "digits/repmlp/RepMLP_CIFAR": Recipe(16, 1, 5, 0.05, 1e-4),
    "digits/repmlp/RepMLPNet": Recipe(16, 1, 4, 2e-3, 0.1, "AdamW"),
    "digits/dyconv": Recipe(16, 1, 4, 0.05, 5e-4),
    "cifar10/refconv": Recipe(128, 1, 105, 0.1, 5e-4),
    "cifar10/refconv/ShuffleNetV2_x0_25": Recipe(64, 1, 12, 0.1, 5e-4),
    "cifar10/compare": Recipe(32, 1, 3, 0.025, 5e-4),
    "cifar10/weight_norm": Recipe(128, 1, 105, 0.1, 5e-4),
    "cifar10/spconv": Recipe(128, 1, 200, 0.1, 5e-4),
    "cifar10/dcd": Recipe(128, 1, 200, 0.1, 5e-4),
    "cifar10/slak": Recipe(128, 1, 200, 2e-3, 0.05, "AdamW"),
    "cifar10/repmlp/RepMLP_CIFAR": Recipe(128, 1, 100, 0.1, 1e-4),
    "cifar10/repmlp/RepMLPNet": Recipe(128, 1, 100, 1e-3, 0.1, "AdamW"),
    "imagenet/refconv": Recipe(256, 4, 105, 0.1, 4e-5),
    "imagenet/spconv": Recipe(256, 4, 90, 0.1, 1e-4),
    "imagenet/slak": Recipe(4096, 32, 300, 4e-3, 0.05, "AdamW"),
    "imagenet/replknet/RepLKNet_31B": Recipe(2048, 32, 300, 4e-3, 0.05, "AdamW"),
    "imagenet/replknet": Recipe(512, 32, 30, 4e-4, 1e-8, "AdamW"),
    "imagenet/dcd/ResNet": Recipe(256, 4, 120, 0.1, 1e-4),
    "imagenet/dcd/MobileNetV2": Recipe(512, 4, 300, 0.1, 2e-5),
    "imagenet/repmlp/RepMLPResNet50": Recipe(256, 4, 100, 0.1, 1e-4),
    "imagenet/repmlp/RepMLPNet": Recipe(256, 8, 100, 1e-3, 0.1, "AdamW"),
    "imagenet/repvgg": Recipe(256, 8, 120, 0.1, 1e-4),
    "imagenet/mobileone": Recipe(256, 8, 300, 0.1, 1e-4),
    "imagenet/dbb": Recipe(256, 4, 120, 0.1, 1e-4),
    "imagenet/acb": Recipe(256, 8, 100, 0.1, 1e-4),
    "imagenet/condconv": Recipe(256, 8, 150, 0.05, 4e-5),
    "imagenet/dyconv": Recipe(256, 8, 150, 0.05, 4e-5),
    "own_photos/refconv": Recipe(16, 1, 20, 0.01, 1e-4),
    "own_photos/spconv": Recipe(16, 1, 20, 0.01, 1e-4),
    "own_photos/slak": Recipe(16, 1, 20, 1e-4, 0.05, "AdamW"),
    "own_photos/dcd": Recipe(16, 1, 20, 0.01, 2e-5),
    "own_photos/repmlp": Recipe(16, 1, 20, 1e-4, 0.1, "AdamW"),
}
#: What the header names.
PAPERS = {
    "refconv": "arXiv 2310.10563",
    "weight_norm": "arXiv 1602.07868",
    "compare": "tools/compare.py",
    "spconv": "arXiv 2006.12085",
    "slak": "arXiv 2207.03620",
    "replknet": "arXiv 2203.06717",
    "dcd": "arXiv 2103.08756",
    "repmlp": "arXiv 2105.01883",
    "repmlp/RepMLPNet": "arXiv 2112.11081",
    "repvgg": "arXiv 2101.03697",
    "mobileone": "arXiv 2206.04040",
    "dbb": "arXiv 2103.13425",
    "acb": "arXiv 1908.03930",
    "condconv": "arXiv 1904.04971",
    "dyconv": "arXiv 1912.03458",
}
#: Of this library's networks for ImageNet, those that are built here at full size; tests of their own see to the
#: others.
BUILT = {"ResNet18_SPConv", "MobileNetV2_x0_35_DCD"}
#: Networks that PaddleClas 2.4 lacks; the headers of their files say so.
NEWER = {"FasterNet_S", "MobileNeXt_x1_0"}
IN_A_CHECKOUT = pytest.mark.skipif(
    not os.environ.get(locate.HOME), reason=f"PaddleClas 2.4 lacks it: set {locate.HOME} to a checkout of 2.6"
)


def look_up(table: dict[str, Any], path: str) -> Any:
    return table[max((start for start in table if path.startswith(start)), key=len)]


@pytest.fixture(scope="module", autouse=True)
def engine():
    engine = ppcls.setup()
    engine.utils.logger.init_logger(log_level="WARNING")
    return engine


def raw(path):
    return yaml.safe_load((ROOT / path).read_text())


def header(path):
    lines = (ROOT / path).read_text().splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def network_of(arch):
    return arch["backbone"] if arch["name"] == "ReparamModel" else arch


def has_baseline(path):
    """Tell whether a config starts from what another one trains, the plain network."""
    return path.endswith("_RefConv.yaml") and not is_fine_tuned(path)


def is_fine_tuned(path):
    """Tell whether a config starts from published weights: no paper has its recipe, or ablations of it."""
    return path.startswith("own_photos")


def mixes(config):
    """Tell whether images are mixed with each other, and so are their labels."""
    return "batch_transform_ops" in config["DataLoader"]["Train"]["dataset"]


def documented_overrides(path):
    """Return the lines of the header that give overrides: one list of KEY=VALUE each."""
    return [re.findall(r"-o (\S+)", line) for line in header(path) if line.startswith("#   -o ")]


def test_there_is_what_the_documentation_names():
    assert {max((start for start in RECIPES if p.startswith(start)), key=len) for p in PATHS} == set(RECIPES)
    assert len(PATHS) >= 90


# ---------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("path", PATHS)
def test_layout_and_header(path):
    dataset, paper, file = path.split("/")
    config = raw(path)
    name = file[: -len(".yaml")]
    # Without the line breaks, which may be anywhere.
    text = " ".join(line.lstrip("# ") for line in header(path))
    assert "Recipe" in text
    assert config["Global"]["output_dir"] == f"./output/{dataset}/{paper}/{name}"
    assert config["Global"]["save_inference_dir"] == f"./output/{dataset}/{paper}/{name}/inference"
    arch = config["Arch"]
    if arch["name"] == "ReparamModel":
        assert name == f"{arch['backbone']['name']}_{arch['layer']['name'].replace('2D', '')}"
    else:
        assert name == arch["name"]
    if is_fine_tuned(path):
        assert network_of(arch)["fresh"] is True
        in_paddleclas = paper == "refconv"
        assert (network_of(arch)["pretrained"] is True) == in_paddleclas
        # The file of the page's own command.
        page = ROOT.parent / "docs" / f"{paper}.md"
        assert in_paddleclas or f"--output {network_of(arch)['pretrained'][2:]}.pdparams" in page.read_text("utf-8")
    elif has_baseline(path):
        # Where PaddleClas 2.4 leaves the last epoch of the baseline, and where 2.6 does.
        baseline = raw(path.replace("_RefConv", ""))
        in_2_6 = f"{baseline['Global']['output_dir']}/latest"
        if network_of(arch)["name"] in NEWER:
            assert arch["pretrained"] == in_2_6
        else:
            assert arch["pretrained"] == f"{baseline['Global']['output_dir']}/{baseline['Arch']['name']}/latest"
            assert f"# -o Arch.pretrained={in_2_6}" in header(path)
        assert documented_overrides(path)
    assert (f"set {locate.HOME} to a checkout" in text) == (network_of(arch)["name"] in NEWER)
    assert look_up(PAPERS, f"{paper}/{name}") in text or f"{name}_RefConv.yaml" in text
    assert arch["class_num"] == CLASSES[dataset]
    recipe = look_up(RECIPES, path)
    assert f"{recipe.cards} cards x {recipe.batch // recipe.cards}" in text or recipe.cards == 1
    assert config["Global"]["epochs"] == recipe.epochs
    optimizer = config["Optimizer"]
    assert optimizer["name"] == recipe.optimizer
    assert optimizer["lr"]["learning_rate"] == recipe.rate
    if recipe.optimizer == "AdamW":
        assert (optimizer["weight_decay"], optimizer["one_dim_param_no_weight_decay"]) == (recipe.decay, True)
    else:
        assert optimizer["regularizer"] == {"name": "L2", "coeff": recipe.decay}
    for mode in TRAINED:
        assert config["DataLoader"][mode]["sampler"]["batch_size"] * recipe.cards == recipe.batch


@pytest.mark.parametrize("path", [p for p in PATHS if p.endswith("_RefConv.yaml")])
def test_refconv_repeats_its_baseline(path):
    """The same recipe, data and images: only the network and the places for the results differ."""
    refconv, baseline = raw(path), raw(path.replace("_RefConv", ""))
    assert {**refconv["Arch"]["backbone"], "class_num": refconv["Arch"]["class_num"]} == baseline["Arch"]
    for config in (refconv, baseline):
        for key in ("output_dir", "save_inference_dir"):
            del config["Global"][key]
        del config["Arch"]
    assert refconv == baseline


@pytest.mark.parametrize("path", PATHS)
def test_evaluation_and_prediction_see_the_same_images(path):
    config = raw(path)
    evaluation = config["DataLoader"]["Eval"]["dataset"]["transform_ops"]
    assert config["Infer"]["transforms"] == [*evaluation, {"ToCHWImage": None}]


@pytest.mark.parametrize("path", PATHS)
def test_every_key_is_read(path, engine):
    config, dataset = raw(path), path.split("/")[0]
    assert set(config) - {"Sparsity"} == SECTIONS
    assert ("Sparsity" in config) == (Path(path).name.startswith("SLaK") and not is_fine_tuned(path))
    from paddle_reparam.ppcls import sparse

    settings = sparse.read_section(config)
    assert settings is None or settings["density"] == 0.6
    assert set(config["Global"]) - {"seed"} == GLOBAL - {"seed"}
    network = network_of(config["Arch"])
    if network is not config["Arch"]:
        assert set(config["Arch"]) == (WRAPPED if has_baseline(path) else WRAPPED - {"pretrained"})
    options = {k: v for k, v in network.items() if k not in {"name", "class_num", *FINE_TUNED}}
    if network["name"] in list_models() and not get_model(network["name"]).in_paddleclas:
        # This library's builders name what they do not know before they build anything.
        with pytest.raises(UnknownName, match="has no argument 'nonsense';"):
            getattr(engine.arch, network["name"])(**options, nonsense=1)
    elif options:
        # PaddleClas' networks swallow what they do not know.
        built = getattr(engine.arch, network["name"])(**options)
        assert set(options) <= set(inspect.signature(type(built).__init__).parameters) - {"kwargs", "kargs"}
    for mode in TRAINED:
        part = config["DataLoader"][mode]
        assert set(part) == {"dataset", "sampler", "loader"}
        operators = {"transform_ops", *(["batch_transform_ops"] if mixes(config) and mode == "Train" else [])}
        assert set(part["dataset"]) == {"name", "image_root", "cls_label_path", *operators, *DELIMITED[dataset]}
        assert part["dataset"].get("delimiter", "\t") == "\t"
        assert set(part["sampler"]) == {"name", "batch_size", "drop_last", "shuffle"}
        assert set(part["loader"]) == {"num_workers", "use_shared_memory"}
    rate = config["Optimizer"]["lr"]
    from ppcls.optimizer import learning_rate, optimizer

    # The schedules and optimizers of both PaddleClas take **kwargs and ignore what they do not know.
    known = set(inspect.signature(getattr(learning_rate, rate["name"]).__init__).parameters)
    assert set(rate) - {"name"} <= known - {"kwargs"}
    known = set(inspect.signature(getattr(optimizer, config["Optimizer"]["name"]).__init__).parameters) - {"args"}
    assert set(config["Optimizer"]) <= known | {"name", "lr", "regularizer", "clip_norm"}
    # The Engine cannot tell the accuracy on mixed images, and takes the metric out again.
    assert set(config["Metric"]) == ({"Eval"} if mixes(config) else {"Train", "Eval"})
    assert set(config["Infer"]) == {"infer_imgs", "batch_size", "transforms", "PostProcess"}


# ---------------------------------------------------------------------------------------------------------------------
# What PaddleClas makes of it


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder with, for each data set, four images like its own, in two classes, with list files."""
    generator = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("dataset")
    for dataset, shape in {**dict.fromkeys(CLASSES, (300, 260, 3)), "digits": (8, 8), "cifar10": (32, 32, 3)}.items():
        (root / dataset).mkdir()
        for i in range(4):
            cv2.imwrite(str(root / dataset / f"{i}.png"), generator.integers(0, 256, shape, dtype=np.uint8))
        between = "\t" if DELIMITED[dataset] else " "
        for name in ("train_list.txt", "val_list.txt"):
            (root / dataset / name).write_text("".join(f"{i}.png{between}{i % 2}\n" for i in range(4)))
        (root / dataset / "label_names.txt").write_text("".join(f"{i} name{i}\n" for i in range(1000)))
    return root


def on_this_machine(path, images, output, overrides=()):
    """Return the config with the small data set, on the CPU."""
    root = images / path.split("/")[0]
    local = [f"Global.output_dir={output}", "Global.device=cpu"]
    for mode in TRAINED:
        lists = {"Train": "train_list.txt", "Eval": "val_list.txt"}[mode]
        local += [
            f"DataLoader.{mode}.dataset.image_root={root}/", f"DataLoader.{mode}.dataset.cls_label_path={root}/{lists}",
            f"DataLoader.{mode}.sampler.batch_size=2", f"DataLoader.{mode}.loader.num_workers=0",
            f"DataLoader.{mode}.loader.use_shared_memory=False",
        ]  # fmt: skip
    local.append(f"Infer.PostProcess.class_id_map_file={root}/label_names.txt")
    return read_config(str(ROOT / path), [*local, *overrides])


def build_plain(engine, arch):
    """Return the baseline that a RefConv config starts from, away from its initial values."""
    options = {**arch["backbone"], "class_num": arch["class_num"]}
    # Some backbones give their parameters fixed names, which one process may use once only.
    with paddle.utils.unique_name.guard():
        model = getattr(engine.arch, options.pop("name"))(**options)
    for layer in model.sublayers():
        if isinstance(layer, paddle.nn.BatchNorm2D):
            layer._mean.set_value(paddle.full_like(layer._mean, 0.1))
    return model


def learning_rates(epochs, steps, scheduler):
    """Return the learning rate at the start of every epoch, and after the last."""
    rates = []
    for step in range(epochs * steps + 1):
        if step % steps == 0:
            rates.append(scheduler())
        scheduler.step()
    return rates


@pytest.mark.parametrize("path", PATHS)
def test_engine_builds_and_computes(path, engine, images, tmp_path):
    from ppcls.data import create_operators
    from ppcls.data.postprocess import build_postprocess
    from ppcls.engine.engine import Engine
    from ppcls.utils.config import AttrDict

    config = on_this_machine(path, images, tmp_path)
    arch = config["Arch"]
    for key in FINE_TUNED & set(network_of(arch)):
        del network_of(arch)[key]
    if path.startswith(("imagenet", "own_photos")) and arch["name"] in set(list_models()) - BUILT:
        # What is tested is the rest of the file, so a small network stands in.
        arch = config["Arch"] = AttrDict(name="PPLCNet_x0_25", class_num=arch["class_num"])
    if network_of(arch)["name"] in NEWER:
        network_of(arch)["name"] = "PPLCNet_x0_25"
    baseline = None
    if path.endswith("_RefConv.yaml"):
        baseline = build_plain(engine, arch)
        arch["pretrained"] = str(tmp_path / "baseline")
        checkpoints.save(baseline.state_dict(), tmp_path / "baseline.pdparams")
        baseline = {k: v.numpy() for k, v in baseline.state_dict().items()}
    with paddle.utils.unique_name.guard():
        made = Engine(copy.deepcopy(config), mode="train")
    model = made.model

    batches = {}
    for mode, loader in (("Train", made.train_dataloader), ("Eval", made.eval_dataloader)):
        batches[mode] = pixels, labels = next(iter(loader))[:2]
        assert pixels.shape == [2, *config["Global"]["image_shape"]]
        assert 0.3 < float(pixels.std()) < 3, "the pixels are not normalised"
        if mixes(config) and mode == "Train":
            assert labels.shape == [2, arch["class_num"]]
            np.testing.assert_allclose(labels[:, :2].sum(axis=1).numpy(), 1.0, rtol=1e-6)
        else:
            assert [int(label) for label in labels.reshape([-1])] in ([0, 1], [0, 0], [1, 0], [1, 1])

    state = {k: v.numpy() for k, v in model.state_dict().items()}
    if baseline is not None:
        for key, value in baseline.items():
            np.testing.assert_array_equal(state[key], value, err_msg=key)
        assert set(state) - set(baseline)
        assert all(k.endswith(".convmap.weight") for k in set(state) - set(baseline))

    model.eval()
    pixels, labels = batches["Eval"]
    with paddle.no_grad():
        logits = model(pixels[:1])
        loss = made.eval_loss_func(logits, labels[:1].reshape([1, 1]))
        # An untrained network finds all classes as likely, and label smoothing would change nothing.
        drawn = paddle.randn([1, arch["class_num"]]) * 3
        training = made.train_loss_func(drawn, labels[:1].reshape([1, 1]))
        metric = made.eval_metric_func(logits, labels[:1].reshape([1, 1]))
    assert logits.shape == [1, arch["class_num"]]
    smoothing = config["Loss"]["Train"][0]["CELoss"].get("epsilon", 0.0)
    log_likelihood = paddle.nn.functional.log_softmax(drawn.astype("float64")).numpy()[0]
    expected = -(1 - smoothing) * log_likelihood[int(labels[0])] - smoothing * log_likelihood.mean()
    assert 0 < float(loss["loss"]) < 1000
    # A sum of up to 1000 numbers in float32.
    np.testing.assert_allclose(float(training["loss"]), expected, rtol=1e-4)
    assert set(metric) >= {f"top{k}" for k in (1, 5) if k <= arch["class_num"]}

    trained = {id(p) for p in model.parameters() if not p.stop_gradient}
    assert {id(p) for p in made.optimizer[0]._parameter_list} >= trained
    name, epochs = config["Optimizer"]["lr"]["name"], config["Global"]["epochs"]
    peak = config["Optimizer"]["lr"]["learning_rate"]
    rates = learning_rates(epochs, len(made.train_dataloader), made.lr_sch[0])
    if name == "Cosine":
        schedule = config["Optimizer"]["lr"]
        warm, start, end = (schedule.get(key, 0) for key in ("warmup_epoch", "warmup_start_lr", "eta_min"))
        expected = [start + (peak - start) * e / warm for e in range(warm)]
        cosine = [(1 + np.cos(np.pi * e / (epochs - warm))) / 2 for e in range(epochs - warm + 1)]
        expected += [end + (peak - end) * share for share in cosine]
    else:
        size = config["Optimizer"]["lr"]["step_size"]
        expected = [peak * 0.1 ** (e // size) for e in range(epochs + 1)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-9)

    image = Path(made.eval_dataloader.dataset.images[0]).read_bytes()
    for operator in create_operators(config["Infer"]["transforms"]):
        image = operator(image)
    np.testing.assert_array_equal(image, pixels[0].numpy())
    answer = build_postprocess(config["Infer"]["PostProcess"])(logits, ["0.png"])[0]
    assert len(answer["class_ids"]) == min(5, arch["class_num"])
    assert answer["label_names"] == [f"name{i}" for i in answer["class_ids"]]


@IN_A_CHECKOUT
@pytest.mark.parametrize("path", [p for p in PATHS if network_of(raw(p)["Arch"])["name"] in NEWER])
def test_networks_that_only_a_newer_paddleclas_has(path, images, tmp_path):
    from ppcls.arch import build_model

    config = on_this_machine(path, images, tmp_path)
    config["Arch"].pop("pretrained", None)
    with paddle.utils.unique_name.guard():
        model = build_model(config, mode="eval")
    layers = [layer for layer in model.sublayers() if type(layer).__name__ == "RefConv2D"]
    assert bool(layers) == path.endswith("_RefConv.yaml")
    model.eval()
    with paddle.no_grad():
        assert model(paddle.randn([1, 3, 64, 64])).shape == [1, 1000]


def test_random_augmentation_takes_every_image(engine):
    """PaddleClas' data sets skip an image whose augmentation fails, with a line in the log."""
    from PIL import Image
    from ppcls.data import preprocess
    from ppcls.data.preprocess.ops import timm_autoaugment

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8))
    used = [op for p in PATHS for op in raw(p)["DataLoader"]["Train"]["dataset"]["transform_ops"]]
    strings = {op["TimmAutoAugment"]["config_str"] for op in used if "TimmAutoAugment" in op}
    assert strings == {"rand-m9-mstd0.5-inc1"}
    for name in timm_autoaugment._RAND_INCREASING_TRANSFORMS:
        for magnitude in (0, 9, 10):
            changed = timm_autoaugment.AugmentOp(name, prob=1.0, magnitude=magnitude)(image)
            assert (changed.size, changed.mode) == (image.size, "RGB"), name
    settings = [op["RandAugment"] for op in used if "RandAugment" in op]
    assert settings
    operator = preprocess.RandAugment(**settings[0])
    assert all(other == settings[0] for other in settings)
    for name, function in operator.func.items():
        assert function(image, operator.level_map[name]).size == image.size, name


@pytest.mark.parametrize("path", [p for p in PATHS if documented_overrides(p)])
def test_documented_overrides_name_keys_of_the_file(path):
    """PaddleClas takes an unknown key for a new one without a word."""
    for override in [override for line in documented_overrides(path) for override in line]:
        part = raw(path)
        for name in override.split("=")[0].split("."):
            part = part[name]


def test_files_of_a_kind_document_the_same_overrides():
    for kind in ("_RefConv.yaml", "imagenet/spconv"):
        lines = {
            p: str(documented_overrides(p)).replace(Path(p).stem, "")
            for p in PATHS
            if kind in p and not is_fine_tuned(p)
        }
        assert len(set(lines.values())) == 1, lines


@pytest.mark.parametrize(
    "path",
    [
        "digits/refconv/PPLCNet_x0_25_RefConv.yaml",
        "cifar10/spconv/ResNet20_SPConv.yaml",
        "cifar10/spconv/VGG16_SPConv.yaml",
        "imagenet/spconv/ResNet18_SPConv.yaml",
    ],
)
def test_documented_overrides_make_the_network(path, images, tmp_path):
    """With each line of overrides in a header the network becomes what it says."""
    from ppcls.arch import build_model

    lines = documented_overrides(path)
    assert lines
    sizes = set()
    for overrides in [[], *lines]:
        config = on_this_machine(path, images, tmp_path, overrides)
        options = config["Arch"].get("layer", {"name": "SPConv2D"})
        config["Arch"].pop("pretrained", None)
        with paddle.utils.unique_name.guard():
            model = build_model(config, mode="train")
        layers = [layer for layer in model.sublayers() if type(layer).__name__ == options["name"]]
        given = dict(override.replace("Arch.layer.", "").split("=") for override in overrides)
        for layer in layers:
            if options["name"] == "RefConv2D":
                assert (layer.init, layer.base) == (given.get("init", "xavier"), given.get("base", "pretrained"))
                assert layer.identity == (given.get("identity") != "False")
                assert ("weight" in layer._parameters) == (given.get("train_base") == "True")
        assert layers
        sizes.add(sum(p.size for p in model.parameters()))
    # The ratio decides the size; of RefConv's switches only train_base adds parameters.
    assert len(sizes) == (2 if "refconv" in path else len(lines) + 1)
