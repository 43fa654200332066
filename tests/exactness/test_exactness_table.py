"""The committed table is that of these tests."""

from pathlib import Path

import matrix
import pytest

pytestmark = pytest.mark.touches_peft

TABLE = Path(__file__).parents[2] / "docs" / "exactness.md"


@pytest.fixture
def committed(pytestconfig: pytest.Config) -> str:
    """The text of the committed table."""
    if pytestconfig.getoption("--write-exactness") is not None:
        pytest.skip("the table is being written")
    return TABLE.read_text(encoding="utf-8")


def test_the_committed_table_lists_exactly_the_cells_of_the_tests(committed: str) -> None:
    declared = [str(cell) for cell in matrix.all_cells()]
    assert declared
    assert sorted(matrix.cells_in(committed)) == sorted(declared), f"run: {matrix.COMMAND}"


def test_the_committed_page_begins_with_what_its_table_holds(committed: str) -> None:
    assert matrix.findings(committed) in committed
    row = "| a cell | llama, qwen3 | PEFT | exact: 2e-15 (1e-12) |\n"
    assert matrix.findings(committed + row) == matrix.findings(committed)  # what other tests measured is not counted
    assert matrix.findings(committed.replace(matrix.OTHERS, row + matrix.OTHERS)) != matrix.findings(committed)
    with pytest.raises(ValueError, match="every result"):
        matrix.findings(row.replace("exact:", "about"))


@pytest.mark.parametrize("blemish", ["FAILED", "NOT EXACT", "NOT CLOSE", "not run here"])
def test_every_cell_of_the_committed_table_holds(blemish: str, committed: str) -> None:
    assert blemish not in committed


def test_a_table_with_an_empty_cell_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "RESULTS", {})
    with pytest.raises(ValueError, match="were not run"):
        matrix.table()


def test_an_error_above_its_tolerance_fails_and_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "RESULTS", {})
    cell = matrix.Cell("a cell", "llama", "PEFT")
    with pytest.raises(AssertionError):
        matrix.Record(cell).exact(2e-3, 1e-12)
    assert matrix.RESULTS[cell] == matrix.Result("NOT EXACT: {error} (1e-12)", 2e-3)


def test_errors_are_rounded_up() -> None:
    assert [matrix._rounded_up(error) for error in (0.0, 1.2e-15, 9e-7, 0.0021, 0.95)] == [
        "0",
        "1e-14",
        "1e-06",
        "3e-03",
        "1e+00",
    ]
