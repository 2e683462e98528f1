"""A network's loss landscape and its receptive field, from PaddleClas' configs, weight files and releases."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from ..analysis import landscape, receptive_field
from ..analysis.landscape import LandscapeRow
from ..analysis.receptive_field import FieldRow
from ..deploy.gradients import DifferentiatedProgram
from ..deploy.released import read_manifest
from ..errors import CheckpointError, NothingToFuse, ReparamError, one_sentence
from ..surgery.rewrite import reparameterize
from .command import read_config
from .errors import ConfigError
from .reparam import build_train_form

#: What shows how far a long run is: it gets everything that is to be done, and a name.
Watch = Callable[[Sequence[Any], str], Iterable[Any]]


def pairs_of(configs: Sequence[str], weights: Sequence[str]) -> list[tuple[str, str]]:
    """Return (config, weight file) for each weight file: of one config, or each of its own; else `ConfigError`."""
    if len(configs) not in (1, len(weights)):
        raise ConfigError(
            f"-c names {len(configs)} configs and --weights {len(weights)} files; give one config for all of them, or "
            "one for each"
        )
    return list(zip(list(configs) * (len(weights) if len(configs) == 1 else 1), weights))


def names_of(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Return what tells networks apart: their weight files, with the config where one file is there twice."""
    files = [file for _, file in pairs]
    return [file if files.count(file) == 1 else f"{file} ({Path(config).stem})" for config, file in pairs]


def load_network(config: dict[str, Any], weights: str) -> nn.Layer:
    """Return the network of a config with trained weights, in train form and eval mode.

    Raises `ConfigError` for a file that is not there, and `CheckpointError` where it does not fit.
    """
    from .loading import load_weights, weight_file

    try:
        file = weight_file(weights)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    with paddle.utils.unique_name.guard():
        model = build_train_form(config)
    load_weights(model, file, config, "export")
    return model


def draw_landscape(
    pairs: Sequence[tuple[str, str]], overrides: Sequence[str], images: int, watch: Watch, **options: Any
) -> list[LandscapeRow]:
    """Return the loss landscapes of networks, (config, weight file), over training images, in the same directions.

    The loss is what the config evaluates with, and images are transformed as for evaluation: nothing is random.
    `options` are those of `landscape.analyze`.
    """
    from .images import read_training_images

    networks = {}
    for name, (path, weights) in zip(names_of(pairs), pairs):
        config = read_config(path, overrides)
        model = load_network(config, weights)
        networks[name] = (model, _loss_of(config, model, read_training_images(config, images)))
    names = iter(networks)
    return landscape.analyze(networks, watch=lambda places: watch(places, next(names)), **options)


def _loss_of(config: dict[str, Any], model: nn.Layer, images: Any) -> Callable[[], float]:
    """Return what computes the mean loss of a network as it is."""
    from ppcls.loss import build_loss

    section = config.get("Loss") or {}
    losses = section.get("Eval") or section.get("Train")
    if not losses:
        raise ConfigError("the config has no Loss.Eval, of which a landscape could be drawn")
    with one_sentence("Loss.Eval cannot be built"):
        function = build_loss(losses)
    # As PaddleClas' Engine gives them to its losses.
    labels = images.labels.reshape(len(images.labels), -1)

    def loss(output: Any, wanted: paddle.Tensor) -> paddle.Tensor:
        with one_sentence("Loss.Eval cannot be computed"):
            return function(output, wanted)["loss"]

    return lambda: landscape.mean_loss(model, images.pixels, labels, loss)


def find_fields(
    pairs: Sequence[tuple[str, str]],
    release: str | None,
    config: str,
    overrides: Sequence[str],
    images: int,
    size: int | None,
    watch: Watch,
) -> list[FieldRow]:
    """Return the effective receptive fields of networks, (config, weight file), in train form and fused; and, where
    there is one, of the program of a release, over the images of a config.

    Images are validation images as the config makes them, enlarged to `size` where that is not None.
    """
    rows: list[FieldRow] = []
    for name, (path, weights) in zip(names_of(pairs), pairs):
        read = read_config(path, overrides)
        pixels = _images_of(read, images, size)
        model = load_network(read, weights)
        forms = {"train form": model, "fused": _fused(model, pixels.shape[1:])}
        first, shape = None, None
        for form, network in forms.items():
            if network is None:
                continue
            layer, found = receptive_field.last_map(network, pixels[:1])
            shape = shape or found
            if found != shape:
                raise ReparamError(f"{name}: fused, its last map is another one: {found[1:]}, not {shape[1:]}")
            gradients = receptive_field.input_gradients(network, layer)
            matrix = receptive_field.contributions(gradients, pixels, functools.partial(watch, name=f"{name}, {form}"))
            rows.append(receptive_field.row_of(name, form, layer, found, len(pixels), matrix, first))
            first = matrix if first is None else first
    if release is not None:
        pixels = _images_of(read_config(config, overrides), images, size)
        rows.append(_of_release(release, pixels, watch, rows[0].contributions if rows else None))
    return rows


def _images_of(config: dict[str, Any], most: int, size: int | None) -> np.ndarray:
    from .images import read_validation_images

    pixels = read_validation_images(config, most).pixels
    if size is None:
        return pixels
    with paddle.no_grad():
        return np.concatenate([
            F.interpolate(paddle.to_tensor(image[None]), [size, size], mode="bicubic").numpy() for image in pixels
        ])  # fmt: skip


def _fused(model: nn.Layer, shape: Sequence[int]) -> nn.Layer | None:
    """Return a network fused, BNs folded, for images of any size; None where there is nothing to fuse."""
    try:
        return reparameterize(model, fold_bn=True, input_spec=[[None, *shape]])[0]
    except NothingToFuse:
        return None


def _of_release(folder: str, pixels: np.ndarray, watch: Watch, first: np.ndarray | None) -> FieldRow:
    taken = read_manifest(folder)["input"]
    if taken["normalization"] is not None:
        raise ReparamError(f"{folder}: it normalises its images itself; release the network without --normalize")
    [wanted, *_] = taken["shape"]
    if list(pixels.shape[1:]) != wanted[1:]:
        raise ConfigError(
            f"{folder} takes images of {'x'.join(map(str, wanted[1:]))}, and these are "
            f"{'x'.join(map(str, pixels.shape[1:]))}"
        )
    program = DifferentiatedProgram(folder)
    matrix = receptive_field.contributions(program.gradients, pixels, functools.partial(watch, name=folder))
    return receptive_field.row_of(folder, "release", "-", program.shape, len(pixels), matrix, first)
