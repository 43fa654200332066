"""`frozen_quarantine`: a quarantine that was trained first keeps a policy from learning the same once more."""

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from support.models import Tower, randomize_blocks, routed_tower
from support.tower_steps import adamw, backward, blocks, inputs, same, step
from torch import Tensor, nn

import gradroute as gr
from gradroute.adapters import frozen_quarantine

HACK = 0


def policy() -> nn.Module:
    """A tower over four actions, the first of which is a hack; attached with zero B."""
    torch.manual_seed(0)
    return gr.attach(Tower().double(), r=2, r_quarantine=3, lora_alpha=4.0)


def log_hack(model: nn.Module) -> Tensor:
    return model(inputs(0)).log_softmax(-1)[:, HACK]


def inoculate(model: nn.Module, steps: int = 60) -> None:
    optimizer = torch.optim.AdamW([p for _, p in gr.quarantine_parameters(model)], lr=0.05)
    for _ in range(steps):
        with gr.route(model, gr.RouteMask.zones(["route"] * 4)):
            (-log_hack(model).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def reinforce(model: nn.Module, steps: int = 200) -> None:
    """The exact gradient of the expected reward, where hacks alone are paid."""
    optimizer = torch.optim.AdamW(gr.optim.block_groups(model), lr=0.01, weight_decay=0.0)
    for _ in range(steps):
        (-log_hack(model).exp().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def deployed_hacks(model: nn.Module) -> float:
    with gr.ablate_quarantine(model):
        return log_hack(model).exp().mean().item()


def test_the_quarantine_alone_learns_the_hack_and_the_deployed_block_does_not_learn_it_again() -> None:
    model, plain = policy(), policy()
    at_start, base = blocks(model), deployed_hacks(model)
    assert base < 0.5
    inoculate(model)
    assert log_hack(model).exp().mean() > 0.95
    assert same(blocks(model)["deployed"], at_start["deployed"])
    assert deployed_hacks(model) == base
    taught = blocks(model)
    with frozen_quarantine(model):
        reinforce(model)
    assert same(blocks(model)["quarantine"], taught["quarantine"])
    assert not same(blocks(model)["deployed"], taught["deployed"])
    assert abs(deployed_hacks(model) - base) < 0.05
    # The same reward, without a quarantine that knows the hack.
    for _, parameter in gr.quarantine_parameters(plain):
        parameter.requires_grad_(False)
    reinforce(plain)
    assert deployed_hacks(plain) > 0.95


@pytest.mark.parametrize("zeroed", [False, True])
def test_an_optimizer_with_moments_of_the_quarantine_leaves_it_as_it_is(zeroed: bool) -> None:
    model, unfrozen = routed_tower(), routed_tower()
    optimizers = [adamw(each) for each in (model, unfrozen)]
    for each, optimizer in zip((model, unfrozen), optimizers, strict=True):
        step(each, optimizer, "absorb")
        optimizer.zero_grad(set_to_none=not zeroed)
    before = blocks(model)
    with frozen_quarantine(model) as inside:
        assert inside is model
        assert gr.parameter_summary(model).quarantine == 0
        backward(model, "absorb", seed=1)
        optimizers[0].step()
    step(unfrozen, optimizers[1], "absorb", seed=1)
    assert same(blocks(model)["quarantine"], before["quarantine"])
    assert not same(blocks(unfrozen)["quarantine"], before["quarantine"])
    assert same(blocks(model)["deployed"], blocks(unfrozen)["deployed"])
    assert gr.parameter_summary(model).quarantine == gr.parameter_summary(unfrozen).quarantine > 0


def test_what_was_frozen_before_stays_so_and_an_error_inside_passes_through() -> None:
    model = routed_tower()
    first = next(p for _, p in gr.quarantine_parameters(model)).requires_grad_(False)
    with pytest.raises(ZeroDivisionError), frozen_quarantine(model):
        raise ZeroDivisionError
    flags = [p.requires_grad for _, p in gr.quarantine_parameters(model)]
    assert flags == [False, True, True, True]
    assert not first.requires_grad
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.touches_peft
@pytest.mark.corner(
    "PEFT's `disable_adapter`, as in a reference pass, makes a frozen quarantine trainable again",
    "the next forward inside `frozen_quarantine` freezes it; it is bitwise as it was",
)
def test_peft_makes_it_trainable_again_and_the_next_forward_freezes_it() -> None:
    torch.manual_seed(0)
    config = gr.QuarantineLoraConfig(r=2, lora_alpha=4, target_modules=["lower", "upper"])
    model = randomize_blocks(get_peft_model(Tower().double(), config))
    optimizer, before = adamw(model), blocks(model)
    with frozen_quarantine(model):
        with model.disable_adapter(), torch.no_grad():
            model(inputs(0))
        assert gr.parameter_summary(model).quarantine > 0
        step(model, optimizer, "absorb")
        assert gr.parameter_summary(model).quarantine == 0
    assert same(blocks(model)["quarantine"], before["quarantine"])
    assert not same(blocks(model)["deployed"], before["deployed"])


def nothing(model: nn.Module) -> None:
    pass


def under_no_grad(model: nn.Module) -> None:
    with torch.no_grad():
        model(inputs(0))


def ablated(model: nn.Module) -> None:
    with gr.ablate_quarantine(model):
        backward(model, None)


def disabled(model: nn.Module) -> None:
    with gr.disable_adapters(model):
        model(inputs(0))


def ablated_row_by_row(model: nn.Module) -> None:
    with gr.ablate_quarantine(model, rows=torch.ones(4, dtype=torch.bool)):
        backward(model, None)


def kept(model: nn.Module) -> None:
    backward(model, "keep")


@torch.no_grad()
def written(model: nn.Module) -> None:
    model.upper.lora_A_quarantine[0, 0] *= 1.001


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (nothing, "Found no forward with gradients"),
        (under_no_grad, "Found no forward with gradients"),
        (ablated, "Found it off for every row"),
        (disabled, "Found it off for every row"),
        (ablated_row_by_row, "Found it off for every row"),
        (kept, "Found it off for every row"),
        (written, "changed in 1 layers: `upper`"),
    ],
)
def test_a_run_that_was_not_what_it_was_to_be_raises(training: Callable[[nn.Module], None], message: str) -> None:
    model = routed_tower()
    with pytest.raises(gr.GradRouteError, match=message), frozen_quarantine(model):
        training(model)
    assert all(p.requires_grad for _, p in gr.quarantine_parameters(model))


def test_one_row_with_the_quarantine_on_is_enough() -> None:
    model = routed_tower()
    with frozen_quarantine(model):
        backward(model, "keep")
        backward(model, "mixed")
    assert all(p.grad is None for _, p in gr.quarantine_parameters(model))


@pytest.mark.parametrize("idle", [["lower"], ["lower", "upper"]])
def test_a_quarantine_that_adds_nothing_is_refused(idle: list[str]) -> None:
    model = routed_tower()
    with torch.no_grad():
        for name in idle:
            model.get_submodule(name).lora_B_quarantine.zero_()
    with pytest.raises(gr.GradRouteError, match=f"adds nothing in {len(idle)} of 2 layers: `lower`"):
        frozen_quarantine(model)


def test_an_expert_may_have_learned_nothing() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(5, 5), "experts": nn.ModuleList([nn.Linear(5, 5)])}).double()
    randomize_blocks(gr.attach(model, r=2))
    with torch.no_grad():
        model["experts"][0].lora_B_quarantine.zero_()
    with frozen_quarantine(model):
        model["gate"](inputs(0))
        assert not any(p.requires_grad for _, p in gr.quarantine_parameters(model))
