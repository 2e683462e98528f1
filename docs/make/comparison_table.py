"""Take the result of a comparison, `result.json` of tools/compare.py, into the pages: its file and its picture.

They become `measured/compare_NAME.json` and `images/compare_NAME.png`; `measured_tables.py` writes the tables of it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from paddle_reparam.analysis.comparison import PLAIN, ComparisonReport
from paddle_reparam.analysis.comparison_figures import draw_cost
from paddle_reparam.errors import ReparamError, exit_code, one_sentence
from paddle_reparam.files import atomic_write
from paddle_reparam.measure.timing import conditions
from paddle_reparam.ppcls.methods import RETRAIN
from paddle_reparam.report import format_markdown
from paddle_reparam.style import digest_of, save_with_digest

DOCS = Path(__file__).resolve().parents[1]
#: Methods that the command does not name: they come by themselves.
_BY_THEMSELVES = {PLAIN, RETRAIN}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 1 with one sentence where the file is no comparison, or unfinished."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="the file result.json of a comparison")
    parser.add_argument("name", help="of the file and the picture in docs/")
    given = parser.parse_args(arguments)
    with exit_code() as result, one_sentence(f"{given.result} cannot be taken"):
        text = given.result.read_text(encoding="utf-8")
        report = ComparisonReport.from_dict(json.loads(text))
        if not report.costs:
            raise ReparamError("what its methods cost was not measured; give its command again")
        file, picture = DOCS / "measured" / f"compare_{given.name}.json", DOCS / "images" / f"compare_{given.name}.png"
        atomic_write(file, lambda path: path.write_text(text, encoding="utf-8"))
        atomic_write(picture, lambda path: save_with_digest(draw_cost(report), path, digest_of(report.to_dict())))
        print(f"written: {file.relative_to(DOCS)}, {picture.relative_to(DOCS)}")
    return result[0]


def to_markdown(measured: Mapping[str, Any]) -> str:
    """Return the command, the table, what can be said of it, and every run, those that failed too, for a page."""
    report = ComparisonReport.from_dict(measured)
    measured_on = conditions(report.costs["machine"], report.costs["threads"])
    said = f"{report.epochs} epochs. Steps and latencies: {measured_on}."
    heads = ["every run, %", *(f"seed {seed}" for seed in report.seeds)]
    runs = [
        [each.method, *(f"{each.accuracy[seed]:.2f}" if seed in each.accuracy else "failed" for seed in report.seeds)]
        for each in report.methods
    ]
    failed = [f"* {run}: {why}" for run, why in report.failed.items()]
    parts = [command_of(report), report.markdown().rstrip(), said, format_markdown(heads, runs), "\n".join(failed)]
    return "\n\n".join(part for part in parts if part)


def command_of(report: ComparisonReport) -> str:
    """Return the command that compares the same, as code."""
    config = report.source["config"]
    words = ["python", "tools/compare.py", "-c", config["name"]]
    words += [word for override in config["overrides"] for word in ("-o", override)]
    words += ["--methods", *(each.method for each in report.methods if each.method not in _BY_THEMSELVES)]
    words += ["--seeds", str(len(report.seeds)), "--output", f"output/compared/{report.network}"]
    return f"`{shlex.join(words)}`"


if __name__ == "__main__":
    sys.exit(main())
