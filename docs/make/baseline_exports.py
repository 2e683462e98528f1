"""Export the networks of `tools/benchmark.py table` as an earlier commit did, for its `--baseline`.

That commit is checked out beside this one for as long as it takes, and its own code builds, fuses and exports each
network with the seed 0. A network that is there already is left as it is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from paddle_reparam.errors import ReparamError, exit_code  # noqa: E402
from paddle_reparam.files import new_folder  # noqa: E402
from paddle_reparam.measure.ways import BASELINE, NETWORKS, baseline_folder  # noqa: E402

#: Run by the commit's own code in its folder: target and folder, over and over.
_EXPORT = """
import sys
from pathlib import Path

sys.path.insert(0, "tools")

import paddle
from benchmark import contenders_of
from paddle_reparam.ppcls import setup

setup().utils.logger.init_logger(log_level="WARNING")
target, folder, size = sys.argv[1:]
paddle.seed(0)
[contender] = contenders_of(target, Path(folder), int(size))
for path in contender.folder.iterdir():
    path.rename(Path(folder) / path.name)
contender.folder.rmdir()
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 where the commit, or a network of it, cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="*", default=list(NETWORKS), help="names or configs (.yaml) of that commit")
    parser.add_argument("--folder", type=Path, default=baseline_folder(), help="a sub-folder a network (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the images (224)")
    given = parser.parse_args(arguments)
    with exit_code() as result, tempfile.TemporaryDirectory() as temporary:
        commit = Path(temporary) / "commit"
        git("worktree", "add", "--quiet", "--detach", str(commit), BASELINE)
        try:
            for target in given.target:
                export(target, commit, given.folder / Path(target).stem, given.size)
        finally:
            git("worktree", "remove", "--force", str(commit))
    return result[0]


def git(*words: str) -> None:
    """Run git in this repository; raises `ReparamError` with what it says where it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        raise ReparamError(f"git {words[0]} {words[1]}: {' '.join(done.stderr.split())}")


def export(target: str, commit: Path, folder: Path, size: int) -> None:
    """Export a network by the code of a commit, unless its folder is there; raises `ReparamError` where it fails."""
    if folder.is_dir():
        print(f"there already: {folder}")
        return
    with new_folder(folder, folder, replace=False) as new:
        environment = {**os.environ, "PYTHONPATH": str(commit)}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _EXPORT, target, str(new.resolve()), str(size)],
            cwd=commit, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise ReparamError(f"{target} at {BASELINE[:7]}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    print(f"written: {folder}")


if __name__ == "__main__":
    sys.exit(main())
