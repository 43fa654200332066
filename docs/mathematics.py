"""Mathematics without a script: a hook of MkDocs that writes TeX as MathML, and formulas of docstrings as TeX.

$...$, $$...$$   ->  pymdownx.arithmatex  ->  on_page_content: MathML, which browsers show by themselves
"""

import html
import re
import sys
from pathlib import Path
from typing import Any

import griffe
import latex2mathml.converter

sys.path.insert(0, str(Path(__file__).parent))

from formulas import with_mathematics

_TEX = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """The page with MathML for the TeX of arithmatex."""

    def mathml(match: re.Match[str]) -> str:
        tag, display = match[1], "inline" if match[1] == "span" else "block"
        written = latex2mathml.converter.convert(html.unescape(match[2]).strip(), display=display)
        return f'<{tag} class="formula">{written}</{tag}>'

    return _TEX.sub(mathml, content)


class FormulasOfDocstrings(griffe.Extension):  # type: ignore[misc]
    """Has mkdocstrings read docstrings with their formulas as TeX."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Of each module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = with_mathematics(obj.docstring.value)
