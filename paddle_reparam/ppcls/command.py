"""PaddleClas' command line, with one sentence and an exit code where it goes wrong."""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import exit_code
from ..training import processes
from . import setup
from .errors import ConfigError

# What YAML means by these words, and Python does not.
_WORDS = {"null": None, "Null": None, "NULL": None, "~": None, "true": True, "false": False}
# To YAML 1.1 this is a text.
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


_PURPOSES = {
    "train": "Train the network of a config",
    "eval": "Measure trained weights on the validation images of a config",
    "infer": "Label images with trained weights",
    "export": "Export trained weights for Paddle Inference, the layers fused and nothing checked",
}


def main(mode: str, arguments: Sequence[str] | None = None) -> int:
    """Run PaddleClas' Engine in a mode (train, eval, infer, export) with its own flags; return the exit code."""
    parser = argparse.ArgumentParser(
        description=f"{_PURPOSES[mode]}, by PaddleClas' Engine with the layers and models of paddle_reparam."
    )
    parser.add_argument("-c", "--config", required=True, help="YAML file")
    add_override(parser)
    parser.add_argument("-p", "--profiler_options", help="profiler settings: key1=value1;key2=value2")
    given = parser.parse_args(arguments)
    with exit_code() as result:
        setup()
        from ppcls.utils import logger

        from .engine import Engine

        config = read_config(given.config, given.override)
        config["profiler_options"] = given.profiler_options
        engine = Engine(config, mode=mode)
        getattr(engine, mode)()
        if mode == "train" and engine.saved:
            logger.info(_after_training(engine, given))
    if result[0]:
        processes.meet_before_the_end()
    return result[0]


#: Keys of a config, or how they begin, that say nothing of the network that ships.
_OF_TRAINING = re.compile(
    r"(Optimizer|Loss|AMP|EMA|Monitor|Sparsity|DataLoader\.Train|DataLoader\.UnLabelTrain)\b|.*\.(pretrained|fresh)="
    r"|Global\.(?!(image_shape|class_num|use_multilabel)=)"
)


def _after_training(engine: Any, given: argparse.Namespace) -> str:
    """Return what to type after a training, for its best weights where there are some."""
    weights = engine.saved.get("best_model", engine.saved["latest"])
    override = [each for each in given.override if not _OF_TRAINING.match(each)]
    output = os.path.join(engine.output_dir, "shipped")
    making = [*options(given.config, override), "--weights", f"{weights}.pdparams", "--output", output]
    return next_steps(("reparam", making, "fuse, export and check: a folder to ship"))


def add_override(parser: argparse.ArgumentParser, note: str = "") -> None:
    """Add PaddleClas' option -o to a parser; `note` is put behind its help."""
    parser.add_argument(
        "-o", "--override", action="append", default=[], metavar="KEY=VALUE",
        help=f"replace a value of the config, as in -o Global.epochs=3; may be given several times{note}",
    )  # fmt: skip


def next_steps(*steps: tuple[str, Sequence[str], str]) -> str:
    """Return what to type next: for each (script of tools/, its arguments, what it is for) the command as it is."""
    running = Path(sys.argv[0])
    rows = []
    for script, arguments, what in steps:
        beside = running.with_name(f"{script}.py")
        path = beside if beside.is_file() else Path("tools") / beside.name
        rows.append(f"# {what}\n{shlex.join(['python', str(path), *arguments])}")
    return "\n".join(["next:", *rows])


def image_of(config: dict[str, Any]) -> str:
    """Return an image, or a folder of some, that a config names for infer, or a word in its place."""
    place = (config.get("Infer") or {}).get("infer_imgs")
    return place if isinstance(place, str) and place and os.path.exists(place) else "IMAGE"


def options(config: str, override: Sequence[str]) -> list[str]:
    """Return the arguments that name a config with its overrides."""
    return ["-c", config, *(part for each in override for part in ("-o", each))]


def read_config(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return PaddleClas' config of a YAML file with overrides applied; `ConfigError` says what is wrong in them."""
    from ppcls.utils import config as ppcls_config

    from .validation import check_form

    try:
        config = ppcls_config.parse_config(path)
    except OSError as error:
        raise ConfigError(f"the config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is no YAML file with sections: {reason}") from error
    for override in overrides:
        _override(config, override)
    for section in ("Global", "Arch", "DataLoader"):
        if not isinstance(config.get(section), dict):
            raise ConfigError(f"{path} has no section {section}; is it a config of PaddleClas?")
    for section, value in config.items():
        config[section] = _numbers(value)
        if type(value) is dict:
            # What an override made; PaddleClas reads some keys as attributes.
            config[section] = ppcls_config.AttrDict(value)
    try:
        check_form(config)
    except RecursionError as error:
        raise ConfigError(f"{path} has a section that contains itself") from error
    return config


def _numbers(value: Any) -> Any:
    """Return a part of a config with texts such as 1e-3 as numbers: PaddleClas does so outside of lists."""
    if isinstance(value, dict):
        for key, part in value.items():
            value[key] = _numbers(part)
        return value
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def read_value(text: str) -> Any:
    """Return what an override's value is: of Python's and YAML's numbers, words, lists and sections, else the text."""
    if text in _WORDS:
        return _WORDS[text]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    if value == text and text[:1] in ("[", "{"):
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            value = text
    if isinstance(value, tuple):
        value = list(value)
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else text


def _override(config: Any, override: str) -> None:
    """Put the value of an override in its place; refuse what PaddleClas answers with an assertion, or takes for a new
    field without a word."""
    from .validation import SECTIONS

    key, *values = override.split("=")
    if len(values) != 1 or not key:
        raise ConfigError(f"-o {override}: write KEY=VALUE with one =, as in -o Global.epochs=3")
    parts = key.split(".")
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth]) or "the config"
        if isinstance(config, dict):
            known = set(map(str, config)) | (set() if depth else SECTIONS)
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.8)
            if part not in known and (near or depth == 0):
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
                raise ConfigError(f"-o {override}: {where} has no {part!r}; {hint}")
            if part not in config and depth < len(parts) - 1:
                config[part] = {}
        elif isinstance(config, list):
            if not part.isdigit() or int(part) >= len(config):
                raise ConfigError(f"-o {override}: {where} is a list of {len(config)} and has no {part!r}")
            part = int(part)
        else:
            raise ConfigError(f"-o {override}: {where} is {config!r} and has nothing named {part!r}")
        if depth == len(parts) - 1:
            config[part] = read_value(values[0])
        else:
            config = config[part]
