"""Every command of every page of docs/ runs, in order, in a copy of the project; the pictures are what is drawn."""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import draw_pictures as pictures
import numpy as np
import pytest
from paddle import nn
from pages import ROOT, blocks_of, commands_of, copy_project, cut_short, keep_few, named_files, run
from PIL import Image

from paddle_reparam import create_model, list_layers
from paddle_reparam.style import DIGEST, DPI

PAGES = sorted((ROOT / "docs").glob("*.md"))
#: The pages with commands and a picture; test_serving.py, test_tasks.py, test_recognition.py, test_deploy.py,
#: test_choose.py, test_ppdet.py, test_segmentation.py and test_two_processes.py run others, and what has no command
#: describes the project.
_ELSEWHERE = (
    "serving", "tasks", "deploy", "compare", "choose", "detection", "faces", "machines", "segmentation",
)  # fmt: skip
TEXTS = {
    page.stem: page.read_text(encoding="utf-8")
    for page in PAGES
    if page.stem not in _ELSEWHERE and "```bash" in page.read_text("utf-8")
}
PAPERS = sorted(TEXTS.keys() - {"monitor"})
#: Page -> what it draws of a whole network.
WHOLE_NETWORKS = {"refconv": ["landscape"], "slak": ["field"]}
PREPARE = "python tools/prepare_data.py digits --output dataset/digits"


def test_there_is_a_page_for_each_paper():
    assert set(PAPERS) == {"refconv", "spconv", "slak", "dcd", "repmlp"}
    for page in PAPERS:
        assert "](monitor.md)" in TEXTS[page]


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A copy of the project with a few of the digits, written by the command with which every page begins."""
    folder = tmp_path_factory.mktemp("project")
    copy_project(folder)
    run(PREPARE, folder)
    keep_few(folder)
    return folder


def commands_on(page: str) -> list[str]:
    return [command for _, block in blocks_of(TEXTS[page]) for command in commands_of(block)]


@pytest.fixture(scope="session")
def runs(project, request):
    """Every page that is asked for -> its run; two of them at a time, as each needs one core."""
    wanted = {item.callspec.params["page"] for item in request.session.items if "runs" in item.fixturenames}
    with ThreadPoolExecutor(2) as pool:
        yield {page: pool.submit(run_page, project, page) for page in sorted(wanted)}


def run_page(folder: Path, page: str) -> None:
    for command in commands_on(page)[1:]:
        if " --input " in command:
            command = with_published_weights(command, folder)
        # Of a few images there are two steps, and masks are to move after the first.
        run(cut_short(command.replace("update_frequency=10", "update_frequency=1")), folder)


#: Network that a page converts weights for -> options that make it small.
SMALL = {
    "MobileNetV2_x1_0_DCD": {},
    "RepMLPNet_T224": {"image_size": 32},
    "ResNet50_SPConv": {},
    "SLaK_tiny": {"width_factor": 0.1, "kernel_size": [9, 7, 5, 5, 3]},
}


def with_published_weights(command: str, folder: Path) -> str:
    """Write the file that a conversion reads, of a small network, and return the command for it.

    PyTorch, which reads the published files, is none of the packages that the tests need: it is an .npz file.
    """
    name, file = (re.search(rf" --{option} (\S+)", command)[1] for option in ("model", "input"))
    state, random = {}, np.random.default_rng(0)
    model = create_model(name, **SMALL[name])
    of_linears = {f"{path}.weight" for path, layer in model.named_sublayers() if isinstance(layer, nn.Linear)}
    for key, tensor in model.state_dict().items():
        array = random.normal(0.0, 0.1, tensor.shape).astype("float32")
        array = array.T if key in of_linears else array
        if key.endswith("._mean"):
            state[key.replace("._mean", ".num_batches_tracked")] = np.array(7)
        if key.endswith("._variance"):
            array = 0.5 + np.abs(array)
        key = key.replace("._mean", ".running_mean").replace("._variance", ".running_var")
        if name == "MobileNetV2_x1_0_DCD":
            key = re.sub(r"\.([qp])\.weight$", r".conv_\1.weight", key)
        state[key] = array
    np.savez(folder / f"{file}.npz", **state)
    options = "".join(f" --option '{key}={value}'" for key, value in SMALL[name].items())
    return command.replace(file, f"{file}.npz") + options


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_every_block_is_run(page):
    assert {language for language, _ in blocks_of(TEXTS[page])} == {"bash"}
    first, *others = commands_on(page)
    assert first == PREPARE
    tools = [re.match(r"python (?:tools|docs/make)/(\w+)\.py ", command)[1] for command in others]
    assert ({"train", "eval", "reparam", "analyze"} if page in PAPERS else {"train", "draw_monitor"}) <= set(tools)


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_every_command_runs_in_order(project, runs, page):
    runs[page].result()
    if page == "monitor":
        with (
            Image.open(project / "output" / "monitor" / "monitor.png") as drawn,
            Image.open(ROOT / "docs" / "images" / "monitor.png") as shown,
        ):
            assert drawn.size == shown.size
        return
    results = project / "output" / "digits" / page
    assert (results / "shipped" / "manifest.json").is_file()
    assert {path.name for path in (results / "figures").iterdir()} == {"analysis.json", f"{page}.png"}
    for whole in WHOLE_NETWORKS.get(page, ()):
        assert {path.suffix for path in (results / whole).iterdir()} == {".json", ".png"}


# ---------------------------------------------------------------------------------------------------------------------
# Text and pictures


@pytest.mark.parametrize("page", sorted(TEXTS))
def test_what_a_page_names_exists(page):
    text = TEXTS[page]
    assert not [name for name in named_files(text) if not (ROOT / name).exists()]
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (ROOT / "docs" / link).exists()]


def test_every_layer_is_in_the_readme_and_on_the_page_that_it_links():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in list_layers():
        [row] = [line for line in readme.splitlines() if line.startswith("|") and f"`{name}`" in line]
        [page] = re.findall(r"\(docs/(\w+)\.md\)", row)
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        assert f"`{name}`" in text, f"{page}.md does not name {name}"


def test_every_paper_has_its_picture():
    assert set(pictures.PICTURES) == set(PAPERS)
    drawn_elsewhere = {"benchmarks", "refocus_cifar10", "landscape_cifar10", "field_digits", "compare_cifar10_ResNet20"}
    assert {path.stem for path in (ROOT / "docs" / "images").iterdir()} - drawn_elsewhere == set(TEXTS)
    for page, text in TEXTS.items():
        assert f"(images/{page}.png)" in text


@pytest.mark.parametrize("page", PAPERS)
def test_the_pictures_are_what_the_code_draws(page):
    with Image.open(ROOT / "docs" / "images" / f"{page}.png") as picture:
        drawn = picture.info[DIGEST]
        assert picture.width == 11 * DPI
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100
    assert drawn == pictures.PICTURES[page]().digest(), "run python docs/make/draw_pictures.py"


def test_drawing_one_picture_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    assert pictures.main(["refconv"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["refconv.png"]
    shutil.rmtree(tmp_path)
    tmp_path.write_text("no folder")
    assert pictures.main(["refconv"]) == 1
    with pytest.raises(SystemExit, match="2"):
        pictures.main(["refconf"])
