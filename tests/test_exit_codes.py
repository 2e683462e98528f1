"""What every command in tools/ and docs/make/ makes of wrong input: one sentence on stderr, and the exit code of
README's table; and what it says of itself."""

import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from paddle_reparam.errors import MissingFile, ReparamError, exit_code

ROOT = Path(__file__).resolve().parents[1]
SCENES = str(ROOT / "ppseg_configs/scenes/bisenet_plain.yml")
BOXES = str(ROOT / "ppdet_configs/scenes/yolov3_plain.yml")
CONFIG = str(ROOT / "ppcls_configs/digits/refconv/PPLCNet_x0_25.yaml")


def run(script: str, *arguments: str) -> int:
    """Run a command in this process; what argparse refuses counts as well."""
    module = importlib.import_module(script)
    try:
        if hasattr(module, "launch"):
            return module.launch(list(arguments))
        if script in ("train", "eval", "infer", "export_model"):
            return module.main(script.removesuffix("_model"), list(arguments))
        return module.main(list(arguments))
    except SystemExit as end:
        return end.code


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("empty").write_bytes(b"")
    Path("garbage").write_bytes(bytes(range(256)) * 8)
    Path("garbage.yaml").write_bytes(bytes(range(256)) * 8)
    Path("garbage.pdparams").write_bytes(bytes(range(256)) * 8)
    Path("list.json").write_text("[1, 2]")
    Path("wrong.json").write_text(json.dumps({"runs": [{"variant": 1}]}))
    Path("taken").write_text("of somebody else")


CONFIGS = [
    ("-c missing.yaml", 2), ("-c folder", 2), ("-c empty", 2), ("-c garbage.yaml", 2), (f"-c {CONFIG} -o Globl.x=1", 2),
    (f"-c {CONFIG} -o Global.epochs", 2), (f"-c {CONFIG} -o Arch.class_num=0", 2), ("", 2), ("-c", 2),
    (f"-c {CONFIG} --unknown", 2),
]  # fmt: skip
WEIGHTS = [("missing", 2), ("missing.pdparams", 2), ("folder", 2), ("empty", 1), ("garbage.pdparams", 1)]


WRONG = [
    *[(script, line, code) for script in ("train", "eval", "infer", "export_model") for line, code in CONFIGS],
    *[(script, f"{line} --weights x --output out", code)
      for script in ("reparam", "analyze") for line, code in CONFIGS],
    *[("refocus", f"{line} --output out", code) for line, code in CONFIGS],
    *[("compare", f"{line} --methods RefConv2D --output out", code) for line, code in CONFIGS],
    ("compare", f"-c {CONFIG} --methods RefConv --output out", 2),
    ("compare", f"-c {CONFIG} --methods RefConv2D --output taken/x", 2),
    ("compare", f"-c {CONFIG} --methods RefConv2D --output folder --seeds 0", 2),
    *[("quantize", f"{line} --release folder --output out.onnx", code) for line, code in CONFIGS[:1]],
    *[(script, f"-c {CONFIG} --weights {file} --output out", code)
      for script in ("reparam", "refocus") for file, code in WEIGHTS],
    ("eval", f"-c {CONFIG} -o Global.pretrained_model=missing", 2),
    ("train", f"-c {CONFIG} -o Global.output_dir=taken/x", 2),
    ("train", f"-c {CONFIG} -o Global.output_dir={'x' * 300}", 2),
    ("reparam", "--check missing", 2),
    ("reparam", "--check folder", 1),
    ("reparam", "--check empty", 1),
    ("reparam", "--check folder --onnx", 2),
    ("quantize", f"-c {CONFIG} --release missing --output out.onnx", 2),
    ("quantize", f"-c {CONFIG} --release folder --output out.onnx --images 0", 2),
    ("quantize", f"-c {CONFIG} --release folder --output out.onnx --largest-drop nan", 2),
    ("quantize", f"-c {CONFIG} --release folder --output out.onnx --largest-drop -1", 2),
    ("analyze", f"-c {CONFIG} --weights x --output taken", 2),
    ("analyze", f"-c {CONFIG} --weights x --output out --images -1", 2),
    ("predict", "missing missing.png", 2),
    ("predict", "folder missing.png", 1),
    ("predict", "garbage missing.png", 1),
    ("predict", "folder x --top 0", 2),
    ("predict", "folder x --top nan", 2),
    ("predict", "missing", 2),
    ("predict", "folder x --gallery folder", 1),
    ("pairs", "missing missing", 2),
    ("pairs", "folder missing", 2),
    ("pairs", "folder taken", 1),
    ("pairs", "folder empty", 1),
    ("prepare_data", "pairs --list garbage --output out.txt", 1),
    ("prepare_data", "folder --root missing", 2),
    ("prepare_data", "folder --root taken", 2),
    ("prepare_data", "folder --root folder", 1),
    ("prepare_data", "digits --output taken/x", 1),
    ("convert_checkpoint", "--model Nothing --input garbage --output out.pdparams", 2),
    ("convert_checkpoint", "--model ResNet20_SPConv --input missing.pth --output out.pdparams", 2),
    ("convert_checkpoint", "--model ResNet20_SPConv --input folder --output out.pdparams", 2),
    ("convert_checkpoint", "--model ResNet20_SPConv --input garbage.pdparams --output out.pdparams", 1),
    ("convert_checkpoint", "--model ResNet20_SPConv --input garbage --output out.txt", 2),
    ("convert_checkpoint", "--model ResNet20_SPConv --option x=3 --input garbage --output o.npz", 2),
    *[("segment", f"{mode} -c {file}", 2)
      for mode in ("train", "eval --weights x") for file in ("missing.yml", "folder", "empty", "garbage.yaml")],
    ("segment", f"train -c {SCENES} -o model", 2),
    ("segment", f"train -c {SCENES} -o itres=3", 2),
    ("segment", f"train -c {SCENES} --iters 0", 2),
    ("segment", f"train -c {SCENES}", 1),
    ("segment", f"train -c {SCENES} -o Reparam.layer=3", 2),
    ("segment", f"eval -c {SCENES} --weights missing", 2),
    ("segment", "export --output out --weights missing -c folder", 2),
    ("segment", "export --output out --weights garbage -c missing.yml", 2),
    ("segment", f"export --output out -c {SCENES} --weights missing", 2),
    ("predict", "missing list.json --masks out", 2),
    *[("detect", f"{mode} -c {file}", 2)
      for mode in ("train", "eval --weights x", "export --weights garbage --output out")
      for file in ("missing.yml", "folder", "empty", "garbage.yaml")],
    ("detect", f"export -c {BOXES} --weights missing --output out", 2),
    ("detect", f"export -c {BOXES} --weights missing --output taken", 2),
    ("detect", f"train -c {BOXES} -o TrainReader", 2),
    ("detect", f"train -c {BOXES} -o epohc=3", 2),
    ("detect", f"train -c {BOXES} -o Reparam.layer=3 -o TrainDataset.dataset_dir=folder", 1),
    ("detect", f"train -c {BOXES}", 1),
    ("detect", f"eval -c {BOXES} --weights missing", 2),
    ("quickstart", "--epochs 0", 2),
    ("quickstart", "--output taken/x", 1),
    ("launch", "missing.py", 2),
    ("launch", "folder", 2),
    ("benchmark", "infer missing", 2),
    ("benchmark", "infer folder", 2),
    ("benchmark", "infer garbage.yaml", 2),
    ("benchmark", "infer ResNet20_SPConv --size 0", 2),
    ("benchmark", "infer ResNet20_SPConv --rounds nan", 2),
    ("benchmark", "infer ResNet20_SPConv --output folder", 2),
    ("benchmark", "infer ResNet20_SPConv --output taken/x.json", 2),
    ("benchmark", "sweep Nothing --of size --values 32", 2),
    ("benchmark", "table ResNet20_SPConv --baseline missing", 2),
    ("benchmark", "table ResNet20_SPConv --baseline folder --seconds 0", 2),
    ("benchmark", "step --model Nothing --size 32", 2),
    ("benchmark", "step --model SLaK_micro --output folder", 2),
    ("benchmark_pages", "--nothing", 2),
    ("baseline_exports", "--nothing", 2),
    ("measured_tables", "--nothing", 2),
    ("position_prior", "--epochs 0", 2),
    ("position_prior", "--seeds 1 --epochs 1 --output taken/x", 1),
    ("scenes_table", "--seeds 0", 2),
    ("chinese_pages", "--nothing", 2),
    ("comparison_table", "missing N", 1),
    ("comparison_table", "list.json N", 1),
    ("compare_refocus", "missing", 1),
    ("compare_refocus", "folder", 1),
    ("compare_refocus", "garbage", 1),
    ("compare_refocus", "list.json", 1),
    ("compare_refocus", "wrong.json", 1),
    ("draw_monitor", "--output x.png --panel curve", 2),
    ("draw_monitor", "--output x.png --panel curve a=missing", 1),
    ("draw_monitor", "--output x.png --panel curve a=taken", 1),
    ("draw_pictures", "nothing", 2),
    ("int8_table", "--images missing --cache folder", 2),
    ("model_table", "--nothing", 2),
    ("task_table", "--nothing", 2),
]  # fmt: skip


@pytest.mark.parametrize(("script", "line", "code"), WRONG)
def test_wrong_input(files, capsys, script, line, code):
    assert run(script, *line.split()) == code, capsys.readouterr().err
    said = capsys.readouterr().err
    errors = [part for part in said.splitlines() if "error: " in part]
    assert len(errors) == 1, said
    assert "Traceback" not in said


SCRIPTS = sorted(path.stem for folder in ("tools", "docs/make") for path in (ROOT / folder).glob("*.py"))


def test_every_command_is_given_wrong_input():
    assert {script for script, _, _ in WRONG} == set(SCRIPTS)


def test_every_command_says_first_what_it_is_for(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")
    said = {}
    for script in SCRIPTS:
        assert run(script, "--help") == 0
        usage, purpose, *_ = re.split(r"\n\n", capsys.readouterr().out)
        assert usage.startswith("usage: ")
        said[script] = purpose
    assert [each for each in said.items() if not re.match(r"[A-Z][a-z]+ .{20,}?[.;:](\s|$)|From .*", each[1])] == []
    assert len(set(said.values())) == len(SCRIPTS)


@pytest.mark.parametrize(("options", "shown"), [([], 0), (["default"], 1)])
def test_warnings_of_libraries_are_shown_by_commands_only_if_asked_for(monkeypatch, options, shown):
    monkeypatch.setattr(sys, "warnoptions", options)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with exit_code() as result, warnings.catch_warnings(record=True) as caught:
            warnings.warn("use another function", stacklevel=1)
    assert (result[0], len(caught)) == (0, shown)


@pytest.mark.parametrize(
    ("error", "code"), [(ReparamError("x"), 1), (OSError("x"), 1), (MissingFile("x"), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(capsys, error, code):
    with exit_code() as result:
        raise error
    assert result[0] == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_reader_that_stops_early_is_no_error():
    script = (
        "import sys\nfrom paddle_reparam.errors import exit_code\nwith exit_code() as result:\n    print('x' * 10**6)\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as stdout:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", f"{script}sys.exit(result[0])"], cwd=ROOT, stdout=stdout,
            stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, b"")
