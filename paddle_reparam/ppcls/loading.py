"""Weights that go into PaddleClas' models: read without running them, and an error where they do not fit.

PaddleClas unpickles a weight file, which runs what it says, and ignores what `set_state_dict` returns, so a file that
does not fit leaves random weights without a word. `register` puts the reader here in the place of its own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from paddle import nn
from ppcls import arch
from ppcls.arch.gears.identity_head import IdentityHead
from ppcls.engine import engine as engine_module
from ppcls.loss import build_loss
from ppcls.utils import download, logger, save_load

from ..errors import CheckpointError, ReparamError, one_sentence
from ..weights import checkpoints
from .errors import ConfigError

_REFOCUSING = "convmap.weight"
# What the networks that are being built, one inside the other, leave fresh; and whether weights were loaded into them.
_being_built: list[dict[str, Any]] = []

#: Seconds without an answer after which a download has failed; PaddleClas tries three times.
_DOWNLOAD_TIMEOUT = 60


def register() -> None:
    """Make every module of PaddleClas load weights by `load_pretrained`, those that are imported later as well.

    Its builders take `fresh` beside `pretrained` from here on, as those of this library do.
    """
    ours = {
        "load_dygraph_pretrain": load_pretrained,
        "load_dygraph_pretrain_from_url": load_pretrained,
        # The Engine has its own way to go on from a checkpoint.
        "init_model": _refuse,
        "load_distillation_model": _refuse,
    }
    theirs = {name: vars(save_load)[name] for name in ours if name in vars(save_load)}
    for module in [m for name, m in sys.modules.items() if name.partition(".")[0] == "ppcls"]:
        for name, function in theirs.items():
            if vars(module).get(name) is function:
                setattr(module, name, ours[name])
        if module.__name__.endswith(".cae"):
            # It has a way of its own.
            module._load_pretrained = _load_into_cae
    for name, builder in list(vars(arch).items()):
        if inspect.isfunction(builder) and "pretrained" in inspect.signature(builder).parameters:
            setattr(arch, name, _leaves_fresh(builder))
    # Without it a host that takes a call and never answers is waited for without end.
    download.requests = SimpleNamespace(get=functools.partial(download.requests.get, timeout=_DOWNLOAD_TIMEOUT))
    arch.DistillationModel.__init__ = _with_pretrained_list(arch.DistillationModel.__init__)


def load_pretrained(
    model: nn.Layer | list[nn.Layer | None],
    path: str,
    use_ssld: bool = False,
    use_ssld_stage1_pretrained: bool = False,
    use_imagenet22k_pretrained: bool = False,
    use_imagenet22kto1k_pretrained: bool = False,
) -> None:
    """Load what `pretrained` of a network names, as PaddleClas' `load_dygraph_pretrain`; the rest chooses the address.

    Raises `CheckpointError` for whatever does not fit, besides what the network was asked to leave fresh.
    """
    if _is_address(path):
        variants = {
            "_ssld_pretrained": use_ssld and "ssld" not in path,
            "_ssld_stage1_pretrained": use_ssld_stage1_pretrained and (use_ssld or "ssld" in path),
            "_22k_pretrained": use_imagenet22k_pretrained,
            "_22kto1k_pretrained": use_imagenet22kto1k_pretrained,
        }
        for variant, wanted in variants.items():
            if wanted:
                path = path.replace("_ssld_pretrained" if "stage1" in variant else "_pretrained", variant)
    asked: dict[str, Any] = _being_built[-1] if _being_built else {"fresh": False}
    asked["loaded"] = True
    load_weights(model, path, {}, "train", asked["fresh"])


def _leaves_fresh(builder: Callable[..., nn.Layer]) -> Callable[..., nn.Layer]:
    """Return a builder of PaddleClas that takes `fresh` beside `pretrained`: what is not taken from that file."""

    @functools.wraps(builder)
    def build(*args: Any, fresh: Any = None, **options: Any) -> nn.Layer:
        asked = {"fresh": read_fresh(fresh, f"fresh of {builder.__name__}"), "loaded": False}
        _being_built.append(asked)
        try:
            model = builder(*args, **options)
        finally:
            _being_built.pop()
        if asked["fresh"] and not asked["loaded"]:
            raise ConfigError(f"fresh of {builder.__name__} goes with pretrained, which names no weights here")
        return model

    return build


def read_fresh(value: Any, name: str) -> bool | list[str]:
    """Return what a config's `fresh` means to `checkpoints.load_into`: True, or patterns; False for none."""
    if value is None or isinstance(value, bool):
        return bool(value)
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigError(f"{name} is {value!r}; give True for the classifier, or patterns of names such as ['fc.*']")
    return list(patterns)


def _with_pretrained_list(original: Callable[..., None]) -> Callable[..., None]:
    """Return DistillationModel's constructor with a `pretrained_list` that is loaded; PaddleClas' ends in an error."""

    @functools.wraps(original)
    def __init__(
        self: nn.Layer, models: Any = None, pretrained_list: Any = None, freeze_params_list: Any = None, **options: Any
    ) -> None:
        files = list(pretrained_list or ())
        if files and len(files) != len(models or ()):
            raise ConfigError(f"Arch.pretrained_list has {len(files)} entries for {len(models or ())} models")
        fresh: list[Any] = [False] * len(files)
        for i, (file, entry) in enumerate(zip(files, models or ())):
            [(name, part)] = entry.items()
            if file:
                fresh[i] = read_fresh(part.pop("fresh", None), f"fresh of {name}")
        original(self, models, None, freeze_params_list, **options)
        for model, file, left in zip(self.model_list, files, fresh):
            if file:
                load_weights(model, file, {}, "train", left)

    return __init__


def _load_into_cae(pretrained: bool | str, address: str, model: nn.Layer, *others: Any, **options: Any) -> None:
    if pretrained is not False:
        load_pretrained(model, address if pretrained is True else pretrained)


def _refuse(*args: Any, **options: Any) -> None:
    raise ReparamError(
        "PaddleClas' own loading of checkpoints runs what a file says; set Global.checkpoints, or Arch.pretrained_list "
        "in a distillation, and train with tools/train.py"
    )


@contextlib.contextmanager
def strict_loading(config: dict[str, Any], mode: str, resume: Callable[..., Any] | None = None) -> Iterator[None]:
    """Make PaddleClas' Engine load `Global.pretrained_model` for a mode while it runs in here.

    `resume` takes the place of what it loads a checkpoint with.
    """

    def load(models: list[nn.Layer | None], path: str) -> None:
        fresh = read_fresh(config["Global"].get("fresh"), "Global.fresh") if mode == "train" else False
        load_weights(models, path, config, mode, fresh)

    with _in_engine(load_dygraph_pretrain=load, load_dygraph_pretrain_from_url=load, init_model=resume or _refuse):
        yield


@contextlib.contextmanager
def weights_are_in() -> Iterator[None]:
    """Keep PaddleClas' Engine from loading its weights a second time, into what it has taken a head from since."""
    with _in_engine(load_dygraph_pretrain=lambda model, path: None):
        yield


@contextlib.contextmanager
def _in_engine(**ours: Callable[..., Any]) -> Iterator[None]:
    theirs = {name: getattr(engine_module, name) for name in ours if hasattr(engine_module, name)}
    for name in theirs:
        setattr(engine_module, name, ours[name])
    try:
        yield
    finally:
        for name, function in theirs.items():
            setattr(engine_module, name, function)


def _is_address(path: Any) -> bool:
    return isinstance(path, str) and path.startswith(("http://", "https://"))


def weight_file(path: str) -> str:
    """Return the local file of what a config names: an address, a file, or one without its suffix."""
    if _is_address(path):
        with one_sentence(f"{path} cannot be downloaded, and is not in {download.WEIGHTS_HOME}"):
            # What was packed would be unpacked wherever it says.
            path = download.get_path_from_url(path, download.WEIGHTS_HOME, decompress=False)
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"{path!r} is no weight file; give its path or its address")
    return checkpoints.weight_file(path)


def load_weights(
    models: nn.Layer | Sequence[nn.Layer | None],
    path: str | os.PathLike[str],
    config: dict[str, Any],
    mode: str,
    fresh: bool | Sequence[str] = False,
) -> None:
    """Load a weight file into a model, and into the training loss where that has weights as well.

    In training a plain baseline may go into RefConv layers, which it has no refocusing weights for; elsewhere they
    would be random. `fresh`: what stays as the model drew it, as in `checkpoints.load_into`. Of what a
    distillation saved, the network that is shipped gets its own entries; its evaluation takes the student's alone.
    Raises `CheckpointError` for whatever else is missing, left over or of another shape.
    """
    model, *losses = models if isinstance(models, (list, tuple)) else [models]
    file = weight_file(os.fspath(path))
    state = checkpoints.load(file)
    average_of = f"{file[: -len('.pdparams')]}.pdema"
    if mode != "resuming" and file.endswith(".pdparams") and os.path.isfile(average_of):
        logger.info(f"{file} holds the moving average of the weights; as they were trained they are in {average_of}")
    model, state = _of_distillation(model, state, config.get("Arch") or {}, mode)
    if mode == "export" and isinstance(getattr(model, "head", None), IdentityHead):
        # PaddleClas took the classifier of a recognition network out: its features are what is exported.
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
    own = model.state_dict()
    for loss in filter(None, losses):
        of_loss = {name: state.pop(name) for name in loss.state_dict() if name in state}
        if of_loss:
            checkpoints.load_into(loss, of_loss)
    if mode != "train" and set(state) - set(own) and "Loss" in config:
        # What was saved in training holds the training loss' weights too; no other mode has a use for them.
        for name in build_loss(config["Loss"]["Train"]).state_dict():
            state.pop(name, None)
    lacking = [name for name in own if name.endswith(_REFOCUSING) and name not in state]
    if lacking and mode != "train":
        raise CheckpointError(
            f"{file}: it lacks {len(lacking)} refocusing weights ({lacking[0]}), which would stay random; "
            f"for {mode} give the weights that training saved, or the plain backbone's config for plain weights"
        )
    try:
        report = checkpoints.load_into(model, state, [f"*{_REFOCUSING}"] if lacking else [], fresh)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {str(error).removeprefix('the state: ')}") from None
    if report.fresh:
        logger.info(f"{file}: not taken from it but fresh, as the network drew them: {', '.join(report.fresh)}")


def _of_distillation(
    model: nn.Layer, state: dict[str, Any], config: dict[str, Any], mode: str
) -> tuple[nn.Layer, dict[str, Any]]:
    """Return which network of a distillation a state is for, and its entries.

    A state holds all of them under their names, or the student's alone without one (`best_model_student`); a model is
    all of them, or the one that `infer_model_name` names.
    """
    if config.get("name") != "DistillationModel":
        return model, state
    name = config.get("infer_model_name") or "Student"
    prefixes = tuple(f"{each}." for entry in config["models"] for each in entry)
    holds_all = any(key.startswith(prefixes) for key in state)
    if isinstance(model, arch.DistillationModel):
        student = getattr(model, "Student", None)
        if holds_all or name != "Student" or student is None or mode in ("train", "resuming"):
            return model, state
        logger.info("these are the student's weights alone; what the teacher puts out means nothing")
        return student, state
    own = f"{name}."
    others = tuple(prefix for prefix in prefixes if prefix != own)
    return model, {key.removeprefix(own): value for key, value in state.items() if not key.startswith(others)}
