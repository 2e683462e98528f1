"""docs/deploy.md: its commands run in order, what they ship is what the page says, and its names are the library's."""

import re

from pages import ROOT, blocks_of, commands_of, cut_short, keep_few, named_files, run_here

from paddle_reparam.deploy import tuning
from paddle_reparam.deploy.released import read_manifest
from paddle_reparam.deploy.runtimes import SERVING, get_runtime
from paddle_reparam.deploy.runtimes.paddle_inference import SERVING as PADDLE
from paddle_reparam.measure import timing

PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def test_every_block_of_the_page_runs_in_order(tmp_path, monkeypatch, capsys):
    # Another Python for each way would take seconds, and so would ONNX files; test_timing.py, test_tuning.py do that.
    monkeypatch.setattr(tuning, "SERVING", PADDLE)
    monkeypatch.setattr(tuning, "in_new_process", lambda function, *arguments, seconds: function(*arguments))
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ppcls_configs").symlink_to(ROOT / "ppcls_configs")
    for _, block in blocks_of(PAGE):
        for command in commands_of(block):
            run_here(cut_short(command))
            if "prepare_data" in command:
                keep_few(tmp_path)
    printed = capsys.readouterr().out
    manifest = read_manifest(tmp_path / "output" / "digits" / "tuned")
    ways = manifest["tuning"]["ways"]
    assert {way["runtime"] for way in ways} == {runtime.name for runtime in PADDLE}
    assert {"1", "8"} == set(ways[0]["times"])
    best = get_runtime(manifest["serving"][0]["runtime"])
    assert "onednn" in {entry["runtime"] for entry in manifest["serving"]}
    # What --check prints is about the way that serves, too.
    assert best.title in printed.rpartition("written")[2]


def test_the_page_names_every_runtime_that_serves_and_no_other():
    table = re.findall(r"^\| (?:Paddle Inference|onnxruntime|OpenVINO) \|(.*)\|", PAGE, flags=re.M)
    columns = [re.findall(r"`([a-z0-9-]+)`", cell) for row in table for cell in row.split("|")[:3]]
    precisions = ["float32", "bfloat16", "int8"] * len(table)
    named = {name: precision for names, precision in zip(columns, precisions) for name in names}
    assert named == {runtime.name: runtime.precision for runtime in SERVING if runtime.name != "gpu"}
    assert not [name for name in named_files(PAGE) if not (ROOT / name).exists()]
