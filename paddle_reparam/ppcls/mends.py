"""What an older PaddleClas trips over with a current Paddle and numpy, each mended only where it is needed."""

from __future__ import annotations

import os
import tempfile
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F

from ..frameworks.old_paddle import OldPaddle


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
        (_multi_label_lacks_its_ratio, _mend_multi_label_dataset),
        (_multi_label_loss_multiplies_truths, _mend_multi_label_loss),
        (_multi_label_metrics_index_numbers, _mend_numbers_of_metrics),
        (_distillation_picks_twice, _mend_distillation_postprocess),
        (_diverse_branches_add_float64, _mend_diverse_branches),
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


def _multi_label_lacks_its_ratio() -> bool:
    """2.4 reads `label_ratio` of each data set of several labels, and sets it only where the config asks for it."""
    from ppcls.data.dataloader.multilabel_dataset import MultiLabelDataset

    with tempfile.TemporaryDirectory() as folder:
        images = os.path.join(folder, "images.txt")
        open(images, "w").close()
        return not hasattr(MultiLabelDataset(folder, images), "label_ratio")


def _mend_multi_label_dataset() -> None:
    from ppcls.data.dataloader.multilabel_dataset import MultiLabelDataset

    MultiLabelDataset.label_ratio = None


def _multi_label_loss_multiplies_truths() -> bool:
    """Weighing labels by how common they are, 2.4 multiplies numbers by truth values, which Paddle no longer does."""
    from ppcls.loss.multilabelloss import MultiLabelLoss

    try:
        MultiLabelLoss(weight_ratio=True)(paddle.zeros([1, 2]), paddle.zeros([1, 2, 2]))
    except (TypeError, ValueError, RuntimeError):
        return True
    return False


def _mend_multi_label_loss() -> None:
    from ppcls.loss.multilabelloss import MultiLabelLoss

    plain = MultiLabelLoss._binary_crossentropy

    def mended(self: Any, input: paddle.Tensor, target: paddle.Tensor, class_num: int) -> paddle.Tensor:
        if not self.weight_ratio:
            # Where the data set puts the ratios behind the labels, as newer versions do.
            return plain(self, input, target[:, 0] if target.ndim == 3 else target, class_num)
        target, ratio = target[:, 0], target[:, 1]
        if self.epsilon is not None:
            target = self._labelsmoothing(target, class_num)
        positive, known = (target > 0.5).astype(input.dtype), (target > -1).astype(input.dtype)
        weight = paddle.exp(positive * (1 - ratio) + (1 - positive) * ratio) * known
        cost = weight * F.binary_cross_entropy_with_logits(input, target, reduction="none")
        return cost.sum(1).mean() if self.size_sum else cost

    MultiLabelLoss._binary_crossentropy = mended


def _multi_label_metrics_index_numbers() -> bool:
    """2.4 reads what it measures of several labels, and of features, as `.numpy()[0]` of a tensor of no dimension."""
    from ppcls.metric.metrics import HammingDistance

    try:
        HammingDistance()(paddle.to_tensor([[1.0, -1.0]]), paddle.to_tensor([[1.0, 0.0]]))
    except IndexError:
        return True
    return False


class _OldPaddle(OldPaddle):
    #: mINP's misspelling of it.
    indechmx_sample = staticmethod(paddle.index_sample)

    @staticmethod
    def mean(x: paddle.Tensor) -> paddle.Tensor:
        return paddle.mean(x).reshape([1])


def _mend_numbers_of_metrics() -> None:
    from ppcls.metric import metrics

    metrics.paddle = _OldPaddle()


def _distillation_picks_twice() -> bool:
    """The Engine gives a post-processing what the student put out; this one picks that again."""
    from ppcls.data.postprocess import DistillationPostProcess

    try:
        DistillationPostProcess()(paddle.zeros([1, 2]))
    except Exception:
        return True
    return False


def _mend_distillation_postprocess() -> None:
    from ppcls.data.postprocess import DistillationPostProcess

    pick = DistillationPostProcess.__call__

    def mended(self: Any, x: Any, file_names: Any = None) -> Any:
        return pick(self, x, file_names) if isinstance(x, dict) else self.func(x, file_names=file_names)

    DistillationPostProcess.__call__ = mended


def _diverse_branches_add_float64() -> bool:
    """The diverse branch block of 2.6 adds an identity in float64 to a kernel, which was float32 until Paddle 2.6."""
    try:
        from ppcls.arch.backbone.base.dbb.dbb_block import IdentityBasedConv1x1
    except ImportError:
        return False
    try:
        IdentityBasedConv1x1(1)(paddle.zeros([1, 1, 1, 1]))
    except ValueError:
        return True
    return False


def _mend_diverse_branches() -> None:
    from ppcls.arch.backbone.base.dbb.dbb_block import IdentityBasedConv1x1

    build = IdentityBasedConv1x1.__init__

    def mended(self: Any, *args: Any, **options: Any) -> None:
        build(self, *args, **options)
        self.id_tensor = self.id_tensor.astype(self.weight.dtype)

    IdentityBasedConv1x1.__init__ = mended
