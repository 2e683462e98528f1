"""How much memory a release needs: a few times the weights, and what Paddle and its passes on one small image take."""

import gc
import importlib
import sys
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
from paddle import nn

from paddle_reparam import replace
from paddle_reparam.deploy.old_programs import HAS_NEW_PROGRAMS
from paddle_reparam.deploy.tuning import Tuning
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


def peak_of_release(tuned=False):
    """Return the bytes of a network's weights, the most that its release held beyond what Paddle itself does, and the
    most that a process held which it started."""
    import resource  # not there on Windows

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
        importlib.import_module("paddle_reparam.deploy.release").release(
            net, weights, Path(folder, "out"), SPEC, tuning=tuning_on_noise() if tuned else None
        )
    # In KiB on Linux, and of all processes that have ended the largest one.
    return bytes_of_weights, own_peak() - before, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def tuning_on_noise():
    """Return what to try: all runtimes of two precisions, each in a process that holds what it loads."""
    images = np.random.default_rng(0).standard_normal([112, *SPEC[0][1:]]).astype("float32")
    asked = {"precisions": ("bfloat16",), "largest_drop": 100.0, "timed": False}
    return Tuning(lambda most: (images[:most], np.zeros(len(images[:most]), int)), lambda most: images, **asked)


@pytest.mark.skipif(
    sys.platform != "linux", reason="how much of the freed memory a process keeps depends on the system"
)
@pytest.mark.parametrize("tuned", [False, True])
def test_a_release_holds_few_copies_of_the_weights(tuned):
    bytes_of_weights, peak, peak_beside = in_new_process(peak_of_release, tuned)
    times = peak / bytes_of_weights
    print(f"weights {bytes_of_weights / MIB:.0f} MiB, peak {peak / MIB:.0f} MiB, {times:.2f} times")
    assert bytes_of_weights > 75 * MIB
    # A network without weights to speak of takes 165 MiB where it is tuned: OpenVINO and onnxruntime are libraries of
    # some size, and fused, this one has 12 MiB more of weights than in train form.
    assert peak < (COPIES + tuned) * bytes_of_weights + (200 if tuned else 150) * MIB
    if tuned:
        print(f"the largest process beside it: {peak_beside / MIB:.0f} MiB")
        # Two runtimes with copies of their own, and what their libraries take: 320 MiB before anything is loaded.
        assert 400 * MIB < peak_beside < 5 * bytes_of_weights + 500 * MIB


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
