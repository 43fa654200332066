"""The gate on log ratios in TRL: scores of both views, alone and beside other gates, at the cost of a forward."""

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.models import randomize_blocks
from support.tiny_models import base_model, config
from support.trl_runs import PROMPTS, Watched, extract, flags, quiet, rows_of, tokenizer, trained, trainer, wrapped
from torch import Tensor, nn

import gradroute as gr
from gradroute.integrations.trl._log_ratios import is_empty
from gradroute.integrations.trl._scoring import is_random

pytestmark = quiet
NATS, TEMPERATURE = 0.3, 0.7
STILL = {"args_learning_rate": 0.0, "args_max_steps": 1}
MISALIGNED = {"args_steps_per_generation": 4}
"""TRL then computes old log-probabilities."""
ABLATED = {"ablated_fraction": 0.25}


def with_dropout() -> nn.Module:
    torch.manual_seed(0)
    base = base_model("llama", seed=0)
    base.lm_head.weight.data *= 20
    model = get_peft_model(base, config(lora_dropout=0.3), autocast_adapter_dtype=False)
    return randomize_blocks(model, 0, std=0.3)


def slow_score(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> float:
    """The row alone, in both views, prefix by prefix."""
    ids, seen = torch.tensor([prompt + completion]), []
    for view in (nullcontext(), gr.ablate_quarantine(model)):
        with torch.no_grad(), view:
            logp = (model(ids).logits[0, len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        seen.append(logp.gather(1, ids[0, len(prompt) :, None]).squeeze(1))
    ratios = (seen[0] - seen[1]).tolist()
    return max(sum(ratios[: length + 1]) for length in range(len(ratios)))


@pytest.mark.parametrize("case", ["old log-probabilities", "none", "dropout"])
def test_scores_are_those_of_rows_alone_in_both_views(case: str, tmp_path: Path) -> None:
    options = {} if case == "none" else MISALIGNED
    model = with_dropout() if case == "dropout" else wrapped()
    made = trained(
        tmp_path, model, cls=Watched, log_ratio_gate=gr.LogRatioGate(NATS), args_temperature=TEMPERATURE,
        **ABLATED, **STILL, **options,
    )  # fmt: skip
    assert is_random(made.model.train()) == (case == "dropout")
    made.model.eval()
    # Steps of a generation: all of its rollouts are in what was run.
    batches = [batch for step in made.micro_batches for batch in step]
    assert all(("old_per_token_logps" in batch) == (case != "none") for batch in batches)
    scores, ablated = [], []
    for batch in batches:
        for i, (prompt, completion) in enumerate(rows_of(batch)):
            score = slow_score(made.model, prompt, completion)
            scores.append(score)
            ablated.append(made.sampled_ablated[prompt + completion])
            assert float(batch["route_log_ratio"][i]) == pytest.approx(score, abs=1e-4)
            found = tuple(float(batch[key][i] != 0) for key in ("route_m", "route_g_d", "route_g_q"))
            on = not ablated[-1]
            assert found == (on, score <= NATS, on)
    assert any(ablated)
    assert 0 < sum(score > NATS for score in scores) < len(scores)
    assert max(map(abs, scores)) > 0.1
    log = made.state.log_history[0]
    assert log["routing/log_ratio_empty"] == 0
    if case == "none":  # then a step is of all rollouts of a generation
        quantiles = torch.tensor(scores).quantile(torch.tensor([0.1, 0.5, 0.9, 0.99])).tolist()
        found = [log[f"routing/log_ratio_p{q}"] for q in (10, 50, 90, 99)]
        assert found == pytest.approx(quantiles, abs=1e-4)
        assert log["routing/log_ratio_flagged"] == sum(score > NATS for score in scores) / len(scores)
        assert log["routing/flag_rate"] == log["routing/log_ratio_flagged"]


class Counts(Watched):
    """How often log-probabilities of a batch of rollouts are computed, but for its loss."""

    passes = 0

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        self.passes += self._sampled_ablated is not None
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


KEEP = {"detector": flags, "gate": gr.LabelGate(below="keep")}
PASSES: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    # case: (options, of the gate on log ratios, passes without it, passes with it)
    "TRL has old ones": ({**MISALIGNED, "detector": flags}, {}, 1, 2),
    "kept rows need old ones": (KEEP, {"below": "keep"}, 1, 2),
    "there are none": ({"detector": flags}, {}, 0, 2),
}


@pytest.mark.parametrize("case", PASSES)
def test_a_batch_of_rollouts_costs_one_forward_more_where_there_are_old_log_probabilities(
    case: str, tmp_path: Path
) -> None:
    options, of_gate, without, expected = PASSES[case]
    for own, passes in (({}, without), ({"log_ratio_gate": gr.LogRatioGate(1e3, **of_gate)}, expected)):
        made = trainer(tmp_path, cls=Counts, **options, **own)
        made.model.train()
        rollouts = made._generate_and_score_completions([{"prompt": PROMPTS[i // 4]} for i in range(8)])
        assert made.passes == passes
        # What the loss is given is what it would be given without the gate.
        assert ("old_per_token_logps" in rollouts) == (without == 1)


BESIDE: dict[str, dict[str, Any]] = {
    "detector": {"detector": flags},
    "directions": {"directions": extract, "gate": partial(gr.BandGate, threshold=0.8)},
    "both": {"directions": extract, "gate": partial(gr.BandGate, threshold=0.8), "detector": flags},
}


@pytest.mark.parametrize("case", BESIDE)
def test_a_rollout_is_routed_if_either_gate_says_so(case: str, tmp_path: Path) -> None:
    made = trained(
        tmp_path, cls=Watched, log_ratio_gate=gr.LogRatioGate(16.0), clean_baseline=False, **STILL, **BESIDE[case]
    )
    words, other, explained, routed = tokenizer(), [], [], []
    for batch in made.micro_batches[0]:
        texts = words.batch_decode([completion for _, completion in rows_of(batch)], skip_special_tokens=True)
        answers = torch.tensor(flags(texts) if "detector" in BESIDE[case] else [False] * 4)
        if "gate" in BESIDE[case]:
            answers |= made.routing.gate.flags(batch["route_score"])
        other += answers.tolist()
        explained += (batch["route_log_ratio"] > 16.0).tolist()
        routed += (batch["route_g_d"] == 0).tolist()
    assert routed == [a or b for a, b in zip(other, explained, strict=True)]
    assert other != routed
    assert explained != routed


def test_tokens_of_tools_and_padding_do_not_count(tmp_path: Path) -> None:
    made = trainer(tmp_path, log_ratio_gate=gr.LogRatioGate(NATS), args_temperature=TEMPERATURE)
    rollouts = {
        "prompt_ids": torch.tensor([[0, 3, 4], [5, 6, 7]]), "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[20, 21, 22, 23], [24, 25, 0, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }  # fmt: skip
    ablated = torch.tensor([False, True])
    whole = made._flagging.log_ratios(rollouts, ablated).scores
    expected = [slow_score(made.model, (3, 4), (20, 21, 22, 23)), slow_score(made.model, (5, 6, 7), (24, 25))]
    assert whole.tolist() == pytest.approx(expected, abs=1e-4)

    tool = made._flagging.log_ratios({**rollouts, "tool_mask": torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]])}, ablated)
    ids, ratios = torch.tensor([[3, 4, 20, 21, 22, 23]]), []
    for view in (nullcontext(), gr.ablate_quarantine(made.model)):
        with torch.no_grad(), view:
            ratios.append((made.model(ids).logits[0, 4] / TEMPERATURE).log_softmax(-1)[23])
    assert float(tool.scores[0]) == pytest.approx(float(ratios[0] - ratios[1]), abs=1e-4)
    assert abs(float(tool.scores[0] - whole[0])) > 0.01
    assert tool.scores[1] == whole[1]


class NeverAsked(gr.LogRatioGate):
    def __call__(self, *_: Tensor) -> gr.RouteMask:
        raise AssertionError


def test_completions_without_a_token_absorb_and_are_not_given_to_the_gate(tmp_path: Path) -> None:
    made = trainer(tmp_path, cls=Watched, log_ratio_gate=NeverAsked(), args_mask_truncated_completions=True, **STILL)
    made.generation_config.suppress_tokens = [0, 1, 2]  # no completion ends
    made.train()
    for batch in made.micro_batches[0]:
        assert batch["route_log_ratio"].isnan().all()
        assert all((batch[key] == 1).all() for key in ("route_m", "route_g_d", "route_g_q"))
    log = made.state.log_history[0]
    assert log["routing/log_ratio_empty"] == 0
    assert "routing/log_ratio_p50" not in log


# The quarantine before its first step


def fresh(folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    return trainer(folder, base_model("llama", seed=0), cls=Counts, peft_config=config(), **options)


@pytest.mark.corner(
    "the quarantine holds nothing yet, before the first step", "a gate on log ratios is not asked; the log says so once"
)
def test_before_the_first_step_nothing_is_explained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gate = gr.LogRatioGate(1e-3)
    made = fresh(tmp_path, log_ratio_gate=gate)
    assert is_empty(made.model)
    with caplog.at_level(logging.INFO, logger="gradroute"):
        made.train()
    assert not is_empty(made.model)
    assert sum("holds nothing yet" in message for message in caplog.messages) == 1
    first, second = made.state.log_history[:2]
    assert [each["routing/log_ratio_empty"] for each in (first, second)] == [1, 0]
    assert [each["routing/log_ratio_flagged"] > 0 for each in (first, second)] == [False, True]
    assert gate.figures.rows == 8  # of the second batch alone
    assert made.passes == 2  # none for the first


@pytest.mark.corner("the quarantine is never trained", "a gate on log ratios raises after `window` batches of rollouts")
def test_a_quarantine_that_nothing_trains_raises(tmp_path: Path) -> None:
    made = fresh(
        tmp_path, log_ratio_gate=gr.LogRatioGate(window=2), args_learning_rate=0.0, args_max_steps=5
    )  # fmt: skip
    with pytest.raises(gr.GradRouteError, match="in 3 batches of rollouts.*nothing trains it"):
        made.train()
    assert made.state.global_step == 2


def test_oriented_blocks_are_empty_at_the_start() -> None:
    model = gr.attach(nn.Sequential(nn.Linear(6, 5)), target_modules=["0"], r=2, lora_alpha=2)
    assert is_empty(model)
    ((_, A), (_, B)) = gr.quarantine_parameters(model)
    B.data[:, 1] = 1e-6
    assert not is_empty(model)
    A.data[1] = 0.0  # as in a block [V; 0], [0, U]
    assert A.any()
    assert B.any()
    assert is_empty(model)


# Refusals, and the card

SOFT = {"directions": extract, "gate": partial(gr.BandGate, soft=True)}
QUANTILES = {"directions": extract, "gate": gr.QuantileGate}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "as gate": ({"gate": gr.LogRatioGate()}, "Found a LogRatioGate.*Fix: log_ratio_gate="),
    "another gate": ({"log_ratio_gate": gr.LabelGate()}, "should be a LogRatioGate"),
    "per token": ({"log_ratio_gate": gr.LogRatioGate(per="token")}, "a zone per row"),
    "keeps all": ({"log_ratio_gate": gr.LogRatioGate(below="keep")}, "Something should train the quarantine"),
    "soft": ({**SOFT, "log_ratio_gate": gr.LogRatioGate()}, "Found a soft gate"),
    "two zones": ({**KEEP, "log_ratio_gate": gr.LogRatioGate()}, r'Fix: LogRatioGate\(below="keep"\)'),
    "unread": ({"detector": flags, "log_ratio_gate": gr.LogRatioGate(below="keep")}, r'below="absorb"'),
    "three zones": ({**QUANTILES, "log_ratio_gate": gr.LogRatioGate()}, r'below="keep"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_gates_that_do_not_combine_are_refused(case: str, tmp_path: Path) -> None:
    options, reason = REFUSED[case]
    with pytest.raises(gr.GradRouteError, match=reason):
        trainer(tmp_path, **options)


def test_what_the_run_routes_by_names_the_gate_and_so_does_its_card(tmp_path: Path) -> None:
    gate = gr.LogRatioGate(NATS)
    made = trainer(tmp_path, log_ratio_gate=gate, detector=flags, detector_recall=0.5)
    assert made.routing.log_ratio_gate is gate
    assert isinstance(made.routing.gate, gr.LabelGate)
    assert made.routing.clean_baseline
    records = [gr.EvalRecord(mode="m", monitored=True, prompt_id=str(i), hacked=i > 1, solved=i < 3) for i in range(4)]
    card = gr.write_card(
        made.model, gr.evaluate_on_off(made.model, lambda _: records), tmp_path / "card.md", routed_by=made.routing
    )
    text = card.read_text()
    assert repr(gate) in text
    assert gate.describe() in text
    assert "detector `flags`, said to flag 0.5 of all hacks" in text
