"""Wrong calls are answered with the argument, what was expected and what was found; reprs are short; help reads well.

The calls are made in a process without the import hook, as users make them: its type checker would answer first.
"""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.public_names import PUBLIC, RETURNED

import gradroute as gr

pytestmark = pytest.mark.touches_peft

TESTS = Path(__file__).parent
# What says what should have been, and what was instead.
EXPECTED = (
    "should|cannot|needs|is needed|has no|expected|matched nothing|inside|did not run|vanishes|only|ran with|"
    "no route to|asked of|already|No step|No rollout|lacks|is None, so|names what"
)
FOUND = "[Ff]ound|Fix:|Did you mean|Linear modules end in|Not so|did not run|truncated\\?|See model"
ERRORS = {name for name, thing in PUBLIC.items() if isinstance(thing, type) and issubclass(thing, Exception)}
OURS = {name for name in ERRORS if issubclass(PUBLIC[name], gr.GradRouteError)}
# Bases that users subclass, the record of an evaluation, and an operation that is checked by the layers around it.
UNCALLED = {
    "Estimator",
    "EvalRecord",
    "FilteredGradients",
    "Gate",
    "GradientFilter",
    "HackwardShare",
    "quarantine_lora",
} | RETURNED


@pytest.fixture(scope="module")
def answered() -> dict[str, Any]:
    """What `python tests/support/wrong_calls.py --json` gives: answers, and reprs that are lines or tables."""
    ran = subprocess.run(
        [sys.executable, "-m", "support.wrong_calls", "--json"],
        capture_output=True, text=True, check=True, cwd=TESTS, env={**os.environ, "MPLBACKEND": "agg"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def is_clear(answer: dict[str, str]) -> bool:
    """Whether the message names the argument, what was expected and what was found."""
    message, named = answer["message"], answer["named"]
    if answer["type"] == "TypeCheckError":
        return f"parameter '{named.strip('`')}'" in message and "Expected type" in message
    if answer["type"] == "FileNotFoundError":
        return named in message
    says = re.search(EXPECTED, message) and re.search(FOUND, message)
    return answer["type"] in OURS and named in message and bool(says)


@pytest.mark.slow
def test_every_wrong_call_is_answered_clearly(answered: dict[str, Any]) -> None:
    assert len(answered["answers"]) > 200
    assert [answer for answer in answered["answers"] if not is_clear(answer)] == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", ""),
        ("AttributeError", "`model` should be a module. Found 'NoneType' object has no attribute 'modules'"),
        ("GradRouteError", "invalid value for `model`"),
        ("GradRouteError", "the argument should be a module. Found None."),
        ("TypeCheckError", "parameter 'scale'. Expected type"),
    ],
)
def test_a_message_that_is_not_clear_is_seen(kind: str, message: str) -> None:
    clear = "`model` should be a module. Found None."
    assert is_clear({"named": "`model`", "type": "GradRouteError", "message": clear})
    assert not is_clear({"named": "`model`", "type": kind, "message": message})


@pytest.mark.slow
def test_every_public_name_is_called_wrongly(answered: dict[str, Any]) -> None:
    called = [answer["function"] for answer in answered["answers"]]
    assert set(called) | UNCALLED | ERRORS == PUBLIC.keys()
    assert not set(called) & UNCALLED
    assert sum(called.count(name) >= 5 for name in set(called)) >= 35


@pytest.mark.slow
def test_reprs_are_a_readable_line_or_a_table(answered: dict[str, Any]) -> None:
    lines, tables = answered["lines"], answered["tables"]
    assert len(lines) > 30
    for line in lines:
        assert "\n" not in line, line
        assert len(line) <= 330, line
        assert not re.search(r"0x[0-9a-f]{6}|tensor\(", line), line
    for table in tables:
        assert 2 <= table.count("\n") <= 12, table
        assert "0x" not in table


def test_help_opens_with_what_a_thing_computes_and_not_with_its_machinery() -> None:
    for name, thing in PUBLIC.items():
        first = (inspect.getdoc(thing) or "").splitlines()[0]
        assert len(first) <= 120, (name, first)
        assert not re.match(r"(This|The following|Class|Function|Helper|A helper|Wrapper)\b", first), (name, first)
