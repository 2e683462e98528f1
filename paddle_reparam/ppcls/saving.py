"""Checkpoints of a training run: files that belong together, there as a whole or not at all, and found after a crash.

PaddleClas writes `latest.pdparams`, `latest.pdopt` and `latest.pdstates` in place, one after the other. Killed in
between, a run leaves a set whose parts do not belong together, or one cut short, and nothing else. Here a set is
written into a hidden folder beside its place, gets a record of the hashes of its files, and is then linked to its
place; the record is the last file there. At every moment one whole set of every prefix can be found.

After one epoch `best_model`, `epoch_N` and `latest` hold the same numbers. These are written once: a file is a hard
link to the one that holds what it would.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import paddle

from .. import forms
from ..errors import CheckpointError, OutputExists, ReparamError
from ..files import digest, flush
from ..training.processes import wait_for_first
from ..weights import pickles
from .errors import ConfigError
from .written_once import Files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

#: What training goes on from.
SUFFIXES = (".pdparams", ".pdopt", ".pdstates")
#: A set's record: the hash of each file, by its path from the record's folder, and the epoch and step it was saved at.
RECORD = ".record.json"
#: Bytes of a record at most; it names three files, or a few more.
_LARGEST_RECORD = 2**20
#: What the name of a hidden folder ends in, in which a set is being written.
_STAGING = ".partial"
#: What a running training holds of its folder.
LOCK = ".training.lock"


@dataclass(frozen=True)
class SavedSet:
    """A set of files that belong together: the path of the set without suffix, and when it was saved."""

    prefix: Path
    epoch: int
    step: int


def save_whole(
    save: Callable[..., None],
    net: Any,
    optimizer: Any,
    states: dict[str, Any],
    folder: str,
    files: Files | None = None,
    **options: Any,
) -> Path | None:
    """Let PaddleClas' `save_model` write a set of files, and put it in place when all of it is on the disk.

    `states` goes into `.pdstates`; `prefix` among the options names the set. `files` are those of this training so far.
    Returns where the set is, without suffix; None in all processes but the first, which write none. Raises
    `ReparamError` where it cannot be written; what was saved before is then as it was.
    """
    files = files or Files()
    if paddle.distributed.get_rank() != 0:
        return None
    target, prefix = Path(folder), options.get("prefix", "ppcls")
    staging = target / f".{prefix}{_STAGING}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        # What a killed run left, of any prefix. No process reads it any more: all have trained since they resumed.
        for left in target.glob(f".*{_STAGING}"):
            _finish(left, target)
        with files.linked():
            save(net, optimizer, states, str(staging), **options)
        paths = sorted(path for path in staging.rglob("*") if path.is_file())
        for path in paths:
            flush(path)
        record = {
            "epoch": int(states.get("epoch", 0)),
            "step": int(states.get("global_step", 0)),
            "files": {path.relative_to(staging).as_posix(): digest(path)["sha256"] for path in paths},
        }
        place = staging / f"{prefix}{RECORD}"
        place.write_text(json.dumps(record, indent=1))
        flush(place)
        _finish(staging, target)
        files.learn_places(staging, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if not list(staging.glob(f"*{RECORD}")):
                shutil.rmtree(staging)
        if not isinstance(error, OSError):
            raise
        raise ReparamError(
            f"{target / prefix}: the checkpoint cannot be written ({error.strerror or error}); the one before it is "
            "unchanged"
        ) from error
    [weights] = [path for path in paths if path.name == f"{prefix}.pdparams"]
    return target / weights.relative_to(staging).with_suffix("")


def _finish(staging: Path, target: Path) -> None:
    """Put a whole staged set in place, and remove what is staged."""
    _put_in_place(staging, target)
    if staging.exists():
        shutil.rmtree(staging)


def _put_in_place(staging: Path, target: Path) -> None:
    for record in sorted(staging.glob(f"*{RECORD}")):
        if _read_record(record) is None:
            continue
        names = [*_entries_of(record)["files"], record.name]
        for name in names:
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            _link(staging / name, place)


def placed(prefix: str | os.PathLike[str]) -> Path:
    """Return where a set is, or is put by the next training, that `newest` may have found staged."""
    return Path(*(part for part in Path(prefix).parts if not _is_staging(part)))


def _is_staging(name: str) -> bool:
    return name.startswith(".") and name.endswith(_STAGING)


def _link(source: Path, place: Path) -> None:
    temporary = place.with_name(f".{place.name}.new")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # Some file systems have no links.
        shutil.copyfile(source, temporary)
    os.replace(temporary, place)
    # Both may be names of one file, as in a set that was half in place; they are then left as they are.
    temporary.unlink(missing_ok=True)


_RECORD_FORM = forms.record(
    {"epoch": forms.whole(-1), "step": forms.whole(), "files": forms.dict_of(forms.plain_path, forms.sha256)}
)


def _entries_of(path: Path) -> dict[str, Any]:
    """Return what a record says; raises `ValueError` where it is none, or names a file that lies outside its folder."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _LARGEST_RECORD:
        raise ValueError(f"{path} is no file, or too large")
    try:
        entries = json.loads(path.read_text())
    except RecursionError as error:
        raise ValueError(f"{path} is no record") from error
    _RECORD_FORM(entries, "")
    for name in entries["files"]:
        for place in (path.parent / name, *(path.parent / parent for parent in Path(name).parents[:-1])):
            if place.is_symlink():
                raise ValueError(f"{place} is a link")
        if not (path.parent / name).is_file():
            raise ValueError(f"{path.parent / name} is no file")
    return entries


def _read_record(path: Path) -> SavedSet | None:
    """Return the set that a record describes, or None where it is not whole."""
    try:
        record = _entries_of(path)
        if not all(digest(path.parent / name)["sha256"] == known for name, known in record["files"].items()):
            return None
        [weights] = [n for n in record["files"] if n.endswith(".pdparams") and f"{n[:-9]}.pdopt" in record["files"]]
        return SavedSet((path.parent / weights).with_suffix(""), record["epoch"], record["step"])
    except (OSError, ValueError, KeyError):
        return None


def newest(folder: str | os.PathLike[str]) -> SavedSet | None:
    """Return the newest whole set under a folder, staged ones included; None where there is none."""
    found = []
    for path in Path(folder).rglob(f"*{RECORD}"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = _entries_of(path)
            found.append((record["epoch"], record["step"], path.stat().st_mtime, path))
    for *_, path in sorted(found, reverse=True):
        saved = _read_record(path)
        if saved is not None:
            return saved
    return None


def sets_of(checkpoint: str | os.PathLike[str]) -> dict[str, Path]:
    """Return the sets that a resumed training begins with, by the prefixes "latest" and "best_model"."""
    sets = {"latest": placed(checkpoint)}
    # Newer PaddleClas can give each set a folder of its name.
    for folder in (sets["latest"].parent, sets["latest"].parent.parent / "best_model"):
        if (folder / "best_model.pdparams").is_file():
            sets.setdefault("best_model", folder / "best_model")
    return sets


def require_whole(prefix: str) -> None:
    """Raise `CheckpointError` where the files of a set are missing, or are not those that were saved together."""
    for suffix in SUFFIXES:
        if not Path(prefix + suffix).is_file():
            raise CheckpointError(
                f"Global.checkpoints: there is no file {prefix + suffix}; give the path of a saved epoch without "
                "its suffix, such as output/ResNet50/latest, or auto for the newest whole one in Global.output_dir"
            )
    path = Path(prefix)
    for folder in (path.parent, path.parent.parent):
        record = folder / f"{path.name}{RECORD}"
        if record.is_file() and _read_record(record) is None:
            saved = newest(folder)
            hint = f"the newest whole one is {placed(saved.prefix)}" if saved else "there is no whole one beside it"
            raise CheckpointError(
                f"Global.checkpoints: the files of {prefix} were not saved together, or are damaged; {hint}"
            )


def read_states(path: str) -> Any:
    """Return what a `.pdopt` or `.pdstates` file holds, without running anything in it.

    Raises `CheckpointError` where it cannot be read.
    """
    return _read(path, pickles.read_state)


def read_parameter_names(path: str) -> dict[str, str]:
    """Return entry -> Paddle's name of the parameter, where a weight file says so; raises as `read_states` does."""
    return _read(path, pickles.parameter_names)


def _read(path: str, read: Callable[[bytes], Any]) -> Any:
    try:
        return read(Path(path).read_bytes())
    except CheckpointError as error:
        raise error.at(path) from None
    except Exception as error:
        raise CheckpointError(f"{path}: it is truncated or damaged ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def only_training_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep trainings of other processes out of a folder: two would take away what the other has begun to save.

    What a killed one had saved but not put in place yet is then put there. Raises `OutputExists` where one is running
    in the folder. The system lets go of the folder when a process ends, however it
    ends; where it cannot lock files, nothing is kept out.
    """
    if paddle.distributed.get_rank() != 0:
        yield
        return
    if fcntl is None:
        _put_all_in_place(folder)
        yield
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / LOCK, "a")  # noqa: SIM115 - it is closed below
    except OSError as error:
        raise ConfigError(f"the output folder {folder} cannot be written to ({error.strerror})") from error
    with file:
        try:
            # The kind of lock that the workers of a loader do not inherit: they may outlive a killed training.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise OutputExists(
                f"another training is running in {folder}; wait for its end, or name another output folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        _put_all_in_place(folder)
        yield


def _put_all_in_place(folder: str | os.PathLike[str]) -> None:
    """Put in place what a killed training staged; it is not removed, as other processes may be about to read it."""
    for staging in Path(folder).rglob(f".*{_STAGING}"):
        try:
            _put_in_place(staging, staging.parent)
        except OSError as error:
            raise ReparamError(f"{staging.parent}: it cannot be written to ({error.strerror or error})") from error


@contextlib.contextmanager
def whole_checkpoints(
    module: Any, states_of_run: Callable[[str, dict[str, Any]], dict[str, Any]], saved: dict[str, Path]
) -> Iterator[None]:
    """Make PaddleClas' Engine save whole sets while it runs in here.

    `states_of_run(prefix, metric_info)` returns what goes into `.pdstates`; `saved` gets the path of each set, without
    suffix.
    """
    save_load = module.save_load
    original, log = save_load.save_model, save_load.logger
    files = Files()

    def save_model(net: Any, optimizer: Any, metric_info: dict[str, Any], folder: str, **options: Any) -> None:
        prefix = options.get("prefix", "ppcls")
        states = states_of_run(prefix, metric_info)
        # It would say where the set is staged.
        save_load.logger = logging.Logger("of no one")
        try:
            place = save_whole(original, net, optimizer, states, folder, files, **options)
        finally:
            save_load.logger = log
        if place is not None:
            saved[prefix] = place
            log.info(f"saved: {place}.pdparams")
        wait_for_first()

    save_load.save_model = save_model
    try:
        yield
    finally:
        save_load.save_model = original
