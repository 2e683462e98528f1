"""Copy what is the same in every language, blocks of code and generated parts, from the English pages to the Chinese.

A generated part stands between `<!-- what it is -->` and `<!-- end -->`. Comments in blocks may be translated.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from paddle_reparam.errors import ReparamError, exit_code  # noqa: E402
from paddle_reparam.files import atomic_write  # noqa: E402

BLOCK = re.compile(r"^```\w+\n.*?^```$", re.M | re.S)
PART = re.compile(r"^<!-- (?!end)[^\n]+ -->$.*?^<!-- end -->$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
_COMMENT = re.compile(r"\s*(?<!\S)# .*")


def pages() -> dict[Path, Path]:
    """Return English page -> Chinese page: README.md beside README_ch.md, docs/x.md above docs/ch/x.md."""
    roots = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
    of_docs = {page: page.parent / "ch" / page.name for page in sorted((ROOT / "docs").glob("*.md"))}
    return {**{page: page.with_name(f"{page.stem}_ch.md") for page in roots}, **of_docs}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 with one sentence where a page has another number of blocks."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(arguments)
    with exit_code() as result:
        for english, chinese in pages().items():
            old = chinese.read_text(encoding="utf-8")
            new = in_step(english, chinese)
            if new != old:
                atomic_write(chinese, lambda path, new=new: path.write_text(new, encoding="utf-8"))
                print(chinese.relative_to(ROOT))
    return result[0]


def in_step(english: Path, chinese: Path) -> str:
    """Return the Chinese page with the English one's blocks and generated parts, translated comments kept."""
    original, text = (page.read_text(encoding="utf-8") for page in (english, chinese))
    # A part may hold blocks, so that parts come last.
    for pattern, what in ((BLOCK, "blocks of code"), (PART, "generated parts")):
        wanted, found = pattern.findall(original), pattern.findall(text)
        if len(wanted) != len(found):
            raise ReparamError(
                f"{chinese.relative_to(ROOT)} has {len(found)} {what}, {english.relative_to(ROOT)} has {len(wanted)}; "
                "translate what is new there, or take out what is gone"
            )
        copied = map(lambda old, new: _copied(old, new, english, chinese), found, wanted)
        text = pattern.sub(lambda _, copied=copied: next(copied), text)
    return text


def without_comment(line: str) -> str:
    """Return a line of code without the comment that may be translated."""
    return _COMMENT.sub("", line)


def _copied(old: str, new: str, english: Path, chinese: Path) -> str:
    """Return the English block or part for the Chinese page; `old` is what stands there."""
    if new.startswith("<!--"):
        return LINK.sub(lambda link: f"]({moved(link[1], english, chinese)})", new)
    before, after = old.splitlines(), new.splitlines()
    if [without_comment(line) for line in before] == [without_comment(line) for line in after]:
        return old
    return new


def moved(link: str, english: Path, chinese: Path) -> str:
    """Return a link of the English page as the Chinese one needs it: to its own pages where there are any."""
    if "://" in link or link.startswith("#"):
        return link
    target = (english.parent / link).resolve()
    return Path(os.path.relpath(pages().get(target, target), chinese.parent)).as_posix()


if __name__ == "__main__":
    sys.exit(main())
