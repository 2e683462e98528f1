"""The contract that every layer keeps, stated once.

layer.reparameterize()(x) == layer(x)        in eval mode, for every valid x
Layer.from_conv(conv)(x)  == conv(x)         at step 0, under `Layer.keeps_function_with`
"""

from __future__ import annotations

import copy
from typing import Any, Callable, ClassVar, NamedTuple

import paddle
from paddle import nn

from ..arithmetic.geometry import ConvGeometry
from ..arithmetic.tensors import assign, to_float64
from ..errors import ReparamError, UnsupportedConv
from ..forms import is_number
from ..registry import Registry

#: What fuses a block in place: in PaddleClas 2.6, in PaddleClas 2.4, in PaddleDetection.
FUSING_METHODS = ("re_parameterize", "rep", "convert_to_deploy")

# What an optimizer reads from a parameter, as `paddle.ParamAttr` sets it: the multiplier of the learning rate, weight
# decay of its own, gradient clipping, averaging.
_OPTIMIZER_ATTRIBUTES = ("optimize_attr", "regularizer", "need_clip", "do_model_average")


class Option(NamedTuple):
    """What an option of a layer may be: in words, and as a test."""

    allowed: str
    accepts: Callable[[Any], bool]


def one_of(*names: str) -> Option:
    """Return the option that is one of these texts."""
    return Option(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


def or_none(option: Option) -> Option:
    """Return the same option, which may be None as well."""
    return Option(f"{option.allowed}, or None", lambda value: value is None or option.accepts(value))


def several(option: Option, count: int | None = None) -> Option:
    """Return the option that is a list of such values, of so many where `count` is given."""
    return Option(
        f"a list, each {option.allowed}" if count is None else f"{count} values, each {option.allowed}",
        lambda value: (
            isinstance(value, (list, tuple)) and count in (None, len(value)) and all(map(option.accepts, value))
        ),
    )


FLAG = Option("one of True, False", lambda value: isinstance(value, bool))
WHOLE = Option("a whole number of 1 or more", lambda value: is_number(value) and isinstance(value, int) and value >= 1)
TWO_OR_MORE = Option("a whole number of 2 or more", lambda value: WHOLE.accepts(value) and value >= 2)
ODD = Option("one of 1, 3, 5, ... (odd)", lambda value: WHOLE.accepts(value) and value % 2 == 1)
SHARE = Option("a number between 0 and 1", lambda value: is_number(value) and 0 < value < 1)
POSITIVE = Option("a number above 0", lambda value: is_number(value) and 0 < value < float("inf"))


class ReparamLayer(nn.Layer):
    """A convolution that is trained as something richer than what it is shipped as.

    A layer gives `build`, `forward_train_form` and `fuse`; where it can start from a trained convolution, also
    `holders`. Everything else, PaddleClas' own export protocol included, follows from these.
    """

    #: The options of `build`; None: they are not checked.
    options: ClassVar[dict[str, Option] | None] = None
    #: Which parameter or buffer of the layer starts from the convolution's "weight" and "bias", for example
    #: `{"weight": "conv.weight", "bias": "conv.bias"}`; nothing: the layer keeps its own initialisation.
    holders: ClassVar[dict[str, str]] = {}

    #: What `reparameterize` returns: the class of a plain layer, or an inference form, which is none.
    fused_type: ClassVar[type] = nn.Conv2D
    #: Options of `from_conv` under which the new layer computes what the convolution did; None: there are none.
    keeps_function_with: ClassVar[dict[str, Any] | None] = None
    #: Names of parameters and buffers that together show, in a state dict, this layer in train form; no plain network
    #: may have them all under one prefix. For example `("convmap.weight",)`.
    train_form_keys: ClassVar[tuple[str, ...]] = ()
    #: True for a block of layers that `replace` may exchange; its `fuse` fuses them as well.
    is_block: ClassVar[bool] = False

    @classmethod
    def build(cls, geometry: ConvGeometry, **options: Any) -> ReparamLayer:
        """Return a new layer for a convolution's geometry, or raise `UnsupportedConv` with the reason why not."""
        raise NotImplementedError

    @classmethod
    def check_options(cls, **options: Any) -> None:
        """Raise `UnknownName` for an option that the layer does not have, `ReparamError` for a value it cannot be."""
        if cls.options is None:
            return
        known = Registry(f"option of {cls.__name__}")
        for name, option in cls.options.items():
            known.add(name, option)
        for name, value in options.items():
            option = known.get(name)
            if not option.accepts(value):
                raise ReparamError(f"{cls.__name__} has no {name}={value!r}; choose {option.allowed}")

    def take_weights(self, conv: nn.Conv2D) -> None:
        """Start from a trained convolution's weights, as far as there are `holders` for them.

        Raises `UnsupportedConv` for a layer with a place for the weight but, as it was built, none for the bias.
        """
        for source, holder in self._held(conv):
            assign(holder, to_float64(source))

    def _held(self, conv: nn.Conv2D) -> list[tuple[paddle.Tensor, paddle.Tensor]]:
        """Return (the convolution's, this layer's tensor) for the weight and the bias, where there are any."""
        state = self.state_dict()
        pairs = []
        for name, path in self.holders.items():
            source = getattr(conv, name)
            if source is not None and path not in state:
                raise UnsupportedConv(
                    f"{type(self).__name__}, with these options, has no place for this convolution's {name}"
                )
            pairs += [] if source is None else [(source, state[path])]
        return pairs

    def _take_attributes(self, conv: nn.Conv2D) -> None:
        """Let an optimizer treat this layer as it did the convolution.

        What is frozen by `stop_gradient` stays frozen, and what is new around it trains. A learning-rate multiplier,
        a regularizer and the exemption from clipping hold for what is new as well: those of the weight, or those of the
        bias for what holds the bias.
        """
        held = self._held(conv)
        for source, target in [(conv.weight, parameter) for parameter in self.parameters()] + held:
            for name in _OPTIMIZER_ATTRIBUTES:
                # A buffer, as of a base weight that never trains, has none of them.
                if hasattr(source, name) and hasattr(target, name):
                    setattr(target, name, copy.copy(getattr(source, name)))
        for source, target in held:
            target.stop_gradient = target.stop_gradient or source.stop_gradient

    def forward_train_form(self, x: paddle.Tensor) -> paddle.Tensor:
        """Compute the layer as it is trained: `[N, C, H, W]` in and out."""
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """Do what the layer does at the start of an epoch of training, counted from 1: nothing, for most.

        It depends on the epoch and the layer's state alone, so a resumed run goes on as the uninterrupted one would.
        """

    def fuse(self) -> nn.Layer:
        """Return the fused layer, computed in float64; called in eval mode only."""
        raise NotImplementedError

    @classmethod
    def from_conv(cls, conv: nn.Conv2D, **options: Any) -> ReparamLayer:
        """Return a layer that stands where `conv` stood, started from its weights where the layer can.

        It is in the convolution's mode, and frozen and optimized as the convolution was. Raises `UnsupportedConv` with
        the reason where the layer cannot stand in for it.
        """
        cls.check_options(**options)
        layer = cls.build(ConvGeometry.of(conv), **options)
        layer.take_weights(conv)
        layer._take_attributes(conv)
        layer.train() if conv.training else layer.eval()
        return layer

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        if self.is_repped:
            return self.fused(x)
        return self.forward_train_form(x)

    def reparameterize(self) -> nn.Layer:
        """Return the fused layer, in eval mode; this layer stays as it is.

        Raises `ReparamError` in training mode, where the layer's output depends on the batch.
        """
        if self.training and not self.is_repped:
            raise ReparamError(
                f"{type(self).__name__} is in training mode, where its output depends on the batch; "
                "call model.eval() before fusing"
            )
        fused = copy.deepcopy(self.fused) if self.is_repped else self.fuse()
        fused.eval()
        return fused

    @property
    def is_repped(self) -> bool:
        """PaddleClas' name for: this layer has been fused in place."""
        return "fused" in self._sub_layers

    def re_parameterize(self) -> None:
        """Fuse in place, as the export of PaddleClas 2.6 asks for; a second call does nothing."""
        if self.is_repped:
            return
        fused = self.reparameterize()
        self._sub_layers.clear()
        self._parameters.clear()
        self._buffers.clear()
        self.fused = fused

    def rep(self) -> None:
        """Fuse in place, as the export of PaddleClas 2.4 asks for."""
        self.re_parameterize()


class InferenceForm(nn.Layer):
    """A layer that ships and is no plain convolution, such as a dynamic one, or a sum of two convolutions."""

    #: What `for_size` can be asked for beside its own choice: forms of which another is faster in another runtime.
    forms: ClassVar[tuple[str, ...]] = ()

    def absorb_affine(self, scale: Any, shift: Any) -> None:
        """Fold the affine of a BN that follows, scale * y + shift per channel (float64), into this layer's weights.

        Raises `UnsupportedConv` with the reason, and changes nothing, where there are no weights that could take it.
        """
        raise NotImplementedError

    def for_size(self, height: int, width: int, form: str | None = None) -> nn.Layer | None:
        """Return a layer that is faster on maps of this one size, in its own copy of the weights; None: this is it.

        `form` is one of `forms`, or None for what is the fastest in Paddle Inference.
        """
        return None
