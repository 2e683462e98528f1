"""RefConv's two trainings as one: the plain network, then the second stage or one of its controls from its weights."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle
import yaml

from ..deploy.released import PLAIN_WEIGHTS
from ..errors import CheckpointError, OutputExists, ReparamError, exit_code, one_sentence
from ..files import atomic_write, digest
from ..registry import Registry
from ..report import Report, format_table
from ..weights import checkpoints
from . import saving, setup
from .command import add_override, read_config
from .errors import ConfigError
from .reparam import image_shape
from .trainings import (
    as_sections,
    as_values,
    build,
    evaluate,
    from_weights,
    plain_config,
    read_curve,
    ship,
    train,
    with_layer,
)

RESULT, RUN, STAGE_TWO = "result.json", "run.json", "stage_two.yaml"
#: What `--weights` may say instead of a file.
PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Variant:
    """A second training from a baseline's weights, by the baseline's recipe.

    `layer` holds options of RefConv2D; where it is None the network stays plain. `rate` multiplies the learning rate.
    """

    what: str
    layer: Mapping[str, Any] | None = None
    rate: float = 1.0


VARIANTS = {
    "refocus": Variant("RefConv: the base frozen, all else trained", {}),
    "random-base": Variant("RefConv over random, frozen kernels", {"base": "random"}),
    "trained-base": Variant("RefConv, the base trained as well", {"train_base": True}),
    "random-trained-base": Variant(
        "RefConv over random kernels, trained as well", {"base": "random", "train_base": True}
    ),
    "retrain": Variant("control: the plain network, the same recipe again"),
    # The factor is chosen here: of the paper's it is known that it is small.
    "finetune": Variant("control: the plain network, a hundredth of the learning rate", rate=0.01),
}


@dataclass
class RefocusReport(Report):
    """What both trainings gave.

    `accuracy` is what PaddleClas measures first (top-1 as a share) of the stock network with the weights of either, and
    `curves` the same while they trained, epoch by epoch, beside the averages over the training images. `weights` are
    names and hashes of all weight files.
    """

    variant: str
    network: str
    seed: int | None
    epochs: int
    accuracy: dict[str, float]
    curves: dict[str, list[dict[str, float]]]
    weights: dict[str, dict[str, Any]]
    source: dict[str, Any]

    def __str__(self) -> str:
        rows = [[name, f"{100 * value:.2f}%"] for name, value in self.accuracy.items()]
        return format_table([self.network, "accuracy"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `tools/refocus.py`; return its exit code: 2 for wrong usage, 1 where a stage fails."""
    parser = argparse.ArgumentParser(
        description="Train a plain network, or take a trained one, then train it again by the same recipe with RefConv "
        "in the place of its convolutions; fuse it, check it, and write weights for the plain network of PaddleClas. "
        "The same command again goes on where a run was killed."
    )
    parser.add_argument("-c", "--config", required=True, help="the YAML file of the plain network's training")
    parser.add_argument(
        "--weights", help="a trained weight file or its address; pretrained: what Arch.pretrained of the config names, "
        "or PaddleClas' own; without it the plain network is trained first",
    )  # fmt: skip
    parser.add_argument("--output", required=True, help="the folder to make; Global.output_dir is not used")
    parser.add_argument(
        "--variant", default="refocus", metavar="NAME",
        help="; ".join(f"{name}: {variant.what}" for name, variant in VARIANTS.items()),
    )  # fmt: skip
    add_override(parser, "; Arch.layer.init, .map_k and Arch.where are those of the second stage")
    given = parser.parse_args(arguments)
    with exit_code() as result:
        setup()
        config = read_config(given.config, given.override)
        source = {"config": {"name": given.config, **digest(Path(given.config)), "overrides": given.override}}
        print(refocus(config, given.output, given.weights, given.variant, source))
        print(f"written: {Path(given.output) / PLAIN_WEIGHTS}, {RESULT}")
    return result[0]


def refocus(
    config: dict[str, Any],
    folder: str | os.PathLike[str],
    weights: str | None = None,
    variant: str = "refocus",
    source: Mapping[str, Any] | None = None,
) -> RefocusReport:
    """Train the plain network of a config, or take its `weights`, then train a variant from them and write the result.

    `config` is what `command.read_config` returns. Its `Arch` may also have the options `layer` and `where` of
    `ReparamModel`, for the second stage. `weights` is a weight file of the plain network, its address, or "pretrained".
    The folder gets both trainings, `baseline.pdparams` (unless it was a file), `stage_two.yaml` (a config for the other
    commands), `shipped` (a release of the fused network), `plain.pdparams` for the stock network, and last of all
    `result.json`, the report with `source` in it.

    A folder in which the same call was interrupted is gone on with: a finished training is not repeated. Raises
    `UnknownName` for an unknown variant, `ConfigError` for a config that cannot work, `OutputExists` for a folder with
    anything else in it, and `ReparamError` where weights do not fit or a check fails.
    """
    folder = Path(folder)
    chosen = _variant(variant)
    baseline = _baseline(config)
    # Before hours of training: what the second stage and the export would stumble over.
    image_shape(config)
    build(stage_two(config, chosen, ""))
    file = None if weights in (None, PRETRAINED) else _fitting_file(baseline, weights)
    _claim(folder, config, variant, digest(file)["sha256"] if file else weights)
    with saving.only_training_in(folder):
        return _train_both(baseline, config, folder, weights, variant, file, source)


def _train_both(
    baseline: dict[str, Any],
    config: dict[str, Any],
    folder: Path,
    weights: str | None,
    variant: str,
    file: Path | None,
    source: Mapping[str, Any] | None,
) -> RefocusReport:
    """Do what `refocus` does in a folder that is claimed; `file` holds the plain network's weights where they exist."""
    curves = {}
    if file is None:
        file = folder / "baseline.pdparams"
        if weights == PRETRAINED:
            _save_pretrained(baseline, file)
        else:
            _copy_file(train(baseline, folder / "baseline"), file)
            curves["baseline"] = read_curve(folder / "baseline")
    second = stage_two(config, VARIANTS[variant], str(file))
    second["Global"]["output_dir"] = str(folder / "stage_two")
    text = yaml.safe_dump(as_values(second), sort_keys=False)
    atomic_write(folder / STAGE_TWO, lambda path: path.write_text(text, encoding="utf-8"))
    trained = train(second, folder / "stage_two")
    curves[variant] = read_curve(folder / "stage_two")
    plain = folder / PLAIN_WEIGHTS
    _write_plain(baseline, second, trained, plain)
    files = {"baseline": file, "trained": trained, "plain": plain}
    report = RefocusReport(
        variant,
        baseline["Arch"]["name"],
        config["Global"].get("seed"),
        config["Global"]["epochs"],
        {"baseline": evaluate(baseline, file, folder), variant: evaluate(baseline, plain, folder)},
        curves,
        {name: {"name": str(path), **digest(path)} for name, path in files.items()},
        dict(source or {}),
    )
    atomic_write(folder / RESULT, lambda path: path.write_text(f"{report.to_json()}\n", encoding="utf-8"))
    return report


def _variant(name: str) -> Variant:
    known = Registry("variant")
    for key, value in VARIANTS.items():
        known.add(key, value)
    return known.get(name)


# ---------------------------------------------------------------------------------------------------------------------
# Configs


def _baseline(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the plain network, without what is for the second stage."""
    return plain_config(
        config,
        "on several devices, train the two networks, plain and with RefConv, by tools/train.py (docs/machines.md)",
        ", and --weights for what a distillation made of it",
    )


def stage_two(config: dict[str, Any], variant: Variant, weights: str) -> dict[str, Any]:
    """Return the config of the second training: the same recipe, the network and its first weights by the variant."""
    layer, where = config["Arch"].get("layer"), config["Arch"].get("where")
    config = as_sections(config)
    for key in ("layer", "where"):
        config["Arch"].pop(key, None)
    if layer is not None and not isinstance(layer, dict):
        raise ConfigError(f"Arch.layer is {layer!r}; give options of RefConv2D, as in -o Arch.layer.init=zero")
    if variant.layer is None:
        if layer or where:
            raise ConfigError("Arch.layer and Arch.where are RefConv's; this variant trains the plain network")
        config = from_weights(config, weights)
        if _scale_rates(config["Optimizer"], variant.rate) == 0:
            raise ConfigError("Optimizer has no learning rate that is known here, in none of its schedules")
        return config
    for key, value in (layer or {}).items():
        if variant.layer.get(key, value) != value or (key == "name" and value != "RefConv2D"):
            raise ConfigError(f"Arch.layer.{key}={value} is not this variant; choose another one, or leave it out")
    return with_layer(config, {"name": "RefConv2D", **(layer or {}), **variant.layer}, where, weights)


def _scale_rates(part: Any, factor: float) -> int:
    """Multiply every learning rate of `Optimizer`, whatever its schedule calls it; return how many there were."""
    found = 0
    for entry in part if isinstance(part, list) else [part]:
        for key, value in entry.items() if isinstance(entry, dict) else ():
            if key.endswith("learning_rate") or key in ("warmup_start_lr", "end_lr", "eta_min"):
                entry[key] = factor * value
            elif key == "values":
                entry[key] = [factor * rate for rate in value]
            else:
                found += _scale_rates(value, factor)
                continue
            found += 1
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def _fitting_file(baseline: dict[str, Any], weights: str) -> Path:
    """Return the file of given weights, which must fit the plain network strictly."""
    from .loading import load_weights, weight_file

    file = Path(weight_file(weights))
    load_weights(build(baseline), file, baseline, "export")
    return file


def _save_pretrained(baseline: dict[str, Any], file: Path) -> None:
    """Write the weights that `Arch.pretrained` of a config gives: those of PaddleClas unless it names a file.

    PaddleClas leaves what does not fit at random, without a word: then two networks are not the same.
    """
    from ppcls.arch import build_model

    config = as_sections(baseline)
    config["Arch"]["pretrained"] = config["Arch"].get("pretrained") or True
    states = []
    for _ in range(2):
        with paddle.utils.unique_name.guard(), one_sentence("the pretrained weights cannot be had"):
            states.append(build_model(config, mode="train").state_dict())
    random = [key for key, value in states[0].items() if not bool((value == states[1][key]).all())]
    if random:
        raise CheckpointError(
            f"the pretrained weights of {config['Arch']['name']} do not fit: {len(random)} entries stay random, the "
            f"first is {random[0]} {list(states[0][random[0]].shape)}; train the baseline from them, without --weights"
        )
    checkpoints.save(states[0], file)


def _copy_file(source: Path, target: Path) -> None:
    atomic_write(target, lambda path: shutil.copyfile(source, path))


def _write_plain(baseline: dict[str, Any], second: dict[str, Any], trained: Path, plain: Path) -> None:
    """Write the weights of the second stage as those of the plain network: fused and compared where it has layers."""
    from .loading import load_weights

    if second["Arch"]["name"] != "ReparamModel":
        stock = build(baseline)
        load_weights(stock, trained, baseline, "export")
        checkpoints.save(stock.state_dict(), plain)
        return
    shipped = plain.parent / "shipped"
    done = ship(baseline, second, trained, shipped)
    why_none = done.manifest["plain_weights"]["why_none"]
    if why_none:
        raise ReparamError(f"{shipped}: there are no weights for the plain network: {why_none}")
    _copy_file(shipped / PLAIN_WEIGHTS, plain)


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def _claim(folder: Path, config: dict[str, Any], variant: str, weights: str | None) -> None:
    """Make a folder this run's, or find that it is already; `OutputExists` for one with anything else in it."""
    run = {"config": as_values(config), "variant": variant, "weights": weights}
    record = folder / RUN
    if (folder / RESULT).exists():
        raise OutputExists(f"{folder} holds a finished run and is kept; name another folder")
    if record.is_file():
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        different = [key for key, value in run.items() if before.get(key) != value]
        if different:
            raise OutputExists(
                f"{folder} holds a run that was interrupted, of another {' and '.join(different)}; name another "
                "folder, or give the same command to go on"
            )
    elif os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputExists(f"{folder} exists already and is kept; name another folder")
    else:
        text = json.dumps(run, indent=1)
        atomic_write(record, lambda path: path.write_text(text, encoding="utf-8"))
