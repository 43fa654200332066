"""`docs/generation.md`: its blocks run in order, and what they print is what the page says of it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": "page"}
    with torch.random.fork_rng():
        for block in BLOCKS:
            exec(compile(block, PAGE.name, "exec"), found)
    return found


def test_rows_that_are_ablated_generate_as_ablated_and_the_others_as_on(names: dict[str, Any]) -> None:
    on, ablated, mixed, rows = (names[name] for name in ("on", "ablated", "mixed", "rows"))
    assert (on != ablated).any(1)[rows].any()
    assert (on != ablated).any(1)[~rows].any()
    assert torch.equal(mixed[rows], ablated[rows])
    assert torch.equal(mixed[~rows], on[~rows])


def test_the_stale_engine_is_found_out_and_exports_are_told_apart(
    names: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    again = {**names}
    with torch.random.fork_rng():
        exec(compile(BLOCKS[1], PAGE.name, "exec"), again)
    printed = capsys.readouterr().out
    assert float(printed.splitlines()[0]) > 0
    assert "ignores the ablation" in printed
    policy, deployed = (names[name](names["prompts"]).logits for name in ("policy", "deployed"))
    assert not torch.allclose(policy, deployed, atol=1e-3)
