"""What a project keeps beside its code: how to contribute, what changed, the table of findings, forms for issues."""

import re
import sys
import types

import contract
import paddle
import pytest
import yaml
from contract import CHECKS, Case
from helpers import randomise_batch_norms, relative_error
from pages import ROOT, blocks_of, commands_of

import paddle_reparam
from paddle_reparam import registry

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "paddle_reparam"
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_findings_table_names_every_script_and_no_other():
    """Each row is a script and its own first sentence."""
    rows = re.findall(
        r"^\| \[(\S+)\]\(\1\) \| (.+) \|$", (ROOT / "findings" / "README.md").read_text("utf-8"), flags=re.M
    )
    scripts = sorted(path for path in (ROOT / "findings").iterdir() if path.suffix != ".md")
    assert rows == [(path.name, path.read_text("utf-8").splitlines()[1].removeprefix("# ")) for path in scripts]
    assert [path for path in scripts if not path.stat().st_mode & 0o100] == []


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_for_issues_are_in_both_languages(path):
    form = yaml.safe_load(path.read_text("utf-8"))
    fields = [field["attributes"] for field in form["body"]]
    texts = [form["name"], form["description"], *(field[key] for field in fields for key in field if key != "render")]
    assert [text for text in texts if not re.fullmatch(r"[^\u4e00-\u9fff]+ / .*[\u4e00-\u9fff].*", text.strip())] == []
    identifiers = [field["id"] for field in form["body"]]
    assert len(set(identifiers)) == len(identifiers)
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_there_are_three_forms():
    assert [path.stem for path in FORMS] == ["bug_report", "feature", "wrong_result"]


# ---------------------------------------------------------------------------------------------------------------------
# CONTRIBUTING


@pytest.fixture
def examples(monkeypatch):
    """The modules that CONTRIBUTING shows, each imported as the file that it says; registered for this test alone."""
    for registered in (registry._layers, registry._models):
        monkeypatch.setattr(registered, "_entries", dict(registered._entries))
    modules = []
    for kind, (_, block) in zip(
        ("layers", "models"), [each for each in blocks_of(CONTRIBUTING) if each[0] == "python"]
    ):
        name = f"paddle_reparam.{kind}.twin"
        module = types.ModuleType(name)
        module.__package__ = f"paddle_reparam.{kind}"
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(block, name, "exec"), module.__dict__)
        modules.append(module)
    return modules


def test_the_layer_of_the_example_keeps_the_contract(examples):
    layer = registry.get_layer("TwinConv2D").layer
    for case in (Case(4, 6, 3, {"padding": 1, "stride": 2, "data_format": "NHWC"}), Case(8, 8, (1, 5), {"groups": 8})):
        for check in CHECKS:
            check(layer, case)
    contract.check_traces(layer, case)


def test_the_network_of_the_example_is_fused(examples):
    model = registry.create_model("TwinNet", class_num=3)
    randomise_batch_norms(model)
    model.eval()
    plain, report = paddle_reparam.reparameterize(model)
    x = paddle.randn([2, 3, 12, 10])
    assert len(report.touched) == 2
    assert relative_error(plain(x), model(x)) < 1e-5


def test_what_contributing_names_is_there():
    """Files, tables of tests, targets of make; those of the example aside."""
    spans = re.findall(r"`([^`\n]+)`", CONTRIBUTING)
    commands = [
        command for language, block in blocks_of(CONTRIBUTING) if language == "bash" for command in commands_of(block)
    ]
    paths = {span for span in spans if re.fullmatch(r"(tests|docs|paddle_reparam|arithmetic)/[\w./]*", span)}
    paths |= {path for command in commands for path in re.findall(r"(?:tests|docs)/\S+", command)}
    assert len(paths) > 8
    missing = {p for p in paths if not (ROOT / p).exists() and not (PACKAGE / p).exists()}
    assert missing == {"paddle_reparam/layers/twin.py", "tests/test_twin.py"}
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    assert {command.split()[1] for command in commands if command.startswith("make ")} <= set(targets)
    for table, file in (
        ("RECIPES", "test_configs"),
        ("PAPERS", "test_configs"),
        ("PAPERS", "test_papers_train"),
        ("SMALL", "test_every_network"),
    ):
        assert f"`{table}`" in CONTRIBUTING
        assert re.search(rf"^{table}\b.* = ", (ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"), flags=re.M)


# ---------------------------------------------------------------------------------------------------------------------
# CHANGELOG


def test_modules_moved_as_the_changelog_says():
    rows = re.findall(r"^\| (`.+`) \| `paddle_reparam([\w.]*)`", CHANGELOG, flags=re.M)
    assert len(rows) > 7
    for old, new in rows:
        for name in re.findall(r"`([\w.]+)`", old):
            module, _, function = name.partition(".")
            place = PACKAGE.joinpath(*new.strip(".").split("."))
            if function:
                assert re.search(
                    rf"^(def|class) {function}\b", place.with_suffix(".py").read_text("utf-8"), flags=re.M
                ), name
            else:
                assert (place / f"{module}.py").is_file() or (place / module / "__init__.py").is_file(), name
                assert not new or not (PACKAGE / f"{module}.py").exists(), f"{name} is where it was"


def test_the_newest_entry_is_this_version():
    assert re.findall(r"^## ([\d.]+)", CHANGELOG, flags=re.M)[0] == paddle_reparam.__version__
