"""Writes `corners.md`: the situations that tests hold, and what the library does in each.

    python docs/make_corners.py

    @pytest.mark.corner("the situation", "what the library does there")       on a test function

The marks are read from the source, so that the page needs no test run. A section is a folder of tests.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "corners.md"
COMMAND = "python docs/make_corners.py"
AREAS = {
    "adapters": "Blocks, routes and views",
    "adapters/peft": "PEFT, checkpoints and exports",
    "directions": "Directions and captures",
    "gates": "Gates",
    "refresh": "Refreshing",
    "filters": "Filters",
    "optim": "Optimizers",
    "evaluation": "Evaluation",
    "integrations": "Trainers",
    ".": "Advantages and the rest",
}
"""Folder below `tests` -> heading, in the order of the page."""


class Corner(NamedTuple):
    """One row."""

    area: str
    situation: str
    answer: str
    test: str


def corners(tests: Path = ROOT / "tests") -> list[Corner]:
    """Every mark, in the order of the files."""
    return [corner for path in sorted(tests.rglob("test_*.py")) for corner in _marked(path, tests)]


def _marked(path: Path, tests: Path) -> Iterator[Corner]:
    folder = path.parent.relative_to(tests).as_posix()
    area = folder if folder in AREAS else folder.split("/")[0]
    for function in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(function, ast.FunctionDef):
            for mark in function.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.corner":
                    situation, answer = (ast.literal_eval(each) for each in mark.args)
                    yield Corner(
                        area, situation, answer, f"{path.relative_to(tests.parent).as_posix()}::{function.name}"
                    )


def page(found: list[Corner]) -> str:
    """The page in Markdown.

    Raises:
        ValueError: a marked test lies in a folder without a heading.
    """
    homeless = [corner.test for corner in found if corner.area not in AREAS]
    if homeless:
        raise ValueError(f"`AREAS` should name the folder of every marked test. Found {homeless}. Fix: add the folder.")
    lines = [
        "# Corners",
        "",
        "Situations in which a training run can go wrong silently, and what gradroute does in each. A test",
        f"checks every row; `{COMMAND}` writes the page from the tests. [Traps](traps.md) explains those that need",
        "an explanation. [Exactness](exactness.md) lists where gradients were compared.",
    ]
    for area, heading in AREAS.items():
        rows = [corner for corner in found if corner.area == area]
        if rows:
            lines += ["", f"## {heading}", "", "| situation | what happens | test |", "|---|---|---|"]
            lines += [f"| {_cell(row.situation)} | {_cell(row.answer)} | {_test(row.test)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _test(test: str) -> str:
    """The file only: names of tests are sentences, too long for a table."""
    return f"`{test.partition('::')[0].removeprefix('tests/')}`"


if __name__ == "__main__":
    PAGE.write_text(page(corners()), encoding="utf-8")
    print(PAGE)
