"""How much memory a release needs: a few times the weights, and what Paddle and its passes on one small image take."""

import gc
import importlib
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
from paddle import nn

from paddle_reparam import replace
from paddle_reparam.deploy.old_programs import HAS_NEW_PROGRAMS
from paddle_reparam.measure.memory import give_back, only_new_objects, own_peak
from paddle_reparam.measure.timing import in_new_process
from paddle_reparam.surgery.verify import settle_batch_norms
from paddle_reparam.weights import checkpoints

MIB = 2**20
#: `paddle.jit.save` of Paddle 2 holds one more.
COPIES = 3 if HAS_NEW_PROGRAMS else 4
SPEC = [[None, 3, 8, 8]]


def make():
    blocks = [part for _ in range(6) for part in (nn.Conv2D(1024, 1024, 3, padding=1), nn.BatchNorm2D(1024), nn.ReLU())]
    head = (nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(1024, 5))
    net = nn.Sequential(nn.Conv2D(3, 1024, 1), *blocks, *head)
    replace(net, "SPConv2D", where="[!0]*")
    settle_batch_norms(net, SPEC, batch=2)
    return net


def peak_of_release():
    """Return the bytes of a network's weights, and the most that its release held beyond what Paddle itself does."""
    give_back()
    before = own_peak()
    net = make()
    bytes_of_weights = sum(4 * p.size for p in net.parameters())
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "weights.pdparams")
        checkpoints.save(net.state_dict(), weights)
        # Writing a file, and filling a network at random, is none of a release.
        give_back()
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        # The package has a function of the same name.
        importlib.import_module("paddle_reparam.deploy.release").release(net, weights, Path(folder, "out"), SPEC)
    return bytes_of_weights, own_peak() - before


@pytest.mark.skipif(
    sys.platform != "linux", reason="how much of the freed memory a process keeps depends on the system"
)
def test_a_release_holds_few_copies_of_the_weights():
    bytes_of_weights, peak = in_new_process(peak_of_release)
    print(f"weights {bytes_of_weights / MIB:.0f} MiB, peak {peak / MIB:.0f} MiB, {peak / bytes_of_weights:.2f} times")
    assert bytes_of_weights > 75 * MIB
    assert peak < COPIES * bytes_of_weights + 150 * MIB


def test_only_new_objects_are_looked_through_and_all_of_them_again_afterwards():
    class Ring:
        def __init__(self):
            self.itself = self

    older = weakref.ref(Ring())
    with only_new_objects():
        assert older() is None, "what was garbage before would stay"
        assert gc.get_freeze_count() > 0
        newer = weakref.ref(Ring())
        give_back()
        assert newer() is None
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        with only_new_objects():
            pass
        assert gc.get_freeze_count() > 0, "what somebody else has set aside"
    finally:
        gc.unfreeze()
