"""Every registered network: strict about its arguments, and the same function in every form.

The forms of small networks are compared in every run; `EVERY_NETWORK=1 pytest <this>` does it for all of them and takes
about an hour on two cores.
"""

from __future__ import annotations

import os

import paddle
import pytest
from network_contract import (
    check_exports,
    check_fused_is_the_same_function,
    check_one_step_changes_every_parameter,
    count,
)

from paddle_reparam import catalogue
from paddle_reparam.errors import ReparamError, UnknownName
from paddle_reparam.registry import create_model, get_model, list_models

EVERY = os.environ.get("EVERY_NETWORK") == "1"
#: One small network of each family that takes images of this size.
SMALL = {"ResNet20_SPConv": 32, "SLaK_micro": 32, "RepMLPNet_micro": 32, "RepMLP_CIFAR": 32}
#: Sides of images that most networks take; the others take those of their own size only.
USUAL = (64, 96)


@pytest.mark.parametrize("name", list_models())
def test_arguments_are_strict(name):
    for wish in ({"pretrained": True}, {"use_ssld": True}):
        with pytest.raises(ReparamError, match=f"no weights of {name} are published in Paddle's format; give"):
            create_model(name, class_num=2, **wish)
    with pytest.raises(UnknownName, match=f"{name} has no argument 'deptth'; it takes .*class_num"):
        create_model(name, deptth=3)


@pytest.mark.parametrize("name", list_models())
def test_published_rows_are_whole(name):
    """Each row says where it is from, and none is there twice."""
    published = get_model(name).published
    assert len(set(map(str, published))) == len(published)
    assert all(p.source for p in published)
    assert all(p.top1 is None or 0 < p.top1 < 100 for p in published)


def sides_of(name: str) -> tuple[int, ...]:
    """Return the sides of images to try, the network's own one where it takes no other."""
    model = create_model(name)
    model.eval()
    try:
        with paddle.no_grad():
            model(paddle.zeros([1, 3, USUAL[0], USUAL[0]]))
    except ReparamError:
        published = get_model(name).published
        return (published[0].input_size,)
    return USUAL


@pytest.mark.parametrize("name", list_models())
def test_all_forms_are_the_same_function(name, tmp_path):
    if not EVERY and name not in SMALL:
        pytest.skip("it takes minutes; EVERY_NETWORK=1 runs it, and its family's own tests run a small sibling")
    side, *others = (SMALL[name],) if name in SMALL else sides_of(name)
    shape = [None, 3, side, side]
    model = create_model(name)
    assert count(model) > 0
    check_one_step_changes_every_parameter(model, shape)
    check_fused_is_the_same_function(model, shape, *([None, 3, other, other] for other in others))
    check_exports(model, shape, tmp_path / str(side))
    for other in others:
        check_exports(model, [None, 3, other, other], tmp_path / str(other), forms=(True,))


def test_the_catalogue_knows_every_network():
    assert {name for name, _ in catalogue.networks()} == set(list_models())
