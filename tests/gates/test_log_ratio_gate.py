"""The gate on log ratios: what the quarantine explains is routed, and nothing else."""

import logging

import pytest
import torch
from support.tiny_models import base_model
from torch import Tensor

import gradroute as gr
from gradroute.errors import FileFormatError

REFUSED = (gr.GradRouteError, TypeError)


def batch(rows: int = 6, tokens: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of two views, and a mask with a tool's answer in the middle and padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    on, ablated = (-3 * torch.rand(rows, tokens, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    mask = torch.arange(tokens) < lengths
    mask[:, 3:5] &= lengths > 6
    mask[0, 1] = False
    mask[:, 0] = True
    return on, ablated, mask


def slow_score(on: list[float], ablated: list[float], mask: list[bool]) -> float:
    """The definition, prefix by prefix."""
    ratios = [a - b for a, b, known in zip(on, ablated, mask, strict=True) if known]
    return max(sum(ratios[: length + 1]) for length in range(len(ratios)))


@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_the_best_prefix(seed: int) -> None:
    on, ablated, mask = batch(seed=seed)
    expected = [slow_score(*row) for row in zip(on.tolist(), ablated.tolist(), mask.tolist(), strict=True)]
    whole = ((on - ablated) * mask).sum(1)
    scores = gr.LogRatioGate().scores(on, ablated, mask)
    assert not torch.allclose(scores, whole)
    assert scores.tolist() == pytest.approx(expected)


def test_a_row_is_routed_above_the_threshold_only() -> None:
    ablated = torch.full((3, 2), -4.0)
    on = ablated + torch.tensor([[1.0, 0.0], [1.25, 0.0], [0.5, 0.5]])
    gate = gr.LogRatioGate(1.0)
    mask = gate(on, ablated, torch.ones(3, 2, dtype=torch.bool))
    assert mask.routed.tolist() == [False, True, False]
    assert repr(mask) == "RouteMask((3,), rows: 0 keep, 2 absorb, 1 route)"
    assert repr(gr.LogRatioGate(below="keep")(on, ablated, torch.ones(3, 2))).endswith("2 keep, 0 absorb, 1 route)")


def test_displacement_is_seen() -> None:
    """A prefix that the quarantine made likelier, inside a rollout that it made unlikelier: it never wants to stop."""
    ratios = torch.tensor([[1.0, 1.0, 1.0, -8.0], [0.1, 0.1, 0.1, 0.1]])
    ablated = torch.full((2, 4), -9.0)
    on = ablated + ratios
    mask = torch.ones(2, 4)
    assert ratios[0].sum() < ratios[1].sum()
    assert gr.LogRatioGate(1.0)(on, ablated, mask).routed.tolist() == [True, False]


def test_per_token_only_the_tokens_that_the_quarantine_explains_are_routed() -> None:
    ablated = torch.full((1, 4), -5.0)
    on = ablated + torch.tensor([[0.2, 2.0, 0.9, 4.0]])
    mask = gr.LogRatioGate(1.0, per="token")(on, ablated, torch.tensor([[1, 1, 1, 0]]))
    assert mask.shape == (1, 4)
    assert mask.routed.tolist() == [[False, True, False, False]]


def test_padding_may_hold_anything() -> None:
    on, ablated, mask = batch()
    scores = gr.LogRatioGate().scores(on, ablated, mask)
    dirty = [torch.where(mask, values, torch.nan) for values in (on, ablated)]
    assert torch.equal(gr.LogRatioGate().scores(*dirty, mask.long()), scores)


@pytest.mark.parametrize("tokens", [10, 1000])
def test_what_chance_alone_gives_grows_with_the_length(tokens: int) -> None:
    """d sqrt(2 T / pi) is what the docs say; a little less, since a walk of few steps misses its peaks."""
    ratios = 0.06 * torch.randn(2000, tokens, generator=torch.Generator().manual_seed(0))
    scores = gr.LogRatioGate().scores(ratios - 3, torch.full_like(ratios, -3.0), torch.ones(2000, tokens))
    expected = 0.06 * (2 * tokens / torch.pi) ** 0.5
    assert 0.7 * expected < scores.mean() < expected


@pytest.mark.parametrize("per", ["rollout", "token"])
def test_half_precision_scores_are_computed_in_float32(per: str) -> None:
    on, ablated, mask = batch()
    low = gr.LogRatioGate(per=per).scores(on.bfloat16(), ablated.bfloat16(), mask)
    exact = gr.LogRatioGate(per=per).scores(on.bfloat16().float(), ablated.bfloat16().float(), mask)
    assert low.dtype == torch.float32
    assert torch.equal(low, exact)


def logps(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Log-probability of each token but the first, without gradients."""
    with torch.no_grad():
        return model(tokens[:, :-1]).logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)


def test_a_hack_that_only_the_quarantine_knows_is_flagged_and_a_skill_that_both_know_is_not() -> None:
    model = base_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # of a random model it is too small for any logit to matter
    gr.attach(model, r=4, lora_alpha=16, seed=0)
    generator = torch.Generator().manual_seed(0)
    hack, skill = (torch.randint(model.config.vocab_size, (1, 8), generator=generator) for _ in range(2))
    optimizer = torch.optim.Adam(gr.optim.block_groups(model), lr=1e-2)
    before = [logps(model, text).sum() for text in (hack, skill)]
    tokens = torch.cat([hack, skill])
    # The quarantine learns the hack, the deployed block the skill, with the quarantine and without.
    mask = gr.RouteMask.weights(m=[1.0, 1.0, 0.0], g_d=[0.0, 1.0, 1.0], g_q=[1.0, 0.0, 0.0])
    for _ in range(100):
        with gr.route(model, mask):
            logits = model(tokens[[0, 1, 1], :-1]).logits
            (-logits.log_softmax(-1).gather(2, tokens[[0, 1, 1], 1:, None])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    on = logps(model, tokens)
    with gr.ablate_quarantine(model):
        ablated = logps(model, tokens)
    assert on[0].sum() > before[0] + 3
    assert ablated[1].sum() > before[1] + 3
    assert gr.LogRatioGate(1.0)(on, ablated, torch.ones_like(on)).routed.tolist() == [True, False]


# Nothing happens in silence


def test_an_empty_quarantine_is_said_and_then_refused(caplog: pytest.LogCaptureFixture) -> None:
    on, _, mask = batch()
    gate = gr.LogRatioGate()
    with caplog.at_level(logging.INFO, logger="gradroute"):
        assert not gate(on, on, mask).routed.any()
    assert "holds nothing yet" in caplog.text
    with pytest.raises(gr.GradRouteError, match=r"same numbers in both, in call 2.*empty_calls=2"):
        gate(on, on.clone(), mask)


def test_more_calls_may_come_before_the_first_step() -> None:
    on, ablated, mask = batch()
    gate = gr.LogRatioGate(empty_calls=2)
    for _ in range(2):
        gate(on, on, mask)
    with pytest.raises(gr.GradRouteError, match="call 3"):
        gate(on, on, mask)
    assert gate(on, ablated, mask).routed.any()
    with pytest.raises(gr.GradRouteError, match="call 1"):
        gr.LogRatioGate(empty_calls=0)(on, on, mask)


def test_a_gate_that_routes_nothing_in_its_window_says_so() -> None:
    on, ablated, mask = batch()
    gate = gr.LogRatioGate(1000.0, window=2, strict=True)
    gate(on, ablated, mask)
    with pytest.raises(gr.GradRouteError, match="routed nothing in 2 calls"):
        gate(on, ablated, mask)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda on, ablated, mask: (on.exp(), ablated, mask), "`on` should be log-probabilities, finite and <= 0"),
        (lambda on, ablated, mask: (on, ablated * torch.nan, mask), "`ablated` should be log-prob.*nan"),
        (lambda on, ablated, mask: (on[:, :-1], ablated, mask), "`on` should be log-prob|ablated"),
        (lambda on, ablated, mask: (on, ablated.long(), mask), "ablated"),
        (lambda on, ablated, mask: (on.sum(1), ablated.sum(1), mask.any(1)), "mask"),
        (lambda on, ablated, mask: (on, ablated, mask * 2), "`mask` should be booleans, or 0 and 1"),
        (lambda on, ablated, mask: (on, ablated, mask * (torch.arange(6) != 4)[:, None]), "none in row 4"),
        (lambda on, ablated, mask: (on[:0], ablated[:0], mask[:0]), "none in the shape"),
    ],
)
def test_what_cannot_be_scored_is_refused(change: object, match: str) -> None:
    gate = gr.LogRatioGate()
    with pytest.raises(REFUSED, match=match):
        gate(*change(*batch()))
    assert gate.figures is None


@pytest.mark.parametrize(
    "settings", [{"threshold": 0.0}, {"threshold": -1.0}, {"per": "row"}, {"below": "route"}, {"empty_calls": -1}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(REFUSED, match=next(iter(settings))):
        gr.LogRatioGate(**settings)


# Figures and state


def test_figures_are_of_the_window() -> None:
    gate = gr.LogRatioGate(1.0, window=2)
    assert gate.figures is None
    calls = [batch(seed=seed) for seed in range(3)]
    for call in calls:
        gate(*call)
    scores = torch.cat([gate.scores(*call) for call in calls[1:]])
    found = gate.figures
    assert found.rows == len(scores) == 12
    assert found.routed == pytest.approx(float((scores > 1).double().mean()))
    assert found.quantiles[0.5] == pytest.approx(float(torch.quantile(scores, 0.5)), rel=1e-5)
    assert sorted(found.quantiles) == [0.1, 0.5, 0.9, 0.99]


def test_a_window_of_many_tokens_has_figures() -> None:
    """`torch.quantile` takes 2^24 numbers at most: 34 calls of 256 rows of 2048 tokens are more."""
    gate = gr.LogRatioGate(1.0, per="token", window=2)
    gate.load_state_dict({**gate.state_dict(), "recent": [torch.linspace(-2.0, 2.0, 2**24 + 1)]})
    found = gate.figures
    assert found.rows == 2**24 + 1
    assert found.quantiles[0.9] == pytest.approx(1.6, abs=1e-3)
    assert found.routed == pytest.approx(0.25, abs=1e-3)


def test_a_gate_goes_on_from_its_state_bit_for_bit(tmp_path: object) -> None:
    calls = [batch(seed=seed) for seed in range(4)]
    whole = gr.LogRatioGate(window=3)
    for call in calls[:2]:
        whole(*call)
    torch.save(whole.state_dict(), tmp_path / "gate.pt")
    resumed = gr.LogRatioGate(window=3)
    resumed.load_state_dict(torch.load(tmp_path / "gate.pt"))
    for call in calls[2:]:
        assert repr(resumed(*call)) == repr(whole(*call))
    assert resumed.figures == whole.figures
    with pytest.raises(gr.GradRouteError, match="call 5"):
        resumed(calls[0][0], calls[0][0], calls[0][2])
    with pytest.raises(FileFormatError, match="threshold=1"):
        gr.LogRatioGate(2.0, window=3).load_state_dict(whole.state_dict())


def test_it_says_what_it_does() -> None:
    gate = gr.LogRatioGate(0.5, per="token")
    assert repr(gate) == "LogRatioGate(0.5 nat, per token, below='absorb')"
    assert gate.describe().startswith("routed is what the quarantine makes more than 0.5 nat likelier (tokens by them")
    assert gate.reads == "log_ratios"
