"""`skip_idle_blocks`: a block that no row was to train is not stepped, whatever the optimizer has in store."""

import os
from pathlib import Path

import pytest
import torch
from support.models import Tower, gradients, routed_tower
from support.tower_steps import adamw, backward, blocks, inputs, same, step
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import gradroute as gr
from gradroute.optim.idle_blocks import skip_idle_blocks


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


@pytest.mark.corner(
    "a block without eligible rows has a gradient from another loss", "`GradRouteError` before the step"
)
def test_a_gradient_from_elsewhere_in_an_idle_block_raises() -> None:
    model = routed_tower()
    optimizer = adamw(model)
    skip_idle_blocks(model, optimizer)
    backward(model, "keep")
    model.lower.lora_B_quarantine.square().sum().backward()
    with pytest.raises(gr.GradRouteError, match="No row was to train the quarantine block.* is not zero"):
        optimizer.step()


@pytest.mark.corner("the optimizer step itself raises", "gradients are as they were")
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
    with pytest.raises(gr.GradRouteError, match="every parameter of the blocks that is to be trained"):
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


@pytest.mark.distributed
@pytest.mark.slow
def test_ranks_agree_on_which_blocks_are_idle(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [{"deployed": 0, "quarantine": 1}] * 2
