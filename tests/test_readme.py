"""The README's Python runs as written, and its two commands are the ones that the gate runs."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_every_python_block_runs() -> None:
    found = blocks("python")
    assert found
    for block in found:
        names: dict[str, object] = {}
        state = torch.get_rng_state()
        exec(compile(block, "README.md", "exec"), names)
        torch.set_rng_state(state)
        assert len(names["refresher"].reports) == 2


def test_the_first_screen_holds_the_two_commands() -> None:
    first_screen = "\n".join(README.splitlines()[:25])
    commands = [block.strip() for block in blocks("bash")[:2]]
    assert commands == [
        'pip install -e ".[examples]" && python examples/grpo_loopholes.py',
        'pip install -e ".[dev]" && pytest',
    ]
    assert all(command in first_screen for command in commands)
