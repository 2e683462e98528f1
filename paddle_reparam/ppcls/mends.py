"""What an older PaddleClas trips over with a current Paddle and numpy, each mended only where it is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle


def apply() -> list[str]:
    """Apply the mends that this PaddleClas needs and return their names."""
    applied = []
    for needed, mend in (
        (_expects_one_element, _mend_losses),
        (_expects_one_element, _mend_metrics),
        (_meter_keeps_tensors, _mend_meter),
        (_auto_augment_uses_np_int, _mend_auto_augment),
        (_posterize_needs_a_bit, _mend_posterize),
        (_mixup_uses_np_bool, _mend_mixup),
        (_no_device_id_on_cpu, _mend_device_id),
    ):
        if needed():
            mend()
            applied.append(mend.__name__)
    return applied


def _at_least_1d(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.reshape([1]) if isinstance(v, paddle.Tensor) and v.ndim == 0 else v for k, v in values.items()}


def _expects_one_element() -> bool:
    """2.4 reads every loss and metric as `.numpy()[0]`; since Paddle 2.5 a mean has no dimension to index."""
    from ppcls.engine.train.utils import update_loss

    try:
        update_loss(SimpleNamespace(output_info={}), {"loss": paddle.zeros([])}, 1)
    except IndexError:
        return True
    return False


def _mend_losses() -> None:
    from ppcls.loss import CombinedLoss

    call = CombinedLoss.__call__
    CombinedLoss.__call__ = lambda self, input, batch: _at_least_1d(call(self, input, batch))


def _mend_metrics() -> None:
    from ppcls.metric import CombinedMetrics

    forward = CombinedMetrics.forward
    CombinedMetrics.forward = lambda self, *args, **kwargs: _at_least_1d(forward(self, *args, **kwargs))


def _meter_keeps_tensors() -> bool:
    """2.4 averages Tensors and reads the average as `.numpy()[0]` too."""
    from ppcls.utils.misc import AverageMeter

    meter = AverageMeter("probe")
    meter.update(paddle.zeros([]))
    try:
        meter.avg_info  # noqa: B018
    except IndexError:
        return True
    return False


def _mend_meter() -> None:
    from ppcls.utils.misc import AverageMeter

    update = AverageMeter.update
    AverageMeter.update = lambda self, val, n=1: update(self, float(val), n)


class _OldNumpy:
    """numpy with the names of Python's types that 1.24 removed."""

    int = int
    bool = bool

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _auto_augment_uses_np_int() -> bool:
    from ppcls.data.preprocess.ops import autoaugment

    try:
        autoaugment.ImageNetPolicy()
    except AttributeError:
        return True
    return False


def _mend_auto_augment() -> None:
    from ppcls.data.preprocess.ops import autoaugment

    autoaugment.np = _OldNumpy()


def _posterize_needs_a_bit() -> bool:
    """An image that keeps no bit of its colours was black; newer Pillows raise, and the data set skips the image."""
    from PIL import Image, ImageOps

    try:
        ImageOps.posterize(Image.new("RGB", (1, 1)), 0)
    except ValueError:
        return True
    return False


def _mend_posterize() -> None:
    from PIL import Image
    from ppcls.data.preprocess.ops import timm_autoaugment

    posterize = timm_autoaugment.posterize

    def mended(img: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
        return Image.new(img.mode, img.size) if bits_to_keep < 1 else posterize(img, bits_to_keep, **options)

    for name, function in timm_autoaugment.NAME_TO_OP.items():
        if function is posterize:
            timm_autoaugment.NAME_TO_OP[name] = mended


def _mixup_uses_np_bool() -> bool:
    """The operator that mixes each image of a batch in its own way, in 2.6."""
    from ppcls.data.preprocess.batch_ops import batch_operators

    operator = getattr(batch_operators, "MixupCutmixHybrid", None)
    if operator is None:
        return False
    try:
        operator(mixup_alpha=1.0, cutmix_alpha=1.0, num_classes=2)._params_per_elem(2)
    except AttributeError:
        return True
    return False


def _mend_mixup() -> None:
    from ppcls.data.preprocess.batch_ops import batch_operators

    batch_operators.np = _OldNumpy()


def _no_device_id_on_cpu() -> bool:
    """2.6 asks for the device of this process when it evaluates in several; Paddle does not set one on CPU."""
    try:
        paddle.distributed.ParallelEnv().device_id  # noqa: B018
    except AttributeError:
        return True
    return False


def _mend_device_id() -> None:
    paddle.distributed.ParallelEnv._device_id = 0
