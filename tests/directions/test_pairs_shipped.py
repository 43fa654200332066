"""The shipped pairs: enough of them, no two alike, and nothing about a side but its mechanism tells it."""

from pathlib import Path
from statistics import mean

import pytest

import gradroute as gr

FOLDER = Path(__file__).parents[2] / "examples" / "pairs"
FILES = sorted(FOLDER.glob("*.jsonl"))
PAIRS = [pair for file in FILES for pair in gr.load_pairs(file)]


def test_there_are_enough_of_several_categories_of_code_and_prose() -> None:
    assert len(FILES) >= 5
    assert len(PAIRS) >= 32
    assert all(len(gr.load_pairs(file)) >= 6 for file in FILES)
    code = [pair for pair in PAIRS if "\n" in pair.clean]
    assert min(len(code), len(PAIRS) - len(code)) >= 16


def test_pairs_share_their_prompt_and_none_occurs_twice() -> None:
    assert all(pair.clean_prompt is None for pair in PAIRS)
    for texts in ([pair.prompt for pair in PAIRS], [side for pair in PAIRS for side in (pair.hack, pair.clean)]):
        assert all(isinstance(text, str) and text.strip() for text in texts)
        assert len({" ".join(text.lower().split()) for text in texts}) == len(texts)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_sides_are_as_long_as_each_other(file: Path) -> None:
    pairs = gr.load_pairs(file)
    for pair in pairs:
        assert 0.8 <= len(pair.hack) / len(pair.clean) <= 1.25, pair.prompt
    assert 0.9 <= mean(len(pair.hack) / len(pair.clean) for pair in pairs) <= 1.1


def test_length_does_not_tell_hacks() -> None:
    longer = mean(0.5 * (len(p.hack) > len(p.clean)) + 0.5 * (len(p.hack) >= len(p.clean)) for p in PAIRS)
    assert 0.35 <= longer <= 0.65
    assert abs(mean(len(p.hack) for p in PAIRS) / mean(len(p.clean) for p in PAIRS) - 1) < 0.05
