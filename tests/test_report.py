"""Reports: JSON that any reader takes, and tables."""

import json
from dataclasses import dataclass, field

import numpy as np

from paddle_reparam.errors import ReparamError, exit_code
from paddle_reparam.report import Report, format_table


@dataclass
class Inner:
    path: str
    error: float


@dataclass
class Outer(Report):
    error: float
    count: int
    places: list = field(default_factory=list)
    counts: dict = field(default_factory=dict)


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_report_is_json_with_all_of_its_parts():
    report = Outer(0.5, 3, [("a.b", "done"), Inner("c", 1e-7)], {3: 1, "BNs": 2})
    expected = {
        "error": 0.5,
        "count": 3,
        "places": [["a.b", "done"], {"path": "c", "error": 1e-7}],
        "counts": {"3": 1, "BNs": 2},
    }
    assert report.to_dict() == expected
    assert strict(report.to_json()) == expected


def test_what_json_has_no_number_for_is_written_as_text():
    report = Outer(float("inf"), np.int64(3), [float("nan"), np.float32("-inf"), np.bool_(True)])
    assert strict(report.to_json()) == {"error": "inf", "count": 3, "places": ["nan", "-inf", True], "counts": {}}


def test_a_table_aligns_numbers_to_the_right_and_words_to_the_left():
    table = format_table(["layer", "n"], [["a", 5], ["long.name", 100]])
    assert table.splitlines() == ["layer        n", "---------  ---", "a            5", "long.name  100"]


def test_a_table_without_rows_has_its_header():
    assert format_table(["layer", "what"], []).splitlines() == ["layer  what", "-----  ----"]


def test_what_a_terminal_would_obey_is_written_out(capsys):
    text = "a\x1b[2Jb\r\u202ec\ud800"
    assert format_table(["label"], [[text], ["猫\u3000é\u200d"]]).splitlines()[2:] == [
        r"a\x1b[2Jb\r\u202ec\ud800",
        "猫\u3000é\u200d",
    ]
    with exit_code() as result:
        raise ReparamError(text)
    assert result == [1]
    assert capsys.readouterr().err == "error: a\\x1b[2Jb\\r\\u202ec\\ud800\n"
