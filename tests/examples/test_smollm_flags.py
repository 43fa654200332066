"""Flags of the SmolLM2 example by ratios of log-probabilities, against whole sequences one by one."""

from random import Random
from typing import Any

import pytest
import torch
from support.models import randomize_blocks

import gradroute as gr
from loopholes.arms import ARMS
from smollm.base_model import _tiny
from smollm.batch import Batch
from smollm.environment import VARIANTS
from smollm.evaluation import evaluate
from smollm.flags import Flagger
from smollm.grpo import attach_blocks, train
from smollm.recipe import Recipe
from smollm.rollouts import grouped, read_prompts, rollouts_of
from smollm.text import prompt_ids, reply_ids

REPLIES = ["42", "status=pass", "no", "VERIFIED or not"]
PROMPTS = 2


@pytest.fixture
def setting() -> Any:
    model, codec = _tiny()
    attach_blocks(model.eval(), Recipe(), seed=0)
    draw = Random(0)
    prompts = [VARIANTS["plain"].prompt(draw) for _ in range(PROMPTS)]
    return model, codec, prompts


def logps(model: Any, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """Of each token of a reply, without a cache, a padding or a batch."""
    with torch.no_grad():
        logp = model(torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0].log_softmax(-1)
    return logp[range(len(prompt) - 1, len(prompt) + len(reply) - 1), reply]


@pytest.mark.parametrize("arm", ["weak-explained", "weak-likelier"])
def test_flags_are_labels_or_what_one_view_makes_likelier_than_the_other(setting: Any, arm: str) -> None:
    model, codec, prompts = setting
    randomize_blocks(model, 0)
    ids = [prompt_ids(codec, prompt.text) for prompt in prompts]
    replies = [reply_ids(codec, reply) for reply in REPLIES]
    prefix = grouped(PROMPTS, len(REPLIES) // PROMPTS)
    # Half of the rows were sampled ablated; all are scored in both views.
    rollouts = rollouts_of(prefix + PROMPTS * (torch.arange(4) % 2), replies)
    prefixes = read_prompts(model, ids, both_views=True)
    batch = Batch.graded(codec, prompts, prefix, rollouts)
    flagger = Flagger(model, ARMS[arm], None, nats=1.0)
    flags, scores = flagger(batch, ids, prefixes, rollouts, torch.Generator())

    other = gr.ablate_quarantine if arm == "weak-explained" else gr.disable_adapters
    expected = []
    for i, reply in zip(prefix.tolist(), replies, strict=True):
        on = logps(model, ids[i], reply)
        with other(model):
            expected.append((on - logps(model, ids[i], reply)).cumsum(0).max())
    assert scores is not None
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-3, atol=1e-3)
    assert flags.tolist() == ((torch.stack(expected) > 1) | batch.hacked & batch.monitored).tolist()
    assert len({bool(score > 1) for score in expected}) == 2  # or any threshold would do


def test_permuted_flags_keep_their_number(setting: Any) -> None:
    model, codec, prompts = setting
    randomize_blocks(model, 0)
    prefix = grouped(PROMPTS, 2)
    rollouts = rollouts_of(prefix, [reply_ids(codec, reply) for reply in REPLIES])
    ids = [prompt_ids(codec, prompt.text) for prompt in prompts]
    batch, prefixes = Batch.graded(codec, prompts, prefix, rollouts), read_prompts(model, ids, both_views=True)
    (flags, scores), (permuted, same) = (
        Flagger(model, ARMS[arm], None, nats=1.0)(batch, ids, prefixes, rollouts, torch.Generator().manual_seed(0))
        for arm in ("weak-explained", "weak-explained-shuffle")
    )
    assert scores is not None
    assert scores.equal(same)
    assert flags.sum() == permuted.sum() > 0
    assert not flags.equal(permuted)


def test_views_are_evaluated_once_only_where_the_quarantine_is_empty(setting: Any) -> None:
    model, codec, _ = setting
    recipe = Recipe(n_per_marker=4, n_no_note=4)
    both, once = (evaluate(model, codec, VARIANTS["plain"], 0, recipe, one_view=one) for one in (False, True))
    assert both == once
    randomize_blocks(model, 0)
    with pytest.raises(RuntimeError, match="quarantine should be empty"):
        evaluate(model, codec, VARIANTS["plain"], 0, recipe, one_view=True)


def test_arms_of_another_study_are_refused(setting: Any) -> None:
    model, codec, _ = setting
    with pytest.raises(ValueError, match="`arm_name` should be one of base, .* Found 'erase'"):
        train(model, codec, VARIANTS["plain"], "erase", 0, 0, Recipe())
