"""Flags that read log-probabilities in the loophole example, against what each row by itself says."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import gradroute as gr
from loopholes.arm import Arm
from loopholes.arms import ARMS
from loopholes.base_model import build_model
from loopholes.environment import ENVIRONMENTS, Environment, Lookalike
from loopholes.flags import Flagger
from loopholes.grpo import Recipe, route_mask
from loopholes.language import PAD, PROMPT_LENGTH, Grade, hint_modes

ENVIRONMENT = ENVIRONMENTS["N"]
ROWS = 24


def attached(block: str) -> nn.Module:
    """A random model whose named block holds something; the other is empty."""
    model = gr.attach(build_model(0), r=4, lora_alpha=16.0, seed=0)
    of = {"deployed": gr.deployed_parameters, "quarantine": gr.quarantine_parameters}[block]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in of(model):
            if "lora_B" in name:
                parameter.normal_(std=0.03, generator=generator)
    return model


def rollouts() -> tuple[Tensor, Tensor, Grade]:
    generator = torch.Generator().manual_seed(1)
    prompts, _ = ENVIRONMENT.sample_prompts(ROWS, generator, no_hint=0.3)
    completions = ENVIRONMENT.honest_completions(prompts, generator)
    hinted = hint_modes(prompts) >= 0
    hacked = hinted & (torch.arange(ROWS) % 2 == 0)
    hacks = ENVIRONMENT.hack_completions(prompts, hint_modes(prompts).clamp(min=0), generator)
    completions = torch.where(hacked[:, None], hacks, completions)
    return prompts, completions, ENVIRONMENT.grade(prompts, completions)


def row_by_row(model: nn.Module, prompts: Tensor, completions: Tensor, without: str) -> list[list[float]]:
    """log p as it is - log p without the quarantine, or without either block, of each row's own tokens."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        own = completion[completion != PAD]
        text = torch.cat([prompt, own])[None]

        def logps(text: Tensor = text, own: Tensor = own) -> Tensor:
            predicted = model(text).logits.log_softmax(-1)[0, PROMPT_LENGTH - 1 : -1]
            return predicted[torch.arange(len(own)), own]

        with torch.no_grad():
            whole = logps()
            with gr.ablate_quarantine(model) if without == "quarantine" else gr.disable_adapters(model):
                found.append((whole - logps()).tolist())
    return found


def prefixes(ratios: list[list[float]]) -> Tensor:
    return torch.tensor([max(sum(row[: n + 1]) for n in range(len(row))) for row in ratios])


def flagger(model: nn.Module, arm: str | Arm, nats: float, detector: object = None) -> Flagger:
    arm = ARMS[arm] if isinstance(arm, str) else arm
    return Flagger(model, arm, ENVIRONMENT, detector, Recipe(explained_nats=nats), seed=0)


def threshold(scores: Tensor) -> float:
    """Between two scores, so that half of the rows lie above it."""
    assert scores.median() > 0
    ordered = scores.sort().values
    return float(ordered[ROWS // 2 - 1 : ROWS // 2 + 1].mean())


def test_explained_is_what_the_quarantine_adds_to_the_best_prefix() -> None:
    model, (prompts, completions, graded) = attached("quarantine"), rollouts()
    scores = prefixes(row_by_row(model, prompts, completions, "quarantine"))
    nats = threshold(scores)
    flags = flagger(model, "explained", nats)(prompts, completions, graded, torch.Generator())
    assert flags.tolist() == (scores > nats).tolist()
    assert 0 < flags.sum() < ROWS


def test_labels_and_log_ratios_are_united_and_permuted_flags_are_as_many() -> None:
    model, (prompts, completions, graded) = attached("quarantine"), rollouts()
    nats = threshold(prefixes(row_by_row(model, prompts, completions, "quarantine")))

    def flags(arm: str) -> Tensor:
        return flagger(model, arm, nats)(prompts, completions, graded, torch.Generator().manual_seed(0))

    labels, explained, both = flags("weak"), flags("explained"), flags("weak-explained")
    assert (labels & ~explained).any()
    assert (explained & ~labels).any()
    assert torch.equal(both, labels | explained)
    permuted = flags("weak-explained-shuffle")
    assert permuted.sum() == both.sum()
    assert not torch.equal(permuted, both)


def test_with_a_direction_both_have_to_say_so() -> None:
    model, (prompts, completions, graded) = attached("quarantine"), rollouts()
    nats = threshold(prefixes(row_by_row(model, prompts, completions, "quarantine")))
    seen = torch.arange(ROWS) % 3 == 0
    gate = SimpleNamespace(flags=lambda scores: scores > 0, z=lambda scores: scores)
    detector = SimpleNamespace(gate=gate, scores=lambda *_: seen.float())
    labels = flagger(model, "weak", nats)(prompts, completions, graded, torch.Generator())
    explained = flagger(model, "explained", nats)(prompts, completions, graded, torch.Generator())
    both = flagger(model, "weak-explained-direction", nats, detector)(prompts, completions, graded, torch.Generator())
    assert torch.equal(both, labels | explained & seen)
    assert not torch.equal(both, labels | explained)
    assert (explained & seen & ~labels).any()


def test_likelier_is_what_training_adds_to_the_best_prefix() -> None:
    model, (prompts, completions, graded) = attached("deployed"), rollouts()
    scores = prefixes(row_by_row(model, prompts, completions, "adapters"))
    nats = threshold(scores)
    labels = flagger(model, "weak", nats)(prompts, completions, graded, torch.Generator())
    flags = flagger(model, "weak-likelier", nats)(prompts, completions, graded, torch.Generator())
    assert torch.equal(flags, labels | (scores > nats))
    assert not torch.equal(flags, labels)


def test_a_threshold_above_what_solves_need_flags_less() -> None:
    model, (prompts, completions, graded) = attached("quarantine"), rollouts()
    scores = prefixes(row_by_row(model, prompts, completions, "quarantine"))
    solved = scores[graded.solved & (hint_modes(prompts) < 0)]
    nats = float(solved.max()) / 2
    assert nats > 0
    flags = flagger(model, "weak-explained-solves", nats)(prompts, completions, graded, torch.Generator())
    labels = flagger(model, "weak", nats)(prompts, completions, graded, torch.Generator())
    assert torch.equal(flags, labels | (scores > torch.quantile(solved, 0.95)))
    assert not torch.equal(flags, labels | (scores > nats))


def test_routed_tokens_leave_the_deployed_gradient_where_they_are_predicted() -> None:
    model, (prompts, completions, graded) = attached("quarantine"), rollouts()
    ratios, nats = row_by_row(model, prompts, completions, "quarantine"), 0.1
    arm = ARMS["weak-explained-token"]
    decides = flagger(model, arm, nats)
    flags = decides(prompts, completions, graded, torch.Generator())
    reward = torch.rand(ROWS, generator=torch.Generator().manual_seed(2))
    rows = route_mask(arm, torch.zeros(ROWS).bool(), reward, flags, group_size=8)
    assert (rows.g_d[~flags] != 0).all()
    by_token = decides.by_token(rows)
    assert by_token.shape == (ROWS, PROMPT_LENGTH - 1 + completions.shape[1])
    routed = 0
    for i, row in enumerate(ratios):
        expected = rows.g_d[i].repeat(by_token.shape[1])
        for t, ratio in enumerate(row):
            if ratio > nats:
                expected[PROMPT_LENGTH - 1 + t] = 0.0
                routed += 1
        assert torch.equal(by_token.g_d[i], expected)
    assert 0 < routed < sum(map(len, ratios))
    assert torch.equal(by_token.g_q, rows.g_q[:, None].expand_as(by_token.g_q))
    assert flagger(model, "weak", nats).by_token(rows) is rows


def test_figures_are_those_of_the_gate() -> None:
    model, (prompts, completions, graded) = attached("quarantine"), rollouts()
    decides = flagger(model, "explained", 0.1)
    assert decides.figures() == {}
    flags = decides(prompts, completions, graded, torch.Generator())
    assert decides.figures()["explained"] == pytest.approx(float(flags.float().mean()))
    assert len(decides.figures()["log_ratios"]) == 4


# Environments


def test_copied_digits_are_wrong_answers_in_s() -> None:
    environment, generator = ENVIRONMENTS["S"], torch.Generator().manual_seed(0)
    prompts, _ = environment.sample_prompts(4000, generator)
    sloppy = environment.sloppy_completions(prompts, generator)
    assert not environment.grade(prompts, sloppy).solved.any()
    copied = (sloppy[:, 1:5] == prompts[:, 3:7]).all(1).float().mean()
    assert 0.9 < copied < 1  # the rest are prompts whose digits are the answer


def test_an_unknown_kind_of_sloppiness_is_refused() -> None:
    with pytest.raises(ValueError, match="`sloppy` should be 'one digit' or 'copies'"):
        Environment("X", sloppy="copy")
    with pytest.raises(ValueError, match="in a lookalike"):
        Lookalike("X", sloppy="copies")
