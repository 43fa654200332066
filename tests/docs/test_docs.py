"""Every Python block of the documentation runs as written, and prints what is shown."""

import gc
from pathlib import Path

import pytest
import torch
from support.doc_pages import PAGES, ROOT, blocks, run_page
from support.peft_cases import unnamed_base

pytestmark = pytest.mark.touches_peft

# Pages whose blocks need a model, prompts or result files beside them, and the tests that provide those and run them.
RUN_ELSEWHERE = {
    "directions-study.md": "examples/test_directions_study.py",
    "loops.md": "docs/test_loops.py",
    "sharded.md": "docs/test_sharded_docs.py",
    "trl.md": "docs/test_trl_docs.py",
}
RUNNING = [p for p in PAGES if blocks(p.read_text(encoding="utf-8")) and p.name not in RUN_ELSEWHERE]


@unnamed_base
@pytest.mark.parametrize("page", RUNNING, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs_and_prints_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(encoding="utf-8"), page.name)
    # Handles on models that a page has left in place.
    gc.collect()


def test_pages_that_are_run_elsewhere_are() -> None:
    names = [page.name for page in PAGES]
    for page, test in RUN_ELSEWHERE.items():
        assert names.count(page) == 1
        code = (ROOT / "tests" / test).read_text(encoding="utf-8")
        assert f'"{page}"' in code
        assert "exec(" in code


def test_the_runner_sees_wrong_output_and_errors() -> None:
    page = "```python\nx = 1\n```\n\n```python\nprint(x)\n```\n\n```text\n{}\n```\n"
    assert run_page(page.format(1), "page")["x"] == 1
    with pytest.raises(AssertionError, match="line 5: the page shows\n2\n\nand the block prints\n1"):
        run_page(page.format(2), "page")
    with pytest.raises(NameError):
        run_page("```python\nprint(y)\n```\n", "page")
    assert [block.output for block in blocks("```python\nx\n```\n\nIt prints\n\n```text\n1\n```\n")] == [None]


def test_a_page_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    run_page("```python\nimport torch\ntorch.manual_seed(3)\n```\n", "page")
    assert torch.equal(before, torch.get_rng_state())
