"""Scores from a pass that is made anyway: which pass it is, what it reads, and that it costs no forward."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.models import randomize_blocks
from support.tiny_models import base_model, config
from support.trl_runs import PAIRS, Watched, extract, flags, quiet, rows_of, trained, trainer, wrapped
from torch import nn

import gradroute as gr
from gradroute._protocol import routed_layers
from gradroute.integrations.trl import GradRouteGRPOTrainer

pytestmark = [
    *quiet,
    pytest.mark.touches_peft,
    # These runs are not about what missed hacks do.
    pytest.mark.filterwarnings("ignore:Rollouts are sampled ablated:gradroute.errors.GradRouteWarning"),
]

# With two optimizer steps per batch of rollouts, TRL takes their old log-probabilities.
TWICE = {"args_steps_per_generation": 4}
ABLATED = {"ablated_fraction": 0.25}
SAMPLED = {"score_view": "sampled"}
STILL = {"args_learning_rate": 0.0, "args_max_steps": 1, "clean_baseline": False}
PASSES: dict[str, tuple[dict[str, Any], str]] = {
    "decoding": ({}, "while they are decoded, at every completion token but the last"),
    "decoding, long": ({"args_max_completion_length": 40}, "while they are decoded, at every"),
    "old log-probabilities": (TWICE, "in the pass of the old log-probabilities"),
    # Chunks of two rows, where a group has four: which rows of a chunk are ablated differs between chunks.
    "old log-probabilities, in small chunks": (
        {**TWICE, "args_per_device_train_batch_size": 2, "args_max_steps": 2},
        "in the pass of the old log-probabilities",
    ),
    "own": (
        {"directions": lambda model: gr.extract_activation_directions(model, PAIRS, features="residual")},
        "in a separate forward, each in the state in which it was sampled: decoding does not give features of residual",
    ),
    "ablated": ({"score_view": None}, "in a separate forward, quarantine ablated"),
}


def score(made: Any, row: tuple[tuple[int, ...], tuple[int, ...]], *, ablated: bool, tokens: int) -> float:
    """Of one rollout alone, over its first completion tokens."""
    prompt, completion = row
    directions = made.routing.directions
    pool = torch.tensor([[0] * len(prompt) + [1] * tokens + [0] * (len(completion) - tokens)])
    view = gr.ablate_quarantine(made.model) if ablated else nullcontext()
    options = {"features": directions.provenance.feature, "modules": list(directions.hack)}
    with torch.no_grad(), view, gr.capture_activations(made.model, pool=pool, **options) as features:
        made.model(torch.tensor([prompt + completion]))
    return float(directions.score(features, view=features.view))


@pytest.mark.parametrize("case", PASSES)
def test_each_rollout_is_scored_in_the_state_that_is_asked_for(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options, said = PASSES[case]
    with caplog.at_level(logging.INFO, "gradroute"):
        made = trained(tmp_path, cls=Watched, **{"directions": extract, **SAMPLED, **STILL, **ABLATED, **options})
    lines = [record.message for record in caplog.records if "are scored" in record.message]
    assert len(lines) == 1
    assert said in lines[0]
    seen, views, short = 0, 0, 0
    for batch in (batch for step in made.micro_batches for batch in step):
        for i, row in enumerate(rows_of(batch)):
            tokens = len(row[1]) - case.startswith("decoding")
            found = float(batch["route_score"][i])
            if tokens == 0:
                short += 1
                assert found != found
                assert batch["route_g_d"][i] == 1
                continue
            in_state = made.sampled_ablated[row[0] + row[1]]
            ablated = in_state or case == "ablated"
            assert found == pytest.approx(score(made, row, ablated=ablated, tokens=tokens), abs=1e-4)
            views += abs(found - score(made, row, ablated=not ablated, tokens=tokens)) > 0.02
            seen += 1
    assert seen + short == 8
    assert views > 4, "the state does not show in the scores"


def forwards(folder: Path, **options: Any) -> int:
    """How often the language model runs in two steps."""
    model, count = wrapped(), 0

    def add(*_: Any) -> None:
        nonlocal count
        count += 1

    model.get_base_model().model.register_forward_hook(add)
    made = trainer(folder, model, **options)
    extracted, count = count, 0
    made.train()
    assert (extracted > 0) == ("directions" in options)
    return count


@pytest.mark.parametrize("options", [{}, TWICE, ABLATED], ids=["decoding", "old log-probabilities", "ablated rows"])
def test_scores_cost_no_forward(options: dict[str, Any], tmp_path: Path) -> None:
    given = {"clean_baseline": False, **options}
    plain = forwards(tmp_path / "plain", detector=flags, **given)
    scored = forwards(tmp_path / "scored", directions=extract, **SAMPLED, **given)
    assert scored == plain
    assert forwards(tmp_path / "ablated", directions=extract, **given) > plain


def test_a_quantile_gate_keeps_what_was_decoded(tmp_path: Path) -> None:
    gate: Any = lambda directions: gr.QuantileGate(directions, warm_up=2)  # noqa: E731
    made = trained(tmp_path, directions=extract, gate=gate, **SAMPLED, args_max_steps=3, refresher=1)
    assert len(made.routing.gate) >= 8


class Keeps(GradRouteGRPOTrainer):
    """Micro-batches."""

    batches: list[dict[str, Any]]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.batches = [*getattr(self, "batches", []), dict(inputs)]
        return super().compute_loss(model, inputs, *args, **kwargs)


def dropped() -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(base_model("llama"), config(lora_dropout=0.2), autocast_adapter_dtype=False)
    return randomize_blocks(model, 0, std=0.3)


def test_dropout_takes_a_separate_forward(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(tmp_path, dropped(), cls=Keeps, directions=extract, **SAMPLED, **STILL)
    with caplog.at_level(logging.INFO, "gradroute"):
        made.train()
    assert any("dropout, or the noise of a router" in record.message for record in caplog.records)
    made.model.eval()
    for batch in made.batches:
        for i, row in enumerate(rows_of(batch)):
            expected = score(made, row, ablated=False, tokens=len(row[1]))
            assert float(batch["route_score"][i]) == pytest.approx(expected, abs=1e-4)


def shorter(ids: list[int]) -> list[int]:
    return ids[: max(1, len(ids) - 1)]


def other(ids: list[int]) -> list[int]:
    return [7 if ids[0] != 7 else 8, *ids[1:]]


@pytest.mark.parametrize("change", [shorter, other])
def test_what_was_decoded_is_compared_with_the_completions(
    change: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Changes(Watched):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            completions, *others = super()._generate_single_turn(*args, **kwargs)
            return [change(ids) for ids in completions], *others

    made = trainer(tmp_path, cls=Changes, directions=extract, **SAMPLED, **STILL)
    made.generation_config.suppress_tokens = [2]
    with caplog.at_level(logging.INFO, "gradroute"):
        made.train()
    assert any("the tokens that were decoded are not those of the completions" in r.message for r in caplog.records)
    for batch in made.micro_batches[0]:
        for i, row in enumerate(rows_of(batch)):
            expected = score(made, row, ablated=False, tokens=len(row[1]))
            assert float(batch["route_score"][i]) == pytest.approx(expected, abs=1e-4)


def test_layers_keep_nothing_after_a_generation_that_fails(tmp_path: Path) -> None:
    made = trainer(tmp_path, directions=extract, **SAMPLED, **STILL)

    forwards = 0

    def fail(*_: Any, **__: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == 3:  # after that of the prompts and of the first token
            assert layers[0].bottlenecks
            raise KeyError("stopped")

    layers = list(routed_layers(made.model).values())
    handle = layers[-1].register_forward_hook(fail)
    with pytest.raises(KeyError, match="stopped"):
        made.train()
    handle.remove()
    assert all(layer.bottlenecks is None for layer in layers)
    assert not made.model.get_base_model()._forward_pre_hooks


@pytest.mark.corner("`score_view` for a TRL run without a gate on directions", "`GradRouteError` when it is built")
def test_a_view_of_scores_that_nothing_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gr.GradRouteError, match="score_view='sampled'` is of a gate that scores"):
        trainer(tmp_path, detector=flags, score_view="sampled")
    with pytest.raises(gr.GradRouteError, match="`score_view` should be"):
        trainer(tmp_path, directions=extract, score_view="on")
