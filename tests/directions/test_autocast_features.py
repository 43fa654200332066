"""Under autocast, features, directions and scores keep the precision that they are said to have."""

import pytest
import torch
from support.language_models import PAIRS, tiny_llama
from torch import Tensor

import gradroute as gr

IDS = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [2, 2, 7, 8, 9]])
POOL = torch.ones_like(IDS)
NAME = "model.layers.1.mlp.down_proj"


def low() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def test_bottleneck_features_are_products_of_the_layers_own_inputs() -> None:
    model = tiny_llama()
    entered: list[Tensor] = []
    layer = model.get_submodule(NAME)
    handle = layer.register_forward_hook(lambda _, args, __: entered.append(args[0]))
    with torch.no_grad(), low(), gr.capture_activations(model, pool=POOL) as capture:
        model(input_ids=IDS)
    handle.remove()
    assert entered[0].dtype == torch.bfloat16  # autocast was on
    expected = entered[0].double().mean(1) @ layer.deployed.A.double().T
    found = capture[NAME]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    rounded = expected.bfloat16().double()
    assert (rounded - expected).abs().max() > 100 * (found.double() - expected).abs().max()


@pytest.mark.parametrize("features", ["bottleneck", "parameter"])
def test_gradient_features_are_not_rounded_by_a_backward_under_autocast(features: str) -> None:
    model = tiny_llama()

    def captured(inside: bool) -> Tensor:
        model.zero_grad()
        with gr.capture_gradients(model, features=features, modules=[NAME]) as capture:
            with low():
                loss = model(input_ids=IDS).logits.float().logsumexp(-1).sum()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        return capture[NAME]

    inside, outside = captured(True), captured(False)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=2e-2, atol=1e-3)
    assert not torch.equal(inside, inside.bfloat16().float())


@pytest.mark.parametrize("estimator", ["mean_difference", "t_statistic", "svd", "ridge"])
def test_directions_extracted_under_autocast_are_unit_rows_and_overlap_with_themselves_by_one(estimator: str) -> None:
    model = tiny_llama()
    with low():
        first = gr.extract_activation_directions(model, PAIRS, estimator=estimator)
        second = gr.extract_activation_directions(model, PAIRS, estimator=estimator)
    for rows in first.rows.values():
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)), rtol=1e-5, atol=1e-5)
    assert first.overlap(second) == pytest.approx(1.0, abs=1e-5)


def test_scores_taken_under_autocast_are_those_taken_outside() -> None:
    model = tiny_llama()
    directions = gr.extract_activation_directions(model, PAIRS)
    with torch.no_grad(), gr.capture_activations(model, pool=POOL) as capture:
        model(input_ids=IDS)
    with low():
        inside = directions.score(capture)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, directions.score(capture))
