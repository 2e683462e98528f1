"""Runs of tools/refocus.py beside each other: the table, the picture, and what the page of RefConv shows of them."""

import copy
import hashlib
import json
import re
from pathlib import Path

import compare_refocus
import pytest
from PIL import Image

from paddle_reparam.style import DIGEST, digest_of

ROOT = Path(__file__).resolve().parents[1]

MEASURED = ROOT / "docs" / "measured" / "refocus_cifar10.json"
PICTURE = ROOT / "docs" / "images" / "refocus_cifar10.png"


def run_of(variant, seed, baseline, result, config="c"):
    curves = {variant: [{"epoch": 1, "train_loss": 0.5, "eval_top1": result}]}
    if variant == "refocus":
        curves["baseline"] = [{"epoch": 1, "train_loss": 1.0, "eval_top1": baseline}]
    hashes = {"baseline": f"b{seed}", "trained": f"t{variant}{seed}", "plain": f"p{variant}{seed}"}
    return {
        "variant": variant, "network": "N", "seed": seed, "epochs": 1,
        "accuracy": {"baseline": baseline, variant: result}, "curves": curves,
        "weights": {name: {"name": f"/here/{name}", "bytes": 1, "sha256": value} for name, value in hashes.items()},
        "source": {"config": {"sha256": config}},
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """Folders of two seeds of RefConv, of a control each, and of one with one seed."""
    folders = []
    for run in (
        run_of("retrain", 0, 0.5, 0.52), run_of("refocus", 0, 0.5, 0.53), run_of("refocus", 1, 0.4, 0.45),
        run_of("retrain", 1, 0.4, 0.46), run_of("random-base", 1, 0.4, 0.3),
    ):  # fmt: skip
        folder = tmp_path / f"{run['variant']}-{run['seed']}"
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(run))
        folders.append(str(folder))
    return folders


def test_table_picture_and_file(runs, tmp_path, capsys):
    written = [str(tmp_path / name) for name in ("runs.json", "curves.png")]
    assert compare_refocus.main([*runs, "--json", written[0], "--picture", written[1]]) == 0
    table = capsys.readouterr().out
    assert table.splitlines() == [
        "| top-1, % | seed 0 | seed 1 | mean | standard deviation |",
        "| --- | --- | --- | --- | --- |",
        "| baseline | 50.00 | 40.00 | 45.00 | 7.07 |",
        "| refocus | 53.00 | 45.00 | 49.00 | 5.66 |",
        "| retrain | 52.00 | 46.00 | 49.00 | 4.24 |",
        "| random-base |  | 30.00 | 30.00 |  |",
        "| refocus - baseline | +3.00 | +5.00 | +4.00 | 1.41 |",
        "| retrain - baseline | +2.00 | +6.00 | +4.00 | 2.83 |",
        "| random-base - baseline |  | -10.00 | -10.00 |  |",
        "| refocus - retrain | +1.00 | -1.00 | +0.00 | 1.41 |",
        "| refocus - random-base |  | +15.00 | +15.00 |  |",
    ]
    assert "/here/" not in Path(written[0]).read_text()
    with Image.open(written[1]) as picture:
        assert picture.width == 1210
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    assert compare_refocus.main([written[0]]) == 0
    assert capsys.readouterr().out == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["source"]["config"].update(sha256="other"), "the runs are not of the same config"),
        (
            lambda run: run["weights"]["baseline"].update(sha256="other"),
            "with seed 0 do not start from the same baseline",
        ),
        (lambda run: run.update(variant="refocus"), "there are two runs of refocus with seed 0"),
        (lambda run: run.pop("weights"), "it is no result of tools/refocus.py"),
    ],
)
def test_runs_that_cannot_be_compared(runs, change, message, capsys):
    file = Path(runs[0]) / "result.json"
    changed = copy.deepcopy(json.loads(file.read_text()))
    change(changed)
    file.write_text(json.dumps(changed))
    assert compare_refocus.main(runs) == 1
    assert message in capsys.readouterr().err
    assert compare_refocus.main([*runs, "no/such"]) == 1


# ---------------------------------------------------------------------------------------------------------------------
# What was measured


def test_the_page_shows_what_was_measured():
    page = (ROOT / "docs" / "refconv.md").read_text(encoding="utf-8")
    runs = compare_refocus.read(MEASURED)
    compare_refocus.require_comparable(runs)
    [table] = re.findall(r"^\| top-1, % .*?(?=\n<!-- end -->)", page, re.M | re.S)
    assert table == compare_refocus.table_of(runs)
    with Image.open(PICTURE) as picture:
        assert picture.info[DIGEST] == digest_of(runs)
    assert f"(images/{PICTURE.name})" in page


def test_the_measurement_is_of_the_config_that_it_names():
    for run in compare_refocus.read(MEASURED):
        config = run["source"]["config"]
        # The lists were written anew since, of the same images, with a tab behind each path.
        text = (ROOT / config["name"]).read_bytes().replace(b'      delimiter: "\\t"\n', b"")
        assert hashlib.sha256(text).hexdigest() == config["sha256"]
        assert config["overrides"] == [f"Global.seed={run['seed']}"]
        assert len(run["curves"][run["variant"]]) == run["epochs"] == 12
        # What was measured last while it trained, and of the plain weights in the end.
        assert run["curves"][run["variant"]][-1]["eval_top1"] == pytest.approx(
            run["accuracy"][run["variant"]], abs=1e-5
        )
    variants = {run["variant"]: 0 for run in compare_refocus.read(MEASURED)}
    for run in compare_refocus.read(MEASURED):
        variants[run["variant"]] += 1
    assert variants["refocus"] == variants["retrain"] == 3
