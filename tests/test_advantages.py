"""`clean_baseline_advantages` against the formula, one rollout at a time."""

import statistics

import pytest
import torch
from torch import Tensor

import gradroute as gr
from gradroute.advantages import GroupAdvantages, weighted_baseline_advantages

REFUSED = (gr.GradRouteError, TypeError)


def by_hand(
    rewards: list[float], flagged: list[bool], size: int, std_normalize: bool = False
) -> tuple[list[float], list[float]]:
    full, clean = [], []
    for first in range(0, len(rewards), size):
        group = list(zip(rewards[first : first + size], flagged[first : first + size], strict=True))
        everyone, unflagged = [r for r, _ in group], [r for r, flag in group if not flag]
        spread = statistics.stdev(everyone) if std_normalize and len(set(everyone)) > 1 else 1.0
        for r, flag in group:
            full.append((r - statistics.fmean(everyone)) / spread)
            clean.append(0.0 if flag else (r - statistics.fmean(unflagged)) / spread)
    return full, clean


def advantages(rewards: list[float], flagged: list[int], size: int, **settings: bool) -> GroupAdvantages:
    rewards = torch.tensor(rewards, dtype=torch.float64)
    return gr.clean_baseline_advantages(rewards, torch.tensor(flagged, dtype=torch.bool), size, **settings)


@pytest.mark.parametrize("std_normalize", [False, True])
def test_both_advantages_equal_the_formula(std_normalize: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(24, generator=generator, dtype=torch.float64)
    flagged = torch.rand(24, generator=generator) < 0.4
    found = gr.clean_baseline_advantages(rewards, flagged, 6, std_normalize=std_normalize)
    full, clean = by_hand(rewards.tolist(), flagged.tolist(), 6, std_normalize)
    torch.testing.assert_close(found.full.tolist(), full, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.clean.tolist(), clean, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found.full, found.clean)


def test_hacks_do_not_pull_the_clean_baseline_up() -> None:
    found = advantages([1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], 6)
    assert found.full.tolist() == [0.5, 0.5, 0.5, -0.5, -0.5, -0.5]
    assert found.clean.tolist() == [0.0, 0.0, 0.75, -0.25, -0.25, -0.25]


def test_without_flags_both_are_the_plain_group_advantage() -> None:
    found = advantages([1, 0, 0, 1, 1, 0], [0] * 6, 3)
    torch.testing.assert_close(found.full, found.clean)
    assert found.full.any()


@pytest.mark.corner("every rollout of a group is flagged", "clean advantages are 0; the quarantine trains")
@pytest.mark.parametrize("std_normalize", [False, True])
def test_a_group_with_all_rows_flagged_trains_the_quarantine_only(std_normalize: bool) -> None:
    found = advantages([1, 0, 0, 1, 0, 1], [1, 1, 1, 0, 0, 0], 3, std_normalize=std_normalize)
    assert found.clean[:3].tolist() == [0.0, 0.0, 0.0]
    assert found.full[:3].all()
    assert found.clean[3:].all()


@pytest.mark.parametrize("std_normalize", [False, True])
def test_a_single_unflagged_row_is_its_own_baseline(std_normalize: bool) -> None:
    found = advantages([0.1, 0.7, 0.7], [0, 1, 1], 3, std_normalize=std_normalize)
    assert found.clean.tolist() == [0.0, 0.0, 0.0]
    assert found.full.all()


@pytest.mark.corner("all rewards of a group are equal", "both advantages are exactly 0")
@pytest.mark.parametrize("std_normalize", [False, True])
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e8])
def test_a_group_without_spread_is_exactly_zero(reward: float, std_normalize: bool) -> None:
    found = advantages([reward] * 7, [0, 1, 0, 0, 1, 0, 0], 7, std_normalize=std_normalize)
    assert not found.full.any()
    assert not found.clean.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3])
def test_unflagged_rows_without_spread_are_exactly_zero(reward: float, dtype: torch.dtype) -> None:
    """Adam would turn rounding noise of a mean into steps of full size."""
    for n in range(2, 9):
        rewards = torch.tensor([reward] * n + [2.0], dtype=dtype)
        flagged = torch.tensor([False] * n + [True])
        found = gr.clean_baseline_advantages(rewards, flagged, n + 1)
        assert found.full.all()
        assert found.clean.tolist() == [0.0] * (n + 1)


def test_groups_do_not_see_each_other() -> None:
    first, second = ([1, 0, 0, 0], [0, 1, 0, 0]), ([5, 5, 4, 2], [1, 0, 0, 1])
    together = advantages(first[0] + second[0], first[1] + second[1], 4)
    apart = [advantages(*group, 4) for group in (first, second)]
    assert together.full.tolist() == [*apart[0].full.tolist(), *apart[1].full.tolist()]
    assert together.clean.tolist() == [*apart[0].clean.tolist(), *apart[1].clean.tolist()]


def test_the_normaliser_is_the_spread_of_the_whole_group() -> None:
    plain, scaled = (advantages([1, 1, 0, 0], [1, 1, 0, 0][::-1], 4, std_normalize=flag) for flag in (False, True))
    spread = statistics.stdev([1, 1, 0, 0])
    torch.testing.assert_close(scaled.full, plain.full / spread)
    torch.testing.assert_close(scaled.clean, plain.clean / spread)


# The floor of the spread


@pytest.mark.corner("`std_normalize`, and rewards that differ by rounding", "advantages stay rounding")
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-3), (torch.float32, 1e-2), (torch.float16, 0.1), (torch.bfloat16, 0.1)]
)
def test_a_spread_that_is_rounding_makes_no_advantage(dtype: torch.dtype, bound: float, size: float) -> None:
    """As of the same rewards in another order of summation: divided by their spread they were advantages of 1.5."""
    rewards = torch.full((4,), 0.6 * size, dtype=dtype)
    rewards[0] = torch.nextafter(rewards[0], torch.tensor(size, dtype=dtype))
    found = gr.clean_baseline_advantages(rewards, torch.tensor([False, False, False, True]), 4, std_normalize=True)
    assert 0 < found.full.abs().max() < bound
    assert found.clean.abs().max() < bound


def test_rounding_of_float32_makes_no_advantage_in_float64_either() -> None:
    rewards = torch.tensor([0.6, 0.6, 0.6, torch.nextafter(torch.tensor(0.6), torch.tensor(1.0))]).double()
    found = gr.clean_baseline_advantages(rewards, torch.zeros(4, dtype=torch.bool), 4, std_normalize=True)
    assert 0 < found.full.abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_spread_above_the_floor_divides_exactly_at_any_size(scale: float) -> None:
    rewards = scale * torch.tensor([1.0, 1.001, 0.999, 1.0])
    found = gr.clean_baseline_advantages(rewards, torch.zeros(4, dtype=torch.bool), 4, std_normalize=True)
    torch.testing.assert_close(found.full, torch.tensor([0.0, 1.2247, -1.2247, 0.0]), rtol=1e-3, atol=1e-3)


# Rollouts without a reward

NAN = float("nan")


@pytest.mark.corner("rows without a reward", "both advantages are 0; in no baseline")
@pytest.mark.parametrize("std_normalize", [False, True])
def test_rows_without_a_reward_have_no_advantage_and_the_others_are_as_if_they_were_alone(std_normalize: bool) -> None:
    rewards = torch.tensor([1.0, NAN, 0.5, 0.0, NAN, 2.0], dtype=torch.float64)
    flagged = torch.tensor([True, True, False, False, False, False])
    found = gr.clean_baseline_advantages(rewards, flagged, 6, no_reward=rewards.isnan(), std_normalize=std_normalize)
    judged = ~rewards.isnan()
    alone = gr.clean_baseline_advantages(rewards[judged], flagged[judged], 4, std_normalize=std_normalize)
    for with_nan, without in zip(found, alone, strict=True):
        assert with_nan[~judged].tolist() == [0.0, 0.0]
        torch.testing.assert_close(with_nan[judged], without, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("std_normalize", [False, True])
def test_a_group_without_any_reward_is_zero_and_the_next_group_unaffected(std_normalize: bool) -> None:
    rewards = torch.tensor([NAN, NAN, NAN, 1.0, 0.0, 0.5])
    flagged = torch.tensor([True, False, False, False, False, True])
    found = gr.clean_baseline_advantages(rewards, flagged, 3, no_reward=rewards.isnan(), std_normalize=std_normalize)
    alone = gr.clean_baseline_advantages(rewards[3:], flagged[3:], 3, std_normalize=std_normalize)
    assert found.full.tolist() == [0.0, 0.0, 0.0, *alone.full.tolist()]
    assert found.clean.tolist() == [0.0, 0.0, 0.0, *alone.clean.tolist()]


def test_a_single_judged_row_is_its_own_baseline() -> None:
    rewards = torch.tensor([0.7, NAN, NAN])
    found = gr.clean_baseline_advantages(
        rewards, torch.zeros(3, dtype=torch.bool), 3, no_reward=rewards.isnan(), std_normalize=True
    )
    assert found.full.tolist() == found.clean.tolist() == [0.0, 0.0, 0.0]


def test_a_reward_that_is_missing_is_marked_or_refused() -> None:
    rewards, marked = torch.tensor([0.0, NAN, 1.0]), torch.tensor([True, False, False])
    with pytest.raises(gr.GradRouteError, match=r"Found nan. Fix: .*no_reward=rewards.isnan\(\)"):
        gr.clean_baseline_advantages(rewards, marked, 3, no_reward=marked)


# Weighted baselines


def test_weights_of_zero_and_one_are_the_clean_and_the_plain_baseline() -> None:
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.5, 2.0, 2.0], dtype=torch.float64)
    flagged = torch.tensor([True, False, False, False, True, True])
    clean_baseline = gr.clean_baseline_advantages(rewards, flagged, 3)
    unflagged = (~flagged).double()
    assert torch.equal(weighted_baseline_advantages(rewards, torch.ones(6), 3), clean_baseline.full)
    assert torch.equal(unflagged * weighted_baseline_advantages(rewards, unflagged, 3), clean_baseline.clean)


def test_weighted_advantages_push_a_block_nowhere_on_average_and_see_every_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, weights = torch.randn(8, generator=generator), torch.rand(8, generator=generator)
    found = weighted_baseline_advantages(rewards, weights, 4)
    expected = [
        r - sum(w * x for w, x in zip(ws, rs, strict=True)) / sum(ws)
        for rs, ws in zip(rewards.view(2, 4).tolist(), weights.view(2, 4).tolist(), strict=True)
        for r in rs
    ]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert (weights * found).view(2, 4).sum(1).abs().max() < 1e-6


def test_negative_weights_are_not_in_the_baseline_and_a_group_without_positive_ones_has_none() -> None:
    rewards = torch.tensor([4.0, 1.0, 3.0, 5.0, 1.0, 0.0])
    weights = torch.tensor([-0.5, 1.0, 1.0, -0.5, 0.0, -1.0])
    assert weighted_baseline_advantages(rewards, weights, 3).tolist() == [2.0, -1.0, 1.0, 0.0, 0.0, 0.0]


def test_weighted_baselines_leave_out_rows_without_a_reward_and_refuse_weights_that_are_not_finite() -> None:
    rewards = torch.tensor([4.0, NAN, 2.0])
    found = weighted_baseline_advantages(rewards, torch.tensor([1.0, 5.0, 1.0]), 3, no_reward=rewards.isnan())
    assert found.tolist() == [1.0, 0.0, -1.0]
    with pytest.raises(gr.GradRouteError, match="`weights` should be finite. Found nan"):
        weighted_baseline_advantages(torch.zeros(2), torch.tensor([1.0, NAN]), 2)


@pytest.mark.parametrize("size", [4, 5, 12])
def test_rewards_must_be_whole_groups(size: int) -> None:
    with pytest.raises(gr.GradRouteError, match=f"`rewards` should hold whole groups of {size}. Found 6 rewards"):
        advantages([0.0, 1.0] * 3, [0] * 6, size)


@pytest.mark.parametrize("size", [1, 0, -3])
def test_a_group_needs_two_rollouts(size: int) -> None:
    with pytest.raises(gr.GradRouteError, match="`group_size` should be"):
        advantages([0.0, 1.0, 1.0], [0] * 3, size)


def test_no_rewards_raise() -> None:
    with pytest.raises(gr.GradRouteError, match="Found 0 rewards"):
        advantages([], [], 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rewards_that_are_not_finite_raise(bad: float) -> None:
    with pytest.raises(gr.GradRouteError, match=f"`rewards` should be finite. Found {bad}"):
        advantages([0.0, bad], [0, 0], 2)


@pytest.mark.parametrize(
    ("rewards", "flagged"),
    [
        (torch.zeros(4), torch.zeros(2, dtype=torch.bool)),
        (torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool)),
        (torch.zeros(4), torch.zeros(4)),
        (torch.zeros(4, dtype=torch.long), torch.zeros(4, dtype=torch.bool)),
    ],
)
def test_other_shapes_and_types_raise(rewards: Tensor, flagged: Tensor) -> None:
    with pytest.raises(REFUSED, match="rewards|flagged"):
        gr.clean_baseline_advantages(rewards, flagged, 2)
