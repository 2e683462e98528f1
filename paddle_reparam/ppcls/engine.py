"""PaddleClas' Engine with its inputs checked first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ppcls.engine import engine as engine_module

from .arch import get_builder
from .errors import ConfigError
from .loading import strict_loading

PaddleClasEngine = engine_module.Engine


class Engine(PaddleClasEngine):
    """PaddleClas' Engine: a config that cannot work is refused at once, and weights that do not fit are an error."""

    def __init__(self, config: dict[str, Any], mode: str = "train") -> None:
        check_config(config, mode)
        with strict_loading(config, mode):
            super().__init__(config, mode)

    def train(self) -> None:
        with strict_loading(self.config, self.mode):
            super().train()

    def export(self, *args: Any, **kwargs: Any) -> None:
        with strict_loading(self.config, self.mode):
            super().export(*args, **kwargs)


def register() -> None:
    """Make this the Engine that PaddleClas' own scripts import."""
    engine_module.Engine = Engine


def networks(arch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every part of `Arch` that names a network, the inner ones of RecModel and the like included."""
    if "name" in arch:
        yield arch
    for part in (arch.get("Backbone"), arch.get("backbone")):
        if isinstance(part, dict):
            yield from networks(part)
    for entry in arch.get("models") or []:
        for part in entry.values():
            yield from networks(part)


def check_config(config: dict[str, Any], mode: str) -> None:
    """Raise `UnknownName` or `ConfigError` for what PaddleClas would fail at, or pass over in silence."""
    settings = config["Global"]
    if mode != "train" or settings["device"] == "cpu":
        # Only training needs it, and Paddle has none for the CPU.
        config["Arch"]["use_sync_bn"] = False
    weights, checkpoints = settings.get("pretrained_model"), settings.get("checkpoints")
    for network in networks(config["Arch"]):
        get_builder(network["name"])
        if network["name"] != "ReparamModel":
            continue
        if mode != "train" and weights:
            # These come with the weights that training saved.
            network["pretrained"] = None
        elif mode == "train" and _wants_base(network) and not (weights or checkpoints):
            raise ConfigError(
                "RefConv2D with base: pretrained has nothing to refocus: set Arch.pretrained or "
                "Global.pretrained_model to the weights of the trained plain backbone, or base: random"
            )
    if mode in ("eval", "infer", "export") and checkpoints and not weights:
        raise ConfigError(
            f"Global.checkpoints is where training goes on from; {mode} reads Global.pretrained_model: set that to "
            f"{checkpoints}"
        )
    if mode in ("eval", "infer") and not weights and not any(_own_weights(n) for n in networks(config["Arch"])):
        raise ConfigError(f"{mode} has no weights: set Global.pretrained_model to what training saved")


def _own_weights(network: dict[str, Any]) -> bool:
    return bool(network.get("pretrained"))


def _wants_base(network: dict[str, Any]) -> bool:
    layer = network.get("layer") or {}
    if (
        layer.get("name") != "RefConv2D"
        or network.get("pretrained")
        or (network.get("backbone") or {}).get("pretrained")
    ):
        return False
    return layer.get("base", "pretrained") == "pretrained"
