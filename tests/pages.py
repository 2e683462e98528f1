"""What the tests of documentation share: the blocks of a page, a copy of the project, and commands that run in it."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import paddle

ROOT = Path(__file__).resolve().parents[1]


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Return (language, content) for every block of code; a block without a language is an error."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)
    assert text.count("```") == 2 * len(blocks), "a block of code has no language, or no end"
    return blocks


def commands_of(block: str) -> list[str]:
    """Return the commands of a block, continued lines as one."""
    joined = re.sub(r"\s*\\\n\s*", " ", block)
    return joined.strip().splitlines()


def named_files(text: str) -> set[str]:
    """Return the files and folders of the project that a text names."""
    return set(re.findall(r"`((?:tools|docs|ppcls_configs)/[\w./-]*|requirements[\w-]*\.txt|NOTICE)`", text))


def copy_project(folder: Path) -> None:
    """Put what a user has into a folder."""
    for name in ("paddle_reparam", "tools", "docs/make", "ppcls_configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def run(command: str, folder: Path, timeout: float = 300) -> str:
    """Run a command as a user does in a folder, and return what it printed; a failure is an error."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def run_here(command: str) -> None:
    """Run a command of `tools/` in this process and the current folder, which saves the imports of one of its own."""
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    before, code = (sys.argv, list(sys.path)), 0
    sys.argv = [script, *arguments]
    try:
        # Named from the start, as in a process of its own.
        with paddle.utils.unique_name.guard():
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv, sys.path[:] = before
    assert not code, f"{command}\nended with {code}"


def keep_few(folder: Path) -> None:
    """Leave a few images of each class in the lists of the digits."""
    for name, count in {"train_list.txt": 4, "val_list.txt": 2}.items():
        path = folder / "dataset" / "digits" / name
        lines = path.read_text().splitlines()
        kept = [line for label in range(10) for line in [x for x in lines if x.endswith(f"\t{label}")][:count]]
        path.write_text("\n".join(kept) + "\n")


def cut_short(command: str) -> str:
    """Return a training with one epoch only, and any other command as it is, but for what so little training gives."""
    if command.startswith("python tools/quantize.py") or " --tune " in command:
        return f"{command} --largest-drop 100"
    if command.startswith("python tools/analyze.py landscape"):
        return f"{command} --points 5 --directions 2"
    trains = command.startswith(("python tools/train.py", "python tools/refocus.py", "python tools/compare.py"))
    return f"{command} -o Global.epochs=1" if trains else command
