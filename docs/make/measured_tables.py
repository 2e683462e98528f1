"""Write the tables of steps, runtimes, int8, comparisons, networks, the position prior and scenes on the pages.

A page shows `measured/NAME.json` between the lines `<!-- measured/NAME.json -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import comparison_table
import int8_table
import position_prior
import scenes_table

from paddle_reparam.analysis.observe import cell_of
from paddle_reparam.errors import exit_code
from paddle_reparam.files import atomic_write
from paddle_reparam.measure.steps import KernelReport, LayersReport, StepReport
from paddle_reparam.measure.ways import WaysReport
from paddle_reparam.report import format_markdown

DOCS = Path(__file__).resolve().parents[1]
#: What this module makes tables of.
FILES = ("step_*", "ways", "int8", "compare_*", "landscape_*", "field_*", "position_prior", "scenes")
BEGIN, END = "<!-- measured/{}.json -->", "<!-- end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    with exit_code() as result:
        print("\n".join(write_pages(DOCS)))
    return result[0]


def write_pages(folder: Path) -> list[str]:
    """Write every table of a folder's pages anew; return the pages that have any."""
    found = []
    for page in sorted(folder.glob("*.md")):
        old = new = page.read_text(encoding="utf-8")
        for file in sorted(file for name in FILES for file in (folder / "measured").glob(f"{name}.json")):
            before, begin, rest = new.partition(BEGIN.format(file.stem))
            if begin:
                new = f"{before}{begin}\n{to_markdown(file)}\n{END}{rest.partition(END)[2]}"
                found.append(page.name)
        if new != old:
            atomic_write(page, lambda path, new=new: path.write_text(new, encoding="utf-8"))
    return sorted(set(found))


def to_markdown(file: Path) -> str:
    """Return what a file holds as a table for a page, with the command that wrote it."""
    measured = json.loads(file.read_text(encoding="utf-8"))
    if "int8" in measured:
        return int8_table.to_markdown(measured)
    if "methods" in measured:
        return comparison_table.to_markdown(measured)
    if "rows" in measured:
        return f"`{measured['command']}`\n\n{of_rows(measured['rows'])}"
    if "scenes" in measured:
        return scenes_table.to_markdown(measured)
    if "position_prior" in measured:
        return position_prior.to_markdown(measured)
    if "networks" in measured:
        return WaysReport.from_dict(measured).to_markdown()
    kinds = {"kernels": KernelReport, "layers": LayersReport, "variants": StepReport}
    [report] = [kind(**measured) for key, kind in kinds.items() if key in measured]
    table = format_markdown(report.columns(), report.rows())
    return f"`{report.command}`\n\n{table}\n\n{report.conditions()}"


def of_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows that tools/analyze.py found as a table, without what is drawn of them."""
    kept = [{key: value for key, value in row.items() if not isinstance(value, list)} for row in rows]
    return format_markdown(
        [key.replace("_", " ") for key in kept[0]], [list(map(cell_of, row.values())) for row in kept]
    )


if __name__ == "__main__":
    sys.exit(main())
