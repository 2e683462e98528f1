"""Every command and every program of README.md runs, in order, in a copy of the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
RUN = {"bash", "python", "yaml"}
#: Languages that are shown only.
SHOWN = {
    "text": "needs a checkout or GPUs",
    "output": "what the block before prints",
    "result": "a quick start's table",
}
#: Commands that are not run here -> why.
NOT_RUN = {
    "make quickstart": "test_quickstart.py runs all of it",
    "make test": "it runs this test",
    "pip install .": "it would change the environment that the tests run in",
    "pip install --no-deps -r requirements.txt": "it would change the environment that the tests run in",
}


def commands(block: str) -> list[str]:
    return block.replace("\\\n", " ").strip().splitlines()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of what a user has, as the working directory."""
    for name in ("paddle_reparam", "tools", "ppcls_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def run_command(command: str) -> None:
    """Run a command, a training of one epoch only."""
    short = " -o Global.epochs=1" if command.startswith("python tools/train.py") else ""
    done = subprocess.run(["bash", "-c", command + short], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def build_arch(block: str) -> None:
    """Build the network of a config's `Arch`, whose weights nobody has; `where` must select something."""
    from paddle_reparam.ppcls import setup

    setup()
    from ppcls.arch import build_model

    config = yaml.safe_load(block)
    assert config["Arch"].pop("pretrained")
    model = build_model(config, "train")
    assert sum(name.endswith("convmap") for name, _ in model.named_sublayers()) > 10


def without_numbers(text: str) -> list[list[str]]:
    return [re.sub(r"\d+(\.\d+)?(e-\d+)?", "0", line).split() for line in text.strip().splitlines()]


def test_every_block_is_run_or_shown_for_a_reason():
    assert {language for language, _ in BLOCKS} == RUN | set(SHOWN)
    assert README.count("```") == 2 * len(BLOCKS)
    in_readme = {command for language, block in BLOCKS if language == "bash" for command in commands(block)}
    assert set(NOT_RUN) < in_readme


def test_every_block_runs_in_order(project, capsys):
    printed = ""
    for language, block in BLOCKS:
        if language == "bash":
            for command in commands(block):
                if command not in NOT_RUN:
                    run_command(command)
        elif language == "python":
            capsys.readouterr()
            exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
            printed = capsys.readouterr().out
            assert printed.strip(), f"it prints nothing:\n{block}"
        elif language == "output":
            assert without_numbers(printed) == without_numbers(block)
        elif language == "yaml":
            build_arch(block)
    assert (project / "output" / "digits" / "shipped" / "manifest.json").is_file()
    assert (project / "shipped" / "manifest.json").is_file()


def test_files_that_the_text_names_exist():
    named = set(re.findall(r"`((?:tools|docs|ppcls_configs)/[\w./]*|requirements[\w-]*\.txt|NOTICE)", README))
    assert len(named) > 3
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_table_is_one_that_the_quick_start_prints():
    [table] = [block for language, block in BLOCKS if language == "result"]
    header, _, *rows = table.splitlines()
    names = [cell.strip() for line in (header, *(row.split("  ")[0] for row in rows)) for cell in line.split("  ")]
    source = (ROOT / "tools" / "quickstart.py").read_text(encoding="utf-8")
    assert len(rows) == 3
    assert not [name for name in names if name and f'"{name}"' not in source]
