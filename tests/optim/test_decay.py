"""`decay_toward_start`: parameters are pulled to where they began, instead of to zero."""

import pytest
import torch
from support.models import routed_tower
from support.tower_steps import REFUSED, adamw, blocks, same, step, trained
from torch import nn

import gradroute as gr
from gradroute.optim.corrections import decay_toward_start
from gradroute.optim.idle_blocks import skip_idle_blocks


def test_decay_equals_the_formula() -> None:
    model, plain = routed_tower(), routed_tower()
    settings = {"weight_decay": 0.0}
    groups = [
        {"params": [p for _, p in get(model)], "lr": lr}
        for get, lr in ((gr.deployed_parameters, 0.01), (gr.quarantine_parameters, 0.03))
    ]
    optimizer = torch.optim.AdamW(groups, **settings)
    plain_groups = [
        {"params": [p for _, p in get(plain)], "lr": lr}
        for get, lr in ((gr.deployed_parameters, 0.01), (gr.quarantine_parameters, 0.03))
    ]
    plain_optimizer = torch.optim.AdamW(plain_groups, **settings)
    start = blocks(model)
    decay = decay_toward_start(model, optimizer, 0.5)
    for seed in range(3):
        with torch.no_grad():
            for a, b in zip(trained(model), trained(plain), strict=True):
                b.copy_(a)
        step(model, optimizer, "absorb", seed)
        step(plain, plain_optimizer, "absorb", seed)
        free, found = blocks(plain), blocks(model)
        for block, lr in (("deployed", 0.01), ("quarantine", 0.03)):
            for name, value in free[block].items():
                expected = value - lr * 0.5 * (value - start[block][name])
                torch.testing.assert_close(found[block][name], expected, rtol=0, atol=1e-15)
                assert not torch.equal(found[block][name], value)
    assert repr(decay) == "DecayTowardStart(0.5, 8 parameters)"


def test_without_gradients_to_follow_it_ends_where_it_began() -> None:
    model = routed_tower()
    optimizer, start = torch.optim.SGD(trained(model), lr=0.5), blocks(model)
    with decay_toward_start(model, optimizer, 0.4):
        with torch.no_grad():
            for p in trained(model):
                p.add_(1.0)
        for _ in range(200):
            for p in trained(model):
                p.grad = torch.zeros_like(p)
            optimizer.step()
    for block in start:
        for name, value in blocks(model)[block].items():
            torch.testing.assert_close(value, start[block][name], rtol=0, atol=1e-12)
    with torch.no_grad():
        model.lower.lora_A.add_(1.0)
    moved = blocks(model)
    optimizer.step()
    assert same(blocks(model)["deployed"], moved["deployed"])


@pytest.mark.parametrize("decay_first", [False, True])
def test_a_skipped_block_is_not_decayed_either(decay_first: bool) -> None:
    model = routed_tower()
    optimizer = adamw(model, weight_decay=0.0)
    makers = [lambda: decay_toward_start(model, optimizer, 0.5), lambda: skip_idle_blocks(model, optimizer)]
    for make in makers if decay_first else makers[::-1]:
        make()
    step(model, optimizer, "absorb")
    before = blocks(model)
    for seed in range(3):
        step(model, optimizer, "keep", seed)
    assert same(blocks(model)["quarantine"], before["quarantine"])
    assert not same(blocks(model)["deployed"], before["deployed"])


def test_a_resumed_decay_pulls_toward_the_old_start() -> None:
    model = routed_tower()
    optimizer = adamw(model, weight_decay=0.0)
    first = decay_toward_start(model, optimizer, 0.5)
    step(model, optimizer, "absorb")
    state = first.state_dict()
    first.close()
    resumed = decay_toward_start(model, optimizer, 0.5)
    assert not same(resumed.state_dict()["start"], state["start"])
    resumed.load_state_dict(state)
    assert same(resumed.state_dict()["start"], state["start"])
    with pytest.raises(gr.errors.FileFormatError, match="weight_decay=0.5. Found 0.25 here"):
        decay_toward_start(model, optimizer, 0.25).load_state_dict(state)
    for start in ({}, {**state["start"], "lower.lora_A": torch.zeros(1)}):
        with pytest.raises(gr.errors.FileFormatError, match=r"same parameters and shapes. Different: \['lower.lora_A"):
            resumed.load_state_dict({**state, "start": start})


def test_two_decays_at_once_and_no_decay_raise() -> None:
    model = routed_tower()
    with pytest.raises(gr.GradRouteError, match="should have weight_decay=0 for `lower.lora_A`. Found 0.1"):
        decay_toward_start(model, adamw(model), 0.5)
    for bad in (0.0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(REFUSED, match="weight_decay"):
            decay_toward_start(model, adamw(model, weight_decay=0.0), bad)
    other = torch.optim.AdamW([nn.Parameter(torch.ones(2))], weight_decay=0.3)
    with pytest.raises(gr.GradRouteError, match="every parameter of the blocks that is to be trained"):
        decay_toward_start(model, other, 0.5)
