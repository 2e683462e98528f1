"""Shipped configs with something wrong in them: every command ends with one sentence, or has done what it says."""

import contextlib
import copy
import io
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
import yaml
from PIL import Image

from paddle_reparam.ppcls import setup
from paddle_reparam.weights import checkpoints

setup()

from paddle_reparam.ppcls.command import main, read_config  # noqa: E402
from paddle_reparam.ppcls.reparam import build_train_form  # noqa: E402

ROOT = Path(__file__).resolve().parents[1] / "ppcls_configs"
PATHS = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("*/*/*.yaml"))
MUTATIONS, TOGETHER = 300, 30
SECONDS = 60
#: How often a command is drawn; an export takes longest.
MODES = ["train"] * 10 + ["eval"] * 5 + ["infer"] * 4 + ["export"]
#: What takes the place of a value.
STRANGE = [
    None, True, False, 0, -1, 1, 3, 0.5, -0.5, 2.0, 10**9, 10**30, 1e300, float("nan"), float("inf"), "", "abc",
    "1e-3", "null", "../..", "no/such/place", "a\x00b", [], [1], ["abc"], [None], [[1, 2], [3]], {},
    {"abc": 1}, {"name": "abc"}, {"name": None}, {1: 2}, b"abc",
]  # fmt: skip


class Place:
    """Four images of 8x8 pixels, a list of them, and weights for every network that the configs get."""

    def __init__(self, root: Path) -> None:
        self.root, self.weights = root, {}
        generator = np.random.default_rng(0)
        lines = []
        for i in range(4):
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / f"{i}.png")
            lines.append(f"{i}.png\t{i}\n")
        (root / "list.txt").write_text("".join(lines))

    def config(self, path: str) -> dict[str, Any]:
        """Return a shipped config with these images, one step of training, and the digits' network of its paper."""
        config = yaml.safe_load((ROOT / path).read_text())
        paper = path.split("/")[1]
        paper = {"replknet": "slak"}.get(paper, paper)
        paper = paper if (ROOT / "digits" / paper).is_dir() else "spconv"
        near = [ROOT / path] if path.startswith("digits") else sorted((ROOT / "digits" / paper).glob("*.yaml"))
        wanted = [p for p in near if p.name.endswith("_RefConv.yaml") == path.endswith("_RefConv.yaml")]
        small = yaml.safe_load(wanted[0].read_text())
        config["Arch"], shape = small["Arch"], small["Global"]["image_shape"]
        if "pretrained" in config["Arch"]:
            config["Arch"]["pretrained"] = str(self.plain(config["Arch"]))
        config["Global"].update(
            device="cpu", epochs=1, image_shape=shape, output_dir=str(self.root / "out"),
            save_inference_dir=str(self.root / "out" / "inference"),
        )  # fmt: skip
        config["Infer"]["infer_imgs"] = str(self.root / "0.png")
        for split in ("Train", "Eval"):
            part = config["DataLoader"][split]
            listed = {"cls_label_path": str(self.root / "list.txt"), "delimiter": "\t"}
            part["dataset"].update(image_root=str(self.root), **listed)
            part["sampler"]["batch_size"], part["loader"]["num_workers"] = 4, 0
        for operators in (
            config["Infer"]["transforms"],
            *(config["DataLoader"][split]["dataset"]["transform_ops"] for split in ("Train", "Eval")),
        ):
            for operator in operators:
                for options in filter(None, operator.values()):
                    options.update({key: shape[1] for key in ("size", "resize_short") if key in options})
            if not any("size" in str(operator) for operator in operators):
                operators.insert(1, {"ResizeImage": {"size": shape[1]}})
        return config

    def plain(self, arch: dict[str, Any]) -> Path:
        """Return a weight file of the plain network of a ReparamModel."""
        return self._saved({**arch["backbone"], "class_num": arch["class_num"]})

    def trained(self, arch: dict[str, Any]) -> Path:
        """Return a weight file as training would have left it."""
        return self._saved(arch)

    def _saved(self, arch: dict[str, Any]) -> Path:
        key = yaml.safe_dump(arch)
        if key not in self.weights:
            config = read_config(str(ROOT / "digits/refconv/PPLCNet_x0_25.yaml"))
            config["Arch"] = copy.deepcopy(arch)
            self.weights[key] = self.root / f"weights_{len(self.weights)}.pdparams"
            checkpoints.save(build_train_form(config).state_dict(), self.weights[key])
        return self.weights[key]


def places(part: Any, path: tuple = ()) -> list[tuple]:
    """Return the paths to everything in a config."""
    found = [path] if path else []
    entries = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for key, value in entries:
        found += places(value, (*path, key))
    return found


def misspelt(text: str, draw: random.Random) -> str:
    i = draw.randrange(len(text))
    return draw.choice([text[:i] + text[i + 1 :], text[:i] + "x" + text[i:], text[:i] + text[i:].swapcase()])


def mutate(config: dict[str, Any], draw: random.Random) -> str:
    """Change one thing in a config; return what."""
    *way, last = path = draw.choice(places(config))
    parent = config
    for key in way:
        parent = parent[key]
    value, name = parent[last], ".".join(map(str, path))
    kind = draw.choice(["delete", "strange", "strange", "strange", "misspell", "swap", "kind", "list"])
    if kind == "delete":
        del parent[last]
    elif kind == "misspell" and isinstance(last, str) and not (isinstance(value, str) and draw.random() < 0.5):
        parent[misspelt(last, draw)] = parent.pop(last)
    elif kind == "misspell" and isinstance(value, str) and value:
        parent[last] = misspelt(value, draw)
    elif kind == "swap" and isinstance(parent, (dict, list)):
        other = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[last], parent[other] = parent[other], value
        name += f" with {other}"
    elif kind == "kind":
        parent[last] = str(value) if not isinstance(value, str) else [value]
    elif kind == "list" and not isinstance(value, list):
        parent[last] = [value, value]
    else:
        parent[last] = draw.choice(STRANGE)
    return f"{kind} {name}"


def outcome(place: Place, seed: int) -> tuple[str, int, str]:
    """Run a command on a config with one or two changes; return what was run, its exit code and what it said."""
    draw = random.Random(seed)
    path, mode = draw.choice(PATHS), draw.choice(MODES)
    config = place.config(path)
    if mode != "train":
        config["Global"]["pretrained_model"] = str(place.trained(config["Arch"]))
    arguments = []
    if draw.random() < 0.25:
        where = draw.choice(places(config))
        arguments = ["-o", f"{'.'.join(map(str, where))}={draw.choice(STRANGE)}".replace("\0", "")]
        changes = arguments[1:]
    else:
        changes = [mutate(config, draw) for _ in range(draw.choice([1, 1, 1, 2]))]
    shutil.rmtree(place.root / "out", ignore_errors=True)
    file = place.root / "config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    said = io.StringIO()
    with contextlib.redirect_stderr(said), paddle.utils.unique_name.guard():
        code = main(mode, ["-c", str(file), *arguments])
    return f"seed {seed}: {mode} {path}: {', '.join(changes)}", code, said.getvalue()


def check(place: Place, seed: int) -> None:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"seed {seed} takes longer than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        what, code, said = outcome(place, seed)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == (code != 0), f"{what}: exit code {code}, {said}"
    assert code in (0, 1, 2), what
    assert "Traceback" not in said, what
    assert all(len(line) < 1200 for line in lines), f"{what}: {said}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("mutations"))


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    """Work deep in the place: a changed output folder such as ../.. must not lead out of it."""
    deep = place.root / "here" / "and" / "there"
    deep.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(deep)


@pytest.mark.parametrize("start", range(0, MUTATIONS, TOGETHER))
def test_a_sentence_or_a_run(place, start):
    for seed in range(start, start + TOGETHER):
        check(place, seed)
