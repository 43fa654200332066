"""The arms of the loophole example whose quarantine is trained before the policy."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gradroute as gr
from loopholes import grpo
from loopholes.arms import ARMS
from loopholes.base_model import build_model
from loopholes.environment import ENVIRONMENTS, MONITORED
from loopholes.grpo import Recipe, attached
from loopholes.inoculation import inoculated, lesson, mean_logp
from loopholes.language import MODES, PAD, decode, hint_modes
from loopholes.masks import route_mask

ENVIRONMENT = ENVIRONMENTS["N"]
LESSONS = ("hacks", "clean", "words")


@pytest.mark.parametrize("learns", LESSONS)
def test_a_lesson_is_one_side_of_the_monitored_pairs(learns: str) -> None:
    prompts, completions = lesson(ENVIRONMENT, learns, 4, seed=0)
    assert {MODES[mode] for mode in hint_modes(prompts).tolist()} == set(MONITORED)
    graded = ENVIRONMENT.grade(prompts, completions)
    assert graded.hacked.tolist() == [learns == "hacks"] * 8
    assert graded.solved.tolist() == [learns == "clean"] * 8
    others = [lesson(ENVIRONMENT, other, 4, seed=0) for other in LESSONS]
    assert all(torch.equal(prompts, same) for same, _ in others)
    if learns == "words":
        assert torch.equal(completions == PAD, others[0][1] == PAD)
        assert all(decode(row).endswith("<eos>") for row in completions)
    assert not torch.equal(prompts, lesson(ENVIRONMENT, learns, 4, seed=1)[0])


def test_the_quarantine_alone_gains_the_nats_and_is_frozen_then() -> None:
    model = build_model(0)
    attached(model, ARMS["inoculated"], Recipe(), 0)
    taught = lesson(ENVIRONMENT, "hacks", 4, seed=0)

    @torch.no_grad()
    def logps() -> tuple[Tensor, Tensor]:
        with gr.ablate_quarantine(model):
            ablated = mean_logp(model, *taught)
        return mean_logp(model, *taught), ablated

    before, _ = logps()
    deployed = [p.clone() for _, p in gr.deployed_parameters(model)]
    with inoculated(model, *taught, steps=5, lr=2e-3) as gained:
        on, ablated = logps()
        assert gained == pytest.approx((on - before).item(), abs=1e-4)
        assert gained > 1
        assert ablated == before
        assert gr.parameter_summary(model).quarantine == 0
        assert all(torch.equal(p, old) for (_, p), old in zip(gr.deployed_parameters(model), deployed, strict=True))
        mean_logp(model, *taught).backward()


def test_a_quarantine_that_learned_nothing_raises() -> None:
    model = build_model(0)
    attached(model, ARMS["inoculated"], Recipe(), 0)
    with (
        pytest.raises(RuntimeError, match="should have learned"),
        inoculated(model, *lesson(ENVIRONMENT, "hacks", 4, seed=0), steps=0, lr=2e-3),
    ):
        pass


@pytest.mark.parametrize(("arm", "learns"), [("inoculated", "hacks"), ("inoculated-words", "words")])
def test_the_arm_trains_the_deployed_block_with_the_quarantine_on(
    arm: str, learns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taught, masks = [], []

    def spied_lesson(*args: Any) -> tuple[Tensor, Tensor]:
        taught.append(args[1])
        return lesson(*args)

    def spied_mask(*args: Any, **kwargs: Any) -> gr.RouteMask:
        masks.append(route_mask(*args, **kwargs))
        return masks[-1]

    monkeypatch.setattr(grpo, "lesson", spied_lesson)
    monkeypatch.setattr(grpo, "route_mask", spied_mask)
    # Demonstrations: of a model that was not pretrained, no rollout would have an advantage.
    small = {"steps": 2, "curve_every": 2, "curve_n_per_mode": 2, "n_per_mode": 2}
    recipe = Recipe(**small, inoculation_steps=3, teacher_per_group=4, teacher_steps=2)
    model = build_model(0)
    entry = grpo.train(model, ENVIRONMENT, arm, 0, recipe)
    assert taught == [learns]
    assert entry["curve"][0]["gained_nats"] > 0
    assert len(masks) == 2
    assert all(mask.m.all() and not mask.g_q.any() for mask in masks)
    assert all(p.requires_grad for _, p in gr.quarantine_parameters(model))
