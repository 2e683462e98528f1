"""What the values of a config must be, by key, each said in words."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import paddle

from ..forms import is_number
from .errors import ConfigError

Check = Callable[[Any], "str | None"]
#: Of images; more would fill any memory.
LONGEST_SIDE = 8192
_LARGEST_BATCH = 1 << 16
MOST_CLASSES = 10**7
#: Of a network's options, the number of classes aside: numbers above it would fill any memory.
LARGEST_OPTION = 10**6


def whole(least: int, most: int = 2**31 - 1) -> Check:
    what = f"a whole number from {least}" if most == 2**31 - 1 else f"a whole number from {least} to {most}"
    return lambda value: None if is_number(value) and isinstance(value, int) and least <= value <= most else what


def number(least: float = -math.inf) -> Check:
    what = "a number" if least == -math.inf else f"a number from {least:g}"
    return lambda value: None if is_number(value) and value >= least else what


def share(value: Any) -> str | None:
    return None if is_number(value) and 0 < value < 1 else "a number between 0 and 1"


def one_of(*choices: Any) -> Check:
    what = f"one of {', '.join(map(str, choices))}"
    return lambda value: None if isinstance(value, str) and value in choices else what


def truth(value: Any) -> str | None:
    return None if isinstance(value, bool) or (is_number(value) and value in (0, 1)) else "True or False"


def text(value: Any) -> str | None:
    return None if isinstance(value, str) and value and "\0" not in value else "a text"


def _list(value: Any) -> str | None:
    return None if isinstance(value, list) else "a list"


def _mapping(value: Any) -> str | None:
    return None if isinstance(value, Mapping) else "a section of KEY: VALUE"


def or_none(check: Check) -> Check:
    def either(value: Any) -> str | None:
        wrong = None if value is None else check(value)
        return wrong and f"{wrong}, or null"

    return either


def texts(value: Any, each: Check = text) -> str | None:
    several = value if isinstance(value, list) else [value]
    return "a text, or a list of them" if not several or any(map(each, several)) else None


def _weights(value: Any) -> str | None:
    """Return what `Global.pretrained_model` must be; a distillation's is a list, with null for a network without."""
    return texts(value, or_none(text))


def _image_shape(value: Any) -> str | None:
    side = whole(1, LONGEST_SIDE)
    if isinstance(value, list) and len(value) == 3 and not any(map(side, value)):
        return None
    return f"[channels, height, width], whole numbers from 1 to {LONGEST_SIDE}"


def _device(value: Any) -> str | None:
    kinds = ("cpu", "gpu", "xpu", "npu", "mlu", "ascend", "intel_gpu", "mps")
    if not isinstance(value, str) or value not in kinds:
        return "cpu or gpu; which GPU is chosen with CUDA_VISIBLE_DEVICES"
    if value == "gpu" and not paddle.is_compiled_with_cuda():
        return "cpu here: this Paddle is built for the CPU alone"
    if value == "gpu" and not paddle.device.cuda.device_count():
        return "cpu here: Paddle finds no GPU"
    if value == "xpu" and not paddle.is_compiled_with_xpu():
        return "cpu here: this Paddle is not built for XPUs"
    return None


GLOBAL: dict[str, Check] = {
    "output_dir": text,
    "device": _device,
    "seed": lambda value: None if value in (None, False) else whole(0, 2**32 - 1)(value),
    "epochs": whole(1),
    "eval_during_train": truth,
    "eval_interval": whole(1),
    "start_eval_epoch": whole(0),
    "save_interval": whole(1),
    "print_batch_step": whole(1),
    "use_visualdl": truth,
    "pretrained_model": or_none(_weights),
    "checkpoints": or_none(text),
    "image_shape": or_none(_image_shape),
    "save_inference_dir": text,
    "class_num": whole(1, MOST_CLASSES),
    "eval_mode": one_of("classification", "retrieval", "adaface"),
    "use_multilabel": truth,
    "use_dali": truth,
    "to_static": truth,
    "update_freq": whole(1),
    "iter_per_epoch": or_none(whole(1)),
    "warmup_iter": or_none(whole(0)),
    "feature_normalize": truth,
    "retrieval_feature_from": text,
    "re_ranking": truth,
}
#: What else PaddleClas reads from Global, of which it says itself what is wrong.
OTHER_GLOBAL = {
    "fresh", "train_mode", "distributed", "feature_binarize", "sim_block_size", "log_ranks", "print_mem_info",
    "infer_config_path", "hpi_config_path", "pdx_model_name", "export_for_fd", "uniform_output_enabled", "model_name",
}  # fmt: skip
LOADER: dict[str, Check] = {"num_workers": whole(0, 256), "use_shared_memory": truth}
LOADER_NEEDS = ("num_workers", "use_shared_memory")
DATASET: dict[str, Check] = {"delimiter": or_none(text)}
SAMPLER: dict[str, Check] = {"batch_size": whole(1, _LARGEST_BATCH), "drop_last": truth, "shuffle": truth}
#: A sampler without a name, that is: one with a name has options of its own.
SAMPLER_NEEDS = ("batch_size", "drop_last", "shuffle")
RATES: dict[str, Check] = {
    "learning_rate": number(0),
    "weight_decay": or_none(number(0)),
    "momentum": number(0),
    "coeff": number(0),
    "clip_norm": number(0),
    "weight": number(),
    "warmup_epoch": number(0),
}
AMP: dict[str, Check] = {
    "level": one_of("O1", "O2"),
    "scale_loss": number(0),
    "use_dynamic_loss_scaling": truth,
    "use_amp": truth,
    "use_fp16_test": truth,
    "use_promote": truth,
}
EMA: dict[str, Check] = {"decay": share}
INFER: dict[str, Check] = {
    "infer_imgs": text,
    "batch_size": whole(1, _LARGEST_BATCH),
    "transforms": _list,
    "PostProcess": _mapping,
    "infer_list": or_none(text),
    "save_dir": or_none(text),
}
INFER_NEEDS = ("infer_imgs", "batch_size", "transforms", "PostProcess")


def check_values(
    section: Mapping[str, Any], checks: Mapping[str, Check], where: str, needed: Iterable[str] = ()
) -> None:
    for key in needed:
        if key not in section:
            raise ConfigError(f"{where} lacks {key}")
    for key, value in section.items():
        wrong = checks[key](value) if key in checks else None
        if wrong:
            raise ConfigError(f"{where}.{key} is {shown(value)}; it takes {wrong}")


def shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def refuse_misspelt(keys: Iterable[str], known: Collection[str], where: str) -> None:
    """Raise `ConfigError` for a key that is nearly a known one; what else is not known belongs to somebody else."""
    for key in keys:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if key not in known and near:
            raise ConfigError(f"{where} has no {key!r}; did you mean {near[0]!r}?")


def section(parent: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """Return the section under a key, or raise `ConfigError` where there is none."""
    if key not in parent:
        raise ConfigError(f"the config has no section {where}")
    if not isinstance(parent[key], Mapping):
        raise ConfigError(f"{where} is {shown(parent[key])}; it takes a section of KEY: VALUE")
    return parent[key]
