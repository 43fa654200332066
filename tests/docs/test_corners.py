"""The page of corners is that of the marked tests."""

import runpy
from pathlib import Path

import pytest
from support.doc_pages import ROOT

MAKER = runpy.run_path(str(ROOT / "docs" / "make_corners.py"))
FOUND = MAKER["corners"]()


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "corners.md").read_text(encoding="utf-8") == MAKER["page"](FOUND), (
        f"run: {MAKER['COMMAND']}"
    )


def test_every_row_is_two_different_texts_and_no_situation_stands_twice() -> None:
    assert len(FOUND) >= 10
    assert all(len(row.situation.split()) >= 3 and len(row.answer.split()) >= 1 for row in FOUND)
    assert len({(row.area, row.situation) for row in FOUND}) == len(FOUND)


def test_only_functions_that_pytest_runs_are_marked() -> None:
    assert [row.test for row in FOUND if not row.test.partition("::")[2].startswith("test_")] == []
    marks = sum(
        path.read_text(encoding="utf-8").count("@pytest.mark.corner(") for path in (ROOT / "tests").rglob("test_*.py")
    )
    assert marks - Path(__file__).read_text(encoding="utf-8").count("@pytest.mark.corner(") == len(FOUND)


def test_a_marked_test_in_a_folder_without_a_heading_raises(tmp_path: Path) -> None:
    (tmp_path / "tests" / "elsewhere").mkdir(parents=True)
    marked = '@pytest.mark.corner("a | b", "raises")\ndef test_it(): ...\n'
    (tmp_path / "tests" / "elsewhere" / "test_one.py").write_text(marked)
    found = MAKER["corners"](tmp_path / "tests")
    assert found == [("elsewhere", "a | b", "raises", "tests/elsewhere/test_one.py::test_it")]
    with pytest.raises(ValueError, match="AREAS"):
        MAKER["page"](found)
    page = MAKER["page"]([MAKER["Corner"]("gates", *found[0][1:])])
    assert "| a \\| b | raises | `elsewhere/test_one.py` |" in page
