"""Every YAML file of ppcls_configs: PaddleClas' own builders make of it what a training, an evaluation and a prediction
need, and everything written in it is read by something."""

import copy
import inspect
import re
from pathlib import Path

import cv2
import numpy as np
import paddle
import pytest
import yaml

from paddle_reparam import checkpoints, ppcls
from paddle_reparam.ppcls.command import read_config
from paddle_reparam.registry import list_models

ROOT = Path(__file__).resolve().parents[1] / "ppcls_configs"
PATHS = [p.relative_to(ROOT).as_posix() for p in sorted(ROOT.rglob("*.yaml"))]
TRAINED = ("Train", "Eval")

#: What the Engines of 2.4 and 2.6 read from Global, as far as it means something for these networks. AMP is no section
#: of these files: in 2.4 the section alone turns it on, whatever its use_amp says.
GLOBAL = {
    "output_dir", "device", "seed", "epochs", "eval_during_train", "eval_interval", "save_interval",
    "print_batch_step", "use_visualdl", "pretrained_model", "checkpoints", "image_shape", "save_inference_dir",
}  # fmt: skip
SECTIONS = {"Global", "Arch", "Loss", "Optimizer", "DataLoader", "Metric", "Infer"}
WRAPPED = {"name", "class_num", "backbone", "layer", "pretrained"}
#: dataset -> (classes, cards that the batch of the recipe is spread over)
DATASETS = {"digits": (10, 1), "cifar10": (10, 1), "imagenet": (1000, 4)}
#: (dataset, paper) -> batch of the recipe, epochs, learning rate, weight decay
RECIPES = {
    ("digits", "refconv"): (16, 10, 0.05, 4e-5),
    ("cifar10", "refconv"): (128, 105, 0.1, 5e-4),
    ("cifar10", "spconv"): (128, 200, 0.1, 5e-4),
    ("imagenet", "refconv"): (256, 105, 0.1, 4e-5),
    ("imagenet", "spconv"): (256, 90, 0.1, 1e-4),
}


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


def documented_overrides(path):
    """Return the lines of the header that give overrides: one list of KEY=VALUE each."""
    return [re.findall(r"-o (\S+)", line) for line in header(path) if line.startswith("#   -o ")]


def test_there_is_what_the_documentation_names():
    assert {tuple(p.split("/")[:2]) for p in PATHS} == set(RECIPES)
    assert len(PATHS) >= 30


# ---------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("path", PATHS)
def test_layout_and_header(path):
    dataset, paper, file = path.split("/")
    config = raw(path)
    name = file[: -len(".yaml")]
    paper_name = {"refconv": "arXiv 2310.10563", "spconv": "arXiv 2006.12085"}[paper]
    text = "\n".join(header(path))
    assert "Recipe" in text
    assert config["Global"]["output_dir"] == f"./output/{dataset}/{paper}/{name}"
    assert config["Global"]["save_inference_dir"] == f"./output/{dataset}/{paper}/{name}/inference"
    arch = config["Arch"]
    if arch["name"] == "ReparamModel":
        assert name == f"{arch['backbone']['name']}_RefConv"
        # Where PaddleClas 2.4 leaves the last epoch of the baseline, and where 2.6 does.
        baseline = raw(path.replace("_RefConv", ""))
        assert arch["pretrained"] == f"{baseline['Global']['output_dir']}/{baseline['Arch']['name']}/latest"
        assert f"# -o Arch.pretrained={baseline['Global']['output_dir']}/latest" in text.splitlines()
        assert documented_overrides(path)
    else:
        assert name == arch["name"]
    assert paper_name in text or f"{name}_RefConv.yaml starts from" in text
    classes, cards = DATASETS[dataset]
    assert arch["class_num"] == classes
    batch, epochs, rate, decay = RECIPES[dataset, paper]
    assert f"4 cards x {batch // 4}" in text or cards == 1
    assert config["Global"]["epochs"] == epochs
    assert config["Optimizer"]["lr"]["learning_rate"] == rate
    assert config["Optimizer"]["regularizer"] == {"name": "L2", "coeff": decay}
    for mode in TRAINED:
        assert config["DataLoader"][mode]["sampler"]["batch_size"] * cards == batch


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
    config = raw(path)
    assert set(config) == SECTIONS
    assert set(config["Global"]) - {"seed"} == GLOBAL - {"seed"}
    network = config["Arch"]
    if network["name"] == "ReparamModel":
        assert set(network) == WRAPPED
        network = network["backbone"]
    # Layers and models of this library refuse unknown options; PaddleClas' networks swallow them.
    options = {k: v for k, v in network.items() if k not in ("name", "class_num")}
    if options and network["name"] not in list_models():
        built = getattr(engine.arch, network["name"])(**options)
        assert set(options) <= set(inspect.signature(type(built).__init__).parameters) - {"kwargs", "kargs"}
    for mode in TRAINED:
        part = config["DataLoader"][mode]
        assert set(part) == {"dataset", "sampler", "loader"}
        assert set(part["dataset"]) == {"name", "image_root", "cls_label_path", "transform_ops"}
        assert set(part["sampler"]) == {"name", "batch_size", "drop_last", "shuffle"}
        assert set(part["loader"]) == {"num_workers", "use_shared_memory"}
    rate = config["Optimizer"]["lr"]
    from ppcls.optimizer import learning_rate

    # The schedules of both PaddleClas take **kwargs and ignore what they do not know.
    known = set(inspect.signature(getattr(learning_rate, rate["name"]).__init__).parameters)
    assert set(rate) - {"name"} <= known - {"kwargs"}
    assert set(config["Optimizer"]) == {"name", "momentum", "lr", "regularizer"}
    assert set(config["Infer"]) == {"infer_imgs", "batch_size", "transforms", "PostProcess"}


# ---------------------------------------------------------------------------------------------------------------------
# What PaddleClas makes of it


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder with, for each data set, four images like its own, in two classes, with list files."""
    generator = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("dataset")
    for dataset, shape in (("digits", (8, 8)), ("cifar10", (32, 32, 3)), ("imagenet", (300, 260, 3))):
        (root / dataset).mkdir()
        for i in range(4):
            cv2.imwrite(str(root / dataset / f"{i}.png"), generator.integers(0, 256, shape, dtype=np.uint8))
        for name in ("train_list.txt", "val_list.txt"):
            (root / dataset / name).write_text("".join(f"{i}.png {i % 2}\n" for i in range(4)))
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
            rates.append(scheduler.get_lr())
        scheduler.step()
    return rates


@pytest.mark.parametrize("path", PATHS)
def test_engine_builds_and_computes(path, engine, images, tmp_path):
    from ppcls.data import create_operators
    from ppcls.data.postprocess import build_postprocess
    from ppcls.engine.engine import Engine

    config = on_this_machine(path, images, tmp_path)
    arch = config["Arch"]
    baseline = None
    if arch["name"] == "ReparamModel":
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
        training = made.train_loss_func(logits, labels[:1].reshape([1, 1]))
        metric = made.eval_metric_func(logits, labels[:1].reshape([1, 1]))
    assert logits.shape == [1, arch["class_num"]]
    assert 0 < float(loss["loss"]) == float(training["loss"]) < 1000
    assert set(metric) >= {"top1", "top5"}

    trained = {id(p) for p in model.parameters() if not p.stop_gradient}
    assert {id(p) for p in made.optimizer[0]._parameter_list} >= trained
    name, epochs = config["Optimizer"]["lr"]["name"], config["Global"]["epochs"]
    peak = config["Optimizer"]["lr"]["learning_rate"]
    rates = learning_rates(epochs, len(made.train_dataloader), made.lr_sch[0])
    if name == "Cosine":
        warm = config["Optimizer"]["lr"]["warmup_epoch"]
        expected = [peak * e / warm for e in range(warm)]
        expected += [peak / 2 * (1 + np.cos(np.pi * e / (epochs - warm))) for e in range(epochs - warm + 1)]
    else:
        size = config["Optimizer"]["lr"]["step_size"]
        expected = [peak * 0.1 ** (e // size) for e in range(epochs + 1)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-9)

    image = Path(made.eval_dataloader.dataset.images[0]).read_bytes()
    for operator in create_operators(config["Infer"]["transforms"]):
        image = operator(image)
    np.testing.assert_array_equal(image, pixels[0].numpy())
    answer = build_postprocess(config["Infer"]["PostProcess"])(logits, ["0.png"])[0]
    assert len(answer["class_ids"]) == 5
    assert answer["label_names"] == [f"name{i}" for i in answer["class_ids"]]


@pytest.mark.parametrize("path", [p for p in PATHS if documented_overrides(p)])
def test_documented_overrides_name_keys_of_the_file(path):
    """PaddleClas takes an unknown key for a new one without a word."""
    for override in [override for line in documented_overrides(path) for override in line]:
        part = raw(path)
        for name in override.split("=")[0].split("."):
            part = part[name]


def test_files_of_a_kind_document_the_same_overrides():
    for kind in ("_RefConv.yaml", "imagenet/spconv"):
        lines = {p: str(documented_overrides(p)).replace(Path(p).stem, "") for p in PATHS if kind in p}
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
