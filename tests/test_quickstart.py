"""The quick start: its table, its comparison, its processes; one short run from the images to the picture."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def _load():
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "tools" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module
    spec.loader.exec_module(module)
    return module


quickstart = _load()


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# ---------------------------------------------------------------------------------------------------------------------
# The comparison and the table


def probabilities(count: int = 40, classes: int = 10) -> np.ndarray:
    logits = np.random.default_rng(0).normal(size=(count, classes))
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_equal_predictions_pass():
    trained = probabilities()
    quickstart.require_same_classes(trained, trained + 1e-7, [f"{i}.png" for i in range(len(trained))])


def test_one_differing_prediction_is_an_error():
    trained, names = probabilities(), [f"{i}.png" for i in range(40)]
    exported = trained.copy()
    exported[17] = np.roll(exported[17], 1)
    before, after = trained[17].argmax(), exported[17].argmax()
    with pytest.raises(
        quickstart.StageFailed, match=f"differ on 1 of 40 images, first on 17.png: exported {after}, trained {before}"
    ):
        quickstart.require_same_classes(trained, exported, names)


def test_predictions_that_are_no_numbers_are_an_error():
    # argmax takes the first NaN for the largest: two broken networks would agree.
    broken = np.full((3, 10), np.nan)
    with pytest.raises(quickstart.StageFailed, match="3 of 3"):
        quickstart.require_same_classes(broken, broken, ["a", "b", "c"])


def test_batches_cover_every_image_once():
    pixels = np.arange(150.0).reshape(150, 1, 1, 1)
    seen = quickstart.in_batches(lambda x: x.reshape(len(x), 1) * 2, pixels, size=64)
    np.testing.assert_array_equal(seen[:, 0], np.arange(150.0) * 2)


def test_table():
    rows = [
        quickstart.Row("baseline", 0.9, 212906, 926720, 2.614, None),
        quickstart.Row("RefConv, fused and exported", 0.925, 1212906, 926721, 12.5, 8.4e-6),
    ]
    assert quickstart.format_results(rows).splitlines() == [
        "network                       top-1  parameters  export, KiB  ms an image  max difference",
        "---------------------------  ------  ----------  -----------  -----------  --------------",
        "baseline                     90.00%     212,906          905         2.61               -",
        "RefConv, fused and exported  92.50%   1,212,906          905        12.50           8e-06",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.parametrize(
    ("line", "share", "note"),
    [
        ("[2024/01/01] ppcls INFO: [Train][Epoch 2/4][Iter: 4/10]lr(Cosine): 0.1, top1: 0.5", 0.375, ""),
        ("[2024/01/01] ppcls INFO: [Train][Epoch 4/4][Iter: 10/10]lr", 1.0, ""),
        ("[Eval][Epoch 3][Avg]CELoss: 0.1, top1: 0.96389, top5: 1.0", None, "epoch 3: validation top-1 96.4%"),
        ("   1.2 s  export for Paddle Inference", 0.7, "export for Paddle Inference"),
        ("anything else", None, ""),
    ],
)  # fmt: skip
def test_progress_is_read_from_the_output(line, share, note):
    assert quickstart.read_progress(line) == quickstart.Progress(share, note)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("print('error: no plan'); print('bye'); raise SystemExit(3)", "exit code 3: error: no plan;"),
        ("raise KeyError('tap')", "exit code 1: KeyError: 'tap';"),
        ("raise SystemExit(1)", "exit code 1: it printed nothing;"),
    ],
)  # fmt: skip
def test_a_failing_command_is_one_sentence(tmp_path, code, sentence):
    log = tmp_path / "log"
    with pytest.raises(quickstart.StageFailed) as error:
        quickstart.run_command(python(code), "the stage", log)
    assert str(error.value) == f"'the stage' failed with {sentence} its whole output is in {log}"
    assert "\n" not in str(error.value)


def test_a_command_runs_in_the_project_folder_and_is_logged(tmp_path):
    quickstart.run_command(python("import os; print(os.getcwd())"), "the stage", tmp_path / "log")
    assert (tmp_path / "log").read_text() == f"{ROOT}\n"


def test_a_failing_stage_ends_the_quick_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "BASELINE_CONFIG", "no/such/config.yaml")
    assert quickstart.main(["--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: 'Train a small plain network, the baseline' failed with exit code 2: ")
    assert "no/such/config.yaml" in error


def test_commands_are_printed_as_they_are_typed():
    short = [sys.executable, "tools/train.py", "-c", "a b.yaml"]
    assert quickstart.as_typed(short).endswith(" tools/train.py -c 'a b.yaml'")
    long = [*short, "--output", "x" * 100, *quickstart.overrides("Global.epochs=1", "Arch.name=X")]
    assert quickstart.as_typed(long).splitlines()[1:] == [
        f"    --output {'x' * 100} \\", "    -o Global.epochs=1 \\", "    -o Arch.name=X",
    ]  # fmt: skip


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux which processes are there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_process_behind(tmp_path, number):
    # A command whose own child ignores the interrupt, as a data loader's worker does.
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import signal, time; "
        "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    driver = (
        f"import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('quickstart', {str(ROOT / 'tools' / 'quickstart.py')!r})\n"
        "quickstart = importlib.util.module_from_spec(spec)\n"
        "sys.modules['quickstart'] = quickstart\n"
        "spec.loader.exec_module(quickstart)\n"
        f"quickstart.run = lambda *_: quickstart.run_command({python(code)!r}, 'stage', "
        f"__import__('pathlib').Path({str(tmp_path / 'log')!r}))\n"
        "sys.exit(quickstart.main([]))\n"
    )
    # A shell that starts the tests in the background lets them, and what they start, ignore interrupts.
    process = subprocess.Popen(
        python(driver), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "pids").exists() and (tmp_path / "pids").read_text()):
            assert time.monotonic() < deadline, "the command did not start"
            time.sleep(0.05)
        child = int((tmp_path / "pids").read_text())
        assert alive(child)
        os.kill(process.pid, number)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.strip().endswith("error: interrupted")
    deadline = time.monotonic() + 5
    while alive(child):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.05)


def test_clearing_removes_what_a_run_made_and_nothing_else(tmp_path):
    for name in quickstart.OWN[:5]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").touch()
    (tmp_path / "result.txt").touch()
    (tmp_path / "notes.txt").write_text("mine")
    quickstart.clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "notes.txt"]
    assert not any((tmp_path / "logs").iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# All of it


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """One run with an epoch each, from another working directory: (folder, what it printed)."""
    output = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "quickstart.py"), "--epochs", "1", "--output", str(output)],
        cwd=output, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return output, done.stdout


def test_a_run_writes_everything_into_its_folder(whole_run):
    output, printed = whole_run
    assert sorted(path.name for path in output.iterdir()) == sorted(quickstart.OWN)
    assert (output / "result.txt").read_text() in printed
    assert json.loads((output / "exported" / "manifest.json").read_text())["checks"]
    with Image.open(output / "quickstart.png") as picture:
        assert picture.size[0] >= 1000
        assert len(picture.getcolors(1 << 24)) > 100


def test_a_run_ends_with_the_same_classes_and_a_plain_network(whole_run):
    _, printed = whole_run
    assert "the same class for all 360 images" in printed
    baseline, trained, exported = printed.split("---\n")[-1].splitlines()[:3]
    assert trained.split()[3] == exported.split()[4], "top-1 differs"
    assert exported.split()[5] == baseline.split()[2], "the exported network is no plain network of the same size"
    assert int(trained.split()[4].replace(",", "")) > int(exported.split()[5].replace(",", ""))


def test_the_curves_come_from_the_logs_of_both_trainings(whole_run):
    output, _ = whole_run
    for name in ("baseline", "refconv"):
        curve = quickstart.read_curve(output / name)
        assert [epoch for epoch, _ in curve.top1] == [1]
        assert 0 <= curve.top1[0][1] <= 1
        assert len(curve.loss) > 1


def test_a_second_log_is_refused(whole_run, tmp_path):
    output, _ = whole_run
    shutil.copytree(output / "baseline", tmp_path / "one")
    shutil.copytree(output / "baseline", tmp_path / "two")
    with pytest.raises(quickstart.StageFailed, match="2 VisualDL logs"):
        quickstart.read_curve(tmp_path)
