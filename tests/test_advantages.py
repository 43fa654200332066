"""`clean_baseline_advantages` against the formula, one rollout at a time."""

import statistics

import pytest
import torch
from torch import Tensor

import gradroute as gr
from gradroute.advantages import GroupAdvantages

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


@pytest.mark.parametrize("size", [4, 5, 12])
def test_rewards_must_be_whole_groups(size: int) -> None:
    with pytest.raises(gr.GradRouteError, match=f"`rewards` should hold whole groups of {size}. Found 6 rewards"):
        advantages([0.0, 1.0] * 3, [0] * 6, size)


@pytest.mark.parametrize("size", [1, 0, -3])
def test_a_group_needs_two_rollouts(size: int) -> None:
    with pytest.raises(gr.GradRouteError, match=f"`group_size` should be at least 2. Found {size}"):
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
