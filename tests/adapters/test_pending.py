"""Masks that are decided between forward and backward: what reads them late, and every way to decide them wrongly."""

import pytest
import torch
from support.models import gradients, normal, routed_tower
from support.tiny_models import VOCAB, peft_model
from torch import Tensor, nn

import gradroute as gr
from gradroute.adapters import PendingMask, clear_route, set_route
from gradroute.errors import RouteError
from gradroute.filters import RolloutFilter, apply_filter

pytestmark = pytest.mark.touches_peft

N = 6
FLAGS = torch.tensor([True, False, True, False, False, True])
CLASSIC = gr.RouteMask.classic(FLAGS)


def loss_of(model: nn.Module) -> Tensor:
    return (model(normal(N, 5)) * normal(N, 4, seed=1)).sum()


def given(mask: gr.RouteMask = CLASSIC) -> dict[str, Tensor]:
    model = routed_tower()
    with gr.route(model, mask):
        loss_of(model).backward()
    return gradients(model)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], expected[name]) for name in expected)


def test_scores_of_the_losss_own_forward_decide_its_mask() -> None:
    model = peft_model("llama", torch.float64)
    pairs = [gr.ContrastivePair([3, 4, 5], [20, 21], [22, 23, 24]), gr.ContrastivePair([6, 7], [20, 25, 21], [22])]
    directions = gr.extract_activation_directions(model, pairs, progress=False)
    gate = gr.ThresholdGate(0.0)
    ids = torch.randint(3, VOCAB, (8, 7), generator=torch.Generator().manual_seed(0))
    completion = (torch.arange(7) >= 3).expand(8, 7)

    def loss() -> Tensor:
        logp = model(input_ids=ids).logits[:, 2:-1].log_softmax(-1)
        return -logp.gather(2, ids[:, 3:, None]).sum()

    with torch.no_grad(), gr.capture_activations(model, pool=completion) as features:
        model(input_ids=ids)
    before = gate(directions.score(features))
    assert 0 < before.routed.sum() < 8
    with gr.route(model, before):
        loss().backward()
    expected = gradients(model)
    model.zero_grad()
    with gr.route(model, PendingMask.on(8)) as pending, gr.capture_activations(model, pool=completion) as features:
        value = loss()
        pending.decide(gate(directions.score(features)))
        value.backward()
    assert torch.equal(pending.decided.routed, before.routed)
    assert same(gradients(model), expected)


def test_a_sticky_route_takes_one_too() -> None:
    model, pending = routed_tower(), PendingMask.on(N)
    set_route(model, pending)
    loss = loss_of(model)
    pending.decide(CLASSIC)
    loss.backward()
    clear_route(model)
    assert same(gradients(model), given())
    set_route(model, PendingMask.on(N))
    loss_of(model)
    with pytest.raises(RouteError, match="Found that it was not"):
        clear_route(model)
    assert not any(layer.has_open_route for layer in (model.lower, model.upper))


def test_weights_of_any_kind_may_be_decided() -> None:
    mask = gr.RouteMask.weights(m=CLASSIC.m, g_d=normal(N, seed=2), g_q=normal(N, seed=3))
    model = routed_tower()
    with gr.route(model, PendingMask(mask.m)) as pending:
        loss = loss_of(model)
        pending.decide(mask)
        loss.backward()
    assert same(gradients(model), given(mask))
    assert not same(gradients(model), given())


def test_a_branch_that_is_detached_waits_for_the_decision_too() -> None:
    found = []
    for mask in (PendingMask.on(N), CLASSIC):
        model = routed_tower(stop_gradient="branch")
        with gr.route(model, mask):
            loss = loss_of(model)
            if isinstance(mask, PendingMask):
                mask.decide(CLASSIC)
            loss.backward()
        found.append(gradients(model))
    assert same(*found)
    assert not same(found[0], given())


def test_a_filter_of_rollouts_reads_the_gates_that_were_decided() -> None:
    filtered = []
    for late in (False, True):
        model = peft_model("llama", torch.float64)
        pairs = [gr.ContrastivePair([3, 4, 5], [20, 21], [22, 23]), gr.ContrastivePair([6, 7], [20, 25], [22])]
        directions = gr.extract_gradient_directions(model, pairs, features="parameter", progress=False)
        model.requires_grad_(False)
        for _, p in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]:
            p.requires_grad_()
        rollouts = RolloutFilter(directions)
        mask = gr.RouteMask.weights(m=torch.ones(4), g_d=[1.0, 0.5, -1.0, 2.0], g_q=[1.0, 0.0, 2.0, 1.0])
        ids = torch.randint(3, VOCAB, (4, 6), generator=torch.Generator().manual_seed(1))
        with rollouts.record(model), gr.route(model, PendingMask(mask.m) if late else mask) as route:
            loss = -model(input_ids=ids).logits.log_softmax(-1)[..., 5].sum()
            if late:
                route.decide(mask)
            loss.backward()
        apply_filter(model, rollouts)
        filtered.append(gradients(model))
    assert same(*filtered)


@pytest.mark.parametrize(("zones", "idle"), [("absorb", None), ("route", "deployed")])
def test_a_block_that_a_late_mask_leaves_out_is_not_stepped(zones: str, idle: str | None) -> None:
    model = routed_tower()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    skip = gr.skip_idle_blocks(model, optimizer)
    with gr.route(model, PendingMask.on(N)) as pending:
        loss = loss_of(model)
        pending.decide(gr.RouteMask.zones([zones] * N))
        loss.backward()
    optimizer.step()
    assert skip.skipped == {block: int(block == idle) for block in ("deployed", "quarantine")}


@pytest.mark.corner("backward runs before the pending mask of a route is decided", "`RouteError` in backward")
def test_backward_comes_after_the_decision() -> None:
    model = routed_tower()
    with pytest.raises(RouteError, match="between forward and backward"), gr.route(model, PendingMask.on(N)):
        loss_of(model).backward()
    assert not gradients(model)


@pytest.mark.corner("a pending mask is never decided", "`RouteError` at the end of the route")
def test_a_mask_that_nobody_decides_raises_at_the_end() -> None:
    model = routed_tower()
    with pytest.raises(RouteError, match="between forward and backward"), gr.route(model, PendingMask.on(N)):
        loss_of(model)


@pytest.mark.corner("a pending mask is decided with another m than its forward ran with", "`RouteError` by `decide`")
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (gr.RouteMask.exclusive(FLAGS), "3 other weights, the first 0 instead of 1 at index \\(1,\\)"),
        (gr.RouteMask.classic(FLAGS[:4]), r"shape \(6,\) of the pending mask. Found \(4,\)"),
    ],
)
def test_what_does_not_fit_the_forward_is_not_decided(mask: gr.RouteMask, message: str) -> None:
    pending = PendingMask.on(N)
    with pytest.raises(RouteError, match=message):
        pending.decide(mask)
    pending.decide(CLASSIC)


@pytest.mark.corner("a pending mask is decided twice, or given to a second route", "`RouteError`")
def test_a_pending_mask_is_of_one_decision_and_one_route() -> None:
    model, pending = routed_tower(), PendingMask.on(N)
    with gr.route(model, pending):
        loss = loss_of(model)
        pending.decide(CLASSIC)
        with pytest.raises(RouteError, match="decided once"):
            pending.decide(CLASSIC)
        loss.backward()
    with pytest.raises(RouteError, match="serves one route"), gr.route(model, pending):
        pass


def test_rows_that_may_come_to_train_the_quarantine_are_not_ablated() -> None:
    model = routed_tower()
    rows = torch.arange(N) < 2
    with pytest.raises(RouteError, match="should not be ablated"):
        with gr.route(model, PendingMask.on(N)), gr.ablate_quarantine(model, rows=rows):
            loss_of(model)
    # With m = 0 their forward is the ablated one, and they can only be kept.
    with gr.route(model, PendingMask((~rows).float())) as pending, gr.ablate_quarantine(model, rows=rows):
        loss = loss_of(model)
        pending.decide(gr.RouteMask.zones(["keep"] * 2 + ["route"] * 4))
        loss.backward()
    assert same(gradients(model), given(gr.RouteMask.zones(["keep"] * 2 + ["route"] * 4)))


@pytest.mark.parametrize("rows", [0, -1, True])
def test_rows_are_a_positive_number(rows: object) -> None:
    with pytest.raises(RouteError, match="`rows`"):
        PendingMask.on(rows)


@pytest.mark.parametrize("m", [torch.tensor([torch.nan]), torch.ones(2, requires_grad=True)])
def test_m_is_checked_like_that_of_a_mask(m: Tensor) -> None:
    with pytest.raises(RouteError, match="`m`"):
        PendingMask(m)
