"""The published results say what the committed result files say."""

from pathlib import Path
from types import ModuleType

import pytest
from support.doc_pages import docs_script

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def update_results() -> ModuleType:
    return docs_script("update_results")


@pytest.mark.slow
def test_every_table_is_what_its_result_files_say(update_results: ModuleType) -> None:
    blocks = 0
    for path in update_results.WRITTEN:
        text = path.read_text()
        blocks += len(update_results.BLOCK.findall(text))
        assert update_results.updated(text) == text
    assert blocks >= 9


@pytest.mark.slow
def test_a_table_that_was_edited_by_hand_is_noticed(update_results: ModuleType) -> None:
    text = (DOCS / "results.md").read_text()
    assert "| route |" in text
    assert update_results.updated(text.replace("| route |", "| ROUTE |", 1)) == text
    with pytest.raises(KeyError, match="no-such-table"):
        update_results.updated("<!-- table: no-such-table -->\n<!-- end -->")


def test_every_figure_and_file_that_is_linked_is_there() -> None:
    text = (DOCS / "results.md").read_text()
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links
    files = [link.partition("#")[0] for link in links if "://" not in link]
    assert all((DOCS / file).exists() for file in files)
