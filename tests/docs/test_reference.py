"""The reference is that of the docstrings, and each docstring says what is needed."""

import ast
import inspect
import re
import runpy
import textwrap
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support.doc_pages import ROOT
from support.public_names import EXPORTED, MAKER, PUBLIC, RETURNED

import gradroute as gr


def doc(name: str) -> str:
    return inspect.getdoc(PUBLIC[name]) or ""


def parameters(thing: Any) -> list[str]:
    """Names of what a caller gives; nothing where a class takes what another one documents."""
    if isinstance(thing, types.ModuleType) or (isinstance(thing, type) and issubclass(thing, BaseException | Warning)):
        return []
    if isinstance(thing, type):
        ours = [base for base in thing.__mro__ if base.__module__.startswith("gradroute")]
        own = {name for base in ours for name in vars(base).get("__annotations__", {})}
        given = inspect.signature(thing).parameters
        # A config takes a hundred arguments of PEFT's; ours are those that the class declares itself.
        return [name for name in given if name in own or thing.__mro__[1] is object]
    return list(inspect.signature(thing).parameters)


def refuses(thing: Any) -> bool:
    """Whether the code of a function, or of a class's construction, raises by itself."""
    if isinstance(thing, types.ModuleType):
        return False
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    built = {"__init__", "__post_init__"} if isinstance(thing, type) else {thing.__name__}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in built]
    return any(isinstance(node, ast.Raise) for function in functions for node in ast.walk(function))


@pytest.mark.parametrize("path", MAKER["pages"](), ids=lambda path: path.stem)
def test_a_page_is_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == MAKER["pages"]()[path], f"run: {MAKER['COMMAND']}"


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")]
    entries, headings = (
        re.findall(pattern, "\n".join(pages), flags=re.MULTILINE) for pattern in (r"^::: (\S+)$", r"^ +heading: (\S+)$")
    )
    assert len(set(entries)) == len(entries)
    assert len(headings) == len(set(headings)) == len(EXPORTED)
    assert {f"gradroute.{name}" for name in gr.__all__} <= set(headings)
    assert "gradroute.integrations.trl.GradRouteGRPOTrainer" in entries


def test_an_entry_is_of_the_name_and_not_of_a_file_that_is_called_like_it() -> None:
    assert MAKER["defined_as"]("gradroute.attach") == "gradroute.adapters.attach.attach"
    for path in map(MAKER["path_of"], EXPORTED):
        module, _, name = MAKER["defined_as"](path).rpartition(".")
        assert getattr(import_module(module), name) is MAKER["thing"](path)


def test_a_name_without_a_place_in_the_reference_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = MAKER["PAGES"]
    monkeypatch.setitem(pages, "refresh", ("Refreshing", {"Refresh": "Refresher Watch Watch attach"}))
    with pytest.raises(ValueError, match="Found otherwise: RefreshReport, Watch, attach"):
        MAKER["check_pages"]()


def test_no_two_public_names_are_described_alike() -> None:
    heads = [doc(name).partition("\n")[0] for name in PUBLIC]
    assert len(set(heads)) == len(heads)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_opens_with_one_sentence(name: str) -> None:
    first, _, rest = doc(name).partition("\n")
    assert first[-1] in ".:;", first
    assert not rest or rest.startswith("\n"), "the first line stands alone"


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - RETURNED))
def test_a_docstring_names_every_argument(name: str) -> None:
    missing = [each for each in parameters(PUBLIC[name]) if not re.search(rf"\b{each}\b", doc(name))]
    assert not missing
    assert "Args:" in doc(name) or not parameters(PUBLIC[name])


@pytest.mark.parametrize("name", PUBLIC)
def test_what_raises_says_when(name: str) -> None:
    if refuses(PUBLIC[name]):
        assert re.search(r"Raises|Warns|Errors are", doc(name))


def test_the_checks_see_what_is_missing() -> None:
    def undocumented(given: int) -> None:
        raise ValueError(given)

    assert parameters(undocumented) == ["given"]
    assert refuses(undocumented)
    assert refuses(gr.evaluation.Rate)
    assert parameters(gr.evaluation.Rate) == ["k", "n"]
    assert "n_heldout" in parameters(gr.directions.estimators.Svd)
    assert "r_quarantine" in parameters(gr.QuarantineLoraConfig)
    assert "lora_alpha" not in parameters(gr.QuarantineLoraConfig)


# Not `z = 0`, nor `-> None`: values and types read well as they are.
FORMULA = re.compile(r"\S (=|<-|->|~|>=|>) (?![01]\b|`)")


@pytest.mark.parametrize("name", [name for name in PUBLIC if FORMULA.search(doc(name).partition("\n")[0])])
def test_a_docstring_that_opens_with_a_formula_has_it_set_as_mathematics(name: str) -> None:
    shown = MAKER["head"](MAKER["path_of"](name))
    assert "$" in shown
    assert not FORMULA.search(re.sub(r"\$.*?\$|`.*?`", "", shown)), shown


def test_every_formula_that_is_set_stands_in_a_docstring() -> None:
    formulas = runpy.run_path(str(ROOT / "docs" / "formulas.py"))
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "gradroute").rglob("*.py"))
    gone = [plain for plain in formulas["INLINE"] if plain not in code]
    gone += [plain for plain in formulas["BLOCKS"] if textwrap.indent(plain, "    ") not in code]
    assert not gone
    text = "Once:\n\n    y = W x\n\nand y <- W x, and a w = Z^T a.\n"
    assert formulas["with_mathematics"](text) == text.replace("y <- W x", r"$y \leftarrow W x$").replace(
        "w = Z^T a", r"$w = Z^\top a$"
    )
    block = "Twice:\n\n    v <- v / |v|\n\nEnd.\n"
    assert r"$$" + "\n" + r"v \leftarrow v / \lVert v \rVert" + "\n$$\n\nEnd." in formulas["with_mathematics"](block)


@pytest.mark.parametrize("page", MAKER["PAGES"])
def test_no_formula_of_a_page_is_left_as_plain_text(page: str) -> None:
    text = (ROOT / "docs" / "reference" / f"{page}.md").read_text(encoding="utf-8")
    assert not re.findall(r"^ {4}.* (?:=|<-|<=>) .*$", text, flags=re.MULTILINE), "put it into docs/formulas.toml"
