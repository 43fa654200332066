"""Rollouts with a shared prefix: the same model as without, in both views; gradients that end at the prefix."""

from random import Random

import pytest
import torch
from support.models import randomize_blocks

import gradroute as gr
from smollm.base_model import _tiny
from smollm.environment import VARIANTS
from smollm.grpo import attach_blocks
from smollm.recipe import Recipe
from smollm.rollouts import captured, grouped, nll, read_prompts, rollouts_of, sample
from smollm.text import prompt_ids, reply_ids

REPLIES = ["42", "status=pass", "no", "VERIFIED or not"]


@pytest.fixture
def setting():
    model, codec = _tiny()
    attach_blocks(model.eval(), Recipe(), seed=0)
    randomize_blocks(model, 0)
    draw = Random(0)
    prompts = [prompt_ids(codec, VARIANTS["plain"].prompt(draw).text) for _ in REPLIES]
    assert len({len(ids) for ids in prompts}) > 1  # so that prefixes are padded
    return model, codec, prompts, [reply_ids(codec, reply) for reply in REPLIES]


def whole_nll(model, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """Without a cache, a padding or a batch."""
    logp = model(torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0].log_softmax(-1)
    return -sum(logp[len(prompt) - 1 + t, token] for t, token in enumerate(reply))


@pytest.mark.parametrize("view", ["on", "ablated"])
def test_a_shared_prefix_changes_no_log_probability(setting, view: str) -> None:
    model, _, prompts, replies = setting
    prefixes = read_prompts(model, prompts, both_views=True)
    ablated = torch.full((len(prompts),), view == "ablated")
    rollouts = rollouts_of(torch.arange(len(prompts)) + len(prompts) * ablated, replies)
    with torch.no_grad(), gr.ablate_quarantine(model, rows=ablated):
        found = nll(model, prefixes, rollouts)
    with torch.no_grad(), gr.ablate_quarantine(model, scale=0.0 if view == "ablated" else 1.0):
        expected = sum(whole_nll(model, p, r) for p, r in zip(prompts, replies, strict=True))
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    with torch.no_grad(), gr.ablate_quarantine(model, scale=1.0 if view == "ablated" else 0.0):
        other = sum(whole_nll(model, p, r) for p, r in zip(prompts, replies, strict=True))
    assert abs(other - expected) > 0.1  # or the two views could not be told apart


def test_features_are_those_of_the_whole_sequence(setting) -> None:
    model, _, prompts, replies = setting
    found = captured(
        model, read_prompts(model, prompts, both_views=False), rollouts_of(torch.arange(4), replies), "bottleneck"
    )
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        pool = torch.tensor([[0] * len(prompt) + [1] * len(reply)])
        with torch.no_grad(), gr.capture_activations(model, pool=pool) as capture:
            model(torch.tensor([[*prompt, *reply]]), use_cache=False)
        for name, values in capture.items():
            torch.testing.assert_close(found[name][row], values[0], rtol=1e-3, atol=1e-4)
    one, other = (found["model.layers.1.mlp.down_proj"][row] for row in (0, 1))
    assert not torch.allclose(one, other, atol=1e-2)


def test_sampling_follows_the_model_in_each_rows_view(setting) -> None:
    model, codec, prompts, _ = setting
    prefixes = read_prompts(model, prompts[:1], both_views=True)
    rows = 400
    ablated = torch.arange(rows) % 2 == 0
    rollouts = sample(
        model, prefixes, ablated.long(), torch.Generator().manual_seed(0), length=3, eos=codec.eos, ablated=ablated
    )
    logps = []
    for scale in (0.0, 1.0):
        with torch.no_grad(), gr.ablate_quarantine(model, scale=scale):
            logps.append(model(torch.tensor([prompts[0]]), use_cache=False).logits[0, -1].log_softmax(-1))
    for own, other, drawn in (
        (logps[0], logps[1], rollouts.tokens[ablated, 0]),
        (logps[1], logps[0], rollouts.tokens[~ablated, 0]),
    ):
        # E log p = -H(p) within its own noise, and less under the other view.
        noise = own[drawn].std() / len(drawn) ** 0.5
        assert abs(own[drawn].mean() - (own.exp() * own).sum()) < 3 * noise
        assert own[drawn].mean() - other[drawn].mean() > 5 * noise


def test_replies_end_where_the_model_ends_them(setting) -> None:
    model, codec, prompts, _ = setting
    prefixes = read_prompts(model, prompts, both_views=False)
    rollouts = sample(model, prefixes, grouped(4, 100), torch.Generator().manual_seed(1), length=6, eos=codec.eos)
    for tokens, length in zip(rollouts.tokens.tolist(), rollouts.length.tolist(), strict=True):
        assert codec.eos not in tokens[: length - 1]
        assert length == 6 or tokens[length - 1] == codec.eos
        assert not any(tokens[length:])
    assert {1, 6} < set(rollouts.length.tolist())


def test_gradients_are_those_of_the_last_prompt_token_and_the_reply(setting) -> None:
    """With one-token prefixes cut off, what is left is the gradient of the whole sequence."""
    model, _, prompts, replies = setting
    deployed = dict(gr.deployed_parameters(model))
    prefixes = read_prompts(model, prompts, both_views=False)
    nll(model, prefixes, rollouts_of(torch.arange(4), replies)).backward()
    found = {name: p.grad.clone() for name, p in deployed.items()}
    model.zero_grad()
    for prompt, reply in zip(prompts, replies, strict=True):
        whole_nll(model, prompt, reply).backward()
    # Above the attention of the last layer nothing reaches back into the prompt: exact there, truncated below.
    exact = [
        name for name in deployed if "layers.1" in name and ("mlp" in name or "o_proj" in name or "q_proj" in name)
    ]
    assert exact
    for name in exact:
        torch.testing.assert_close(found[name], deployed[name].grad, rtol=1e-3, atol=1e-4)
    cut = [name for name in deployed if "layers.1" in name and "v_proj" in name]
    assert any(not torch.allclose(found[name], deployed[name].grad, atol=1e-2) for name in cut)
