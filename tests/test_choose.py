"""docs/choose.md and docs/compare.md: their commands run, and the table has every layer, with what it really keeps."""

import json
import re

import paddle
import pytest
from pages import ROOT, blocks_of, commands_of, cut_short, keep_few, named_files, run_here
from PIL import Image

from paddle_reparam import list_layers
from paddle_reparam.analysis.comparison import ComparisonReport
from paddle_reparam.deploy import checks
from paddle_reparam.deploy.runtimes import proving
from paddle_reparam.measure import timing
from paddle_reparam.ppcls import costs
from paddle_reparam.registry import get_layer
from paddle_reparam.style import DIGEST, digest_of

PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("choose", "compare")}
ROWS = {
    name: [cell.strip() for cell in line.split("|")[1:-1]]
    for line in PAGES["choose"].splitlines()
    if line.startswith("| `") and line.count("|") == 7
    for name in re.findall(r"`(\w+)`", line.split("|")[1])
}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_the_page_runs_in_order(page, tmp_path, monkeypatch):
    # What is timed and what is compared in other runtimes takes most of the time: test_compare.py does those.
    monkeypatch.setattr(costs, "in_process_of", lambda threads, function, *arguments: function(*arguments))
    monkeypatch.setattr(costs, "_ROUNDS", timing.FEWEST_ROUNDS)
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    monkeypatch.setattr(checks, "proving", lambda folder, *given: proving(folder, *given)[:1])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ppcls_configs").symlink_to(ROOT / "ppcls_configs")
    for language, block in blocks_of(PAGES[page]):
        if language == "python":
            exec(compile(block, page, "exec"), {})
            continue
        for command in commands_of(block):
            run_here(cut_short(command.replace("--seeds 3", "--seeds 1")))
            if "prepare_data" in command:
                keep_few(tmp_path)
    for result in tmp_path.glob("output/digits/*/result.json"):
        assert not json.loads(result.read_text(encoding="utf-8"))["failed"]
        assert {"table.md", "cost.png", "curves.png", "runs", "costs"} <= {
            path.name for path in result.parent.iterdir()
        }
    assert bool(list(tmp_path.glob("output/digits/*/result.json"))) == (page == "compare")


def test_the_table_has_every_layer_and_says_what_it_keeps():
    assert ROWS.keys() == set(list_layers())
    for name, (*_, keeps, _, _) in ROWS.items():
        options = get_layer(name).layer.keeps_function_with
        said = {None: "no", "{}": "yes"}.get(options if options is None else str(options))
        said = said or ", ".join(f"`{option}={value}`" for option, value in options.items())
        assert keeps == said, f"{name}: the page says {keeps}, it is {said}"


def test_what_ships_as_one_convolution_does():
    for name, row in ROWS.items():
        one = re.search("one (dense |depthwise )?convolution", row[-1]) is not None
        assert one == (get_layer(name).layer.fused_type is paddle.nn.Conv2D), f"{name}: the page says {row[-1]}"


@pytest.mark.parametrize("page", PAGES)
def test_the_page_names_files_that_are_there(page):
    assert not [name for name in named_files(PAGES[page]) if not (ROOT / name).exists()]


@pytest.mark.parametrize(
    "file", sorted((ROOT / "docs" / "measured").glob("compare_*.json")), ids=lambda file: file.stem
)
def test_the_picture_of_a_comparison_is_of_its_file(file):
    report = ComparisonReport.from_dict(json.loads(file.read_text(encoding="utf-8")))
    with Image.open(ROOT / "docs" / "images" / f"{file.stem}.png") as picture:
        assert picture.info[DIGEST] == digest_of(report.to_dict())
    for page in ("choose.md", "ch/choose.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert f"images/{file.stem}.png)" in text
        assert report.markdown().strip() in text
