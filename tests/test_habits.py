"""What a project keeps beside its code: what changed, the table of findings, forms for issues."""

import re

import pytest
import yaml
from pages import ROOT

import paddle_reparam

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
# CHANGELOG


def test_modules_moved_as_the_changelog_says():
    rows = re.findall(r"^\| (`.+`) \| `paddle_reparam([\w.]*)`", CHANGELOG, flags=re.M)
    assert len(rows) > 7
    for old, new in rows:
        for name in re.findall(r"`([\w.]+)`", old):
            module, _, function = name.partition(".")
            place = PACKAGE.joinpath(*new.strip(".").split("."))
            if function:
                assert re.search(rf"^def {function}\(", place.with_suffix(".py").read_text("utf-8"), flags=re.M), name
            else:
                assert (place / f"{module}.py").is_file() or (place / module / "__init__.py").is_file(), name
                assert not new or not (PACKAGE / f"{module}.py").exists(), f"{name} is where it was"


def test_the_newest_entry_is_this_version():
    assert re.findall(r"^## ([\d.]+)", CHANGELOG, flags=re.M)[0] == paddle_reparam.__version__
