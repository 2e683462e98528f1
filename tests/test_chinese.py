"""Every page is there in both languages, and a Chinese page that lags behind the English one is named."""

import importlib.util
import re
from collections import Counter

import pytest
from pages import ROOT

_spec = importlib.util.spec_from_file_location("chinese_pages", ROOT / "docs" / "make" / "chinese_pages.py")
chinese_pages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(chinese_pages)

PAGES = chinese_pages.pages()
of_each_page = pytest.mark.parametrize(
    ("english", "chinese"), PAGES.items(), ids=[page.relative_to(ROOT).as_posix() for page in PAGES]
)
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def prose_of(page) -> str:
    """Return a page without its blocks, its generated parts, and the line that leads to the other language."""
    text = page.read_text(encoding="utf-8")
    for pattern in (chinese_pages.PART, chinese_pages.BLOCK):
        text = pattern.sub("", text)
    title, switch, rest = text.split("\n\n", 2)
    return f"{title}\n\n{rest}" if "简体中文" in switch else text


def links_of(page, pictures: bool) -> list[str]:
    """Return what the links of a page lead to, by their English pages; or the pictures that it shows."""
    kind = r"!\[[^]]*\]" if pictures else r"(?<!!)\[[^]]*\]"
    english = {chinese: english for english, chinese in PAGES.items()}
    targets = []
    for link in re.findall(rf"{kind}\(([^)\s]+)\)", prose_of(page)):
        path = link if "://" in link else (page.parent / link).resolve()
        assert link == str(path) or path.exists(), f"{page.name} links {link}, which is not there"
        targets.append(str(english.get(path, path)))
    return targets


def test_no_page_is_in_chinese_alone():
    there = {*ROOT.glob("*_ch.md"), *(ROOT / "docs" / "ch").glob("*.md")}
    assert there == set(PAGES.values())


@of_each_page
def test_each_page_leads_to_the_other(english, chinese):
    here, there = (chinese_pages.os.path.relpath(b, a.parent) for a, b in ((english, chinese), (chinese, english)))
    assert english.read_text(encoding="utf-8").split("\n\n")[1] == f"English | [简体中文]({here})"
    assert chinese.read_text(encoding="utf-8").split("\n\n")[1] == f"[English]({there}) | 简体中文"


@of_each_page
def test_blocks_and_generated_parts_are_the_same(english, chinese):
    assert chinese_pages.in_step(english, chinese) == chinese.read_text(encoding="utf-8"), (
        "run python docs/make/chinese_pages.py"
    )


@of_each_page
def test_a_chinese_page_has_what_the_english_one_has(english, chinese):
    """Sections, rows of tables, items, links, pictures, names in code, and numbers of three digits or with a point."""
    theirs, ours = prose_of(english), prose_of(chinese)
    for what, pattern in (
        ("headings", r"^(#+) "),
        ("rows of tables", r"^(\|)"),
        ("items", r"^(\*) "),
    ):
        assert re.findall(pattern, ours, flags=re.M) == re.findall(pattern, theirs, flags=re.M), what
    for pictures in (True, False):
        assert Counter(links_of(chinese, pictures)) == Counter(links_of(english, pictures))
    for what, pattern in (("code", r"`([^`]+)`"), ("numbers", r"(?<![A-Za-z_\d.,])(\d[\d,]*\.\d+|\d{3,})")):
        found, wanted = (
            {re.sub(r"\s+", " ", each) for each in re.findall(pattern, re.sub(r"\]\([^)]*\)", "]", text))}
            for text in (ours, theirs)
        )
        assert found == wanted, f"{what}: {sorted(found ^ wanted)}"


@of_each_page
def test_links_stay_in_the_language(english, chinese):
    for link in re.findall(r"\]\(([^)\s:]+)\)", prose_of(chinese)):
        assert (chinese.parent / link).resolve() not in PAGES, f"{link} has a Chinese page"


@of_each_page
def test_nothing_is_left_in_english(english, chinese):
    """Headings that are a name aside."""
    paragraphs = [part for part in re.split(r"\n\s*\n", prose_of(chinese)) if part.strip()]
    assert [part for part in paragraphs if not CHINESE.search(part) and not re.match(r"#+ [\w ,-]+$", part)] == []


# ---------------------------------------------------------------------------------------------------------------------
# The test of the tests


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n## ", "\n### ", 1),
        lambda text: re.sub(r"^\|.*\n", "", text, count=1, flags=re.M),
        lambda text: re.sub(r"^!\[.*\n", "", text, count=1, flags=re.M),
        lambda text: text.replace("](https://arxiv.org/abs/2310.10563)", "](https://arxiv.org/abs/2310.10564)"),
        lambda text: text.replace("1.47", "1.48"),
        lambda text: text.replace("`plain.pdparams`", "`plain.npz`"),
        lambda text: text.replace("python tools/eval.py", "python tools/evaluate.py"),
        lambda text: text.replace("| retrain | 48.90", "| retrain | 48.91"),
    ],
)
def test_a_change_of_one_page_alone_is_found(change, monkeypatch):
    english, chinese = ROOT / "docs" / "refconv.md", ROOT / "docs" / "ch" / "refconv.md"
    changed = change(chinese.read_text(encoding="utf-8"))
    assert changed != chinese.read_text(encoding="utf-8")
    read = type(chinese).read_text
    monkeypatch.setattr(
        type(chinese), "read_text", lambda path, *given, **kw: changed if path == chinese else read(path, *given, **kw)
    )

    def compare():
        test_blocks_and_generated_parts_are_the_same(english, chinese)
        test_a_chinese_page_has_what_the_english_one_has(english, chinese)

    with pytest.raises((AssertionError, chinese_pages.ReparamError)):
        compare()


def test_the_command_copies_blocks_and_keeps_translated_comments(tmp_path, monkeypatch, capsys):
    english, chinese = tmp_path / "page.md", tmp_path / "ch" / "page.md"
    monkeypatch.setattr(chinese_pages, "ROOT", tmp_path)
    monkeypatch.setattr(chinese_pages, "pages", lambda: {english: chinese})
    chinese.parent.mkdir()
    translated = "```bash\nmake test  # 全部\n```\n"
    block, other = "```bash\nmake test  # all of it\n```\n", "```python\nprint(1)\n```\n"
    english.write_text(f"Text\n\n{block}\n{other}\n<!-- table -->\n[x](page.md) [y](z.png)\n<!-- end -->\n")
    chinese.write_text(f"文字\n\n{translated}\n{other.replace('1', '2')}\n<!-- t -->\n<!-- end -->\n")
    assert chinese_pages.main([]) == 0
    assert capsys.readouterr().out.strip() == "ch/page.md"
    assert chinese.read_text() == (
        f"文字\n\n{translated}\n{other}\n<!-- table -->\n[x](page.md) [y](../z.png)\n<!-- end -->\n"
    )
    english.write_text(f"{english.read_text()}\n{block}")
    assert chinese_pages.main([]) == 1
    assert "ch/page.md has 2 blocks of code, page.md has 3; translate what is new there" in capsys.readouterr().err
