"""The files beside an export with which PaddleClas' own scripts and PaddleX run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..deploy.outputs import THRESHOLD, OutputSpec

#: What PaddleClas' scripts want to be told: one image at a time, on the CPU.
_OF_PADDLECLAS = {
    "infer_imgs": ".", "batch_size": 1, "use_gpu": False, "enable_mkldnn": True, "cpu_num_threads": 1,
    "enable_benchmark": False, "use_fp16": False, "ir_optim": True, "use_tensorrt": False, "gpu_mem": 8000,
    "enable_profile": False,
}  # fmt: skip
#: Backend -> what PaddleX calls the ways to resize of PaddleClas.
_RESIZED_BY_PADDLEX = {
    "cv2": {"bilinear": "LINEAR", "nearest": "NEAREST", "bicubic": "BICUBIC", "area": "AREA", "lanczos": "LANCZOS4"},
    "pil": {"bilinear": "BILINEAR", "nearest": "NEAREST", "bicubic": "BICUBIC", "box": "BOX", "lanczos": "LANCZOS4"},
}

Steps = Sequence[Mapping[str, Mapping[str, Any]]]


def files_for_others(
    steps: Steps | None, labels: Sequence[str | None] | None, output: OutputSpec, size: Sequence[int] | None
) -> dict[str, str]:
    """Return name -> text of the files with which others run a release, where they can.

    `steps` are those of `release_steps`; `size` is [height, width] of the images of an export of one size, None for one
    of every size. PaddleClas' scripts in `deploy/python` read `predict_cls.yml` and `labels.txt`, or of features
    `predict_rec.yml`; PaddleX reads `inference.yml`. None of them knows steps of this library.
    """
    texts = {}
    names = None if labels is None else [str(i) if label is None else label for i, label in enumerate(labels)]
    if names is not None:
        texts["labels.txt"] = "".join(f"{i} {name}\n" for i, name in enumerate(names))
    if steps is None or any("ToGray" in step for step in steps):
        return texts
    features, several = "features" in output.keys, output.activation == "sigmoid"
    indicator = "MultiLabelThreshOutput" if several else "Topk"
    options = {"threshold": THRESHOLD} if several else {"topk": 5}
    of_steps = {"transform_ops": list(steps)}
    if features:
        texts["predict_rec.yml"] = yaml.safe_dump(
            {
                "Global": {**_OF_PADDLECLAS, "rec_inference_model_dir": "."},
                "RecPreProcess": of_steps,
                "RecPostProcess": None,
            }
        )
    else:
        file = None if names is None else "labels.txt"
        texts["predict_cls.yml"] = yaml.safe_dump(
            {
                "Global": {**_OF_PADDLECLAS, "inference_model_dir": "."},
                "PreProcess": of_steps,
                "PostProcess": {"main_indicator": indicator, indicator: {**options, "class_id_map_file": file}},
            }
        )
    ours = _steps_of_paddlex(steps, size)
    if ours is None:
        return texts
    # Without a word, PaddleX leaves a crop out for features and for several labels, and resizes for features in one way
    # only. Several labels without names end in an error there.
    misread = (features or several) and "CropImage" in ours
    misread = misread or (features and "backend" in ours["ResizeImage"])
    if misread or (several and names is None):
        return texts
    known = {} if names is None else {"label_list": names}
    texts["inference.yml"] = yaml.safe_dump(
        {
            "PreProcess": {"transform_ops": [{name: options} for name, options in ours.items()]},
            "PostProcess": {"NormalizeFeatures": {}} if features else {indicator: {**options, **known}},
        }
    )
    return texts


def _steps_of_paddlex(steps: Steps, size: Sequence[int] | None) -> dict[str, dict[str, Any]] | None:
    """Return name -> options of the steps as PaddleX takes them, in the order in which it runs them, or None.

    It resizes, crops where that is asked for, normalises and puts the channels first.
    """
    given = {name: dict(options) for step in steps for name, options in step.items()}
    if size is not None and not {"ResizeImage", "CropImage"} & set(given):
        # The export takes images of this size alone, and they stay what they are.
        given = {"ResizeImage": {"size": [size[1], size[0]]}, **given}
    axes = ["NormalizeImage", "ToCHWImage"]
    if given.get("NormalizeImage", {}).get("order", "chw") == "chw":
        axes.reverse()
    if [*given] not in (["ResizeImage", *axes], ["ResizeImage", "CropImage", *axes]):
        return None
    resize, normalize = given["ResizeImage"], given["NormalizeImage"]
    backend, way = resize.get("backend") or "cv2", resize.get("interpolation") or "bilinear"
    theirs = _RESIZED_BY_PADDLEX.get(backend, {}).get(way)
    if theirs is None:
        return None
    by = {} if theirs == "LINEAR" else {"backend": backend, "interpolation": theirs}
    given["ResizeImage"] = {**{key: resize[key] for key in ("size", "resize_short") if resize.get(key)}, **by}
    given["NormalizeImage"] = {**{key: normalize[key] for key in ("mean", "std", "scale")}, "order": ""}
    order = ("ResizeImage", "CropImage", "NormalizeImage", "ToCHWImage")
    return {name: given[name] for name in order if name in given}
