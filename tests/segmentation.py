"""A small set of scenes and a config of PaddleSeg for it, which tests train in seconds."""

from __future__ import annotations

import yaml

from paddle_reparam.training.scenes import write_scenes

SIDE = 32


def scenes_config(folder, **sections):
    """Write scenes and a config into a folder; return the config's path. `sections` take the place of its own."""
    root = folder / "scenes"
    if not root.exists():
        write_scenes(root, train=8, val=3, side=SIDE)
    of_set = {"type": "Dataset", "dataset_root": str(root), "num_classes": 11, "transforms": [{"type": "Normalize"}]}
    config = {
        "batch_size": 4,
        "iters": 2,
        "train_dataset": {**of_set, "mode": "train", "train_path": str(root / "train.txt")},
        "val_dataset": {**of_set, "mode": "val", "val_path": str(root / "val.txt")},
        "optimizer": {"type": "AdamW", "weight_decay": 0.01},
        "lr_scheduler": {"type": "PolynomialDecay", "learning_rate": 0.003},
        "model": {
            "type": "UPerNet",
            "num_classes": 11,
            "backbone": {"type": "SLaK_micro", "patch_size": 2, "depths": [1, 1, 1, 1]},
            "backbone_indices": [0, 1, 2, 3],
            "channels": 8,
            "enable_auxiliary_loss": True,
            "dropout_prob": 0.0,
        },
        "loss": {"types": [{"type": "CrossEntropyLoss"}], "coef": [1, 0.4]},
        **sections,
    }
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path
