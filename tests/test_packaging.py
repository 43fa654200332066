"""Versions agree everywhere, and what a contributor is told to run is what the gate runs."""

import re
import tomllib

from support.doc_pages import ROOT, fenced

import gradroute as gr

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
GATE = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_place_names_one_version() -> None:
    named = re.search(r"^version: (\S+)$", CITATION, re.MULTILINE)
    assert named is not None
    assert named[1] == PROJECT["version"] == gr.__version__


def test_the_citation_names_title_authors_and_what_it_builds_on() -> None:
    for key in ("cff-version", "message", "type", "title", "authors", "license", "references"):
        assert re.search(rf"^{key}:", CITATION, re.MULTILINE), key
    assert PROJECT["license"] in CITATION
    assert "arXiv:2410.04332" in CITATION


def test_a_contributor_is_given_five_commands_that_the_gate_runs_too() -> None:
    (block,) = fenced((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "bash")
    commands = [line.partition("#")[0].strip() for line in block.splitlines()]
    assert len(commands) == 5
    assert commands[-1] == ".ci/run"
    for part in ("pip install", "ruff check .", "ruff format --check .", "mypy", "pytest -n 2", "mkdocs"):
        assert any(part in command for command in commands)
        assert part in GATE


def test_extras_are_those_that_the_documentation_names() -> None:
    extras = set(PROJECT["optional-dependencies"])
    text = "\n".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    named = ",".join(name for found in re.findall(r"\[([a-z,]+)\]\"|`\[([a-z]+)\]`", text) for name in found if name)
    assert set(named.split(",")) <= extras
    assert {"plot", "examples", "trl", "docs", "dev"} <= extras
