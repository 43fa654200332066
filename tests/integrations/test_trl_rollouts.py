"""Advantages and masks of rollouts, in numbers: what TRL's loss is given, and what each block gets of it."""

import pytest
import torch

import gradroute as gr
from gradroute.integrations.trl._rollouts import (
    CLEAN,
    SPLIT,
    MicroBatch,
    as_sampled,
    clean_advantages,
    put_route,
    sampled_ablated,
    two_advantages,
    with_flags,
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


def test_split_rows_train_the_quarantine_first_and_the_deployed_block_again() -> None:
    rollouts = {
        "advantages": torch.tensor([1.0, 2.0, 3.0]), "completion_mask": torch.tensor([[1, 1], [1, 0], [1, 1]]),
        "num_items_in_batch": torch.tensor(5),
        CLEAN: torch.tensor([-1.0, -2.0, -3.0]), SPLIT: torch.tensor([False, True, True]),
    }  # fmt: skip
    put_route(rollouts, gr.RouteMask.zones(["route", "absorb", "absorb"]), None)
    whole = MicroBatch.of({key: value for key, value in rollouts.items() if key != SPLIT}, "grpo", always_again=True)
    assert whole.again is None
    shares = {"grpo": 2 / 3, "bnpo": 3 / 5, "dapo": 1.0}
    for loss_type, share in shares.items():
        batch = MicroBatch.of(rollouts, loss_type, always_again=False)
        assert batch.inputs.keys() == {"advantages", "completion_mask", "num_items_in_batch"}
        assert batch.mask.g_d.tolist() == [0, 0, 0]
        assert batch.mask.g_q.tolist() == [1, 1, 1]
        assert batch.again is not None
        assert batch.again["advantages"].tolist() == [-2.0, -3.0]
        assert batch.again["num_items_in_batch"] == 5
        assert batch.again_mask is not None
        assert batch.again_mask.g_d.tolist() == [1, 1]
        assert batch.again_mask.g_q.tolist() == [0, 0]
        assert float(batch.again_share) == pytest.approx(share)


def test_a_rank_without_split_rows_keeps_step_with_those_that_have_some() -> None:
    rollouts = {"advantages": torch.ones(2), CLEAN: torch.ones(2), SPLIT: torch.zeros(2).bool()}
    put_route(rollouts, gr.RouteMask.zones([1, 2]), None)
    assert MicroBatch.of(rollouts, "grpo", always_again=False).again is None
    batch = MicroBatch.of(rollouts, "grpo", always_again=True)
    assert batch.again is not None
    assert batch.again_share == 0.0


def test_rollouts_without_a_route_are_refused() -> None:
    with pytest.raises(gr.errors.RouteError, match="should carry its route"):
        MicroBatch.of({"advantages": torch.ones(2)}, "grpo", always_again=False)
