"""Trainings of one plain network, as it is or with a layer in it: what several commands make of a config."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import paddle
from paddle import nn

from ..deploy.release import ReleaseReport, release
from ..errors import ReparamError
from . import saving
from .errors import ConfigError
from .reparam import build_train_form, image_shape, read_output

# ---------------------------------------------------------------------------------------------------------------------
# Configs


def plain_config(config: dict[str, Any], several_devices: str, distilled: str = "") -> dict[str, Any]:
    """Return the config of the plain network alone, without the options `layer` and `where` of its `Arch`.

    `several_devices` and `distilled` say what to do with a config that a command cannot train. Raises `ConfigError`
    where that is so.
    """
    from .validation import networks

    if paddle.distributed.get_world_size() > 1:
        raise ConfigError(f"this command trains in one process; {several_devices}")
    if config["Arch"].get("models"):
        raise ConfigError(
            f"Arch is a {config['Arch'].get('name')} of several networks, and what is trained here is one; give the "
            f"config of one network{distilled}"
        )
    for network in networks(config["Arch"]):
        if network["name"] == "ReparamModel":
            raise ConfigError("Arch is a ReparamModel already; give the config of the plain network, its backbone")
    if config["Global"].get("checkpoints"):
        raise ConfigError("Global.checkpoints must be null: the same command again goes on by itself")
    if not (config["DataLoader"].get("Eval") and (config.get("Metric") or {}).get("Eval")):
        raise ConfigError("the config needs DataLoader.Eval and Metric.Eval, by which all networks are measured")
    plain = as_sections(config)
    for key in ("layer", "where"):
        plain["Arch"].pop(key, None)
    return plain


def from_weights(config: dict[str, Any], weights: str) -> dict[str, Any]:
    """Return the config of a training of the same network by the same recipe, from a weight file."""
    config = _without_weights(config)
    config["Global"]["pretrained_model"] = weights
    return config


def with_layer(
    config: dict[str, Any], layer: Mapping[str, Any], where: str | Sequence[str] | None, weights: str | None
) -> dict[str, Any]:
    """Return the config of a training by the same recipe with a layer in the place of the network's convolutions.

    `layer` is its `name` with options; `weights` is a file of the plain network, to start from. With None the network
    starts from what the plain one starts from.
    """
    from .arch import ENGINE_KEYS

    if weights is None:
        config = as_sections(config)
        # Of the plain network as well: loaded before the layers are put in.
        settings = config["Global"]
        weights, fresh = settings.pop("pretrained_model", None), settings.pop("fresh", None)
    else:
        config, fresh = _without_weights(config), None
    arch = config["Arch"]
    outside = {key: arch.pop(key) for key in [*ENGINE_KEYS, "use_sync_bn", "class_num"] if key in arch}
    config["Arch"] = as_sections({
        "name": "ReparamModel", **outside, "backbone": dict(arch), "layer": dict(layer), "where": where,
        "pretrained": weights, **({} if fresh is None else {"fresh": fresh}),
    })  # fmt: skip
    return config


def _without_weights(config: dict[str, Any]) -> dict[str, Any]:
    from .validation import without_weights

    config = as_sections(config)
    without_weights(config["Arch"])
    config["Global"].update(pretrained_model=None, fresh=None)
    return config


def as_values(config: Any) -> Any:
    """Return a config as what JSON and YAML files hold."""
    return json.loads(json.dumps(config))


def as_sections(config: Any) -> Any:
    """Return a copy whose sections are attributes, as the Engine reads them; after copy.deepcopy they are not."""
    from ppcls.utils.config import AttrDict

    if isinstance(config, dict):
        return AttrDict({key: as_sections(value) for key, value in config.items()})
    return [as_sections(value) for value in config] if isinstance(config, (list, tuple)) else config


# ---------------------------------------------------------------------------------------------------------------------
# What is done with them


def build(config: dict[str, Any]) -> nn.Layer:
    """Build the network of a config on the CPU, where it is fused and compared; an Engine sets its own device."""
    paddle.set_device("cpu")
    # Some backbones give their parameters fixed names, which can be given once; in here the names start anew.
    with paddle.utils.unique_name.guard():
        return build_train_form(config)


def train(config: dict[str, Any], folder: Path, watch: Callable[[float], None] | None = None) -> Path:
    """Train, or go on, or do nothing where all epochs are done; return the weights after the last epoch.

    `watch` is told after each step which share of all steps is done; there is then no progress bar.
    """
    from .engine import Engine

    config = as_sections(config)
    config["Global"]["output_dir"] = str(folder)
    config["Global"]["checkpoints"] = "auto"
    config["profiler_options"] = None
    epochs = config["Global"]["epochs"]
    with saving.only_training_in(folder):
        saved = saving.newest(folder)
    if saved is None or saved.epoch < epochs:
        # A training's parameters are named from the start: the optimizer's state is found again by these names.
        with paddle.utils.unique_name.guard(), _own_log():
            engine = Engine(config, mode="train")
            engine.watch = watch
            engine.train()
        saved = saving.newest(folder)
    if saved is None or saved.epoch < epochs:
        raise ReparamError(f"{folder}: the training ended without a whole checkpoint of epoch {epochs}")
    return Path(f"{saving.placed(saved.prefix)}.pdparams")


@contextlib.contextmanager
def started(config: dict[str, Any], folder: Path) -> Iterator[Any]:
    """Give the Engine of a training that is ready for its first step; it writes its log into a folder."""
    from .engine import Engine

    config = as_sections(config)
    config["Global"].update(output_dir=str(folder), checkpoints=None, use_visualdl=False)
    config["Monitor"] = config["profiler_options"] = None
    with paddle.utils.unique_name.guard(), _own_log():
        yield Engine(config, mode="train")


def evaluate(config: dict[str, Any], weights: Path, folder: Path) -> float:
    """Return what PaddleClas measures of a config's network with a weight file; its log goes into a folder."""
    from .engine import Engine

    config = _without_weights(config)
    config["Global"].update(pretrained_model=str(weights), checkpoints=None, output_dir=str(folder / "evaluation"))
    with paddle.utils.unique_name.guard(), _own_log():
        return float(Engine(config, mode="eval").eval())


def ship(
    plain: dict[str, Any],
    config: dict[str, Any],
    weights: Path,
    folder: Path,
    progress: Callable[[str], None] = print,
) -> ReleaseReport:
    """Release what was trained by a config, fused and checked; an earlier release there is replaced.

    `plain` is the config of the plain network, whose weights are written where there is a layer in it. Raises
    `ReparamError` where a check fails.
    """
    from .loading import load_weights

    stock = build(plain) if config["Arch"]["name"] == "ReparamModel" else None
    return release(
        build(config), weights, folder, [[None, *image_shape(config)]], output=read_output(config), stock=stock,
        load=functools.partial(load_weights, config=config, mode="export"), fuse_something=stock is not None,
        force=folder.exists(), progress=progress,
    )  # fmt: skip


@contextlib.contextmanager
def _own_log() -> Iterator[None]:
    """Keep PaddleClas, which opens a log file for each Engine and closes none, from writing one into the other."""
    log = logging.getLogger("ppcls")

    def close() -> None:
        for handler in [each for each in log.handlers if isinstance(each, logging.FileHandler)]:
            log.removeHandler(handler)
            handler.close()

    close()
    try:
        yield
    finally:
        close()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what PaddleClas logs in its files, and off the screen all but errors."""
    screens = [each for each in logging.getLogger("ppcls").handlers if not isinstance(each, logging.FileHandler)]
    before = [each.level for each in screens]
    for each in screens:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(screens, before):
            each.setLevel(level)


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Return what PaddleClas logged of every epoch of a training: `epoch`, and its averages as `train_*`, `eval_*`."""
    epochs: dict[int, dict[str, float]] = {}
    for log in sorted(folder.rglob("train.log")):
        # An epoch that was begun again after a kill counts as it was the last time.
        for mode, epoch, values in re.findall(
            r"\[(Train|Eval)\]\[Epoch (\d+)(?:/\d+)?\]\[Avg\](.*)", log.read_text(encoding="utf-8")
        ):
            found = re.findall(r"(\w+): ([-+.\deinfa]+)", values)
            epochs.setdefault(int(epoch), {}).update({f"{mode.lower()}_{key}": float(value) for key, value in found})
    return [{"epoch": epoch, **epochs[epoch]} for epoch in sorted(epochs)]
