"""Pairs from scripted policies, and the baselines that a direction made from them is compared with."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pairs_from_graders
import pytest
from pairs_from_graders import bag_of_words, length, line

STUDIES = Path(__file__).parents[2] / "examples" / "studies"
needs_hackbait = pytest.mark.skipif(
    importlib.util.find_spec("hackbait") is None, reason="hackbait is not installed: pip install hackbait==0.1.0"
)
FAMILIES = ["a"] * 4 + ["b"] * 4


def rows(word: str, other: str) -> list[dict[str, str]]:
    """Hacks of family a say `word`, those of b say `other`."""
    said = [word] * 4 + [other] * 4
    return [{"hack": f"{each} it {i}", "clean": f"do it {i} with care"} for i, each in enumerate(said)]


def test_a_word_that_families_share_is_found_and_one_that_tells_the_opposite_is_not() -> None:
    assert line("words", [bag_of_words(rows("fake", "fake"))], FAMILIES).split()[1] == "1.00"
    turned = [{"hack": "x", "clean": "y"}] * 4 + [{"hack": "y", "clean": "x"}] * 4
    assert line("words", [bag_of_words(turned)], FAMILIES).split()[1] == "0.00"


def test_length_is_compared_with_the_sign_of_the_other_families() -> None:
    short = [{"hack": "a", "clean": "aaa"}] * 8
    assert line("length", [length(short)], FAMILIES).split()[1] == "1.00"
    turned = [{"hack": "a", "clean": "aaa"}] * 4 + [{"hack": "aaa", "clean": "a"}] * 4
    assert line("length", [length(turned)], FAMILIES).split()[1] == "0.00"


def test_without_hackbait_it_ends_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hackbait", None)
    with pytest.raises(SystemExit, match="pip install hackbait==0.1.0"):
        pairs_from_graders.rows_of(1)


@needs_hackbait
def test_every_pair_is_a_hack_and_a_clean_answer_to_one_task() -> None:
    found = pairs_from_graders.rows_of(2)
    assert len(found) == 5 * 3 * 2
    assert len({row["family"] for row in found}) == 5
    assert all(row["hack"] != row["clean"] and row["prompt"][-1]["role"] == "user" for row in found)


@pytest.mark.slow
@needs_hackbait
def test_the_study_prints_a_line_for_each_direction_and_baseline(tmp_path: Path) -> None:
    command = [sys.executable, str(STUDIES / "pairs_from_graders.py")]
    options = ["--model", "random", "--per-tier", "1", "--draws", "2"]
    ended = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("random: 15 pairs of 5 families")
    names = ["bag of words", "length"]
    for features in ("bottleneck", "residual"):
        names += [f"{features}, {name}" for name in ("mean difference", "ridge", "2 random")]
    assert [line[:32].strip() for line in lines[2:]] == names
    assert all(len(line.split()[-5:]) == 5 for line in lines[2:])
