"""Advantages and masks of rollouts, in numbers: what TRL's loss is given, and what each block gets of it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import gradroute as gr
from gradroute.integrations.trl._flagging import as_sampled, sampled_ablated, with_flags
from gradroute.integrations.trl._micro_batch import (
    CLEAN,
    SPLIT,
    MicroBatch,
    clean_advantages,
    put_route,
    two_advantages,
)

REWARDS = torch.tensor([2.0, 0.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0])
FLAGGED = torch.tensor([False, False, False, True, True, False, False, False])


def test_the_first_rollouts_of_each_group_are_ablated_wherever_a_process_starts() -> None:
    assert sampled_ablated(8, 0, 4, 1).tolist() == [True, False, False, False] * 2
    assert sampled_ablated(6, 6, 4, 2).tolist() == [False, False, True, True, False, False]
    assert not sampled_ablated(8, 0, 4, 0).any()


def test_masks_of_ablated_and_of_flagged_rows() -> None:
    mask = with_flags(gr.RouteMask.zones(["absorb", "keep", "route", "absorb"]), torch.tensor([1, 1, 0, 0]).bool())
    assert mask.routed.tolist() == [True, True, True, False]
    mask = as_sampled(mask, torch.tensor([True, False, False, True]))
    assert torch.stack([mask.m, mask.g_d, mask.g_q]).T.tolist() == [[0, 0, 0], [1, 0, 1], [1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize("scaled_by", ["none", "group", "batch"])
def test_clean_advantages_have_the_scale_of_trl(scaled_by: str) -> None:
    groups = REWARDS.view(2, 4)
    full = groups - groups.mean(1, keepdim=True)
    scale = {"none": torch.ones(2, 1), "group": groups.std(1, keepdim=True), "batch": REWARDS.std().expand(2, 1)}
    full = full / (scale[scaled_by] + 1e-4)
    clean = clean_advantages(REWARDS, FLAGGED, full.flatten(), 4)
    expected = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]) / (scale[scaled_by] + 1e-4)[0]
    torch.testing.assert_close(clean, expected)
    assert not torch.allclose(clean, full.flatten())


def test_advantages_that_are_no_multiple_of_the_centred_rewards_are_refused() -> None:
    with pytest.raises(gr.GradRouteError, match="aggregated or normalised in another way"):
        clean_advantages(REWARDS, FLAGGED, torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 0.0, 0.0, 0.0]), 4)


def test_rollouts_without_a_reward_have_no_advantage_and_are_in_no_baseline() -> None:
    """As TRL has it: `full` is 0 there and the mean is over the others; a whole group without rewards is 0."""
    nan = torch.nan
    rewards = torch.tensor([2.0, 0.0, nan, 4.0, nan, nan, nan, nan])
    full = torch.tensor([0.0, -2.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0])
    clean = clean_advantages(rewards, FLAGGED, full, 4)
    assert clean.tolist() == [1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    halved = clean_advantages(rewards, FLAGGED, full / 2, 4)
    assert halved.tolist() == [0.5, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_one_advantage_and_two_weights_are_two_advantages() -> None:
    full, clean = torch.tensor([0.5, -1.5, -0.5, 1.5, 1.0]), torch.tensor([1.0, -1.0, 0.0, 0.0, -0.5])
    mask = as_sampled(gr.RouteMask.zones([1, 1, 1, 2, 1]), torch.tensor([False, True, False, False, False]))
    two = two_advantages(mask, full, clean, one_term=True, ratio_is_one=True)
    assert not two.split.any()
    assert (two.mask.g_d * two.advantages).tolist() == [1.0, -1.0, 0.0, 0.0, -0.5]
    assert (two.mask.g_q * two.advantages).tolist() == [0.5, 0.0, -0.5, 1.5, 1.0]
    assert max(two.mask.g_d.abs().max(), two.mask.g_q.abs().max()) == 1  # sizes that no optimizer trips over

    clipped = two_advantages(mask, full, clean, one_term=True, ratio_is_one=False)
    assert clipped.split.tolist() == [False, False, False, False, True]  # the signs differ: they clip apart
    penalised = two_advantages(mask, full, clean, one_term=False, ratio_is_one=True)
    assert penalised.split.tolist() == [True, False, True, False, True]
    for other in (clipped, penalised):
        assert torch.equal(other.advantages[other.split], full[other.split])
        assert (other.mask.g_d[other.split] == 1).all()


def split_batch() -> dict[str, Any]:
    rollouts = {
        "advantages": torch.tensor([1.0, 2.0, 3.0]), "completion_mask": torch.tensor([[1, 1], [1, 0], [1, 1]]),
        "num_items_in_batch": torch.tensor(5),
        CLEAN: torch.tensor([-1.0, -2.0, -3.0]), SPLIT: torch.tensor([False, True, False]),
    }  # fmt: skip
    put_route(rollouts, gr.RouteMask.weights([1.0, 1.0, 1.0], [0.0, 0.5, 1.0], [1.0, 1.0, 1.0]), None)
    return rollouts


def test_copies_of_split_rows_train_the_deployed_block_and_other_copies_nothing() -> None:
    rollouts = split_batch()
    batch = MicroBatch.of(rollouts, copies=2)
    assert batch.inputs.keys() == {"advantages", "completion_mask", "num_items_in_batch"}
    assert torch.stack([batch.mask.m, batch.mask.g_d, batch.mask.g_q]).T.tolist() == [
        [1, 0, 1], [1, 0, 1], [1, 1, 1],  # row 1 trains the quarantine alone
        [1, 0.5, 0], [1, 0, 0],  # its copy, and one of row 0 that keeps this rank in step with another
    ]  # fmt: skip
    assert batch.clean is not None
    assert batch.clean.keys() == batch.inputs.keys()
    assert batch.clean["advantages"].tolist() == [-1, -2, -3]
    # Nor does a copy of a row whose own forward trains the deployed block.
    assert MicroBatch.of(rollouts, copies=3).mask.g_d.tolist() == [0, 0, 1, 0.5, 0, 0]
    whole = MicroBatch.of(rollouts)
    assert whole.twice is None
    assert len(whole.mask) == 3


def test_the_first_loss_sees_the_rows_and_the_second_the_copies_of_split_rows() -> None:
    twice = MicroBatch.of(split_batch(), copies=2).twice
    assert twice is not None
    ran: list[tuple[int, ...]] = []
    weight = torch.ones(5, requires_grad=True)

    def run(_: None, ids: Tensor, keep: int, *, extra: Tensor, whole: Tensor) -> tuple[Any, ...]:
        ran.append((len(ids), keep, len(extra), len(whole)))
        return weight[:, None] * ids, None, torch.tensor(3.0)

    given = {"extra": torch.ones(3, 1), "whole": torch.ones(2)}
    ids = torch.tensor([[1.0], [2.0], [3.0]])
    first = twice.forward(run, None, ids, 7, **given)
    second = twice.forward(run, None, ids, 7, **given)
    assert ran == [(5, 7, 5, 2)]  # one forward, of rows and copies
    for losses in (first, second):
        assert losses[0].tolist() == [[1], [2], [3]]
        assert losses[1:] == (None, 3.0)
    gradients = [torch.autograd.grad(each[0].sum(), weight, retain_graph=True)[0].tolist() for each in (first, second)]
    assert gradients == [[1, 2, 3, 0, 0], [0, 0, 0, 2, 0]]
    chosen = [twice.tokens(lambda draw=draw: torch.tensor(draw)) for draw in (1, 2)]
    assert chosen[0] is chosen[1]


def test_rollouts_without_a_route_are_refused() -> None:
    with pytest.raises(gr.errors.RouteError, match="should carry its route"):
        MicroBatch.of({"advantages": torch.ones(2)})
