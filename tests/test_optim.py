"""What an optimizer does to a routed gradient: idle blocks, realised updates, moments, decay, audit."""

import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch
from gradient_directions import ACTIVATION, PARAMETER
from models import Tower, gradients, routed_tower
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradroute as gr
from gradroute.routing.audit import BlockUpdate, audit_updates
from gradroute.routing.idle_blocks import skip_idle_blocks
from gradroute.routing.optim import decay_toward_start, project_updates, purge_moments

REFUSED = (gr.GradRouteError, TypeError)
ZONES = {"keep": [0] * 4, "absorb": [1] * 4, "route": [2] * 4, "mixed": [0, 1, 2, 0]}


def blocks(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """A copy of both blocks' parameters."""
    return {
        "deployed": {name: p.detach().clone() for name, p in gr.deployed_parameters(model)},
        "quarantine": {name: p.detach().clone() for name, p in gr.quarantine_parameters(model)},
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]]


def adamw(model: nn.Module, **settings: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), **{"lr": 0.01, "weight_decay": 0.1, **settings})


def inputs(seed: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def backward(model: nn.Module, zones: str | None, seed: int = 0) -> None:
    if zones is None:
        model(inputs(seed)).square().sum().backward()
        return
    with gr.route(model, gr.RouteMask.zones(torch.tensor(ZONES[zones]))):
        model(inputs(seed)).square().sum().backward()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, zones: str | None, seed: int = 0) -> None:
    optimizer.zero_grad()
    backward(model, zones, seed)
    optimizer.step()


# Idle blocks


@pytest.mark.parametrize(
    ("zones", "idle", "busy"), [("keep", "quarantine", "deployed"), ("route", "deployed", "quarantine")]
)
@pytest.mark.parametrize("foreach", [False, True])
def test_an_idle_block_is_bitwise_still_for_fifty_steps_and_moves_without_the_skip(
    zones: str, idle: str, busy: str, foreach: bool
) -> None:
    model, plain = routed_tower(), routed_tower()
    optimizer, plain_optimizer = adamw(model, foreach=foreach), adamw(plain, foreach=foreach)
    skip = skip_idle_blocks(model, optimizer)
    for each, its in ((model, optimizer), (plain, plain_optimizer)):
        step(each, its, "absorb", seed=99)  # both blocks have moments now
    start = blocks(model)
    state = {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}
    state = {name: {k: v.clone() for k, v in values.items()} for name, values in state.items()}
    for seed in range(50):
        step(model, optimizer, zones, seed)
        step(plain, plain_optimizer, zones, seed)
    assert same(blocks(model)[idle], start[idle])
    assert not same(blocks(plain)[idle], start[idle])
    moved = max((blocks(plain)[idle][name] - value).abs().max().item() for name, value in start[idle].items())
    assert moved > 0.01
    for name, parameter in model.named_parameters():
        if name in start[idle]:
            now = optimizer.state[parameter]
            assert all(torch.equal(now[key], state[name][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
        elif name in start[busy]:
            assert optimizer.state[parameter]["step"] == 51
    if zones == "keep":  # the other way round the quarantine's gradient sees where the deployed block has gone
        assert same(blocks(model)[busy], blocks(plain)[busy])
    assert skip.skipped == {idle: 50, busy: 0}
    assert f"{idle} 50 times" in repr(skip)


@pytest.mark.parametrize("zones", ["absorb", "mixed", None])
def test_a_window_with_eligible_rows_for_both_is_stepped_as_ever(zones: str | None) -> None:
    model, plain = routed_tower(), routed_tower()
    optimizer, plain_optimizer = adamw(model), adamw(plain)
    skip = skip_idle_blocks(model, optimizer)
    for seed in range(3):
        step(model, optimizer, zones, seed)
        step(plain, plain_optimizer, zones, seed)
    assert same(blocks(model)["deployed"], blocks(plain)["deployed"])
    assert same(blocks(model)["quarantine"], blocks(plain)["quarantine"])
    assert skip.skipped == {"deployed": 0, "quarantine": 0}


@pytest.mark.parametrize("order", [("keep", "route"), ("route", "keep"), ("keep", "absorb", "keep")])
def test_a_block_that_one_of_the_accumulated_batches_trains_is_stepped(order: tuple[str, ...]) -> None:
    model = routed_tower()
    optimizer = adamw(model)
    skip = skip_idle_blocks(model, optimizer)
    for seed, zones in enumerate(order):
        backward(model, zones, seed)
    before = blocks(model)
    optimizer.step()
    assert not same(blocks(model)["deployed"], before["deployed"])
    assert not same(blocks(model)["quarantine"], before["quarantine"])
    assert skip.skipped == {"deployed": 0, "quarantine": 0}
    optimizer.zero_grad()
    step(model, optimizer, "keep")
    assert skip.skipped == {"deployed": 0, "quarantine": 1}


@pytest.mark.parametrize(
    ("mask", "idle"),
    [
        (gr.RouteMask.weights(0.0, 1.0, torch.tensor([1.0, 0.0, 1.0, 0.0])), "quarantine"),
        (
            gr.RouteMask.weights(torch.tensor([1.0, 0.0, 1.0, 0.0]), 1.0, torch.tensor([0.0, 1.0, 0.0, 1.0])),
            "quarantine",
        ),
        (gr.RouteMask.weights(1.0, -0.5, torch.tensor([0.0, 0.0, 0.0, 1.0])), None),
        (gr.RouteMask.weights(1.0, 0.0, torch.tensor([0.0, 0.0, 0.0, 1.0])), "deployed"),
    ],
)
def test_eligible_is_a_gate_that_is_not_zero_and_for_the_quarantine_an_open_forward(mask, idle: str | None) -> None:
    model = routed_tower()
    optimizer = adamw(model)
    skip = skip_idle_blocks(model, optimizer)
    with gr.route(model, mask):
        model(inputs(0)).square().sum().backward()
    optimizer.step()
    assert skip.skipped == {block: int(block == idle) for block in ("deployed", "quarantine")}


def test_an_ablated_quarantine_is_idle_and_one_with_an_open_row_is_not() -> None:
    for rows, idle in ((None, 1), (torch.tensor([True] * 4), 1), (torch.tensor([True, True, False, True]), 0)):
        model = routed_tower()
        optimizer = adamw(model)
        skip = skip_idle_blocks(model, optimizer)
        with gr.ablate_quarantine(model, rows=rows):
            backward(model, None)
        optimizer.step()
        assert skip.skipped == {"deployed": 0, "quarantine": idle}


def test_passes_without_gradients_and_disabled_ones_do_not_count() -> None:
    model = routed_tower()
    optimizer = adamw(model)
    skip = skip_idle_blocks(model, optimizer)
    with torch.no_grad():
        model(inputs(1))
    backward(model, "keep")
    with gr.disable_adapters(model):
        model(inputs(1))
    optimizer.step()
    assert skip.skipped == {"deployed": 0, "quarantine": 1}


class Checkpointed(Tower):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_sees_through_gradient_checkpointing(reentrant: bool) -> None:
    model = gr.attach(Checkpointed().double(), r=2, lora_alpha=4.0)
    model.reentrant = reentrant
    optimizer = adamw(model)
    skip = skip_idle_blocks(model, optimizer)
    step(model, optimizer, "keep")
    step(model, optimizer, "mixed")
    step(model, optimizer, "keep")
    assert skip.skipped == {"deployed": 0, "quarantine": 2}


def test_gradients_are_put_back_after_the_step() -> None:
    model = routed_tower()
    optimizer = adamw(model)
    skip_idle_blocks(model, optimizer)
    backward(model, "keep")
    before = gradients(model)
    optimizer.step()
    assert same(before, gradients(model))
    assert len(gradients(model)) == 8


def test_a_removed_skip_skips_no_more() -> None:
    model = routed_tower()
    optimizer = adamw(model)
    with skip_idle_blocks(model, optimizer) as skip:
        step(model, optimizer, "keep")
    before = blocks(model)
    step(model, optimizer, "keep")
    assert not same(blocks(model)["quarantine"], before["quarantine"])
    assert skip.skipped["quarantine"] == 1
    assert not any(layer._forward_pre_hooks for layer in (model.lower, model.upper))
    assert not optimizer._optimizer_step_post_hooks


def test_a_step_without_a_forward_raises() -> None:
    model, other = routed_tower(), routed_tower()
    optimizer = adamw(model)
    skip_idle_blocks(model, optimizer)
    backward(other, "keep")
    with pytest.raises(gr.GradRouteError, match="Some routed layer should have run forward.* Found none"):
        optimizer.step()
    step(model, optimizer, "keep")
    with pytest.raises(gr.GradRouteError, match="Found none"):
        optimizer.step()


def test_a_gradient_from_elsewhere_in_an_idle_block_raises() -> None:
    model = routed_tower()
    optimizer = adamw(model)
    skip_idle_blocks(model, optimizer)
    backward(model, "keep")
    model.lower.lora_B_quarantine.square().sum().backward()
    with pytest.raises(gr.GradRouteError, match="No row was to train the quarantine block.* is not zero"):
        optimizer.step()


def test_a_step_that_raises_leaves_nothing_behind() -> None:
    model = routed_tower()
    optimizer = adamw(model)
    skip = skip_idle_blocks(model, optimizer)

    def fails(*_: object) -> None:
        raise RuntimeError("out of memory")

    broken = optimizer.register_step_post_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, optimizer, "keep")
    broken.remove()
    optimizer.zero_grad()
    backward(model, "mixed")
    before = gradients(model)
    optimizer.step()
    assert same(before, gradients(model))
    assert skip.skipped["quarantine"] == 1


def test_a_closure_and_a_foreign_optimizer_raise() -> None:
    model = routed_tower()
    optimizer = adamw(model)
    skip_idle_blocks(model, optimizer)
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(gr.GradRouteError, match=r"step\(closure\)"):
            call()
    with pytest.raises(gr.GradRouteError, match="`optimizer` should hold parameters of the blocks"):
        skip_idle_blocks(routed_tower(), optimizer)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = routed_tower()
    optimizer = adamw(model)
    skip = skip_idle_blocks(model, optimizer)
    step(model, optimizer, "keep")  # idle on both ranks
    step(model, optimizer, "keep" if rank == 0 else "mixed")  # on one only: the other steps its zero gradient too
    torch.save(skip.skipped, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_ranks_agree_on_which_blocks_are_idle(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [{"deployed": 0, "quarantine": 1}] * 2


# Directions in the space of the deployed parameters


def parameter_directions(model: nn.Module, k: int = 1, seed: int = 0) -> gr.Directions:
    """k orthonormal rows per module, as wide as the deployed parameters together."""
    generator = torch.Generator().manual_seed(seed)
    widths = {name: sum(p.numel() for p in layer.block_parameters("deployed")) for name, layer in layers(model).items()}
    rows = {
        name: torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q.T.contiguous()
        for name, d in widths.items()
    }
    hack = {name: torch.ones(2, d, dtype=torch.float64) for name, d in widths.items()}
    clean = {name: torch.zeros(2, d, dtype=torch.float64) for name, d in widths.items()}
    return gr.Directions(rows, hack, clean, PARAMETER)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {"lower": model.lower, "upper": model.upper}


def row(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def deployed_row(model: nn.Module) -> dict[str, Tensor]:
    return {name: row(list(layer.block_parameters("deployed"))) for name, layer in layers(model).items()}


def svd_tower() -> nn.Module:
    torch.manual_seed(0)
    model = gr.attach(Tower().double(), r=3, lora_alpha=4.0, parametrization="svd_gain")
    with torch.no_grad():
        for p in trained(model):
            p.normal_()
    return model


MODELS = {"lora": routed_tower, "svd_gain": svd_tower}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("side", ["one", "two"])
@pytest.mark.parametrize("k", [1, 2])
def test_the_realised_update_is_projected(kind: str, side: str, k: int) -> None:
    model, plain = MODELS[kind](), MODELS[kind]()
    optimizer, plain_optimizer = adamw(model), adamw(plain)
    directions = parameter_directions(model, k)
    projection = project_updates(model, optimizer, directions, side=side)
    fired = set()
    for seed in range(3):
        with torch.no_grad():
            for a, b in zip(trained(model), trained(plain), strict=True):
                b.copy_(a)
        before = deployed_row(model)
        step(model, optimizer, "mixed", seed)
        step(plain, plain_optimizer, "mixed", seed)
        free, found = deployed_row(plain), deployed_row(model)
        removed_square = update_square = 0.0
        for name, V in directions.rows.items():
            update = free[name] - before[name]
            expected = update.clone()
            for v in V:
                along = float(v @ update)
                fired.add(along < 0)
                if along < 0 or side == "two":
                    expected -= along * v
            torch.testing.assert_close(found[name] - before[name], expected, rtol=0, atol=1e-12)
            removed_square += float((update - expected).square().sum())
            update_square += float(update.square().sum())
        assert projection.removed_share == pytest.approx(math.sqrt(removed_square / update_square), abs=1e-9)
        assert same(blocks(model)["quarantine"], blocks(plain)["quarantine"])
    assert fired == {True, False}
    assert f"2 modules, {side}-sided, removed 0." in repr(projection)


def test_an_erased_gradient_is_not_an_erased_update_and_a_projected_one_is() -> None:
    def hackward(with_projection: bool) -> float:
        model = routed_tower()
        optimizer, directions = adamw(model), parameter_directions(model)
        if with_projection:
            project_updates(model, optimizer, directions)
        backward(model, "absorb")
        for name, layer in layers(model).items():
            own = list(layer.block_parameters("deployed"))
            g, v = row([p.grad for p in own]), directions.rows[name][0]
            erased = g - (v @ g) * v
            for p, part in zip(own, erased.split([p.numel() for p in own]), strict=True):
                p.grad.copy_(part.reshape(p.shape))
        before = deployed_row(model)
        optimizer.step()
        return max(float(-(V[0] @ (deployed_row(model)[n] - before[n]))) for n, V in directions.rows.items())

    assert hackward(with_projection=False) > 1e-3
    assert hackward(with_projection=True) < 1e-12


def test_refreshed_rows_are_seen_and_checked_at_the_next_step() -> None:
    model = routed_tower()
    optimizer, directions = adamw(model), parameter_directions(model)
    project_updates(model, optimizer, directions, side="two")
    fresh = parameter_directions(model, seed=5)
    directions.update_(fresh, step=1)
    before = deployed_row(model)
    step(model, optimizer, "absorb")
    for name, V in fresh.rows.items():
        assert abs(float(V[0] @ (deployed_row(model)[name] - before[name]))) < 1e-12
    unfit_rows = parameter_directions(model, seed=6)
    unfit_rows.rows["lower"] = unfit_rows.rows["lower"][[0, 0]]
    directions.update_(unfit_rows, step=2)
    now = blocks(model)
    with pytest.raises(gr.GradRouteError, match="`directions` of `lower` should have"):
        step(model, optimizer, "absorb")
    assert same(blocks(model)["deployed"], now["deployed"])


def test_a_removed_projection_leaves_updates_alone() -> None:
    model, plain = routed_tower(), routed_tower()
    optimizer, plain_optimizer = adamw(model), adamw(plain)
    with project_updates(model, optimizer, parameter_directions(model), side="two") as projection:
        assert "no step yet" in repr(projection)
    step(model, optimizer, "absorb")
    step(plain, plain_optimizer, "absorb")
    assert same(blocks(model)["deployed"], blocks(plain)["deployed"])


def unfit(model: nn.Module, kind: str) -> gr.Directions:
    directions = parameter_directions(model, k=2)
    if kind == "skewed":
        directions.rows["upper"][1] += directions.rows["upper"][0]
        return directions
    if kind == "standardised":
        scale = {name: torch.ones(rows.shape[1]) for name, rows in directions.rows.items()}
        return dataclasses.replace(directions, scale=scale)
    keep = ["lower"] if kind == "missing" else ["lower", "upper"]
    cut = slice(0, -1) if kind == "narrow" else slice(None)
    parts = [{n: t[n][:, cut] for n in keep} for t in (directions.rows, directions.hack, directions.clean)]
    return gr.Directions(*parts, PARAMETER)


@pytest.mark.parametrize("kind", ["skewed", "missing", "narrow", "standardised"])
def test_directions_that_do_not_fit_raise(kind: str) -> None:
    model = routed_tower()
    optimizer = adamw(model)
    step(model, optimizer, "absorb")
    message = {
        "skewed": "orthogonal rows",
        "missing": "every routed layer",
        "narrow": "wide",
        "standardised": "standardised",
    }[kind]
    for use in (project_updates, purge_moments, audit_updates):
        with pytest.raises(gr.GradRouteError, match=message):
            use(model, optimizer, unfit(model, kind))
    assert not optimizer._optimizer_step_pre_hooks


def test_directions_of_activations_have_no_sign_here() -> None:
    model = routed_tower()
    optimizer = adamw(model)
    step(model, optimizer, "absorb")
    directions = dataclasses.replace(parameter_directions(model), provenance=ACTIVATION)
    for use in (project_updates, purge_moments, audit_updates):
        with pytest.warns(gr.GradRouteWarning, match="activations have no sign in gradient space"):
            use(model, optimizer, directions)
    project_updates(model, optimizer, directions, side="two")
    project_updates(model, optimizer, directions.random_like(seed=0))


def test_an_optimizer_without_the_deployed_block_has_no_update_to_project() -> None:
    model = routed_tower()
    optimizer = torch.optim.AdamW([p for _, p in gr.quarantine_parameters(model)])
    with pytest.raises(gr.GradRouteError, match="`optimizer` should hold the deployed parameters of `lower`"):
        project_updates(model, optimizer, parameter_directions(model))


def test_sides_are_one_and_two() -> None:
    model = routed_tower()
    for use in (project_updates, purge_moments):
        with pytest.raises(REFUSED, match="side"):
            use(model, adamw(model), parameter_directions(model), side="three")


# Moments


@pytest.mark.parametrize("side", ["one", "two"])
@pytest.mark.parametrize("make", [adamw, lambda m: torch.optim.SGD(trained(m), lr=0.01, momentum=0.9)])
def test_moments_are_purged_along_the_rows(side: str, make) -> None:
    model = routed_tower()
    optimizer, directions = make(model), parameter_directions(model, k=3)
    step(model, optimizer, "absorb")
    key = "exp_avg" if "exp_avg" in optimizer.state[model.lower.lora_A] else "momentum_buffer"

    def moments(block: str) -> dict[str, Tensor]:
        return {
            n: row([optimizer.state[p][key] for p in each.block_parameters(block)]) for n, each in layers(model).items()
        }

    before, quarantine, parameters = moments("deployed"), moments("quarantine"), blocks(model)
    share = purge_moments(model, optimizer, directions, side=side)
    signs, removed_square, square = set(), 0.0, 0.0
    for name, V in directions.rows.items():
        expected = before[name].clone()
        for v in V:
            along = float(v @ before[name])
            signs.add(along > 0)
            if along > 0 or side == "two":
                expected -= along * v
        torch.testing.assert_close(moments("deployed")[name], expected, rtol=0, atol=1e-12)
        removed_square += float((before[name] - expected).square().sum())
        square += float(before[name].square().sum())
    assert signs == {True, False}
    assert share == pytest.approx(math.sqrt(removed_square / square), abs=1e-12)
    assert share > 0.01
    assert same(moments("quarantine"), quarantine)
    assert same(blocks(model)["deployed"], parameters["deployed"])
    assert purge_moments(model, optimizer, directions, side=side) < 1e-9


def test_a_step_after_a_purge_has_no_banked_hack_ward_part() -> None:
    """With SGD the update is the momentum: what was banked shows directly."""

    def hackward(purge: bool) -> float:
        model = routed_tower()
        optimizer, directions = torch.optim.SGD(trained(model), lr=0.1, momentum=0.9), parameter_directions(model)
        for name, layer in layers(model).items():
            own = list(layer.block_parameters("deployed"))
            for p, part in zip(own, directions.rows[name][0].split([p.numel() for p in own]), strict=True):
                p.grad = part.reshape(p.shape).clone()
        optimizer.step()
        if purge:
            purge_moments(model, optimizer, directions)
        for p in trained(model):
            p.grad = torch.zeros_like(p)
        before = deployed_row(model)
        optimizer.step()
        return max(float(-(V[0] @ (deployed_row(model)[n] - before[n]))) for n, V in directions.rows.items())

    assert hackward(purge=False) == pytest.approx(0.09)
    assert hackward(purge=True) == pytest.approx(0.0, abs=1e-12)


def test_no_moments_to_purge_raise() -> None:
    model = routed_tower()
    for optimizer in (adamw(model), torch.optim.SGD(trained(model), lr=0.1)):
        with pytest.raises(gr.GradRouteError, match=r"should have a first moment .*`lower`. Found none"):
            purge_moments(model, optimizer, parameter_directions(model))
        step(model, optimizer, "absorb")
    with pytest.raises(gr.GradRouteError, match="Found none. Fix: purge after the first step, of an optimizer with"):
        purge_moments(model, optimizer, parameter_directions(model))


# Decay toward the start


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
    first.remove()
    resumed = decay_toward_start(model, optimizer, 0.5)
    assert not same(resumed.state_dict()["start"], state["start"])
    resumed.load_state_dict(state)
    assert same(resumed.state_dict()["start"], state["start"])
    with pytest.raises(gr.FileFormatError, match="weight_decay=0.5. Found 0.25 here"):
        decay_toward_start(model, optimizer, 0.25).load_state_dict(state)
    for start in ({}, {**state["start"], "lower.lora_A": torch.zeros(1)}):
        with pytest.raises(gr.FileFormatError, match=r"same parameters and shapes. Different: \['lower.lora_A"):
            resumed.load_state_dict({**state, "start": start})


def test_two_decays_at_once_and_no_decay_raise() -> None:
    model = routed_tower()
    with pytest.raises(gr.GradRouteError, match="should have weight_decay=0 for `lower.lora_A`. Found 0.1"):
        decay_toward_start(model, adamw(model), 0.5)
    for bad in (0.0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(REFUSED, match="weight_decay"):
            decay_toward_start(model, adamw(model, weight_decay=0.0), bad)
    other = torch.optim.AdamW([nn.Parameter(torch.ones(2))], weight_decay=0.3)
    with pytest.raises(gr.GradRouteError, match="should hold parameters of the blocks"):
        decay_toward_start(model, other, 0.5)


# Audit


def test_an_audit_measures_gradient_update_and_hack_ward_share() -> None:
    model = routed_tower()
    optimizer, directions = adamw(model), parameter_directions(model, k=2)
    audits = audit_updates(model, optimizer, directions)
    for number in (1, 2):
        before, rows = blocks(model), deployed_row(model)
        step(model, optimizer, "mixed", seed=number)
        found, grads = audits.read(), gradients(model)
        after = blocks(model)
        for block in before:
            gradient = torch.cat([grads[name].flatten() for name in before[block]]).norm().item()
            update = torch.cat([(after[block][n] - v).flatten() for n, v in before[block].items()]).norm().item()
            measured = getattr(found, block)
            assert measured.gradient_norm == pytest.approx(gradient)
            assert measured.update_norm == pytest.approx(update)
            assert measured.ratio == pytest.approx(update / gradient)
        change = {n: deployed_row(model)[n] - rows[n] for n in rows}
        hackward = sum(float((-(v @ change[n])).clamp(min=0) ** 2) for n, V in directions.rows.items() for v in V)
        assert found.cout == pytest.approx(math.sqrt(hackward / sum(float(c @ c) for c in change.values())))
        assert 0 < found.cout < 1
        assert found.step == number
    assert repr(found).startswith(f"UpdateAudit(step 2; deployed: gradient {found.deployed.gradient_norm:.2e}, update")
    assert f"cout {found.cout:.3f}; quarantine: gradient" in repr(found)


def test_a_tiny_residual_shows_as_a_ratio_far_above_the_other_block() -> None:
    model = routed_tower()
    optimizer = adamw(model, weight_decay=0.0)
    with audit_updates(model, optimizer) as audits:
        with gr.route(model, gr.RouteMask.weights(1.0, torch.full((4,), 1e-6), 1.0)):
            model(inputs(0)).square().sum().backward()
        optimizer.step()
    found = audits.read()
    assert found.cout is None
    assert found.deployed.gradient_norm < 1e-5 * found.quarantine.gradient_norm
    assert found.deployed.update_norm > 0.3 * found.quarantine.update_norm
    assert found.deployed.ratio > 1e4 * found.quarantine.ratio
    assert "cout" not in repr(found)


def test_a_block_that_moves_by_its_moments_alone_has_an_infinite_ratio_and_a_still_one_none() -> None:
    model = routed_tower()
    optimizer = adamw(model)
    audits = audit_updates(model, optimizer)
    step(model, optimizer, "absorb")
    step(model, optimizer, "keep")
    assert audits.read().quarantine.ratio == math.inf
    skip_idle_blocks(model, optimizer)
    step(model, optimizer, "keep")
    assert audits.read().quarantine == BlockUpdate(0.0, 0.0)
    assert BlockUpdate(0.0, 0.0).ratio == 0.0


def test_no_update_has_no_hack_ward_share() -> None:
    model = routed_tower()
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    audits = audit_updates(model, optimizer, parameter_directions(model))
    step(model, optimizer, "absorb")
    assert audits.read().cout == 0.0


def test_a_projected_update_has_a_cout_of_zero() -> None:
    model = routed_tower()
    optimizer, directions = adamw(model), parameter_directions(model)
    project_updates(model, optimizer, directions)
    with audit_updates(model, optimizer, directions) as audits:
        step(model, optimizer, "absorb")
    assert audits.read().cout < 1e-9


def test_a_step_that_was_not_seen_raises() -> None:
    model, other = routed_tower(), routed_tower()
    optimizer = adamw(model)
    with pytest.raises(gr.GradRouteError, match="No step of the audited optimizer was seen"):
        with audit_updates(model, adamw(model)):
            step(model, optimizer, "absorb")
    audits = audit_updates(model, optimizer)
    with pytest.raises(gr.GradRouteError, match=r"since the last read\(\). Found 0 steps in all"):
        audits.read()
    step(model, optimizer, "absorb")
    audits.read()
    with pytest.raises(gr.GradRouteError, match="Found 1 steps in all"):
        audits.read()
    with pytest.raises(ZeroDivisionError):
        with audit_updates(other, adamw(other)):
            _ = 1 / 0
