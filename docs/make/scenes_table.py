"""What RefConv's second stage does for a segmentation network, beside the same iterations without it, on scenes.

It runs tools/segment.py in the current folder, where output/scenes is; what is trained there already is measured only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddle_reparam.errors import UsageError, exit_code
from paddle_reparam.files import atomic_write
from paddle_reparam.ppseg import command
from paddle_reparam.report import format_markdown

ROOT = Path(__file__).resolve().parents[2]
#: Stage -> what it is.
STAGES = {"plain": "trained", "retrain": "trained once more", "refconv": "trained once more, with RefConv"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "measured" / "scenes.json")
    given = parser.parse_args(arguments)
    with exit_code() as result:
        if given.seeds < 1:
            raise UsageError(f"--seeds is {given.seeds}; it is 1 or more")
        scores: dict[str, list[dict[str, float]]] = {stage: [] for stage in STAGES}
        for seed in range(given.seeds):
            for stage, found in scores.items():
                found.append(_measured(stage, seed))
        measured = {"command": f"python docs/make/scenes_table.py --seeds {given.seeds}", "scenes": scores}
        atomic_write(given.output, lambda path: path.write_text(json.dumps(measured, indent=2) + "\n"))
        print(to_markdown(measured))
    return result[0]


def _measured(stage: str, seed: int) -> dict[str, float]:
    """Return mIoU and accuracy of a stage, trained where it is not yet."""
    config = ROOT / "ppseg_configs" / "scenes" / f"bisenet_{stage}.yml"
    folders = {each: Path(f"output/scenes_{each}_{seed}") for each in STAGES}
    best = {each: folder / "best_model" / "model.pdparams" for each, folder in folders.items()}
    parser = argparse.ArgumentParser()
    command.add_config(parser)
    command.add_training(parser)
    parser.add_argument("--weights", default=str(best[stage]))
    options = ["-c", str(config), "--seed", str(seed), "--save_dir", str(folders[stage])]
    options += [] if stage == "plain" else ["-o", f"model.pretrained={best['plain']}"]
    if not best[stage].is_file():
        command.train(parser.parse_args(options))
    return command.evaluate(parser.parse_args(options))


def to_markdown(measured: Mapping[str, Any]) -> str:
    """Return what was measured as a table."""
    rows = []
    for stage, what in STAGES.items():
        scores = [100 * each["mIoU"] for each in measured["scenes"][stage]]
        accuracy = [100 * each["accuracy"] for each in measured["scenes"][stage]]
        mean = sum(scores) / len(scores)
        rows.append([what, f"{mean:.1f}", ", ".join(f"{each:.1f}" for each in scores),
                     f"{sum(accuracy) / len(accuracy):.1f}"])  # fmt: skip
    head = ["BiSeNetV2", "mIoU, %: mean", "by seed", "pixels right, %"]
    return f"`{measured['command']}`\n\n{format_markdown(head, rows)}"


if __name__ == "__main__":
    sys.exit(main())
