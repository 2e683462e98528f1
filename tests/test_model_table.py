"""docs/models.md is what its command writes today."""

from __future__ import annotations

import re

import model_table
import pytest

from paddle_reparam.measure import catalogue
from paddle_reparam.registry import Published, list_models

TEXT = model_table.TABLE.read_text(encoding="utf-8") if model_table.TABLE.exists() else ""
#: Building and counting the largest ones takes minutes; their rows are compared in all but the counted columns.
SMALL = 5.0
COUNTED = slice(3, 9)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def rows_of(text: str) -> dict[tuple[str, ...], list[str]]:
    """Return (network, options, input, published top-1, source) -> the cells of its row."""
    lines = [cells(line) for line in text.splitlines() if line.startswith("| ")][2:]
    return {(*line[:3], *line[9:11]): line for line in lines}


def blank_row(name: str, published: Published) -> catalogue.Row:
    return catalogue.Row(name, published, 0, catalogue.Sizes(0, 0, 0, 0, ""))


ROWS = rows_of(TEXT)
EXPECTED = rows_of(model_table.table_of([blank_row(*each) for each in catalogue.networks()]))


def test_every_network_is_in_the_table():
    assert TEXT.startswith(model_table.INTRODUCTION)
    assert {name for name, *_ in ROWS} == set(list_models())
    assert list(ROWS) == list(EXPECTED)


def test_what_is_not_counted_is_up_to_date():
    for key, row in EXPECTED.items():
        written = ROWS[key]
        assert written[:3] + written[9:] == row[:3] + row[9:], "run python docs/make/model_table.py"


def is_small(name: str, published: Published) -> bool:
    key = next(iter(rows_of(model_table.table_of([blank_row(name, published)]))))
    return key in ROWS and float(ROWS[key][3]) < SMALL


@pytest.mark.parametrize(
    "each", [e for e in catalogue.networks() if is_small(*e)], ids=lambda e: f"{e[0]}-{e[1].options}"
)
def test_what_is_counted_is_up_to_date(each):
    [(key, row)] = rows_of(model_table.table_of([catalogue.measure_network(*each)])).items()
    assert ROWS[key][COUNTED] == row[COUNTED], "run python docs/make/model_table.py"


def test_links_lead_to_configs():
    links = re.findall(r"\]\((\S+)\)", TEXT)
    assert len(links) > 10
    assert not [link for link in links if not (model_table.TABLE.parent / link).is_file()]
