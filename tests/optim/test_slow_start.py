"""The slow start: the deployed block's learning rate for the first steps, whatever schedules the rate."""

import copy

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
