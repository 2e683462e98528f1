"""docs/other_tasks.md: every network of the three tasks is there, with the sizes that it has."""

import pytest
import task_table

ROWS = {
    tuple(cell.strip() for cell in line.strip("|").split("|"))[:3]: line
    for line in task_table.TABLE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| task", "| ---"))
}
ENTRIES = list(task_table.entries())


def test_the_page_has_every_network():
    assert set(ROWS) == {entry[:3] for entry in ENTRIES}


@pytest.mark.parametrize("entry", [e for e in ENTRIES if min(e[3]) < 512], ids=lambda entry: entry[1])
def test_a_row_is_what_is_counted(entry):
    cells = " | ".join(task_table.row_of(entry))
    assert ROWS[entry[:3]] == f"| {cells} |", "run python docs/make/task_table.py"
