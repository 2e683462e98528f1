"""What a project keeps beside its code: the findings' table, and the forms for issues."""

import re

import pytest
import yaml
from pages import ROOT

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
