"""The moving average that PaddleDetection trains with: of what trains, and right from its first step."""

from __future__ import annotations

import functools
from typing import Any

import paddle
from paddle import nn
from ppdet.optimizer import ema
from ppdet.optimizer.utils import get_bn_running_state_names


def register() -> None:
    """Let PaddleDetection average what trains, and the statistics of BNs, and take all else as it is."""
    ema.ModelEMA.__init__ = _with_what_stays(ema.ModelEMA.__init__)
    if _is_biased():
        _mend_weights()


def _with_what_stays(build: Any) -> Any:
    """Return the constructor, without what no optimizer moves in the average: frozen kernels, masks, temperatures.

    An average of a constant would come out as that but for rounding, which grows with the steps; one of a mask or of a
    schedule is none.
    """

    @functools.wraps(build)
    def __init__(self: Any, model: nn.Layer, *arguments: Any, **options: Any) -> None:
        # Its own way to leave out what is frozen ends in an error.
        options.pop("ema_filter_no_grad", None)
        build(self, model, *arguments, **options)
        moves = {name for name, parameter in model.named_parameters() if not parameter.stop_gradient}
        moves.update(get_bn_running_state_names(model))
        self.ema_black_list = {*self.ema_black_list, *(name for name in self.state_dict if name not in moves)}
        for name, tensor in model.state_dict().items():
            if name in self.ema_black_list:
                self.state_dict[name] = tensor

    return __init__


def _is_biased() -> bool:
    """Dividing by 1 - decay ** steps, it takes a decay that grew from step to step for one that was always the last."""
    layer = nn.Linear(1, 1)
    average = ema.ModelEMA(layer)
    for _ in range(2):
        average.update()
    return abs(float(average.apply()["weight"]) / float(layer.weight) - 1) > 1e-4


def _mend_weights() -> None:
    """Divide by the weight that all steps together have in the average."""
    update, apply, reset, resume = (
        ema.ModelEMA.update, ema.ModelEMA.apply, ema.ModelEMA.reset, ema.ModelEMA.resume
    )  # fmt: skip

    def updated(self: Any, model: nn.Layer | None = None) -> None:
        update(self, model)
        self._left_of_zero = getattr(self, "_left_of_zero", 1.0) * self._decay

    def applied(self: Any) -> dict[str, paddle.Tensor]:
        decay = getattr(self, "_decay", 0.0)
        if self.step and self.ema_decay_type != "exponential":
            # What it divides by is 1 - decay ** step.
            self._decay = getattr(self, "_left_of_zero", 0.0) ** (1 / self.step)
        try:
            return apply(self)
        finally:
            self._decay = decay

    def anew(self: Any) -> None:
        reset(self)
        self._left_of_zero = 1.0

    def resumed(self: Any, state_dict: dict[str, paddle.Tensor], step: int = 0) -> None:
        # What is saved has been divided already.
        resume(self, state_dict, step)
        self._left_of_zero = 0.0

    ema.ModelEMA.update, ema.ModelEMA.apply = updated, applied
    ema.ModelEMA.reset, ema.ModelEMA.resume = anew, resumed
