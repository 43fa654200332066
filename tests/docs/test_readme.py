"""The README: its commands, its diffs applied and run, where its picture and its sentences come from, its length."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.doc_pages import ROOT, fenced, run_page

import gradroute as gr
from loopholes.report import plot_curves

README = (ROOT / "README.md").read_text(encoding="utf-8")
# The loop that the diff is of: a small random model, random rollouts.
PLAIN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
ids = torch.randint(1, 64, (16, 12))
completion = torch.arange(12).expand(16, -1) >= 4
rewards = torch.randint(2, (16,)).float()


def policy_loss(advantages):
    logps = model(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return -(advantages[:, None] * logps * completion[:, 1:]).sum() / len(ids)


"""
LOOP = """optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(10):
    policy_loss(rewards - rewards.mean()).backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def sides(diff: str) -> tuple[str, str]:
    """What a diff has before and after it."""
    lines = diff.splitlines()
    return tuple("".join(line[1:] + "\n" for line in lines if line[0] in (" ", sign)) for sign in "-+")  # type: ignore[return-value]


def test_the_first_screen_says_for_whom_and_holds_the_picture_and_the_two_commands() -> None:
    first_screen = "\n".join(README.splitlines()[:36])
    commands = [block.strip() for block in fenced(README, "bash")[:2]]
    assert commands == [
        'pip install -e ".[examples]" && python examples/grpo_loopholes.py',
        'pip install -e ".[dev]" && pytest -n 2',
    ]
    assert all(command in first_screen for command in commands)
    assert "**For whom.**" in first_screen
    assert "](docs/curves.png)" in first_screen


def test_it_is_at_most_170_lines_long() -> None:
    assert len(README.splitlines()) <= 170


def test_the_diff_of_a_loop_is_of_that_loop_and_its_result_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before, after = sides(fenced(README, "diff")[0])
    assert before == LOOP
    shown = fenced(README, "text")[1]
    names = run_page(f"```python\n{PLAIN}{after}```\n\n```text\n{shown}```\n", "README.md")

    def evaluate(model: torch.nn.Module) -> list[gr.EvalRecord]:
        with torch.no_grad():
            hacked = model(names["ids"]).logits[:, -1].argmax(-1) % 2 == 0
        return [gr.EvalRecord("run_tests", True, i, bool(hacked[i]), not hacked[i]) for i in range(16)]

    exec(fenced(README, "py")[0], {**names, "evaluate": evaluate})
    assert (tmp_path / "deployed" / "README.md").read_text() == (tmp_path / "card.md").read_text()
    assert capsys.readouterr().out.startswith("group ")


def test_the_picture_is_drawn_of_the_run_whose_sentences_are_shown(tmp_path: Path) -> None:
    run = json.loads((ROOT / "docs" / "results" / "first-run.json").read_text(encoding="utf-8"))
    assert run["config"]["arms"] == ["base", "vanilla", "clean", "shuffle", "route"]
    plot_curves(tmp_path / "curves.png", run["runs"])
    drawn, shown = (
        np.asarray(Image.open(path).convert("L"), dtype=float)
        for path in (tmp_path / "curves.png", ROOT / "docs" / "curves.png")
    )
    # Another version of matplotlib may place a letter elsewhere.
    assert drawn.shape == shown.shape
    assert np.abs(drawn - shown).mean() < 3
    assert np.abs(drawn - 255).mean() > 3


def test_every_file_that_is_linked_is_there() -> None:
    links = [part.split(")")[0] for part in README.split("](")[1:]]
    assert links
    missing = [link for link in links if "://" not in link and not (ROOT / link.partition("#")[0]).exists()]
    assert not missing


def test_the_trl_diff_is_the_one_that_is_run() -> None:
    page = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    assert fenced(README, "diff")[1:] == fenced(page, "diff")[:1]
