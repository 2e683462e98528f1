"""What a comparison compares: a plain network, as it is or with a layer in it, named as in `RefConv2D(map_k=5)`."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paddle

from ..analysis.comparison import PLAIN
from ..errors import one_sentence
from ..registry import Registry, list_layers
from ..surgery.rewrite import reparameterize
from .command import read_value
from .contenders import as_wrong_usage
from .errors import ConfigError
from .reparam import image_shape
from .trainings import as_sections, build, from_weights, started, with_layer

#: The control of what refocuses a trained network: the same training again, and nothing put in.
RETRAIN = "retrain"
#: A layer that starts from the trained plain network of its seed -> its control.
_CONTROLS = {"RefConv2D": RETRAIN}


@dataclass(frozen=True)
class Method:
    """A way to train a plain network: `layer` (name and options) in its convolutions, None: in none of them.

    `trainings` is how many it takes: what is trained in the second starts from the plain network of its seed.
    """

    name: str
    layer: dict[str, Any] | None = None
    where: str | list[str] | None = None
    trainings: int = 1

    @property
    def control(self) -> str | None:
        """The method that it is compared with besides the plain network."""
        return None if self.layer is None else _CONTROLS.get(self.layer["name"])

    @property
    def folder(self) -> str:
        """A name for its folders, with no character that a file system or a shell minds."""
        plain = re.sub(r"[^\w.=-]+", "_", self.name).strip("_")
        return plain if plain == self.name else f"{plain[:60]}-{hashlib.sha256(self.name.encode()).hexdigest()[:6]}"

    def config(self, plain: dict[str, Any], seed: int, weights: str | None = None) -> dict[str, Any]:
        """Return the config of its training, by the recipe of the plain network's config.

        `weights` are those of the plain network of this seed, for what starts from them.
        """
        config = as_sections(plain)
        config["Global"]["seed"] = seed
        if self.layer is not None:
            return with_layer(config, self.layer, self.where, weights)
        return config if weights is None else from_weights(config, weights)


def read_methods(names: Sequence[str], where: str | list[str] | None = None) -> list[Method]:
    """Return the methods of these names, the plain network first, and with what needs one its control.

    A name is `plain`, `retrain`, or a registered layer's, with options as in `RefConv2D(map_k=5)`; its option `where`
    says in which convolutions, as the argument does for all layers. Raises `ConfigError` and `UnknownName`.
    """
    known = Registry("method")
    for name in [PLAIN, RETRAIN, *list_layers()]:
        known.add(name, name)
    methods = {PLAIN: Method(PLAIN)}
    for text in names:
        method = _read(text, known, where)
        if method.name in methods and method.name not in (PLAIN, RETRAIN):
            raise ConfigError(f"{method.name} is given twice; one of them is enough")
        if method.control is not None:
            methods.setdefault(method.control, Method(method.control, trainings=2))
        methods[method.name] = method
    if len(methods) == 1:
        raise ConfigError("there is nothing to compare the plain network with; name a layer, such as RefConv2D")
    return list(methods.values())


def _read(text: str, known: Registry, where: str | list[str] | None) -> Method:
    found = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text, flags=re.S)
    if found is None:
        raise ConfigError(f"{text!r} is no method; write a name, with options as in 'RefConv2D(map_k=5)'")
    name, options = known.get(found[1]), {}
    for part in _parts(found[2] or ""):
        key, equals, value = part.partition("=")
        if not (equals and key.strip().isidentifier() and value.strip()) or key.strip() in options:
            raise ConfigError(f"{text!r}: {part.strip()!r} is no option; write each once, as in 'RefConv2D(map_k=5)'")
        options[key.strip()] = read_value(value.strip())
    if name in (PLAIN, RETRAIN):
        if options:
            raise ConfigError(f"{text!r}: {name} has no options; it is the network without a layer")
        return Method(name, trainings=2 if name == RETRAIN else 1)
    label = ", ".join(f"{key}={options[key]}" for key in sorted(options))
    where = options.pop("where", where)
    return Method(
        f"{name}({label})" if label else name, {"name": name, **options}, where, 2 if name in _CONTROLS else 1
    )


def _parts(options: str) -> list[str]:
    """Return what stands between commas, those in brackets aside."""
    parts, depth = [""], 0
    for character in options:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()] if parts != [""] else []


def check(plain: dict[str, Any], methods: Sequence[Method], seed: int) -> None:
    """Raise `ConfigError` or `ReparamError` for what would go wrong with a method, or with the config, later on.

    Each network is built, run on one image and fused, without weights; the data are read as the training reads them.
    """
    shape = image_shape(plain)
    for method in methods:
        with as_wrong_usage(method.name), paddle.no_grad():
            model = build(method.config(plain, seed, "" if method.trainings > 1 else None))
            with one_sentence(f"it cannot be run on images of {'x'.join(map(str, shape))}"):
                model(paddle.zeros([1, *shape]))
            if method.layer is not None:
                reparameterize(model)
    with tempfile.TemporaryDirectory() as folder, started(Method(PLAIN).config(plain, seed), Path(folder)):
        pass
