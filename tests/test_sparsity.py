"""Dynamic sparse training: exact counts, what pruned positions hold, and masks that depend on seed and step alone."""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from paddle import nn

from paddle_reparam.errors import ReparamError, UsageError
from paddle_reparam.registry import create_model
from paddle_reparam.surgery import masks
from paddle_reparam.surgery.masks import masked_places
from paddle_reparam.training import sparsity
from paddle_reparam.training.sparsity import SparseTraining, add_masks, exact_counts, prune_and_grow
from paddle_reparam.weights.checkpoints import load_into, save

SHAPES = [[16, 3, 3, 3], [32, 16, 1, 1], [16, 1, 7, 5], [10, 32]]
SIZES = [math.prod(shape) for shape in SHAPES]


# --- Pure functions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 0.3, 0.6, 0.95])
def test_erk_meets_the_density_and_follows_the_rule(density):
    densities = sparsity.erk_densities(SHAPES, density)
    assert np.dot(densities, SIZES) == pytest.approx(density * sum(SIZES), rel=1e-12)
    assert max(densities) <= 1.0
    factors = [d / (sum(s) / math.prod(s)) for d, s in zip(densities, SHAPES) if d < 1.0]
    assert np.ptp(factors) <= 1e-12 * max(factors)
    # Those at 1 would be above it by the others' factor.
    assert all(max(factors) * sum(s) / math.prod(s) >= 1.0 for d, s in zip(densities, SHAPES) if d == 1.0)


def test_snip_keeps_the_highest_scores_of_all_layers():
    scores = [np.array([[9.0, 1.0], [8.0, 2.0]]), np.array([3.0, 7.0, 0.5, 0.1])]
    assert sparsity.snip_densities(scores, 0.5) == [0.5, 0.5]
    assert sparsity.snip_densities(scores, 0.25) == [0.5, 0.0]
    assert sparsity.snip_densities([np.ones(4), np.ones(4)], 0.5) == [1.0, 0.0]


@pytest.mark.parametrize("density", [0.1, 0.37, 0.6, 0.999])
def test_counts_are_exact_in_sum(density):
    for densities in ([density] * 4, sparsity.erk_densities(SHAPES, density), [1.0, 0.0, 0.0, 1.0]):
        counts = exact_counts(densities, SIZES, density)
        assert sum(counts) == round(density * sum(SIZES))
        assert all(1 <= count <= size for count, size in zip(counts, SIZES))
    even = exact_counts([density] * 4, SIZES, density)
    assert all(abs(count - density * size) <= 2 for count, size in zip(even, SIZES))
    with pytest.raises(ReparamError, match="2 of 1000 weights cannot stay with at least one for each"):
        exact_counts([0.002] * 4, [250] * 4, 0.002)


def test_prune_and_grow_exchanges_the_smallest_and_keeps_the_count():
    generator = np.random.default_rng(0)
    weight = generator.standard_normal([8, 25])
    mask = masks.draw_mask(weight.shape, 120, generator)
    new, stays = prune_and_grow(weight * mask, mask, 0.3, generator)
    assert mask.sum() == new.sum() == 120
    assert stays.sum() == 120 - 36
    assert not (stays & ~mask).any()
    assert (stays <= new).all()
    gone = mask & ~stays
    assert np.abs(weight[gone]).max() < np.abs(weight[stays]).min()
    scores = generator.uniform(size=weight.shape)
    grown, stays = prune_and_grow(weight * mask, mask, 0.3, generator, scores)
    chosen = grown & ~stays
    assert chosen.sum() == 36
    assert scores[chosen].min() > scores[~grown].max()


def test_prune_and_grow_leaves_what_has_no_room():
    weight, dense = np.ones([4, 4]), np.ones([4, 4], bool)
    new, stays = prune_and_grow(weight, dense, 0.5, np.random.default_rng(0))
    assert new.all()
    assert stays.all()
    nearly = dense.copy()
    nearly[0, 0] = False
    new, _ = prune_and_grow(weight, nearly, 0.5, np.random.default_rng(0))
    assert new.sum() == 15


def test_prune_rate_is_a_cosine():
    rates = [sparsity.prune_rate(step, 100, 0.5) for step in (0, 50, 100, 120)]
    assert rates == pytest.approx([0.5, (0.5 + 0.005) / 2, 0.005, 0.005])


# --- A model -----------------------------------------------------------------------------------------------------


def net():
    paddle.seed(3)
    return nn.Sequential(
        nn.Conv2D(3, 8, 3), nn.BatchNorm2D(8), nn.ReLU(), nn.Conv2D(8, 8, (5, 3), groups=8, padding=(2, 1)),
        nn.ReLU(), nn.AdaptiveAvgPool2D(2), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def batch(step, dtype="float32"):
    generator = np.random.default_rng(step)
    images = generator.standard_normal([6, 3, 9, 9])
    return paddle.to_tensor(images).astype(dtype), paddle.to_tensor(generator.integers(0, 5, [6]))


def loss_of(model, step=0):
    images, labels = batch(step)
    return nn.functional.cross_entropy(model(images), labels)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.clear_grad()


def counts(model):
    return {place.path: int(place.read_mask().sum()) for place in masked_places(model)}


def assert_hidden_is_zero(model, optimizer):
    """What a mask hides is zero: the weight, and everything of its shape that the optimizer keeps."""
    kept = 0
    for place in masked_places(model):
        hidden = ~place.read_mask()
        assert not place.parameter.numpy()[hidden].any(), place.path
        for name, by_parameter in optimizer._accumulators.items():
            moment = by_parameter.get(place.parameter.name)
            if moment is not None and list(moment.shape) == list(hidden.shape):
                kept += 1
                assert not moment.numpy()[hidden].any(), f"{name} of {place.path}"
    assert kept >= len(masked_places(model))


@pytest.mark.parametrize("distribution", ["uniform", "erk", "snip"])
def test_masks_have_exactly_the_density(distribution):
    model = net()
    report = add_masks(model, 0.6, distribution, loss=lambda: loss_of(model))
    weights = [p for p in model.parameters() if len(p.shape) in (2, 4)]
    total = sum(p.size for p in weights)
    assert sum(int((p.numpy() != 0).sum()) for p in weights) == round(0.6 * total)
    assert report.density == pytest.approx(0.6, abs=1e-3)
    assert {path for path, _ in report.dense} >= {"0.bias", "1.weight", "1.bias", "7.bias"}
    assert f"{distribution}: 60" in str(report)
    assert "eligible: trainable parameters with 2 or 4 axes that match *" in str(report)
    assert sum(counts(model).values()) == sum(count for _, _, count in report.masked)


def test_masks_are_read_from_weights():
    model = net()
    weight = model[7].weight
    weight.set_value(paddle.where(paddle.arange(160).reshape([32, 5]) % 3 == 0, weight, paddle.zeros_like(weight)))
    report = add_masks(model, 0.0, "weights")
    assert [path for path, _, _ in report.masked] == ["7.weight"]
    assert counts(model) == {"7.weight": 54}


OPTIMIZERS = {
    "momentum": lambda p: paddle.optimizer.Momentum(0.1, 0.9, p, weight_decay=1e-2),
    "adamw": lambda p: paddle.optimizer.AdamW(1e-2, parameters=p, weight_decay=0.05),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_counts_never_drift_and_what_is_hidden_is_zero_after_every_step(optimizer, growth):
    model = net()
    add_masks(model, 0.5, "erk")
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    training = SparseTraining(model, optimizer, 40, update_frequency=3, first_prune_rate=0.5, growth=growth)
    before, digests = counts(model), set()
    for step in range(13):
        train(model, optimizer, 1, step)
        assert counts(model) == before
        assert_hidden_is_zero(model, optimizer)
        digests.add(sparsity.masks_digest(model))
    assert training.step == 13
    assert len(digests) == 5
    # What grew learns, but for the weights of a channel that is never active.
    assert all((p.parameter.numpy()[p.read_mask()] != 0).mean() > 0.75 for p in masked_places(model))


def test_nothing_moves_after_the_last_step():
    model = net()
    add_masks(model, 0.5)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    SparseTraining(model, optimizer, total_steps=4, update_frequency=2, first_prune_rate=0.5)
    train(model, optimizer, 3)
    digest = sparsity.masks_digest(model)
    train(model, optimizer, 4, 3)
    assert sparsity.masks_digest(model) == digest


@pytest.mark.parametrize("call", ["step", "minimize"])
@pytest.mark.parametrize("level", ["O1", "O2"])
def test_mixed_precision_keeps_what_is_hidden_at_zero(level, call):
    """A CPU computes all of it in float32, whatever the level; what is called is the same."""
    model = net()
    add_masks(model, 0.5)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    model, optimizer = paddle.amp.decorate(model, optimizer, level=level, dtype="float16")
    training = SparseTraining(model, optimizer, 40, update_frequency=2, first_prune_rate=0.5)
    scaler = paddle.amp.GradScaler(init_loss_scaling=1024.0)
    before, digests = counts(model), set()
    for step in range(6):
        with paddle.amp.auto_cast(level=level, dtype="float16"):
            scaled = scaler.scale(loss_of(model, step))
        scaled.backward()
        if call == "step":
            scaler.step(optimizer)
            scaler.update()
        else:
            scaler.minimize(optimizer, scaled)
        optimizer.clear_grad()
        assert counts(model) == before
        assert_hidden_is_zero(model, optimizer)
        digests.add(sparsity.masks_digest(model))
    assert training.step == 6
    assert len(digests) == 4


def test_master_weights_of_sixteen_bits_are_cleared():
    """Of what trains weights of 16 bits, this is what a CPU can do."""
    layer = nn.Linear(32, 16)
    layer.to(dtype="bfloat16")
    add_masks(layer, 0.5)
    optimizer = paddle.optimizer.SGD(0.1, layer.parameters(), multi_precision=True)
    SparseTraining(layer, optimizer, 40, update_frequency=2, first_prune_rate=0.5, growth="gradient")
    [place] = masked_places(layer)
    generator = np.random.default_rng(0)
    for _ in range(5):
        for parameter in layer.parameters():
            parameter.grad = paddle.to_tensor(generator.standard_normal(parameter.shape)).astype("bfloat16")
        optimizer.step()
        optimizer.clear_grad()
        hidden = ~place.read_mask()
        assert hidden.sum() == 256
        assert not place.parameter.astype("float32").numpy()[hidden].any()
        master = optimizer._master_weights[place.parameter.name]
        assert master.dtype == paddle.float32
        assert not master.numpy()[hidden].any()
        assert master.numpy()[~hidden].any()


def test_a_step_that_overflowed_is_none():
    """A gradient scaler still calls the optimizer then, which sees the sign and leaves everything as it is."""
    model = net()
    add_masks(model, 0.5)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    training = SparseTraining(model, optimizer, 40, update_frequency=2, first_prune_rate=0.5, growth="gradient")
    train(model, optimizer, 1)
    before = {name: value.numpy() for name, value in model.state_dict().items() if "_mean" not in name}
    digest = sparsity.masks_digest(model)
    (loss_of(model, 1) * math.inf).backward()
    optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([True]))
    optimizer.step()
    optimizer.clear_grad()
    assert (training.step, sparsity.masks_digest(model)) == (1, digest)
    for place in masked_places(model):
        np.testing.assert_array_equal(place.parameter.numpy(), before[place.path])
    optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([False]))
    train(model, optimizer, 1, 1)
    assert training.step == 2
    assert sparsity.masks_digest(model) != digest
    assert_hidden_is_zero(model, optimizer)


def test_gradients_of_several_backward_passes_decide_together():
    grown = []
    for parts in (1, 2):
        model = nn.Linear(8, 4)
        model.weight.set_value(paddle.arange(32, dtype="float32").reshape([8, 4]) + 1)
        add_masks(model, 0.5)
        optimizer = paddle.optimizer.SGD(0.0, model.parameters())
        SparseTraining(model, optimizer, 40, update_frequency=1, first_prune_rate=0.5, growth="gradient")
        images = paddle.to_tensor(np.random.default_rng(0).standard_normal([6, 8]), "float32")
        for part in paddle.split(images, parts):
            model(part).square().sum().backward()
        optimizer.step()
        grown.append(sparsity.masks_digest(model))
    assert grown[0] == grown[1]


def test_slak_t_has_as_many_weights_as_published():
    """The 30 million of the paper are those that are not zero: 30.47 with 40 % zeros, of 50.70."""
    model = create_model("SLaK_tiny")
    places, _ = sparsity.eligible(model)
    shapes = [list(place.parameter.shape) for place in places]
    sizes = [math.prod(shape) for shape in shapes]
    # Paddle counts a BN's mean and variance among the parameters.
    everything = sum(parameter.size for parameter in model.parameters() if not parameter.stop_gradient)
    for rule in (sparsity.uniform_densities, sparsity.erk_densities):
        hidden = sum(sizes) - sum(exact_counts(rule(shapes, 0.6), sizes, 0.6))
        assert everything - hidden == pytest.approx(30.47e6, rel=1e-3)


@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(growth, tmp_path):
    def start(model):
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        return optimizer, SparseTraining(model, optimizer, 40, 3, 0.5, growth, seed=7)

    whole = net()
    add_masks(whole, 0.5)
    optimizer, _ = start(whole)
    train(whole, optimizer, 12)

    first = net()
    add_masks(first, 0.5)
    optimizer, _ = start(first)
    train(first, optimizer, 6)  # a mask has just grown: some of its weights are still zero
    save(first.state_dict(), tmp_path / "weights.pdparams")
    state = optimizer.state_dict()

    second = net()
    add_masks(second, 0.5, seed=99)
    load_into(second, tmp_path / "weights.pdparams")
    names = {a.name: b.name for a, b in zip(first.parameters(), second.parameters())}
    for old, new in names.items():
        state = {key.replace(old, new, 1) if key.startswith(f"{old}_") else key: v for key, v in state.items()}
    optimizer, training = start(second)
    optimizer.set_state_dict(state)
    assert training.step == 6
    train(second, optimizer, 6, first=6)
    assert sparsity.masks_digest(second) == sparsity.masks_digest(whole)
    for key, value in whole.state_dict().items():
        np.testing.assert_array_equal(second.state_dict()[key].numpy(), value.numpy(), err_msg=key)


def test_close_gives_everything_back():
    model = net()
    add_masks(model, 0.5)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    training = SparseTraining(model, optimizer, 40, 2, 0.5)
    training.close()
    train(model, optimizer, 1)
    assert training.step == 0
    assert all(place.parameter.numpy()[~place.read_mask()].any() for place in masked_places(model))
    masks.remove_masks(model)
    assert set(model.state_dict()) == set(net().state_dict())


def test_the_average_respects_the_masks():
    model = net()
    add_masks(model, 0.5)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    SparseTraining(model, optimizer, 40, 2, 0.5)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    place = masked_places(model)[0]
    for step in range(4):
        train(model, optimizer, 1, step)
        previous = {name: value.numpy().copy() for name, value in average.items()}
        sparsity.follow_with_average(model, average, 0.9)
        now, mask, weight = average[place.path].numpy(), place.read_mask(), place.parameter.numpy()
        assert not now[~mask].any()
        fresh = mask & (previous[place.path] == 0)
        np.testing.assert_array_equal(now[fresh], weight[fresh])
        old = mask & ~fresh
        np.testing.assert_allclose(now[old], 0.9 * previous[place.path][old] + 0.1 * weight[old], rtol=1e-5)
    np.testing.assert_allclose(average["1.bias"].numpy(), 0.9 * previous["1.bias"] + 0.1 * model[1].bias.numpy(), 1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 1.5}, UsageError, "density 1.5 is no share between 0 and 1"),
        ({"density": 0.5, "distribution": "lottery"}, UsageError, "none of uniform, erk, snip, weights"),
        ({"density": 0.5, "distribution": "snip"}, ReparamError, "SNIP needs the loss of a batch"),
        (
            {"density": 0.5, "distribution": "weights"},
            ReparamError,
            "no parameter got a mask: .*every eligible weight",
        ),
        ({"density": 0.5, "where": ["*LoRA*"]}, UsageError, "no parameter of Sequential can be sparse: .*not selected"),
    ],
)
def test_wrong_wishes_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        add_masks(net(), **options)


def test_snip_is_refused_where_gradients_would_be_lost():
    model = net()
    model[7].to(dtype="bfloat16")
    with pytest.raises(ReparamError, match=r"make the weights float32 \(AMP.level: O1\), or take another"):
        add_masks(model, 0.5, "snip", loss=lambda: loss_of(model))


def test_a_new_training_begins_its_schedule_anew():
    """Masks that came with the weights of a finished training move again."""
    model = net()
    add_masks(model, 0.5)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    training = SparseTraining(model, optimizer, total_steps=4, update_frequency=2, first_prune_rate=0.5)
    train(model, optimizer, 4)
    training.close()
    sparsity.restart(model)
    training = SparseTraining(model, optimizer, total_steps=4, update_frequency=2, first_prune_rate=0.5, seed=1)
    digest = sparsity.masks_digest(model)
    train(model, optimizer, 2)
    assert training.step == 2
    assert sparsity.masks_digest(model) != digest


def test_masks_are_added_once_and_needed_for_training():
    model = net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    with pytest.raises(ReparamError, match="no masks; call add_masks first"):
        SparseTraining(model, optimizer, 10)
    add_masks(model, 0.5)
    with pytest.raises(ReparamError, match="has masks already"):
        add_masks(model, 0.5)
    with pytest.raises(UsageError, match="growth 'hope'"):
        SparseTraining(model, optimizer, 10, growth="hope")
