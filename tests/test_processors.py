"""What Paddle is told about the processor."""

import os

import pytest

from paddle_reparam import ppcls
from paddle_reparam.measure import steps
from paddle_reparam.measure.processors import MKL_CODE, lacks_vnni, let_amd_multiply_fast

AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu sse2 avx avx2 bmi2\n"


@pytest.fixture(autouse=True)
def variable_as_it_was(monkeypatch):
    monkeypatch.setenv(MKL_CODE, "to be put back")
    monkeypatch.delenv(MKL_CODE)


@pytest.mark.parametrize(
    ("facts", "before", "after"),
    [
        (AMD, None, "5"),
        (AMD, "0", "0"),
        (AMD.replace(" avx2", ""), None, None),
        (AMD.replace("AuthenticAMD", "GenuineIntel"), None, None),
    ],
)
def test_only_amd_with_avx2_is_told_and_nobody_overruled(facts, before, after, tmp_path):
    if before is not None:
        os.environ[MKL_CODE] = before
    (tmp_path / "cpuinfo").write_text(facts)
    let_amd_multiply_fast(tmp_path / "cpuinfo")
    assert os.environ.get(MKL_CODE) == after


def test_where_nothing_is_known_nothing_is_done(tmp_path):
    let_amd_multiply_fast(tmp_path / "no such file")
    assert MKL_CODE not in os.environ


def test_whoever_trains_is_let_multiply_fast(monkeypatch):
    calls = []
    monkeypatch.setattr(ppcls, "let_amd_multiply_fast", lambda: calls.append("setup"))
    ppcls.setup()
    monkeypatch.setattr(steps, "let_amd_multiply_fast", lambda: calls.append("step"))
    monkeypatch.setattr(steps, "in_new_process", stop)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(ZeroDivisionError):
        steps.measure_steps(steps.StepSettings("SLaK_micro"))
    assert calls == ["setup", "step"]


def stop(*_):
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("flags", "lacks"),
    [("avx2 avx512f", True), ("avx2 avx512_vnni", False), ("avx2 avx_vnni", False), ("asimd", False)],
)
def test_a_processor_without_vnni_is_known(tmp_path, flags, lacks):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}")
    assert lacks_vnni(tmp_path / "cpuinfo") is lacks
    assert not lacks_vnni(tmp_path / "none")
