"""Rollouts are scored by a forward that ends with the last block that directions read, also under TRL's defaults."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.trl_runs import PAIRS, quiet, trained
from test_early_exit import Counting
from torch import nn

import gradroute as gr
from gradroute._protocol import routed_layers
from gradroute.directions import early_exit
from gradroute.integrations.trl import flagging

pytestmark = quiet


def lower(model: nn.Module) -> gr.Directions:
    modules = [name for name in routed_layers(model) if ".layers.0." in name]
    return gr.extract_activation_directions(model, PAIRS, modules=modules)


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[int, int]], list[torch.Tensor]]:
    """How often each block ran in each scoring, and the scores."""
    ran: list[tuple[int, int]] = []
    scores: list[torch.Tensor] = []
    original = flagging.captured_rollouts

    def watched(trainer: Any, rollouts: Any, directions: gr.Directions) -> Any:
        blocks = trainer.model.get_base_model().model.layers
        assert len(blocks) == 2
        plain = [block.mlp.act_fn for block in blocks]
        counting = [Counting(act) for act in plain]
        for block, act in zip(blocks, counting, strict=True):
            block.mlp.act_fn = act
        capture, rows = original(trainer, rollouts, directions)
        for block, act in zip(blocks, plain, strict=True):
            block.mlp.act_fn = act
        ran.append((counting[0].times, counting[1].times))
        scores.append(directions.score(capture))
        return capture, rows

    monkeypatch.setattr(flagging, "captured_rollouts", watched)
    trained(folder, directions=lower, args_gradient_checkpointing=True)
    return ran, scores


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_scoring_by_lower_blocks_runs_no_upper_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, scores = run(tmp_path / "early", monkeypatch)
    assert ran
    assert all(first > 0 and second == 0 for first, second in ran[1:])
    assert ran[0][1] <= 1  # the first forward of a model is watched, if extraction was not
    monkeypatch.undo()
    monkeypatch.setattr(early_exit, "_blocks", lambda _: {})
    whole, expected = run(tmp_path / "whole", monkeypatch)
    assert all(first == second > 0 for first, second in whole)
    assert len(scores) == len(expected) >= 2
    for found, wanted in zip(scores, expected, strict=True):
        assert torch.equal(found, wanted)
