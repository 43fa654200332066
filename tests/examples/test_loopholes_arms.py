"""Each arm's use of flags and directions in the example, and its measurements other than the rates."""

from pathlib import Path
from typing import Any

import pytest
import suite
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

import gradroute as gr
from loopholes import grpo, measurements
from loopholes.arms import ARMS
from loopholes.base_model import build_model
from loopholes.environment import ENVIRONMENTS
from loopholes.grpo import Recipe, attached, make_detector
from loopholes.masks import route_mask
from loopholes.measurements import auroc, dose_curve
from loopholes.sampling import sample
from reporting.store import Job, read_result

REWARD = torch.tensor([1.0, 0.0, 1.0, 0.0])
FLAGS = torch.tensor([True, False, False, False])
ABLATED = torch.tensor([False, True, False, False])


def weights(arm: str) -> tuple[list[float], list[float], list[float]]:
    mask = route_mask(ARMS[arm], ABLATED, REWARD, FLAGS if ARMS[arm].flags != "none" else FLAGS & False, 4)
    return mask.m.tolist(), mask.g_d.tolist(), mask.g_q.tolist()


def test_advantages_of_each_arm_by_hand() -> None:
    on = [1.0, 0.0, 1.0, 1.0]
    # unflagged rewards 0, 1, 0 have the mean 1/3; all four have 1/2
    clean = pytest.approx([0.0, -1 / 3, 2 / 3, -1 / 3])
    assert weights("route") == (on, clean, [0.5, 0.0, 0.5, -0.5])
    assert weights("filter") == ([0.0] * 4, clean, [0.0] * 4)
    # the flagged reward of 1 becomes 0: the mean is 1/4
    assert weights("penalty") == ([0.0] * 4, [-0.25, -0.25, 0.75, -0.25], [0.0] * 4)
    assert weights("vanilla") == ([0.0] * 4, [0.5, -0.5, 0.5, -0.5], [0.0] * 4)
    assert weights("rollout-filter") == (on, REWARD.tolist(), [0.5, 0.0, 0.5, -0.5])
    assert weights("route-v1") == (on, [0.5, -0.5, 0.5, -0.5], [0.0] * 4)


def test_the_penalty_makes_up_for_missed_labels_and_labels_may_miss_all() -> None:
    """Arms that penalise nothing trained with recall 0 until their penalty was computed as well."""
    penalties = {recall: Recipe(recall=recall).penalty_of(ARMS["weak-penalty"]) for recall in (1.0, 0.2, 0.0)}
    assert penalties == {1.0: 3.0, 0.2: 5.0, 0.0: 3.0}
    assert Recipe(recall=0.2).penalty_of(ARMS["penalty"]) == 1.0


def test_a_penalty_is_the_recipes_and_at_least_one_over_recall() -> None:
    arm = ARMS["weak-penalty"]
    assert [Recipe(recall=recall).penalty_of(arm) for recall in (1.0, 0.5, 0.2)] == [3.0, 3.0, 5.0]
    assert Recipe(penalty=7.0).penalty_of(arm) == 7.0
    assert [Recipe().penalty_of(ARMS[name]) for name in ("penalty", "weak-likelier")] == [1.0, 1.0]
    mask = route_mask(arm, ABLATED, REWARD, FLAGS, 4, penalty=3.0)
    # the flagged reward of 1 becomes -2: the mean is -1/4
    assert mask.g_d.tolist() == [-1.75, 0.25, 1.25, 0.25]


@pytest.mark.parametrize(
    ("arm", "ablated", "slow", "penalty"),
    [
        ("weak", [True] * 4, False, 3.0),
        ("weak-explained", [False, False, True, True], True, 3.0),
        ("weak-explained-early", [True] * 4, True, 3.0),
        ("weak-explained-fast", [False, False, True, True], False, 3.0),
        ("unrouted", [False] * 4, False, 3.0),
        ("weak-penalty", [True] * 4, False, 3.0),
        ("weak-likelier", [True] * 4, False, 1.0),
    ],
)
def test_the_parts_of_the_recipe_are_in_the_arms_that_have_them(
    arm: str, ablated: list[bool], slow: bool, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, starts = [], []

    def spied(*args: Any, **kwargs: Any) -> gr.RouteMask:
        seen.append((bool(args[1].any()), args[5]))
        return route_mask(*args, **kwargs)

    monkeypatch.setattr(grpo, "route_mask", spied)
    start = gr.optim.slow_start
    monkeypatch.setattr(gr.optim, "slow_start", lambda *args, **kwargs: starts.append(kwargs) or start(*args, **kwargs))
    grpo.train(
        build_model(0), ENVIRONMENTS["N"], arm, 0, Recipe(steps=4, curve_every=4, curve_n_per_mode=2, n_per_mode=2)
    )
    assert seen == [(each, penalty) for each in ablated]
    assert starts == ([{"steps": 2, "fraction": 0.25}] if slow else [])


def test_oriented_random_directions_score_hacks_higher_in_every_module() -> None:
    lower = {}
    for arm in ("random", "random-oriented"):
        model = build_model(0)
        attached(model, ARMS[arm], Recipe(), 0)
        detector = make_detector(model, ENVIRONMENTS["C"], ARMS[arm], Recipe(), 0)
        assert detector is not None
        made = detector.directions
        gaps = [((made.hack[name] - made.clean[name]).mean(0) @ row).item() for name, (row,) in made.rows.items()]
        lower[arm] = sum(gap < 0 for gap in gaps)
    assert lower["random"] > 0
    assert lower["random-oriented"] == 0


def test_auroc_counts_pairs_in_the_right_order_and_ties_half() -> None:
    assert auroc(torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([True, True, False, False])) == 0.625


def test_the_dose_curve_scales_the_quarantine() -> None:
    model = build_model(0)
    attached(model, ARMS["route"], Recipe(), 0)
    curve = dose_curve(model, ENVIRONMENTS["C"], 64, seed=0)
    assert [point["scale"] for point in curve] == [0.0, 0.25, 0.5, 0.75, 1.0]
    # B is zero: whatever the scale, the same model on the same prompts and random numbers
    assert len({tuple(point.values())[1:] for point in curve}) == 1
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B_quarantine"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    prompted = []

    def first_step(module: nn.Module, args: tuple[torch.Tensor], output: CausalLMOutputWithPast) -> None:
        # All scales see the same prompts; what follows depends on what was sampled.
        if args[0].shape[1] > 1:
            prompted.append(output.logits.sum().item())

    model.register_forward_hook(first_step)
    dose_curve(model, ENVIRONMENTS["C"], 2, seed=0)
    assert len(prompted) == len(set(prompted)) == 5


def test_the_modes_asked_for_are_those_that_are_monitored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "load_base", lambda environment, seed: build_model(seed))
    job, recipe = Job("C", "vanilla", 0, 0), Recipe(steps=1, curve_n_per_mode=2, n_per_mode=2)
    suite.run_one(job, ["file"], recipe, tmp_path)
    assert read_result(job.path(tmp_path), job, suite.identity(recipe, ["file"]))["monitored"] == ["file"]


def test_drift_is_of_what_would_be_extracted_now_with_the_first() -> None:
    """Ablated: what only the quarantine learnt moves nothing."""
    model, environment = build_model(0), ENVIRONMENTS["C"]
    attached(model, ARMS["route"], Recipe(), 0)
    detector = make_detector(model, environment, ARMS["route"], Recipe(), 0)
    assert detector is not None
    prompts, _ = environment.sample_prompts(16, torch.Generator().manual_seed(0))
    completions = sample(model, prompts, torch.Generator().manual_seed(1), environment.completion_length)
    ablated, hacked = torch.zeros(16, dtype=torch.bool), torch.arange(16) < 8

    def drift() -> dict[str, Any]:
        assert detector is not None
        return measurements.drift(detector, prompts, completions, ablated, hacked)

    for where in ("", "_upper"):
        assert drift()[f"overlap_first{where}"] == pytest.approx(1.0)
        assert drift()[f"auroc_first{where}"] == drift()[f"auroc_fresh{where}"]
    blocks = dict(model.named_parameters())
    for name, moves in (("lora_B_quarantine", False), ("lora_B", True)):
        with torch.no_grad():
            for parameter in (p for key, p in blocks.items() if key.endswith(name)):
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
        moved = drift()
        for where in ("", "_upper"):
            assert (moved[f"overlap_first{where}"] < 0.95) is moves
            assert (moved[f"auroc_first{where}"] != moved[f"auroc_fresh{where}"]) is moves
        assert moved["overlap_in_use"] == pytest.approx(moved["overlap_first"])
    assert moved["overlap_first"] != moved["overlap_first_upper"]
    detector.directions.update_(detector.extract(), step=1)
    assert drift()["overlap_in_use"] == pytest.approx(1.0)
    assert drift()["overlap_first"] < 0.95
    assert drift()["auroc_fresh"] == auroc(detector.scores(prompts, completions, ablated), hacked)
    assert "auroc_first" not in measurements.drift(detector, prompts, completions, ablated, hacked | True)
    random = make_detector(model, ENVIRONMENTS["C"], ARMS["random"], Recipe(), 0)
    assert random is not None
    assert measurements.drift(random, prompts, completions, ablated, hacked) == {}
