"""Directions in what an optimizer does: realised updates are projected, and moments purged."""

import dataclasses
import math

import pytest
import torch
from support.gradient_directions import ACTIVATION, PARAMETER, of_model
from support.models import Tower, routed_tower
from support.tower_steps import (
    REFUSED,
    adamw,
    backward,
    blocks,
    deployed_row,
    layers,
    parameter_directions,
    row,
    same,
    step,
    trained,
)
from torch import Tensor, nn

import gradroute as gr
from gradroute.optim.audit import audit_updates
from gradroute.optim.corrections import project_updates, purge_moments

# Updates


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
    return gr.Directions(*parts, of_model(PARAMETER, model))


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
    directions = dataclasses.replace(parameter_directions(model), provenance=of_model(ACTIVATION, model))
    for use in (project_updates, purge_moments, audit_updates):
        with pytest.warns(gr.GradRouteWarning, match="activations have no sign in gradient space"):
            use(model, optimizer, directions)
    project_updates(model, optimizer, directions, side="two")
    project_updates(model, optimizer, directions.random_like(seed=0))


def test_an_optimizer_without_the_deployed_block_has_no_update_to_project() -> None:
    model = routed_tower()
    optimizer = torch.optim.AdamW([p for _, p in gr.quarantine_parameters(model)])
    with pytest.raises(gr.GradRouteError, match=r"those of `lower`, `upper`: they"):
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


@pytest.mark.corner(
    "an audit along directions of another base model whose modules have the same names", "`GradRouteError`"
)
def test_directions_of_another_base_model_raise() -> None:
    model, other = routed_tower(), routed_tower()
    with torch.no_grad():
        other.lower.base_layer.weight.mul_(1.5)
    optimizer = adamw(model)
    step(model, optimizer, "absorb")
    for use in (project_updates, purge_moments, audit_updates):
        with pytest.raises(gr.GradRouteError, match="of another one, whose modules have the same names"):
            use(model, optimizer, parameter_directions(other))
        use(model, optimizer, parameter_directions(model))
