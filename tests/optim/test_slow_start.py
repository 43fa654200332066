"""The slow start: the deployed block's learning rate for the first steps, whatever schedules the rate."""

import copy
from collections.abc import Callable

import pytest
import torch
from support.tiny_models import base_model
from torch import nn

import gradroute as gr
from gradroute.errors import FileFormatError


def model_and_optimizer(kind: type = torch.optim.SGD, **options: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = base_model("llama")
    gr.attach(model, r=2, lora_alpha=4, seed=0)
    return model, kind(gr.optim.block_groups(model), **{"lr": 0.1, **options})


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """How far each block moves in a step along gradients of one."""
    blocks = [[p for _, p in of(model)] for of in (gr.deployed_parameters, gr.quarantine_parameters)]
    before = [[p.detach().clone() for p in block] for block in blocks]
    for block in blocks:
        for p in block:
            p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [
        max((p - old).abs().max().item() for p, old in zip(block, olds, strict=True))
        for block, olds in zip(blocks, before, strict=True)
    ]
    return moved[0], moved[1]


def test_the_deployed_block_takes_a_fraction_of_the_first_steps() -> None:
    model, optimizer = model_and_optimizer()
    assert step(model, optimizer) == pytest.approx((0.1, 0.1), rel=1e-4)
    start = gr.optim.slow_start(model, optimizer, steps=2, fraction=0.25)
    for done in range(2):
        assert (start.done, start.over) == (done, False)
        assert step(model, optimizer) == pytest.approx((0.025, 0.1), rel=1e-4)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert start.over
    assert step(model, optimizer) == pytest.approx((0.1, 0.1), rel=1e-4)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_it_equals_a_smaller_rate_bit_for_bit(kind: type) -> None:
    (slow, a), (plain, b) = model_and_optimizer(kind), model_and_optimizer(kind)
    gr.optim.slow_start(slow, a, steps=3, fraction=0.25)
    b.param_groups[0]["lr"] = 0.1 * 0.25
    for _ in range(3):
        step(slow, a)
        step(plain, b)
    for p, q in zip(slow.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_schedulers_see_the_whole_rate() -> None:
    model, optimizer = model_and_optimizer()
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, end_factor=1.0, total_iters=2)
    gr.optim.slow_start(model, optimizer, steps=2, fraction=0.5)
    moves = []
    for _ in range(3):
        moves.append(step(model, optimizer))
        scheduler.step()
    assert moves == [pytest.approx(each, rel=1e-3) for each in ((0.025, 0.05), (0.0375, 0.075), (0.1, 0.1))]


def test_a_fraction_of_zero_holds_the_block_still() -> None:
    model, optimizer = model_and_optimizer()
    gr.optim.slow_start(model, optimizer, steps=1, fraction=0.0)
    assert step(model, optimizer)[0] == 0.0


def test_a_step_that_raises_leaves_no_rate_behind() -> None:
    model, optimizer = model_and_optimizer()
    start = gr.optim.slow_start(model, optimizer, steps=2)

    def breaks(*_: object) -> None:
        raise RuntimeError

    handle = optimizer.register_step_pre_hook(breaks)
    with pytest.raises(RuntimeError):
        step(model, optimizer)
    handle.remove()
    assert step(model, optimizer) == pytest.approx((0.025, 0.1), rel=1e-4)
    assert start.done == 1
    optimizer.register_step_pre_hook(breaks)
    with pytest.raises(RuntimeError):
        step(model, optimizer)
    start.close()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def test_two_models_of_one_optimizer_start_apart() -> None:
    model, optimizer = model_and_optimizer()
    other, _ = model_and_optimizer()
    for group in gr.optim.block_groups(other):
        optimizer.add_param_group(group)
    for each, steps in ((model, 1), (other, 2)):
        gr.optim.slow_start(each, optimizer, steps=steps)
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    assert step(model, optimizer) == pytest.approx((0.025, 0.1), rel=1e-4)
    assert step(other, optimizer) == pytest.approx((0.025, 0.1), rel=1e-4)
    assert rates(optimizer) == [0.1] * 4


def test_what_is_saved_after_a_step_that_raised_has_the_schedulers_rates() -> None:
    model, optimizer = model_and_optimizer()
    gr.optim.slow_start(model, optimizer, steps=2)

    def breaks(*_: object) -> None:
        raise RuntimeError

    optimizer.register_step_pre_hook(breaks)
    with pytest.raises(RuntimeError):
        step(model, optimizer)
    assert rates(optimizer) == [0.025, 0.1]
    assert [group["lr"] for group in optimizer.state_dict()["param_groups"]] == [0.1, 0.1]


@pytest.mark.corner(
    "a slow start of a deployed block that has one already", "`GradRouteError`; one that is over may stay"
)
def test_two_slow_starts_at_a_time_are_refused() -> None:
    """Each would restore what the other had set, and the rate would shrink with every step."""
    model, optimizer = model_and_optimizer()
    first = gr.optim.slow_start(model, optimizer, steps=1)
    with pytest.raises(gr.GradRouteError, match=r"one slow start at a time.*step 0 of 1.*close"):
        gr.optim.slow_start(model, optimizer, steps=1)
    gr.optim.slow_start(*model_and_optimizer(), steps=1)
    step(model, optimizer)
    assert first.is_open
    gr.optim.slow_start(model, optimizer, steps=1)
    assert step(model, optimizer) == pytest.approx((0.025, 0.1), rel=1e-4)
    assert rates(optimizer) == [0.1, 0.1]


@pytest.mark.corner("a scheduler steps inside a slow optimizer step", "`GradRouteError` from `step()`")
@pytest.mark.parametrize("as_rate", [float, torch.tensor])
@pytest.mark.parametrize("kind", ["pre", "post"])
def test_a_rate_that_is_written_during_the_step_is_told(kind: str, as_rate: Callable[[float], object]) -> None:
    model, optimizer = model_and_optimizer(torch.optim.AdamW, lr=as_rate(0.1), foreach=False)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=4)
    start = gr.optim.slow_start(model, optimizer, steps=1)
    hook = getattr(optimizer, f"register_step_{kind}_hook")(lambda *_: scheduler.step())
    with pytest.raises(gr.GradRouteError, match=r"learning rate should be left alone.*written in the step"):
        step(model, optimizer)
    hook.remove()
    start.close()
    assert rates(optimizer)[0] > 0.04


def test_a_rate_that_is_written_after_a_step_that_raised_is_told_at_the_next() -> None:
    model, optimizer = model_and_optimizer()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    gr.optim.slow_start(model, optimizer, steps=2)

    def breaks(*_: object) -> None:
        raise RuntimeError

    hook = optimizer.register_step_pre_hook(breaks)
    with pytest.raises(RuntimeError):
        step(model, optimizer)
    hook.remove()
    optimizer.zero_grad()
    optimizer._opt_called = True  # or torch warns that no step came before the scheduler's
    scheduler.step()
    with pytest.raises(gr.GradRouteError, match="written after a step that raised"):
        step(model, optimizer)
    step(model, optimizer)


def test_other_handles_see_the_slow_rate() -> None:
    """p <- p - lr wd (p - p_0): with the rate of the step, whichever handle was made first."""
    ends = []
    for slow_first in (True, False):
        model, optimizer = model_and_optimizer()
        makers = [
            lambda m, o: gr.optim.slow_start(m, o, steps=2),
            lambda m, o: gr.optim.decay_toward_start(m, o, 1.0),
        ]
        for make in makers if slow_first else makers[::-1]:
            make(model, optimizer)
        step(model, optimizer)
        ends.append(torch.cat([p.detach().flatten() for _, p in gr.deployed_parameters(model)]))
    assert torch.equal(*ends)


def test_a_step_that_a_scaler_leaves_out_does_not_count() -> None:
    for fused in (True, False):
        model, optimizer = model_and_optimizer(torch.optim.AdamW, fused=fused)
        start = gr.optim.slow_start(model, optimizer, steps=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        for gradient, done in ((torch.inf, 0), (1.0, 1)):
            scaler.scale(torch.ones(1))
            for p in model.parameters():
                p.grad = torch.full_like(p, gradient)
            scaler.step(optimizer)
            scaler.update()
            assert start.done == done


@pytest.mark.corner(
    "blocks are attached again during a slow start", "the new deployed block is slow, or `GradRouteError`"
)
def test_blocks_and_groups_are_read_at_each_step() -> None:
    model, optimizer = model_and_optimizer()
    gr.optim.slow_start(model, optimizer, steps=3)
    gr.detach(model)
    gr.attach(model, r=2, lora_alpha=4, seed=1)
    with pytest.raises(gr.GradRouteError, match=r"should hold every parameter.*lacks"):
        optimizer.step()
    for group in gr.optim.block_groups(model):
        optimizer.add_param_group(group)
    assert step(model, optimizer) == pytest.approx((0.025, 0.1), rel=1e-4)


def test_a_rate_that_the_optimizer_makes_itself_is_refused() -> None:
    model, optimizer = model_and_optimizer()
    for group in optimizer.param_groups:
        group["lr"] = None
    with pytest.raises(gr.GradRouteError, match="Found lr=None"):
        gr.optim.slow_start(model, optimizer, steps=1)


def test_it_ends_when_it_is_closed() -> None:
    model, optimizer = model_and_optimizer()
    with gr.optim.slow_start(model, optimizer, steps=5):
        assert step(model, optimizer)[0] == pytest.approx(0.025, rel=1e-4)
    assert step(model, optimizer)[0] == pytest.approx(0.1, rel=1e-4)


def test_it_goes_on_from_its_state() -> None:
    model, optimizer = model_and_optimizer()
    start = gr.optim.slow_start(model, optimizer, steps=2)
    step(model, optimizer)
    state = copy.deepcopy(start.state_dict())
    other, other_optimizer = model_and_optimizer()
    resumed = gr.optim.slow_start(other, other_optimizer, steps=2)
    resumed.load_state_dict(state)
    assert step(other, other_optimizer)[0] == pytest.approx(0.025, rel=1e-4)
    assert resumed.over
    with pytest.raises(FileFormatError, match="steps=2"):
        gr.optim.slow_start(*model_and_optimizer(), steps=3).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1, "fraction": 1.0}, "fraction"),
        ({"steps": 1, "fraction": -0.1}, "fraction"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(gr.GradRouteError, match=match):
        gr.optim.slow_start(*model_and_optimizer(), **options)


def test_an_optimizer_that_cannot_hold_one_block_back_is_refused() -> None:
    model, _ = model_and_optimizer()
    mixed = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(gr.GradRouteError, match=r"groups that hold one block each.*block_groups"):
        gr.optim.slow_start(model, mixed, steps=1)
    without = torch.optim.SGD([p for _, p in gr.quarantine_parameters(model)], lr=0.1)
    with pytest.raises(gr.GradRouteError, match="should hold every parameter"):
        gr.optim.slow_start(model, without, steps=1)


# Groups


def test_groups_hold_one_block_each_and_every_parameter_once() -> None:
    model, _ = model_and_optimizer()
    groups = gr.optim.block_groups(model)
    assert [group["block"] for group in groups] == ["deployed", "quarantine"]
    for group, of in zip(groups, (gr.deployed_parameters, gr.quarantine_parameters), strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for _, p in of(model)}


def test_other_groups_are_split_and_keep_their_settings() -> None:
    model, _ = model_and_optimizer()
    head = nn.Linear(2, 2)
    decayed, rest = list(model.parameters())[::2], [*list(model.parameters())[1::2], *head.parameters()]
    groups = gr.optim.block_groups(model, [{"params": decayed, "weight_decay": 0.1}, {"params": rest}])
    assert [(group["block"], group.get("weight_decay")) for group in groups] == [
        ("deployed", 0.1), ("quarantine", 0.1), (None, 0.1), ("deployed", None), ("quarantine", None), (None, None),
    ]  # fmt: skip
    kept = [id(p) for group in groups for p in group["params"]]
    assert sorted(kept) == sorted(id(p) for p in (*decayed, *rest))


def test_groups_without_a_block_are_refused() -> None:
    model, _ = model_and_optimizer()
    with pytest.raises(gr.GradRouteError, match="trainable parameters of the blocks"):
        gr.optim.block_groups(model, [{"params": list(nn.Linear(2, 2).parameters())}])


def test_parameters_are_given_as_an_optimizer_takes_them() -> None:
    model, _ = model_and_optimizer()
    listed = gr.optim.block_groups(model, [{"params": list(model.parameters())}])
    assert [group["block"] for group in listed] == ["deployed", "quarantine", None]
    alone = torch.nn.Parameter(torch.ones(3, 2))
    for given in (model.parameters(), list(model.named_parameters()), model.named_parameters()):
        groups = gr.optim.block_groups(model, [{"params": given}, {"params": alone}])
        kept = [[id(p) for p in group["params"]] for group in groups]
        assert kept == [*([id(p) for p in group["params"]] for group in listed), [id(alone)]]


def test_names_of_parameters_are_split_with_them() -> None:
    model, _ = model_and_optimizer()
    names = {id(p): name for name, p in model.named_parameters()}
    made = torch.optim.SGD(list(model.named_parameters()), lr=0.1)
    if "param_names" not in made.param_groups[0]:
        pytest.skip("this torch has no names of parameters in optimizers")
    for groups in (made.param_groups, [{"params": list(model.named_parameters())}]):
        for group in gr.optim.block_groups(model, groups):
            assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_groups_that_are_no_groups_are_refused() -> None:
    model, _ = model_and_optimizer()
    for wrong in (model.parameters(), [{"lr": 0.1}]):
        with pytest.raises(gr.GradRouteError, match=r"`groups` should be dicts with \"params\""):
            gr.optim.block_groups(model, wrong)
