"""Every command and every program of README.md runs, in order, in a copy of the project."""

import re

import pytest
import yaml
from helpers import missing_for_onnx
from pages import ROOT, blocks_of, commands_of, copy_project, cut_short, named_files, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks_of(README)
RUN = {"bash", "python", "yaml"}
#: Languages that are shown only.
SHOWN = {
    "text": "needs a checkout or GPUs",
    "output": "what the block before prints",
    "result": "a quick start's table",
}
#: What the commands of the section on own photos hold; test_own_photos.py runs them.
OWN_PHOTOS = "own_photos"
#: Commands that are not run here -> why.
NOT_RUN = {
    "make quickstart": "test_quickstart.py runs all of it",
    "make test": "it runs this test",
    "pip install .": "it would change the environment that the tests run in",
    "pip install --no-deps -r requirements.txt -e .": "it would change the environment that the tests run in",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of what a user has, as the working directory."""
    copy_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    in_readme = {command for language, block in BLOCKS if language == "bash" for command in commands_of(block)}
    assert set(NOT_RUN) < in_readme


def test_the_first_program_runs_from_any_folder(tmp_path):
    (first, program), (then, printed) = BLOCKS[:2]
    assert (first, then) == ("python", "output")
    (tmp_path / "example.py").write_text(program, encoding="utf-8")
    assert without_numbers(run("python example.py", tmp_path)) == without_numbers(printed)


def test_one_command_installs_the_list_and_the_library():
    install = "pip install --no-deps -r {} -e ."
    assert install.format("requirements.txt") in NOT_RUN
    for name in ("requirements.txt", "requirements-gpu.txt"):
        first, *_ = (ROOT / name).read_text(encoding="utf-8").splitlines()
        assert first.endswith(f": {install.format(name)}")
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert " --no-deps -r $(VENV)/requirements.txt -e ." in make


def test_every_block_runs_in_order(project, capsys):
    for language, block in BLOCKS[2:]:
        if language == "bash":
            for command in commands_of(block):
                if command in NOT_RUN or OWN_PHOTOS in command:
                    continue
                if not (re.search("onnx|quantize.py", command) and missing_for_onnx()):
                    run(cut_short(command), project)
        elif language == "python":
            capsys.readouterr()
            exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})
            assert capsys.readouterr().out.strip(), f"it prints nothing:\n{block}"
        elif language == "yaml":
            build_arch(block)
    assert (project / "output" / "digits" / "shipped" / "manifest.json").is_file()
    assert (project / "shipped" / "manifest.json").is_file()


def test_files_that_the_text_names_exist():
    named = named_files(README)
    assert len(named) > 3
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_table_is_one_that_the_quick_start_prints():
    [table] = [block for language, block in BLOCKS if language == "result"]
    header, _, *rows = table.splitlines()
    names = [cell.strip() for line in (header, *(row.split("  ")[0] for row in rows)) for cell in line.split("  ")]
    source = (ROOT / "tools" / "quickstart.py").read_text(encoding="utf-8")
    assert len(rows) == 3
    assert not [name for name in names if name and f'"{name}"' not in source]
