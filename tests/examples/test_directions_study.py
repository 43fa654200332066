"""`docs/directions-study.md`: its example runs on what the study wrote, and its text says what its tables say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import gradroute as gr

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "directions-study.md").read_text(encoding="utf-8")
STUDIES = {
    name: json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("directions", "directions-random")
}


def test_the_inverted_direction_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """On its own pairs it looks right; the labelled rollouts tell."""
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    exec(compile(block, "directions-study.md", "exec"), names)
    assert gr.directions.summary(names["hack"], draws=1).auroc > 0.9
    assert names["found"].inverted
    assert names["found"].high < 0.5 < names["fewer"].high
    assert all("scores are inverted" in str(each.message) for each in names["said"])
    for name in ("found", "fewer"):
        found = names[name]
        assert f"AUROC {found.auroc:.2f} [{found.low:.2f}, {found.high:.2f}]" in block


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_studies_hold_every_cell_of_the_shipped_pairs(study: dict[str, Any]) -> None:
    assert study["config"]["pairs"] == 42
    assert len(study["cells"]) == 7 * 2 * 7
    for cell in study["cells"]:
        if cell["direction"] == "random":
            assert len(cell["draws"]) == study["config"]["draws"] == 20
        else:
            assert cell["low"] <= cell["auroc"] <= cell["high"]


def above_random(name: str, left_out: str, kind: str) -> int:
    """Cells above every random draw, among features of activations or of gradients."""
    cells = [cell for cell in STUDIES[name]["cells"] if cell["left_out"] == left_out]
    best = {cell["feature"]: max(cell["draws"]) for cell in cells if "draws" in cell}
    chosen = [cell for cell in cells if "draws" not in cell and cell["direction"] != "shuffled labels"]
    chosen = [cell for cell in chosen if cell["feature"].startswith("gradient") == (kind == "gradient")]
    return sum(cell["auroc"] > best[cell["feature"]] for cell in chosen)


def test_the_text_counts_what_the_tables_hold() -> None:
    assert "3 of 20 cells are above all draws" in " ".join(TEXT.split())
    assert above_random("directions", "categories", "activation") == 3
    bold = [TEXT.split(f"<!-- table: directions {table} -->")[1].split("<!-- end -->")[0].count("**") // 2
            for table in ("directions.json pairs", "directions.json categories")]  # fmt: skip
    assert bold == [
        sum(above_random("directions", kind, f) for f in ("activation", "gradient")) for kind in ("pairs", "categories")
    ]
    others = STUDIES["directions"]["transfer"]
    inverted = [value for target, value in others["false_claims"].items() if target != "false_claims"]
    onto = [values["false_claims"] for source, values in others.items() if source != "false_claims"]
    said = f"({min(inverted):.2f} to {max(inverted):.2f}, and {min(onto):.2f} to {max(onto):.2f}".replace("0.", ".")
    assert said in " ".join(TEXT.split())
