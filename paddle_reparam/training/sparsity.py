"""Dynamic sparse training, as SLaK does it (arXiv 2207.03620): masks that are pruned and grown while a network trains.

Where a mask lies is told in `surgery/masks.py`. Gradients are masked before the optimizer sees them, and what a pruned
position held (weight, master weight, moments) is cleared when it is pruned: from then on it is zero after every step,
whatever the optimizer adds up.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Callable

import numpy as np
import paddle
from paddle import nn

from ..errors import ReparamError, UnknownName, UsageError
from ..report import Report, format_table
from ..surgery.masks import STEP, SUFFIX, Place, draw_mask, keep_only, mask_in_place, masked, masked_places
from ..surgery.tracing import walk
from .processes import differing

Array = np.ndarray
SIXTEEN_BITS = (paddle.float16, paddle.bfloat16)
#: Prune rate at the end of training, as published.
LAST_RATE = 0.005
#: How the weights that stay are shared among the parameters, and where weights grow.
DISTRIBUTIONS = ("uniform", "erk", "snip", "weights")
GROWTH = ("random", "gradient")


# ---------------------------------------------------------------------------------------------------------------------
# Pure functions: how dense each parameter is to be, and which of its numbers stay


def uniform_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Return the same density for every parameter."""
    return [density] * len(shapes)


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Return the densities of the Erdos-Renyi kernel rule: proportional to sum(shape) / prod(shape), at most 1.

    Parameters that the rule would make denser than 1 are dense, and the others share what is left.
    """
    sizes = np.array([math.prod(shape) for shape in shapes], dtype=np.float64)
    raw = np.array([sum(shape) for shape in shapes], dtype=np.float64) / sizes
    dense = np.zeros(len(sizes), bool)
    while True:
        wanted = density * sizes.sum() - sizes[dense].sum()
        available = (raw * sizes)[~dense].sum()
        factor = wanted / available if available else 0.0
        over = ~dense & (factor * raw > 1.0)
        if not over.any():
            return np.where(dense, 1.0, factor * raw).tolist()
        dense |= over


def snip_densities(scores: Sequence[Array], density: float) -> list[float]:
    """Return, for each parameter, the share of its scores among the highest density * total of all scores.

    A score is |w * dL/dw| of one batch (SNIP, arXiv 1810.02340). Ties at the threshold are broken in order.
    """
    everything = np.concatenate([score.reshape(-1) for score in scores])
    keep = round(density * everything.size)
    kept = np.zeros(everything.size, bool)
    kept[np.argsort(-everything, kind="stable")[:keep]] = True
    ends = np.cumsum([score.size for score in scores])[:-1]
    return [float(part.mean()) for part in np.split(kept, ends)]


def exact_counts(densities: Sequence[float], sizes: Sequence[int], density: float) -> list[int]:
    """Return how many numbers of each parameter stay, at least one each, in sum round(density * total)."""
    wanted = round(density * sum(sizes))
    exact = np.clip(np.asarray(densities) * np.asarray(sizes), 1, sizes)
    counts = np.floor(exact).astype(np.int64)
    # What rounding down left goes to the largest remainders; what the bounds took, to whoever still has room.
    order = np.argsort(counts - exact, kind="stable")
    while counts.sum() != wanted:
        step = 1 if counts.sum() < wanted else -1
        free = [i for i in order if 1 <= counts[i] + step <= sizes[i]]
        if not free:
            raise ReparamError(f"{wanted} of {sum(sizes)} weights cannot stay with at least one for each parameter")
        share = max(1, abs(int(wanted - counts.sum())) // len(free))
        for i in free:
            room = sizes[i] - counts[i] if step > 0 else counts[i] - 1
            counts[i] += step * min(share, room, abs(int(wanted - counts.sum())))
    return counts.tolist()


def prune_rate(step: int, total_steps: int, first: float) -> float:
    """Return the share of the active weights to prune at a step: a cosine from `first` to `LAST_RATE`."""
    progress = min(1.0, step / max(1, total_steps))
    return LAST_RATE + (first - LAST_RATE) * (1 + math.cos(math.pi * progress)) / 2


def prune_and_grow(
    weight: Array, mask: Array, rate: float, generator: np.random.Generator, scores: Array | None = None
) -> tuple[Array, Array]:
    """Return (new mask, what stayed active): the smallest weights go, as many others come, so the count stays.

    ceil(rate * count) active weights of the smallest magnitude are pruned. The same number grows among all positions
    that are then inactive: at random, or where `scores` (magnitudes of the gradient) are highest.
    """
    flat, active = weight.reshape(-1), np.flatnonzero(mask)
    changes = math.ceil(rate * active.size)
    if active.size == mask.size or changes == 0:
        return mask, mask
    stays = mask.reshape(-1).copy()
    stays[active[np.argsort(np.abs(flat[active]), kind="stable")[:changes]]] = False
    free = np.flatnonzero(~stays)
    if scores is None:
        grown = generator.choice(free, changes, replace=False)
    else:
        grown = free[np.argsort(-scores.reshape(-1)[free], kind="stable")[:changes]]
    new = stays.copy()
    new[grown] = True
    return new.reshape(mask.shape), stays.reshape(mask.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Masks on a model


@dataclass
class MaskReport(Report):
    """Which parameters got masks, as (path, shape, count of what stays), and which did not and why."""

    masked: list[tuple[str, list[int], int]] = field(default_factory=list)
    dense: list[tuple[str, str]] = field(default_factory=list)
    distribution: str = ""
    #: The rule by which a parameter is eligible.
    rule: str = ""
    #: Share of the eligible weights that stay.
    density: float = 1.0

    def __str__(self) -> str:
        rows = [[path, shape, count, f"{count / math.prod(shape):.3f}"] for path, shape, count in self.masked]
        rows += [[path, "", "", f"dense: {why}"] for path, why in self.dense]
        table = format_table(["parameter", "shape", "stays", "density"], rows)
        return f"{table}\n{self.distribution}: {self.density:.2%} of the eligible weights stay; eligible: {self.rule}"


def eligible(model: nn.Layer, where: Sequence[str] = ("*",)) -> tuple[list[Place], list[tuple[str, str]]]:
    """Return (places that get masks, (path, why not) of the others).

    Eligible is every trainable parameter with two or four axes, as published: convolutions, linear layers, the head;
    not biases, norms and layer scales. `where`: patterns that the path must match, such as `"*large_kernel.LoRA*"`.
    """
    places, others, seen = [], [], set()
    for layer_path, layer in walk(model):
        for name, parameter in layer._parameters.items():
            path = f"{layer_path}.{name}" if layer_path else name
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if parameter.stop_gradient:
                others.append((path, "frozen"))
            elif len(parameter.shape) not in (2, 4):
                others.append((path, f"{len(parameter.shape)} axes, not 2 or 4"))
            elif not any(fnmatch.fnmatchcase(path, pattern) for pattern in where):
                others.append((path, "not selected"))
            else:
                places.append(Place(path, layer, name))
    if not places:
        raise UsageError(f"no parameter of {type(model).__name__} can be sparse: {sorted({w for _, w in others})}")
    return places, others


def gradient_scores(model: nn.Layer, loss: paddle.Tensor, places: Sequence[Place]) -> list[Array]:
    """Return |w * dL/dw| for each place, of the gradient over the images of all processes."""
    gradients = paddle.grad(loss, [place.parameter for place in places], allow_unused=True)
    scores = []
    for place, gradient in zip(places, gradients):
        score = paddle.zeros_like(place.parameter) if gradient is None else gradient
        score = (score * place.parameter).astype("float32").detach()
        if paddle.distributed.get_world_size() > 1:
            # A sum, not a mean: only the order of the scores counts.
            paddle.distributed.all_reduce(score)
        scores.append(np.abs(score.numpy()))
    if not any(score.any() for score in scores):
        raise ReparamError("every SNIP score is zero: the loss does not depend on any eligible weight")
    return scores


def add_masks(
    model: nn.Layer,
    density: float,
    distribution: str = "erk",
    where: Sequence[str] = ("*",),
    loss: Callable[[], paddle.Tensor] | None = None,
    seed: int = 0,
) -> MaskReport:
    """Give a model masks with exactly round(density * eligible weights) ones, and clear the weights that they hide.

    `distribution` over the parameters: "uniform", "erk", "snip" (by the gradient of `loss`, called once) or "weights"
    (a mask shows where the weights are not zero now; `density` is not used). A parameter whose every weight stays gets
    no mask. Masks are drawn from `seed` alone, so all processes draw the same.
    """
    if distribution not in DISTRIBUTIONS:
        raise UnknownName(f"distribution {distribution!r} is none of {', '.join(DISTRIBUTIONS)}")
    if masked_places(model):
        raise ReparamError("the model has masks already; a checkpoint that carries masks needs no new ones")
    places, others = eligible(model, where)
    shapes = [list(place.parameter.shape) for place in places]
    sizes = [math.prod(shape) for shape in shapes]
    if distribution == "weights":
        masks = [place.parameter.detach().astype("float32").numpy() != 0 for place in places]
        if not any(mask.any() for mask in masks):
            raise ReparamError("every eligible weight is zero, so the weights show no mask")
    else:
        if not 0.0 < density < 1.0:
            raise UsageError(f"density {density} is no share between 0 and 1")
        if distribution == "snip":
            if loss is None:
                raise ReparamError("SNIP needs the loss of a batch")
            if any(place.parameter.dtype in SIXTEEN_BITS for place in places):
                raise UsageError(
                    "SNIP compares gradients that 16 bits are too few for: make the weights float32 (AMP.level: O1), "
                    "or take another distribution, such as erk"
                )
            densities = snip_densities(gradient_scores(model, loss(), places), density)
        else:
            rules = {"uniform": uniform_densities, "erk": erk_densities}
            densities = rules[distribution](shapes, density)
        counts = exact_counts(densities, sizes, density)
        masks = [draw_mask(s, n, np.random.default_rng([seed, i])) for i, (s, n) in enumerate(zip(shapes, counts))]
    rule = f"trainable parameters with 2 or 4 axes that match {' or '.join(where)}"
    report = MaskReport(dense=others, distribution=distribution, rule=rule)
    for place, shape, mask in zip(places, shapes, masks):
        if mask.all():
            report.dense.append((place.path, "every weight stays"))
            continue
        place.layer.register_buffer(place.name + SUFFIX, paddle.to_tensor(mask))
        keep_only(place.parameter, mask)
        report.masked.append((place.path, shape, int(mask.sum())))
    if not report.masked:
        raise ReparamError(f"no parameter got a mask: with distribution {distribution!r} every eligible weight stays")
    report.density = sum(int(mask.sum()) for mask in masks) / sum(sizes)
    model.register_buffer(STEP, paddle.zeros([1], "int64"))
    return report


def restart(model: nn.Layer) -> None:
    """Let a new training begin with the masks of an earlier one: the step counter is 0 again."""
    counter = model._buffers[STEP]
    counter.set_value(paddle.zeros_like(counter))


def inner_optimizer(optimizer: Any) -> Any:
    """Return the optimizer that steps, where it is in the wrapper that Paddle puts around one for many processes."""
    return getattr(optimizer, "_inner_opt", optimizer)


def masks_digest(model: nn.Layer) -> bytes:
    """Return a hash of all masks, the same in every process that trains the same network."""
    digest = hashlib.sha256()
    for place in masked_places(model):
        digest.update(place.path.encode() + np.packbits(place.read_mask()).tobytes())
    return digest.digest()


# ---------------------------------------------------------------------------------------------------------------------
# Training


class SparseTraining:
    """Keeps a model sparse while an optimizer trains it, and moves its masks.

    Every `update_frequency` steps until `total_steps`, `prune_and_grow` goes over all masks, at the rate that
    `prune_rate` gives. Growth is "random" or "gradient". What is drawn depends on `seed` and the step alone, so a
    resumed run goes on as the uninterrupted one would, and several processes need to exchange nothing; at the start and
    at each update they compare a hash of their masks, and `ReparamError` stops all of them where it differs. A step
    that a gradient scaler skips, since a gradient overflowed, is none.
    """

    def __init__(
        self,
        model: nn.Layer,
        optimizer: Any,
        total_steps: int,
        update_frequency: int = 100,
        first_prune_rate: float = 0.3,
        growth: str = "random",
        seed: int = 0,
    ) -> None:
        if growth not in GROWTH:
            raise UnknownName(f"growth {growth!r} is none of {', '.join(GROWTH)}")
        self.model, self.optimizer = model, optimizer
        self.places = masked_places(model)
        if not self.places or STEP not in model._buffers:
            raise ReparamError("the model has no masks; call add_masks first, or load a checkpoint that carries them")
        self.total_steps, self.update_frequency = total_steps, update_frequency
        self.first_prune_rate, self.growth, self.seed = first_prune_rate, growth, seed
        #: Share of the active weights that the last update exchanged.
        self.last_rate = 0.0
        self._steps = int(model._buffers[STEP].item())
        # A gradient scaler calls either of the two.
        self._plain = {name: getattr(optimizer, name) for name in ("step", "minimize")}
        for name, plain in self._plain.items():
            setattr(optimizer, name, self._follow(plain))
        for place in self.places:
            self._clear(place, place.read_mask())
        self._compare_processes()

    @property
    def step(self) -> int:
        """Optimizer steps that the masks have seen, over all runs."""
        return self._steps

    def close(self) -> None:
        """Give the optimizer back as it was."""
        for name, plain in self._plain.items():
            setattr(self.optimizer, name, plain)

    def _follow(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def run(*args: Any, **kwargs: Any) -> Any:
            upcoming = self.step + 1
            updates = upcoming % self.update_frequency == 0 and upcoming < self.total_steps
            dense = self._dense_gradients() if updates and self.growth == "gradient" else None
            self._mask_gradients()
            result = plain(*args, **kwargs)
            if not self._inner._get_auxiliary_var("found_inf"):
                self._steps = upcoming
                counter = self.model._buffers[STEP]
                counter.set_value(paddle.to_tensor([upcoming]).astype(counter.dtype))
                if updates:
                    self.update_masks(dense)
            return result

        return run

    @property
    def _inner(self) -> Any:
        return inner_optimizer(self.optimizer)

    def _dense_gradients(self) -> list[Array]:
        """Return the magnitude of each gradient as if nothing were hidden; data parallel ones are of all processes."""
        for place in self.places:
            if place.parameter.grad is None:
                raise ReparamError(f"{place.path} got no gradient in the step before its mask was to grow by it")
        return [np.abs(place.parameter.grad.astype("float32").numpy()) for place in self.places]

    @paddle.no_grad()
    def _mask_gradients(self) -> None:
        for place in self.places:
            gradient = place.parameter.grad
            if gradient is not None:
                mask_in_place(gradient, place.mask.astype("bool"))

    def update_masks(self, dense: Sequence[Array] | None = None) -> None:
        """Prune and grow every mask once: at random, or where the magnitudes of the `dense` gradients are highest."""
        self.last_rate = prune_rate(self.step, self.total_steps, self.first_prune_rate)
        for i, place in enumerate(self.places):
            weight = place.parameter.detach().astype("float32").numpy()
            generator = np.random.default_rng([self.seed, self.step, i])
            mask, stays = prune_and_grow(weight, place.read_mask(), self.last_rate, generator, dense and dense[i])
            place.mask.set_value(paddle.to_tensor(mask).astype(place.mask.dtype))
            self._clear(place, stays)
        self._compare_processes()

    def _clear(self, place: Place, keep: Array) -> None:
        """Zero the weight, its master copy and its moments where `keep` is not set."""
        name, shape = place.parameter.name, list(place.parameter.shape)
        tensors = [place.parameter, getattr(self._inner, "_master_weights", {}).get(name)]
        tensors += [by_name.get(name) for by_name in getattr(self._inner, "_accumulators", {}).values()]
        for tensor in tensors:
            if tensor is not None and list(tensor.shape) == shape:
                keep_only(tensor, keep)

    def _compare_processes(self) -> None:
        if paddle.distributed.get_world_size() > 1 and differing([masks_digest(self.model)]):
            raise ReparamError(
                f"the masks of the processes differ after step {self.step}; start again from the last checkpoint with "
                "the same seed and code on all of them"
            )


def follow_with_average(model: nn.Layer, average: Mapping[str, paddle.Tensor], decay: float) -> None:
    """Update an exponential moving average of the weights, `average[name]`, that respects the masks.

    ema = (decay * ema + (1 - decay) * w) * mask; a position that has just become active takes the whole weight.
    """
    masks = {place.path: place.read_mask() for place in masked_places(model)}
    for name, parameter in model.named_parameters():
        ema = average[name]
        new = decay * ema + (1 - decay) * parameter.detach().astype(ema.dtype)
        if name in masks:
            new = paddle.where(ema == 0, parameter.detach().astype(ema.dtype), new)
            new = masked(new, paddle.to_tensor(masks[name]))
        ema.set_value(new)
