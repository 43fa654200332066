"""`assert_ablation_reaches`: an engine that ignores the ablation is told from one that follows it."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.models import randomize_blocks
from support.tiny_models import base_model, config, peft_model, token_ids
from torch import Tensor, nn

import gradroute as gr
from gradroute._protocol import routed_layers


def model_of(seed: int = 0) -> nn.Module:
    return randomize_blocks(peft_model("llama"), seed, std=0.5).eval()


def greedy(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    ids = token_ids(4, 5) if ids is None else ids
    options: dict[str, Any] = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]


def logprobs(model: nn.Module) -> Tensor:
    return model(input_ids=token_ids()).logits.log_softmax(-1)[:, -1]


class Engine:
    """Generates with its own merged weights; like many engines it gets new ones only when somebody syncs it."""

    def __init__(self, model: nn.Module) -> None:
        self.sync(model)

    def sync(self, model: nn.Module) -> None:
        self.copy = base_model("llama")
        with torch.no_grad():
            for name, layer in routed_layers(model).items():
                blocks = [layer.deployed] + ([layer.quarantine] if layer.view == "on" else [])
                weight = self.copy.get_submodule(name.removeprefix("base_model.model.")).weight
                weight += sum(block.scaling * block.B @ block.A for block in blocks)

    def generate(self) -> Tensor:
        return greedy(self.copy)


def test_generate_of_the_model_itself_sees_the_ablation() -> None:
    model = model_of()
    on = greedy(model)
    with gr.ablate_quarantine(model):
        off = greedy(model)
    expected = (on != off).any(1).float().mean().item()
    assert expected > 0
    assert gr.evaluation.assert_ablation_reaches(model, greedy) == expected
    assert gr.evaluation.assert_ablation_reaches(model, logprobs) == 1.0


@pytest.mark.corner(
    "an engine generates from weights that were merged before the ablation", "`assert_ablation_reaches` raises"
)
def test_an_engine_that_holds_merged_weights_is_found_out_and_one_that_syncs_is_not() -> None:
    model = model_of()
    stale = Engine(model)
    assert torch.equal(stale.generate(), greedy(model))
    with pytest.raises(gr.GradRouteError, match="same 4 outputs.*ignores the ablation"):
        gr.evaluation.assert_ablation_reaches(model, lambda model: stale.generate())

    def synced(model: nn.Module) -> Tensor:
        stale.sync(model)
        return stale.generate()

    assert gr.evaluation.assert_ablation_reaches(model, synced) > 0


@pytest.mark.corner(
    "the quarantine is still zero when the engine is checked", "`GradRouteError`: the check would tell nothing"
)
def test_a_quarantine_that_changes_nothing_tells_nothing() -> None:
    fresh = get_peft_model(base_model("llama"), config())
    with pytest.raises(gr.GradRouteError, match="net delta of zero in all 14 layers"):
        gr.evaluation.assert_ablation_reaches(fresh, greedy)
    # A split start has no zero matrix, and no delta either.
    with torch.no_grad():
        for layer in routed_layers(fresh).values():
            A, B = layer.lora_A_quarantine["default"].weight, layer.lora_B_quarantine["default"].weight
            A[2:] = 0
            B[:, 2:] = 1
    with pytest.raises(gr.GradRouteError, match="net delta of zero"):
        gr.evaluation.assert_ablation_reaches(fresh, greedy)
    randomize_blocks(fresh, std=0.5)
    assert gr.evaluation.assert_ablation_reaches(fresh.eval(), logprobs) == 1.0


def test_an_engine_that_draws_by_itself_tells_nothing() -> None:
    model, generator = model_of(), torch.Generator().manual_seed(0)

    def drawn(model: nn.Module) -> Tensor:
        return torch.randint(9, (3, 4), generator=generator)

    with pytest.raises(gr.GradRouteError, match="same output for the same model"):
        gr.evaluation.assert_ablation_reaches(model, drawn)


def test_sampling_from_the_models_own_random_state_is_repeated_and_left_as_found() -> None:
    model = model_of().train()

    def sampled(model: nn.Module) -> list[str]:
        assert not model.training
        tokens = model.generate(input_ids=token_ids(4, 5), do_sample=True, min_new_tokens=6, max_new_tokens=6)
        return ["".join(map(chr, row)) for row in tokens.tolist()]

    state = torch.get_rng_state()
    assert gr.evaluation.assert_ablation_reaches(model, sampled) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_it_starts_from_the_on_view() -> None:
    model = model_of()
    with gr.ablate_quarantine(model), pytest.raises(gr.GradRouteError, match="on view"):
        gr.evaluation.assert_ablation_reaches(model, greedy)


@pytest.mark.parametrize("output", [[], "text", 3])
def test_what_is_no_list_of_outputs_is_refused(output: Any) -> None:
    with pytest.raises(gr.GradRouteError, match="one output per row"):
        gr.evaluation.assert_ablation_reaches(model_of(), lambda model: output)


def test_outputs_of_other_lengths_differ() -> None:
    model = model_of()
    assert gr.evaluation.assert_ablation_reaches(model, lambda m: [1] * (1 + int(views(m) == {"on"}))) == 1.0


def views(model: nn.Module) -> set[str]:
    return {layer.view for layer in routed_layers(model).values()}
