"""Write docs/models.md, the table of all networks, from the registry; --measure trains the digits configs first."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddle_reparam import InferenceModel
from paddle_reparam.errors import exit_code
from paddle_reparam.files import atomic_write
from paddle_reparam.measure import catalogue

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "ppcls_configs"
TABLE = ROOT / "docs" / "models.md"
#: Network -> what training its digits config gave; written by `--measure`.
MEASURED = ROOT / "docs" / "measured.json"

INTRODUCTION = """\
# Networks

English | [简体中文](ch/models.md)

Written by `python docs/make/model_table.py`; do not edit. Parameters and multiply-adds were counted here, for one image
of the given size: "train" is the network as it is trained, "fused" what `reparameterize(fold_bn=True)` makes of it,
"non-zero" what is left at the sparsity that the paper trains with (dense kernels do not get faster by zeros). Published
accuracies are those of the source beside them, on ImageNet for images of 224 pixels and more and on CIFAR-10 for those
of 32, and were not measured again. "Measured here" is the exported network on the 360 validation images of
scikit-learn's digits, after one training with one seed (`python docs/make/model_table.py --measure`): it shows that the
road works, and ranks nothing. Any backbone of PaddleClas with RefConv has the size of that backbone, and is not listed.

"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 with one sentence where a network or a training fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="train and export every digits config first")
    given = parser.parse_args(arguments)
    with exit_code() as result:
        if given.measure:
            results = json.dumps(measure(), indent=2) + "\n"
            atomic_write(MEASURED, lambda path: path.write_text(results, encoding="utf-8"))
        rows = [catalogue.measure_network(*each) for each in tqdm(catalogue.networks(), unit=" networks")]
        text = f"{INTRODUCTION}<!-- networks -->\n{table_of(rows).strip()}\n<!-- end -->\n"
        atomic_write(TABLE, lambda path: path.write_text(text, encoding="utf-8"))
        print(f"{TABLE.relative_to(ROOT)}: {len(rows)} networks")
    return result[0]


def table_of(rows: list[catalogue.Row]) -> str:
    """Return the table with the configs and the measured accuracies that are there."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    return catalogue.to_markdown(rows, catalogue.configs_of(CONFIGS), measured)


def measure() -> dict[str, dict[str, float | str]]:
    """Train, fuse and export every digits config with the commands of tools/; return network -> accuracy."""
    # The configs name the images from the project's folder.
    os.chdir(ROOT)
    sys.path.insert(0, "tools")
    from quickstart import in_batches, last_epoch, read_images, run_command, shown

    def run(script: str, title: str, log: Path, *given: str) -> None:
        print(f"{title}: {script}", file=sys.stderr)
        run_command([sys.executable, f"tools/{script}.py", *given], f"{title}: {script}", log)

    logs = ROOT / "output" / "digits"
    logs.mkdir(parents=True, exist_ok=True)
    if not (ROOT / "dataset" / "digits").exists():
        run("prepare_data", "digits", logs / "data.log", "digits", "--output", "dataset/digits")
    results = {}
    # A baseline comes before what is trained from it.
    for config in sorted(CONFIGS.glob("digits/*/*.yaml")):
        folder, exported = ROOT / "output" / config.relative_to(CONFIGS).with_suffix(""), "exported"
        folder.mkdir(parents=True, exist_ok=True)
        run("train", config.stem, folder / "train.log", "-c", shown(config))
        weights, target = last_epoch(folder), folder / exported
        run("reparam", config.stem, folder / "reparam.log", "-c", shown(config), "--weights", shown(weights),
            "--output", shown(target), "--force")  # fmt: skip
        images, network = read_images(str(config), []), InferenceModel(target)
        probabilities = in_batches(lambda x, network=network: network.run(x)[0], images.pixels)
        top1 = float(100 * np.mean(probabilities.argmax(1) == images.labels))
        results[config.stem] = {"top1": round(top1, 2), "what": "digits"}
    return results


if __name__ == "__main__":
    sys.exit(main())
