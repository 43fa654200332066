"""The exactness matrix: which cells there are, what a test found in each, and the table of all of them.

A test declares its cells with `cells(...)` and fills each of them through the fixture `record`: with the error reached
and the tolerance, with the exception that refused, or with what it saw.
"""

import importlib
import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

COMMAND = 'pytest -m "" tests/exactness --write-exactness docs/exactness.md'


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    name: str
    model: str
    adapters: str

    def __str__(self) -> str:
        return f"{self.name} | {self.model} | {self.adapters}"


SECTIONS: dict[str, list[Cell]] = {}
RESULTS: dict[Cell, "Result"] = {}

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def cells(name: str, *, PEFT: str = "", attach: str = "", **parameters: Iterable[Any]) -> Decorator:
    """Parametrise a test by `architecture`, `adapters` and `parameters`, and declare a cell for each combination.

    Args:
        name: of the cell; `{parameter}` in it stands for the value.
        PEFT, attach: the architectures, separated by commas, for which the cell exists with these adapters.
        parameters: further arguments of the test, with their values.
    """
    models = [(m, a) for a, names in (("PEFT", PEFT), ("attach", attach)) for m in names.split(", ") if m]
    arguments = ("architecture", "adapters", *parameters)
    combinations = [(*model, *values) for values in itertools.product(*parameters.values()) for model in models]

    def declare(test: Callable[..., None]) -> Callable[..., None]:
        section = SECTIONS.setdefault(inspect.getdoc(inspect.getmodule(test)) or "", [])
        for values in combinations:
            cell = cell_of(name, dict(zip(arguments, values, strict=True)))
            assert cell not in itertools.chain(*SECTIONS.values()), f"{cell} is declared twice"
            section.append(cell)
        return pytest.mark.cell(name)(pytest.mark.parametrize(arguments, combinations)(test))

    return declare


def cell_of(name: str, values: dict[str, Any]) -> Cell:
    """The cell of a declaration for one combination of its parameters."""
    return Cell(name.format(**values), values["architecture"], values["adapters"])


@dataclass(frozen=True)
class Result:
    """What a cell showed; in `text`, {error} stands for the error and {example} for a message that names a module."""

    text: str
    error: float = 0.0
    example: str = ""


class Record:
    """Fills one cell of the table."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def exact(self, error: float, tolerance: float, remark: str = "") -> None:
        """The relative error that was reached; fails if it is above `tolerance`."""
        self._within("exact", error, tolerance, remark)

    def close(self, error: float, tolerance: float, remark: str = "") -> None:
        """The same, of a type whose rounding can be seen."""
        self._within("close", error, tolerance, remark)

    def _within(self, verdict: str, error: float, tolerance: float, remark: str) -> None:
        limit = f" ({tolerance:g})" if tolerance else ""
        verdict = verdict if error <= tolerance else f"NOT {verdict.upper()}"
        RESULTS[self.cell] = Result(f"{verdict}: {{error}}{limit}{remark}", error)
        assert error <= tolerance

    def refused(self, error: BaseException | str, kind: str = "") -> None:
        """The exception that was raised, or the message and name of one that somebody else caught."""
        sentence = re.split(r"(?<=\.) |: `", str(error).strip().splitlines()[0])[0].rstrip(".")
        RESULTS[self.cell] = Result(f"`{kind or type(error).__name__}`: {{example}}", example=sentence)

    def saw(self, text: str) -> None:
        """Anything else."""
        RESULTS[self.cell] = Result(text)


OTHERS = "## Sharded models"
"""The heading of the part of the page that `docs/update_results.py` writes."""


def _rounded_up(error: float) -> str:
    """To one digit, and to a power of ten where rounding differs between machines."""
    if error == 0:
        return "0"
    power = math.floor(math.log10(error))
    digit = math.ceil(error / 10.0**power) if power >= -3 else 10
    return f"{digit * 10.0**power:.0e}"


def all_cells() -> list[Cell]:
    """Every cell that the tests declare, whichever of them were collected."""
    for file in sorted(Path(__file__).parent.glob("test_exact_*.py")):
        importlib.import_module(file.stem)
    return list(itertools.chain(*SECTIONS.values()))


def table() -> str:
    """The matrix in Markdown.

    Raises:
        ValueError: a cell was not filled.
    """
    empty = [str(cell) for cell in all_cells() if cell not in RESULTS]
    if empty:
        raise ValueError(f"{len(empty)} cells of the matrix were not run, such as: {empty[0]}. Fix: {COMMAND}")
    sections: list[str] = []
    for section, members in SECTIONS.items():
        title, _, text = section.partition(": ")
        sections += ["", f"## {title}", "", text[0].upper() + text[1:], ""]
        sections += ["| cell | model | adapters | result |", "|---|---|---|---|"]
        sections += _rows(members)
    lines = [
        "# Where routing is exact, and where it refuses",
        "",
        findings("\n".join(sections)),
        "",
        "The page is written by the test run itself. A cell is a situation on one model, with one kind of adapters:",
        "",
        f"    {COMMAND}",
        "",
        f"Versions: {', '.join(f'{name} {version(name)}' for name in ('torch', 'transformers', 'peft'))}.",
        "",
        inspect.cleandoc(_LEGEND),
    ]
    return "\n".join([*lines, *sections]) + "\n"


def findings(markdown: str) -> str:
    """The sentences that the page begins with, counted from a written table.

    Raises:
        ValueError: a result that none of the sentences counts.
    """
    rows = [line.removesuffix(" |").split(" | ", 3) for line in _table_rows(markdown)]
    results = [result for _, models, _, result in rows for _ in models.split(", ")]

    def cells_with(pattern: str) -> list[re.Match[str]]:
        return [found for result in results if (found := re.match(pattern, result))]

    double, single = (cells_with(rf"exact: (\S+) \({tolerance}\)") for tolerance in ("1e-12", "0.0001"))
    zero, close, refused, same = map(cells_with, ("exact: 0$", "close: ", r"`\w+`: ", "the tokens "))
    if len(results) != sum(map(len, (double, single, zero, close, refused, same))):
        raise ValueError("The first sentences of the page should count every result. Fix: add the new kind to them.")
    largest = [max((found[1] for found in group), key=float) for group in (double, single)]
    sentences = f"""
        Routing is exact in float64: in {len(double)} cells no block's gradient, and no ablated row, is off by more than
        {largest[0]}, relative to rows that run alone. In float32 it is {largest[1]} ({len(single)} cells).

        Low precision adds no error of routing to that of the type ({len(close)} cells), and a block that no row trains
        has a gradient of exactly zero ({len(zero)} cells).

        What cannot be right raises an error that says why ({len(refused)} cells): a route closed too early, masks that
        do not fit, experts, double backward.

        Generation with some rows ablated gives each row the tokens that it gets alone ({len(same)} cells).

        No cell that was tested, of {len(results)}, is wrong in silence.
    """
    return "\n".join(
        textwrap.fill(" ".join(each.split()), 118, initial_indent="- ", subsequent_indent="  ")
        for each in sentences.strip().split("\n\n")
    )


def _rows(members: list[Cell]) -> list[str]:
    """A row for the models that showed the same, with the largest of their errors and the first of their messages."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in members:
        groups.setdefault((cell.name, cell.adapters, RESULTS[cell].text), []).append(cell)
    rows = []
    for (name, adapters, text), group in groups.items():
        error = _rounded_up(max(RESULTS[cell].error for cell in group))
        result = text.replace("{error}", error).replace("{example}", RESULTS[group[0]].example).replace("|", "\\|")
        rows.append(f"| {name} | {', '.join(cell.model for cell in group)} | {adapters} | {result} |")
    return rows


_LEGEND = """
    The models are random ones of real architectures, two layers deep and 16 wide, with blocks that are not zero, in
    float64 where no other type is named. `PEFT`: `get_peft_model(model, QuarantineLoraConfig(...))`; `attach`:
    `gradroute.attach(model, ...)`. The reference (`tests/exactness/two_pass.py`) runs every row alone in float64,
    through plain autograd, and weighs its gradients afterwards. A test first makes sure that a model which ignores the
    mask would fail it.

    "exact: 1e-14 (1e-12)": the largest relative error of any layer's block in any of the models, rounded up, and the
    tolerance of the test. An exception stands with the first sentence of its message, from the first of the models.
"""


def cells_in(markdown: str) -> list[str]:
    """The cells that a written table lists."""
    found = []
    for line in _table_rows(markdown):
        name, models, adapters, _ = line.removeprefix("| ").split(" | ", 3)
        found += [str(Cell(name, model, adapters)) for model in models.split(", ")]
    return found


def _table_rows(markdown: str) -> list[str]:
    lines = markdown.partition(OTHERS)[0].splitlines()
    return [line for line in lines if line.startswith("| ") and not line.startswith("| cell |")]


def write(path: Path) -> None:
    """Write the matrix; what other tests have measured stays as it is in the file."""
    _, heading, others = (path.read_text(encoding="utf-8") if path.is_file() else "").partition(OTHERS)
    path.write_text(table() + (f"\n{heading}{others}" if heading else ""), encoding="utf-8")
