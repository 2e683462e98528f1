"""What a profile says is what oneDNN wrote of the timed runs, and of nothing else."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn

from paddle_reparam.deploy.export import export_inference
from paddle_reparam.deploy.programs import program_file
from paddle_reparam.errors import ReparamError
from paddle_reparam.measure import profiling
from paddle_reparam.measure.benchmark import Contender, profile_all
from paddle_reparam.measure.profiling import Profile, ProfileReport, Share, middle_half, profile, read_log
from paddle_reparam.measure.timing import in_new_process, memory_rate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    paddle.seed(0)
    network = nn.Sequential(
        nn.Conv2D(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2D(16, 16, (1, 5), padding=(0, 2), groups=16),
        nn.Conv2D(16, 16, 3, padding=1, groups=2), nn.Conv2D(16, 8, 1), nn.AdaptiveAvgPool2D(1), nn.Flatten(),
        nn.Linear(8, 4),
    )  # fmt: skip
    network.eval()
    target = tmp_path_factory.mktemp("exported")
    export_inference(network, target, [[None, 3, 32, 32]])
    return target


def test_the_profile_of_a_real_run(folder):
    x = np.ones([2, 3, 32, 32], "float32")
    found = profile(folder, x, rounds=8, name="small", macs=7)
    calls = {share.kind: share.calls for share in found.shares}
    convolutions = {kind: number for kind, number in calls.items() if kind.startswith("convolution")}
    assert convolutions == {
        "convolution 3x3": 1, "convolution 1x5, depthwise": 1, "convolution 3x3, grouped": 1, "convolution 1x1": 1,
    }  # fmt: skip
    assert calls.get("pooling") == 1
    assert calls.get("inner product", 0) + calls.get("matmul", 0) == 1
    assert all(share.milliseconds > 0 for share in found.shares if share.kind != "reorder")
    assert [s.milliseconds for s in found.shares] == sorted((s.milliseconds for s in found.shares), reverse=True)
    assert (found.name, found.batch, found.macs) == ("small", 2, 7)
    assert found.weights_bytes == program_file(folder).with_suffix(".pdiparams").stat().st_size
    # oneDNN's clock and ours, around it, agree: nothing of the warm-up is in the sum.
    assert 0 < found.primitives < found.whole
    assert found.rest == pytest.approx(found.whole - found.primitives)
    assert found.without_log > 0
    assert "convolution 3x3, grouped" in str(found)


def test_a_network_without_oned_nn_has_no_profile(folder, monkeypatch):
    monkeypatch.setattr(profiling, "in_new_process", lambda *arguments: ([1.0] * 5, profiling._MARK * 5))
    with pytest.raises(ReparamError, match="oneDNN's log holds no primitive"):
        profile(folder, np.ones([1, 3, 32, 32], "float32"), rounds=5)


NEW = "onednn_verbose,v1,primitive,exec,cpu,{},undef,src:f32::blocked:acdb::f0,{},{},{}\n"
OLD = "onednn_verbose,exec,cpu,{},undef,src_f32::blocked:acdb::f0,{},{},{}\n"
WHOLE_KERNEL = "mb1_ic16oc16_ih8oh8kh51sh1dh0ph25_iw8ow8kw5sw1dw0pw2"


@pytest.mark.parametrize("line", [NEW, OLD])
@pytest.mark.parametrize(
    ("kind", "attributes", "problem", "called"),
    [
        ("convolution,brgconv:avx512_core", ",alg:convolution_direct", WHOLE_KERNEL, "convolution 51x5"),
        ("convolution,brdgmm_dw:avx512_core", ",alg:convolution_direct", f"g16{WHOLE_KERNEL}",
         "convolution 51x5, depthwise"),
        ("convolution,jit:avx2", "attr-post-ops:eltwise_relu ,alg:convolution_direct", f"g2{WHOLE_KERNEL}",
         "convolution 51x5, grouped"),
        ("binary,ref:any", ",alg:binary_add", "1x16x8x8:1x16x8x8", "binary add, reference code"),
        ("eltwise,jit:avx512_core", ",alg:eltwise_gelu_erf alpha:0 beta:0", "1x16x8x8", "eltwise gelu erf"),
        ("inner_product,gemm:jit", ",", "mb1ic8oc4", "inner product"),
    ],
)  # fmt: skip
def test_lines_of_both_formats_are_understood(line, kind, attributes, problem, called):
    text = line.format(kind, attributes, problem, "0.25")
    assert read_log(profiling._MARK + text + text, 1) == [{called: (2, 0.5)}]


def test_what_is_no_timed_primitive_is_left_out():
    line = NEW.format("pooling,jit:avx2", ",alg:pooling_avg", "mb1ic8", "0.5")
    others = [
        "onednn_verbose,v1,info,oneDNN v3.6.2\n",
        line.replace("primitive,exec", "primitive,create:cache_hit"),
        line.replace("primitive,exec", "graph,exec"),
        "a line of somebody else, 0.5\n",
    ]
    warm_up = line * 3
    log = warm_up + profiling._MARK + line + profiling._MARK + "".join(others) + line
    assert read_log(log, 2) == [{"pooling": (1, 0.5)}] * 2


def test_a_log_with_a_lost_line_is_refused():
    line = NEW.format("pooling,jit:avx2", ",alg:pooling_avg", "mb1ic8", "0.5")
    whole = profiling._MARK + line + line
    with pytest.raises(ReparamError, match="2 runs with 2 different sets of primitives"):
        read_log(whole + profiling._MARK + line, 2)
    with pytest.raises(ReparamError, match=r"holds 2 runs .* there were 3 runs"):
        read_log(whole + whole, 3)


def test_only_the_middle_half_of_the_runs_counts(folder, monkeypatch):
    line = NEW.format("pooling,jit:avx2", ",alg:pooling_avg", "mb1ic8", "{}")
    took = [4.0, 900.0, 2.0, 0.001]
    log = "".join(profiling._MARK + line.format(ms) for ms in took)
    monkeypatch.setattr(profiling, "in_new_process", lambda *arguments: ([ms / 1000 for ms in took], log))
    found = profile(folder, np.ones([2, 3, 32, 32], "float32"), rounds=4)
    assert found.shares == [Share("pooling", 1, 1.5)]
    assert (found.whole, found.without_log) == (pytest.approx(1.5), pytest.approx(1.5))
    assert middle_half([1.0, 5.0, 3.0]) == [0, 2, 1]


def test_limits_are_those_of_the_first_network_and_of_the_memory():
    def of(name, macs, weights, milliseconds):
        return Profile(name, 2, macs, weights, [Share("matmul", 1, 1.0)], milliseconds, milliseconds)

    profiles = [of("plain", 100, 0, 8.0), of("other", 50, 20_000_000, 9.0), of("folder", None, 0, 9.0)]
    text = str(ProfileReport({}, {"threads": 1}, 1e9, profiles))
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith(("other  ", "folder  "))}
    assert rows == {"other": ["9.00", "4.00", "10.00"], "folder": ["9.00", "-", "0.00"]}
    assert "read from memory: 1.0 GB/s" in text


def test_all_of_a_run(folder):
    report = profile_all([Contender("a", "exported", folder, (3, 32, 32))], rounds=5, progress=lambda line: None)
    assert [each.name for each in report.profiles] == ["a"]
    assert report.memory_rate > 1e8
    assert report.machine["paddle"] == paddle.__version__


def test_a_rate_is_bytes_over_seconds():
    assert 1e8 < memory_rate(1, 2**26) < 1e13


def test_a_process_that_dies_is_told():
    import os

    with pytest.raises(ReparamError, match="the process that was to run it ended before it had"):
        in_new_process(os.abort)
    with pytest.raises(ReparamError, match="no such export: it must hold one exported program"):
        in_new_process(profiling._run, "no such export", np.ones([1]), 1, 1, True)
