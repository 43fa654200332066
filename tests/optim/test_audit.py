"""`audit_updates`: gradient, update and hack-ward share of each block at each step."""

import math

import pytest
import torch
from support.models import gradients, routed_tower
from support.tower_steps import adamw, blocks, deployed_row, inputs, parameter_directions, step, trained

import gradroute as gr
from gradroute.optim.audit import BlockUpdate, audit_updates
from gradroute.optim.corrections import decay_toward_start, project_updates
from gradroute.optim.idle_blocks import skip_idle_blocks


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


@pytest.mark.parametrize("audit_first", [False, True])
def test_a_projected_update_has_a_cout_of_zero_whichever_handle_was_made_first(audit_first: bool) -> None:
    model = routed_tower()
    optimizer, directions = adamw(model), parameter_directions(model)
    if not audit_first:
        project_updates(model, optimizer, directions)
    audits = audit_updates(model, optimizer, directions)
    if audit_first:
        project_updates(model, optimizer, directions)
    step(model, optimizer, "absorb")
    assert audits.read().cout < 1e-9


@pytest.mark.parametrize("audit_first", [False, True])
def test_a_decay_toward_the_start_is_part_of_the_update_whichever_handle_was_made_first(audit_first: bool) -> None:
    model = routed_tower()
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    if not audit_first:
        decay_toward_start(model, optimizer, 0.5)
    audits = audit_updates(model, optimizer)
    if audit_first:
        decay_toward_start(model, optimizer, 0.5)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(1.0)
    before = blocks(model)["deployed"]
    step(model, optimizer, "absorb")
    found = [blocks(model)["deployed"][name] - value for name, value in before.items()]
    assert audits.read().deployed.update_norm == pytest.approx(torch.cat([f.flatten() for f in found]).norm().item())


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
