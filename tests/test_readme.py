"""The README's Python runs as written, and its two commands are the ones that the gate runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loop, with_peft, filters = blocks("python")
    assert len(run(loop)["refresher"].reports) == 2
    names = run(with_peft)
    assert type(names["plain"]) is names["LlamaForCausalLM"]
    names = run(filters)
    assert names["rollouts"].directions is names["hack"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "deployed", "policy"}


def test_the_first_screen_holds_the_two_commands() -> None:
    first_screen = "\n".join(README.splitlines()[:25])
    commands = [block.strip() for block in blocks("bash")[:2]]
    assert commands == [
        'pip install -e ".[examples]" && python examples/grpo_loopholes.py',
        'pip install -e ".[dev]" && pytest',
    ]
    assert all(command in first_screen for command in commands)
