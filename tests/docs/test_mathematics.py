"""Formulas become MathML that a browser shows by itself: nothing of the TeX is left in it."""

import html
import re
import runpy
from xml.etree import ElementTree

import pytest
from support.doc_pages import PAGES, ROOT

pytest.importorskip("latex2mathml", reason="an extra: docs")
pytest.importorskip("griffe", reason="an extra: docs")

HOOK = runpy.run_path(str(ROOT / "docs" / "mathematics.py"))
FORMULAS = runpy.run_path(str(ROOT / "docs" / "formulas.py"))
OF_PAGES = [
    tex.strip()
    for page in PAGES
    for tex in re.findall(r"^\$\$\n(.*?)\n\$\$$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
]
TEX = dict.fromkeys([*FORMULAS["BLOCKS"].values(), *FORMULAS["INLINE"].values(), *OF_PAGES])


def shown(tex: str) -> str:
    """What the hook makes of what arithmatex has written."""
    page: str = HOOK["on_page_content"](f'<p>a</p><div class="arithmatex">\\[{html.escape(tex)}\\]</div>')
    return page


@pytest.mark.parametrize("tex", TEX)
def test_all_of_a_formula_is_mathml(tex: str) -> None:
    found = shown(tex)
    assert found.startswith('<p>a</p><div class="formula"><math')
    math = ElementTree.fromstring(found.removeprefix("<p>a</p>"))
    text = "".join(math.itertext())
    assert "\\" not in text, text
    assert "&" not in text, text
    letters = set(re.findall(r"(?<![\\a-zA-Z{])[a-zA-Z](?![a-zA-Z])", tex))
    assert letters <= set(text)


def test_a_command_that_is_not_known_would_be_seen() -> None:
    assert "\\nosuchcommand" in html.unescape(shown(r"a \nosuchcommand b"))


def test_a_formula_in_a_line_stays_in_it() -> None:
    page = HOOK["on_page_content"](r'<p>with <span class="arithmatex">\(a &lt; b\)</span>, and</p>')
    assert page.startswith('<p>with <span class="formula"><math')
    assert 'display="inline"' in page
    assert page.endswith("</math></span>, and</p>")
