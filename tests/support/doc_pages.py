"""Markdown as a program: the Python blocks of a page, in order, in one namespace, with the output shown after them.

A block is fenced with `python`; a block fenced with `text` that follows it, with nothing in between, is what it prints.
A block fenced with `py` is shown and not run: for what needs a package, a machine or a model that tests do not have.
"""

import contextlib
import importlib.util
import io
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def docs_script(name: str) -> ModuleType:
    """A script of `docs/`, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Block:
    """One Python block: its line in the page, its code, and the output shown after it."""

    line: int
    code: str
    output: str | None


def fenced(text: str, language: str) -> list[str]:
    """The content of every block of a language."""
    return [found[2] for found in _FENCE.finditer(text) if found[1] == language]


def blocks(text: str) -> list[Block]:
    """The Python blocks of a page."""
    fences = list(_FENCE.finditer(text))
    found = []
    for i, fence in enumerate(fences):
        if fence[1] == "python":
            after = fences[i + 1] if i + 1 < len(fences) else None
            shown = after is not None and after[1] == "text" and not text[fence.end() : after.start()].strip()
            line = text[: fence.start()].count("\n") + 1
            found.append(Block(line, fence[2], after[2] if after is not None and shown else None))
    return found


def run_page(text: str, name: str) -> dict[str, Any]:
    """Run a page; raises AssertionError where a block prints something else than the page shows.

    Returns the names that the page has made.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        for block in blocks(text):
            # Empty lines in front, so that an error names the line of the page.
            code = compile("\n" * block.line + block.code, name, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, names)
            if block.output is not None and printed.getvalue() != block.output:
                raise AssertionError(
                    f"{name}, line {block.line}: the page shows\n{block.output}\nand the block prints\n"
                    f"{printed.getvalue()}"
                )
    return names
