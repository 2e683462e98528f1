"""A small set of scenes and configs of PaddleDetection for it, which tests train in seconds."""

from __future__ import annotations

from pathlib import Path

import yaml

from paddle_reparam.training.scenes import write_scenes

CONFIGS = Path(__file__).resolve().parents[1] / "ppdet_configs" / "scenes"


def detection_config(folder, name="yolov3_plain", **sections):
    """Write scenes, and a config that has a recipe beneath it, into a folder; return the config's path."""
    root = folder / "scenes"
    if not root.exists():
        write_scenes(root, train=4, val=2)
    sets = "".join(
        f"{part}Dataset:\n  !{kind}\n    dataset_dir: {root}\n    anno_path: {file}\n{more}\n"
        for part, kind, file, more in (
            ("Train", "COCODataSet", "train.json",
             "    image_dir: images\n    data_fields: ['image', 'gt_bbox', 'gt_class', 'is_crowd']"),
            ("Eval", "COCODataSet", "val.json", "    image_dir: images\n    allow_empty: true"),
            ("Test", "ImageFolder", "val.json", ""),
        )
    )  # fmt: skip
    config = {
        "_BASE_": [str(CONFIGS / f"{name}.yml")],
        "epoch": 1,
        "save_dir": str(folder / "out"),
        "TrainReader": {"batch_size": 2},
        **sections,
    }
    path = folder / "config.yml"
    path.write_text(f"{yaml.safe_dump(config)}\n{sets}")
    return path
