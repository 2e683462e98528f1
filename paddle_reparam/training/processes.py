"""What the processes of a training do together, where each by itself would go another way, or not wait for the rest."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import numpy as np
import paddle
from paddle import nn
from paddle.base import core

from ..arithmetic.geometry import BATCH_NORMS

#: What the next wait of this process is called; in all of them the same, as all wait at the same places.
_waits = itertools.count()


def differing(digests: Sequence[bytes]) -> list[int]:
    """Return at which places several processes were not all given the same digest; every one of them must ask."""
    found: list[paddle.Tensor] = []
    own = [int.from_bytes(each[:7], "big") for each in digests]
    paddle.distributed.all_gather(found, paddle.to_tensor(own, "int64"))
    table = np.stack([each.numpy() for each in found])
    return np.flatnonzero((table != table[0]).any(0)).tolist()


def wait_for_first() -> None:
    """Return when the first process has got here as well, from what it alone had to do.

    Over gloo, which Paddle takes on a CPU, a process ends that has waited for another one for half a minute, and that
    cannot be set. Here it waits for a quarter of an hour, as processes wait for each other before they train.
    """
    if paddle.distributed.get_world_size() == 1 or paddle.distributed.get_backend() != "GLOO":
        return
    store, name = core.create_or_get_global_tcp_store(), f"paddle_reparam/{next(_waits)}"
    if paddle.distributed.get_rank() == 0:
        store.set(name, "here")
    else:
        store.wait(name)


@paddle.no_grad()
def take_statistics_of_first(model: nn.Layer) -> None:
    """Give the batch norms of every process the running statistics of the first one's."""
    if paddle.distributed.get_world_size() == 1:
        return
    for layer in model.sublayers():
        if isinstance(layer, BATCH_NORMS):
            for statistics in (layer._mean, layer._variance):
                paddle.distributed.broadcast(statistics, 0)


def meet_before_the_end() -> None:
    """Let the others of a training know that this process ends before it has met them.

    They would wait for it for a quarter of an hour. Once all have met they notice when one is gone.
    """
    if paddle.distributed.get_world_size() > 1 and not paddle.distributed.is_initialized():
        with contextlib.suppress(Exception):
            paddle.distributed.init_parallel_env()
