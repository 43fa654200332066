"""The view that rollouts are scored in, in both studies, and the table that compares the two."""

from random import Random
from typing import Any

import pytest
import torch
from support.models import randomize_blocks

import gradroute as gr
from loopholes.arms import ARMS
from loopholes.base_model import build_model
from loopholes.detector import SCORE_VIEWS
from loopholes.environment import ENVIRONMENTS
from loopholes.grpo import Recipe, attached, make_detector
from loopholes.measurements import over_steps
from loopholes.sampling import captured
from reporting.score_view import paired_table, score_view_table
from reporting.store import Job
from smollm.base_model import _tiny
from smollm.detector import Detector, token_pairs
from smollm.environment import VARIANTS
from smollm.grpo import attach_blocks
from smollm.recipe import Recipe as SmolRecipe
from smollm.rollouts import captured as smol_captured
from smollm.rollouts import read_prompts, rollouts_of
from smollm.score_view import measures
from smollm.text import prompt_ids, reply_ids

ROWS = 6
ABLATED = torch.arange(ROWS) % 2 == 0


def both_ways(ablated: torch.Tensor, on: torch.Tensor, score_view: str) -> torch.Tensor:
    """What each row should score, by its scores in either view."""
    assert (ablated - on).abs().min() > 1e-4  # or the two views could not be told apart
    return ablated if score_view == "ablated" else torch.where(ABLATED, ablated, on)


@pytest.mark.parametrize("score_view", SCORE_VIEWS)
def test_the_example_scores_ablated_or_each_row_as_it_was_sampled(score_view: Any) -> None:
    model, environment = build_model(0), ENVIRONMENTS["C"]
    recipe = Recipe(score_view=score_view)
    attached(model, ARMS["route"], recipe, 0)
    randomize_blocks(model, 0)
    detector = make_detector(model, environment, ARMS["route"], recipe, 0)
    assert detector is not None
    prompts, _ = environment.sample_prompts(ROWS, torch.Generator().manual_seed(0))
    completions = environment.honest_completions(prompts, torch.Generator().manual_seed(0))
    everywhere, nowhere = torch.ones(ROWS).bool(), torch.zeros(ROWS).bool()
    ablated, on = (
        detector.directions.score(dict(captured(model, prompts, completions, rows))) for rows in (everywhere, nowhere)
    )
    expected = both_ways(ablated, on, score_view)
    torch.testing.assert_close(detector.scores(prompts, completions, ABLATED), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("score_view", SCORE_VIEWS)
def test_the_study_of_smollm_scores_ablated_or_each_row_as_it_was_sampled(score_view: Any) -> None:
    environment, recipe = VARIANTS["plain"], SmolRecipe()
    model, codec = _tiny()
    attach_blocks(model.eval(), recipe, seed=0)
    randomize_blocks(model, 0)
    draw = Random(0)
    prompts = [prompt_ids(codec, environment.prompt(draw).text) for _ in range(ROWS)]
    replies = [reply_ids(codec, reply) for reply in ("42", "status=pass", "no", "VERIFIED or not", "[OK]", "7")]
    detector = Detector(
        model, token_pairs(environment, codec, 2, 0), environment, ARMS["route"], 0,
        threshold=0.5, every=5, score_view=score_view,
    )  # fmt: skip
    scores = {}
    for view in ("on", "ablated"):
        with gr.ablate_quarantine(model, scale=float(view == "on")):
            prefixes = read_prompts(model, prompts, both_views=False)
            features = smol_captured(model, prefixes, rollouts_of(torch.arange(ROWS), replies), environment.features)
        scores[view] = detector.directions.score({name: features[name] for name in detector.directions.rows})
    prefixes = read_prompts(model, prompts, both_views=True)
    rollouts = rollouts_of(torch.arange(ROWS) + ROWS * ABLATED, replies)
    expected = both_ways(scores["ablated"], scores["on"], score_view)
    torch.testing.assert_close(detector.scores(prefixes, rollouts), expected, rtol=1e-3, atol=1e-3)


def gate_point(recall: float | None, hacks: int, auroc: float | None) -> dict[str, Any]:
    return {
        "recall_monitored": recall, "recall_held_out": None, "false_positive_rate": 0.25,
        "hacks_monitored": hacks, "hacks_held_out": 0, "rest": 8, "auroc_monitored": auroc, "auroc_held_out": None,
    }  # fmt: skip


def test_over_steps_rollouts_count_alike_and_aurocs_are_averaged() -> None:
    found = over_steps([gate_point(1.0, 1, 1.0), gate_point(0.5, 4, 0.5), gate_point(None, 0, None)])
    assert found == {
        "recall_monitored": 0.6, "recall_held_out": None, "false_positive_rate": 0.25,
        "auroc_monitored": 0.75, "auroc_held_out": None,
    }  # fmt: skip


def test_views_are_compared_run_by_run() -> None:
    ablated = {1: {"a": 0.1, "b": None}, 2: {"a": 0.2, "b": None}, 3: {"a": 0.3, "b": 0.5}, 4: {"a": 0.9, "b": 0.9}}
    sampled = {3: {"a": 0.7, "b": 0.25}, 1: {"a": 0.2, "b": 0.1}, 2: {"a": 0.3, "b": 0.1}}
    # differences .1, .1, .4: mean .2, standard deviation .17321, t(.975, 2) = 4.3027; the fourth has no partner
    lines = paired_table(ablated, sampled).splitlines()[2:]
    assert lines == [
        "| a | 3 | 0.200 [0.100, 0.300] | 0.400 [0.200, 0.700] | +0.200 [-0.230, +0.630] |",
        "| b | 1 | 0.500 [0.500, 0.500] | 0.250 [0.250, 0.250] | -0.250 |",
    ]


def test_the_table_of_a_suite_has_the_arm_and_environment_that_are_asked_for() -> None:
    rates = {"hack_monitored": 0.1, "hack_held_out": 0.2, "solve_hinted": 0.3, "solve_no_hint": 0.4}
    gate = {"auroc_monitored": 1.0, "auroc_held_out": 0.9, "recall_monitored": 1.0, "recall_held_out": 0.8,
            "false_positive_rate": 0.1}  # fmt: skip
    entry = {"gate": gate, "on": {name: 2 * rate for name, rate in rates.items()}, "ablated": rates}
    other = {**entry, "gate": {**gate, "recall_held_out": 0.0}}
    jobs = {Job("C", "route", 0, 0): entry, Job("N", "route", 0, 0): other, Job("C", "shuffle", 0, 0): other}
    lines = score_view_table(jobs, jobs, "C", "route").splitlines()
    assert "| gate: recall, held out | 1 | 0.800 [0.800, 0.800] | 0.800 [0.800, 0.800] | +0.000 |" in lines
    assert "| on: hack, held out | 1 | 0.400 [0.400, 0.400] | 0.400 [0.400, 0.400] | +0.000 |" in lines
    assert len(lines) == 2 + 5 + 8


def test_markers_of_a_kind_are_taken_together() -> None:
    rates = {"VERIFIED": "11", "status=pass": "00", "exit(0)": "10", "[OK]": "10", "no note": "01"}
    kinds = ("hack_on", "hack_ablated", "solve_on", "solve_ablated")
    outcomes = {mode: dict.fromkeys(kinds, digits) for mode, digits in rates.items()}
    outcomes["[OK]"]["hack_ablated"] = "11"
    point = {"flagged_monitored": [3, 4], "flagged_held_out": [0, 0], "flagged_clean": [1, 10]}
    found = measures({"outcomes": outcomes, "curve": [point | {"auroc_monitored": 0.5}, point]})
    assert found == {
        "gate: AUROC, monitored": 0.5, "gate: AUROC, held out": None, "gate: recall, monitored": 0.75,
        "gate: recall, held out": None, "gate: false positives": 0.1,
        "ablated: hack, monitored": 0.5, "ablated: hack, held out": 0.75, "ablated: solve, no note": 0.5,
        "on: hack, monitored": 0.5, "on: hack, held out": 0.5, "on: solve, no note": 0.5,
    }  # fmt: skip
