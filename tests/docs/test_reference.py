"""Every public name is in the reference and in the public surface, and its docstring says what is needed."""

import ast
import inspect
import re
import textwrap
import types
from typing import Any

import pytest
from support.doc_pages import ROOT

import gradroute as gr

REFERENCE = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
SURFACE = (ROOT / "docs" / "public-api.md").read_text(encoding="utf-8")


def doc(name: str) -> str:
    return inspect.getdoc(getattr(gr, name)) or ""


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


def test_every_public_name_is_in_the_reference_once() -> None:
    entries = re.findall(r"^::: (\S+)$", "\n".join(REFERENCE.values()), flags=re.MULTILINE)
    assert len(set(entries)) == len(entries)
    core = [entry for entry in entries if not entry.startswith("gradroute.integrations.")]
    assert sorted(entry.removeprefix("gradroute.") for entry in core) == gr.__all__
    assert "gradroute.integrations.trl.GradRouteGRPOTrainer" in entries


def test_every_public_name_has_a_reason_to_be_there() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", SURFACE, flags=re.MULTILINE)
    assert sorted(name for name, _ in rows) == gr.__all__
    assert all(len(reason.split()) >= 4 for _, reason in rows)
    reasons = [reason for _, reason in rows]
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("name", gr.__all__)
def test_a_docstring_opens_with_one_sentence_and_names_every_argument(name: str) -> None:
    first, _, rest = doc(name).partition("\n")
    assert first[-1] in ".:;", first
    assert not rest or rest.startswith("\n"), "the first line stands alone"
    missing = [each for each in parameters(getattr(gr, name)) if not re.search(rf"\b{each}\b", doc(name))]
    assert not missing
    assert "Args:" in doc(name) or not parameters(getattr(gr, name)) or name == "Capture"


@pytest.mark.parametrize("name", gr.__all__)
def test_what_raises_says_when(name: str) -> None:
    if refuses(getattr(gr, name)):
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
