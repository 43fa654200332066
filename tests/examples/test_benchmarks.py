"""The benchmarks run, and the page says what was measured."""

import json
import math

import pytest

from benchmarks import report
from benchmarks.__main__ import GOALS, measure, parse_arguments
from benchmarks.row import Row

# P7 and P9 start processes of their own, and are one command each.
PARTS = [name for name in GOALS if name not in ("P7", "P9")]


@pytest.mark.slow
def test_every_part_runs_on_tiny_shapes() -> None:
    found = measure(parse_arguments(["--quick", "--threads", "1", "--only", ",".join(PARTS)]))
    assert {row["goal"] for row in found["rows"]} >= {name for name in PARTS if name.startswith("P")}
    assert all(math.isfinite(row["value"]) and row["value"] >= 0 for row in found["rows"])
    assert set(found["wall_s"]) == set(PARTS)
    assert json.loads(json.dumps(found)) == found
    for make in report.TABLES.values():
        assert "|" in make(found) or make in (report.findings, report.setting)


def test_the_page_is_what_its_result_file_says() -> None:
    text = report.PAGE.read_text()
    assert {match[1] for match in report.BLOCK.findall(text)} == set(report.TABLES)
    assert report.updated(text, json.loads(report.RESULTS.read_text())) == text
    assert "| P1 |" in text
    edited = text.replace("| P1 |", "| P0 |", 1)
    assert report.updated(edited, json.loads(report.RESULTS.read_text())) == text


def test_a_goal_is_met_at_its_limit_and_not_above_it() -> None:
    assert Row("P1", "a ratio", 0.97, 0.97).met
    assert not Row("P1", "a ratio", 0.971, 0.97).met
    assert Row("", "a ratio", 0.97).met is None


@pytest.mark.parametrize(
    "arguments", [["--only", "P0"], ["--threads", "0"], ["--threads", "two"], ["--write-docs", "--quick"]]
)
def test_what_cannot_be_measured_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
