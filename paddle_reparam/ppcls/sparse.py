"""The `Sparsity` section of a config: dynamic sparse training in PaddleClas' Engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn
from ppcls.utils import logger

from ..surgery import masks
from ..training import sparsity
from ..training.sparsity import SparseTraining
from . import sections, values
from .errors import ConfigError
from .sections import Key

KEYS = {
    "density": Key(None, values.or_none(values.share)),
    "distribution": Key("snip", values.one_of(*sparsity.DISTRIBUTIONS)),
    "where": Key(["*"], values.texts),
    "update_frequency": Key(100, values.whole(1)),
    "prune_rate": Key(0.3, values.share),
    "growth": Key("random", values.one_of(*sparsity.GROWTH)),
}


def read_section(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `Sparsity` section with its defaults, or None; raises `ConfigError` for what it cannot mean."""
    settings = sections.read(config, "Sparsity", KEYS, "{density: 0.6, ...}")
    if settings is None:
        return None
    if isinstance(settings["where"], str):
        settings["where"] = [settings["where"]]
    if settings["density"] is None and settings["distribution"] != "weights":
        raise ConfigError("Sparsity has no density; give the share of weights that stay, such as 0.6")
    return settings


def start(engine: Any, settings: Mapping[str, Any] | None) -> SparseTraining | None:
    """Make the Engine's network sparse, by the masks that its weights brought along or by new ones, and keep it so.

    Without settings it trains dense, and masks that its weights brought along are taken away: they would soon be wrong.
    """
    model = getattr(engine.model, "_layers", engine.model)
    average = engine.model_ema.module if getattr(engine, "ema", False) else None
    if settings is None:
        if masks.masked_places(model):
            logger.warning(
                "the weights carry masks and the config has no Sparsity: from here on all weights are trained"
            )
            masks.remove_masks(model)
            if average is not None:
                masks.remove_masks(average)
        return None
    seed = engine.config["Global"].get("seed") or 0
    if not masks.masked_places(model):
        report = sparsity.add_masks(
            model,
            settings["density"],
            settings["distribution"],
            settings["where"],
            loss=lambda: _loss_of_first_images(engine, model),
            seed=seed,
        )
        logger.info(f"Sparsity:\n{report}")
    elif not engine.config["Global"]["checkpoints"]:
        # They came with Global.pretrained_model, at the end of its training.
        sparsity.restart(model)
    # Newer Engines can gather the gradients of several batches, and leave out those that do not fill such a group.
    batches = getattr(engine, "iter_per_epoch", len(engine.train_dataloader))
    steps = batches // getattr(engine, "update_freq", 1) * engine.config["Global"]["epochs"]
    optimizers = [optimizer for optimizer in engine.optimizer if _holds(optimizer, model)]
    if len(optimizers) != 1:
        raise ConfigError(f"Sparsity needs one optimizer for the whole network, and the config has {len(optimizers)}")
    training = SparseTraining(
        model, optimizers[0], steps, settings["update_frequency"], settings["prune_rate"], settings["growth"], seed
    )
    if average is not None:
        _follow(engine.model_ema, model)
    return training


def _holds(optimizer: Any, model: nn.Layer) -> bool:
    names = {p.name for p in sparsity.inner_optimizer(optimizer)._parameter_list}
    return any(parameter.name in names for parameter in model.parameters())


def _loss_of_first_images(engine: Any, model: nn.Layer) -> paddle.Tensor:
    """Return the plain cross entropy of one batch of this process' images, without mixing; BNs stay as they were."""
    dataset, sampler = engine.train_dataloader.dataset, engine.train_dataloader.batch_sampler
    first = paddle.distributed.get_rank() * sampler.batch_size
    samples = [dataset[(first + i) % len(dataset)] for i in range(sampler.batch_size)]
    images = paddle.to_tensor(np.stack([np.asarray(sample[0]) for sample in samples]).astype("float32"))
    labels = paddle.to_tensor(np.array([int(sample[1]) for sample in samples]))
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.train()
    output = model(images)
    for buffer, before in kept:
        buffer.set_value(before)
    output = output.get("logits", output.get("output")) if isinstance(output, dict) else output
    return F.cross_entropy(output[0] if isinstance(output, (list, tuple)) else output, labels)


def _follow(average: Any, model: nn.Layer) -> None:
    """Make PaddleClas' moving average respect the masks, and carry them in its own weight file."""
    module = average.module
    masks.adopt_masks(module, model.state_dict())
    parameters = dict(module.named_parameters())

    @paddle.no_grad()
    def update(followed: nn.Layer) -> None:
        followed = getattr(followed, "_layers", followed)
        sparsity.follow_with_average(followed, parameters, average.decay)
        own = dict(module.named_buffers())
        for name, buffer in followed.named_buffers():
            if buffer.is_floating_point():
                own[name].set_value(average.decay * own[name] + (1 - average.decay) * buffer)
            else:
                own[name].set_value(buffer)

    average.update = update
