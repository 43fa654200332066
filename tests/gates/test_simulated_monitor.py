"""A label gate that simulates a monitor with misses and false alarms."""

import pytest
import torch

import gradroute as gr

REFUSED = (gr.GradRouteError, TypeError)


def test_recall_and_false_positives_are_simulated_at_their_rates() -> None:
    flags = torch.arange(40_000) % 4 == 0
    made = gr.LabelGate(recall=0.7, false_positive_rate=0.05, seed=3)
    routed = made(flags).routed
    assert routed[flags].double().mean() == pytest.approx(0.7, abs=0.02)
    assert routed[~flags].double().mean() == pytest.approx(0.05, abs=0.01)
    assert "recall=0.7, false_positive_rate=0.05, seed=3" in repr(made)


def test_the_simulation_follows_its_seed_and_leaves_the_global_generator() -> None:
    flags = torch.arange(200) % 2 == 0
    before = torch.get_rng_state()
    first, same, other = (gr.LabelGate(recall=0.5, seed=seed)(flags).routed for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    again = gr.LabelGate(recall=0.5, seed=1)
    assert not torch.equal(again(flags).routed, again(flags).routed)


def test_a_recall_of_zero_and_a_rate_of_one_are_exact() -> None:
    flags = torch.tensor([True, False] * 50)
    assert not gr.LabelGate(recall=0.0)(flags).routed.any()
    with pytest.warns(gr.GradRouteWarning, match="collapsed the deployed block"):
        made = gr.LabelGate(recall=1.0, false_positive_rate=1.0)
    assert made(flags).routed.all()


def test_a_simulated_monitor_flags_tokens_too() -> None:
    flags = torch.ones(30, 40, dtype=torch.bool)
    routed = gr.LabelGate(recall=0.5)(flags).routed
    assert routed.shape == (30, 40)
    assert 0.4 < routed.double().mean() < 0.6


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_a_tenth_of_false_positives_warns_at_once(rate: float) -> None:
    with pytest.warns(gr.GradRouteWarning, match=f"`false_positive_rate` is {rate:g}: .*collapsed the deployed block"):
        gr.LabelGate(false_positive_rate=rate)
    gr.LabelGate(false_positive_rate=0.09)


def test_more_false_alarms_than_hits_warn_with_the_precision() -> None:
    rare = torch.arange(1000) == 0
    made = gr.LabelGate(false_positive_rate=0.09, window=2)
    made(rare)
    with pytest.warns(gr.GradRouteWarning, match=r"more clean rows than hacks in 2 calls: its precision was 0\.01"):
        made(rare)
    common = torch.arange(1000) % 2 == 0
    for _ in range(4):
        made(common)


@pytest.mark.parametrize("name", ["recall", "false_positive_rate"])
@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan"), True])
def test_rates_are_shares(name: str, rate: float) -> None:
    with pytest.raises(REFUSED, match=name):
        gr.LabelGate(**{name: rate})
