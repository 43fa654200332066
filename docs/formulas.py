"""Puts the formulas of docstrings, which are plain text for `help()`, into the documentation as mathematics.

`formulas.toml` holds each formula twice, as it stands in a docstring and as TeX.
"""

import re
import tomllib
from pathlib import Path

_FILE = tomllib.loads((Path(__file__).parent / "formulas.toml").read_text(encoding="utf-8"))
BLOCKS = {each["plain"].strip("\n"): each["tex"].strip() for each in _FILE["block"]}
INLINE = {each["plain"]: each["tex"].strip() for each in _FILE["inline"]}

_INDENTED = re.compile(r"^(?: {4}.*\n?)+", re.MULTILINE)
# Longest first: some formulas begin with another one.
_KNOWN = re.compile("|".join(map(re.escape, sorted(INLINE, key=len, reverse=True))))


def with_mathematics(text: str) -> str:
    """`text`, a docstring or a part of one, with every formula that is known as `$...$` or `$$...$$`."""

    def block(match: re.Match[str]) -> str:
        tex = BLOCKS.get(re.sub(r"^ {4}", "", match[0].rstrip("\n"), flags=re.MULTILINE))
        return match[0] if tex is None else f"$$\n{tex}\n$$\n"

    return _KNOWN.sub(lambda match: f"${INLINE[match[0]]}$", _INDENTED.sub(block, text))
