"""Write docs/other_tasks.md: networks for faces, segmentation and detection, with what is replaced and their sizes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddle_reparam import create_model, ppdet, ppseg
from paddle_reparam.errors import exit_code
from paddle_reparam.files import atomic_write
from paddle_reparam.measure import catalogue
from paddle_reparam.report import format_markdown
from paddle_reparam.surgery.rewrite import replace

from paddle import nn  # isort: skip - paddle_reparam quiets it

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "other_tasks.md"

INTRODUCTION = """\
# Faces, segmentation and detection: the networks

English | [简体中文](ch/other_tasks.md)

Written by `python docs/make/task_table.py`; do not edit. Sizes of whole networks as they train and fused, for one
image: of faces the backbone, of segmentation with 19 classes (150 with SLaK, as on ADE20K), of detection up to the
heads, in the small recipes of `ppdet_configs/scenes/`. "Replaced" is what `replace` puts in, in all convolutions that
the layer can stand in for; "backbone" a network of this library as a backbone. What the articles report is theirs, on
their data, and was not measured again; what was measured here, on digits, is on the page of the task.

"""
HEADER = [
    "task", "network", "replaced", "input", "parameters, M: train", "fused", "multiply-adds, M: train", "fused",
    "fusing gives", "the articles report", "measured here",
]  # fmt: skip
_ADE20K = (
    "47.6 mIoU on ADE20K, 65 M parameters without the zeros of its sparsity; ConvNeXt_tiny 46.0 mIoU (arXiv 2207.03620)"
)
_COCO = "SLaK_tiny in Cascade Mask R-CNN: 48.4 box AP on COCO after 12 epochs (arXiv 2207.03620)"
_MEGAFACE = "4.91 points above MobileFaceNet on MegaFace (arXiv 2105.01883)"
#: PaddleSeg's network, its backbone, the backbone's options, what is replaced, classes, what the articles report.
SEGMENTERS = [
    ("PSPNet", "ResNet50_vd", {"output_stride": 8}, "RefConv2D", 19, ""),
    ("DeepLabV3P", "ResNet50_vd", {"output_stride": 8, "multi_grid": [1, 2, 4]}, "RefConv2D", 19, ""),
    ("BiSeNetV2", None, {}, "RefConv2D", 19, ""),
    ("UPerNet", "SLaK_tiny", {}, None, 150, _ADE20K),
]
#: What a row is made of: task, network, what is replaced, image, how it is built, what the articles report.
Entry = tuple[str, str, str, tuple[int, int], Callable[[], nn.Layer], str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 with one sentence where a network cannot be built or fused."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    with exit_code() as result:
        table = format_markdown(HEADER, [row_of(entry) for entry in tqdm(list(entries()), unit=" networks")])
        text = f"{INTRODUCTION}<!-- networks -->\n{table.strip()}\n<!-- end -->\n"
        atomic_write(TABLE, lambda path: path.write_text(text, encoding="utf-8"))
        print(f"written: {TABLE.relative_to(ROOT)}")
    return result[0]


def entries() -> Iterator[Entry]:
    """Give what each row is made of."""
    for name, reported in (("MobileFaceNet", ""), ("FaceResNet", ""), ("RepMLP_FaceRes", _MEGAFACE)):
        yield "faces", name, "", (96, 96), lambda name=name: create_model(name), reported
    for network, backbone, options, layer, classes, reported in SEGMENTERS:
        name = network if backbone is None else f"{network}, {backbone}"
        build = lambda each=(network, backbone, options, layer, classes): segmenter(*each)  # noqa: E731
        yield "segmentation", name, layer or "backbone", (512, 512), build, reported
    for config in sorted((ROOT / "ppdet_configs" / "scenes").glob("*_*.yml")):
        if config.stem.endswith(("_plain", "_retrain")):
            continue
        layer, reported = ("backbone", _COCO) if "slak" in config.stem else ("RefConv2D", "")
        build = lambda config=config: detector(config)  # noqa: E731
        yield "detection", f"[{config.stem}](../{config.relative_to(ROOT)})", layer, (64, 64), build, reported


def segmenter(network: str, backbone: str | None, options: dict, layer: str | None, classes: int) -> nn.Layer:
    """Build a network of PaddleSeg, with a layer of this library in it or one of its networks as the backbone."""
    ppseg.setup()
    from paddleseg.cvlibs import manager

    given = {} if backbone is None else {"backbone": manager.BACKBONES[backbone](**options)}
    if network == "UPerNet":
        given["backbone_indices"] = [0, 1, 2, 3]
    model = manager.MODELS[network](num_classes=classes, **given)
    if layer is not None:
        replace(model, layer)
    return model


def detector(config: Path) -> nn.Layer:
    """Build the network of a recipe for PaddleDetection, up to its heads."""
    ppdet.setup()
    from ppdet.engine import trainer

    from paddle_reparam.ppdet.command import reading
    from paddle_reparam.ppdet.heads import UpToHeads

    with reading(str(config), []) as values:
        return UpToHeads(trainer.create(values["architecture"]))


def row_of(entry: Entry) -> list[str]:
    """Return the cells of a row."""
    task, network, replaced, image, build, reported = entry
    sizes = catalogue.sizes_of(build(), image)
    cells = [task, network, replaced, f"{image[0]}x{image[1]}", *sizes.cells(), sizes.fusing, reported]
    return [*cells, f"[{task}]({task}.md)"]


if __name__ == "__main__":
    sys.exit(main())
