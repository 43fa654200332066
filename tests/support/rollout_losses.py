"""Losses of six rollouts, and by slow references: their own gradients, their scores, a masked second backward."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradroute as gr
from gradroute._protocol import routed_layers
from support.gradient_directions import BOTTLENECK, PARAMETER, deployed_row
from support.language_models import VOCAB
from support.models import gradients

ROWS, SEQ = 6, 7
IDS = torch.randint(VOCAB, (ROWS, SEQ), generator=torch.Generator().manual_seed(0))
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0, -1.5, 0.3, -1.0], dtype=torch.float64)


def losses(model: nn.Module, ids: Tensor = IDS, rows: slice = slice(None)) -> Tensor:
    """A policy-gradient loss per rollout: advantage times NLL."""
    ids = ids[rows]
    logits = model(ids)
    logits = getattr(logits, "logits", logits)
    nll = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return ADVANTAGES.to(nll.dtype)[rows] * nll.view(len(ids), -1).mean(1)


both_features = pytest.mark.parametrize("made", [PARAMETER, BOTTLENECK], ids=["parameter", "bottleneck"])


def own_gradients(model: nn.Module, loss_fn) -> list[dict[str, Tensor]]:
    """Each rollout's own deployed gradient, by a backward of its own."""
    rows = []
    for i in range(ROWS):
        model.zero_grad()
        loss_fn(model)[i].backward()
        rows.append({name: deployed_row(layer).clone() for name, layer in routed_layers(model).items()})
    model.zero_grad()
    return rows


def reference_scores(model: nn.Module, loss_fn, directions: gr.Directions) -> Tensor:
    """Cosine of each rollout's gradient, or bottleneck feature, with the summed rows, over all modules."""
    v = torch.cat([rows.sum(0) for rows in directions.rows.values()])
    if directions.provenance.feature == "bottleneck":
        with gr.capture_gradients(model) as captured:
            loss_fn(model).sum().backward()
        model.zero_grad()
        features = torch.cat(list(captured.values()), dim=1)
    else:
        features = torch.stack([torch.cat(list(rows.values())) for rows in own_gradients(model, loss_fn)])
    return features @ v / features.norm(dim=1) / v.norm()


def middle_of(scores: Tensor) -> float:
    """Between the third and the fourth of six."""
    return float(scores.sort().values[2:4].mean())


def routed_backward(model: nn.Module, loss_fn, removed: Tensor) -> dict[str, Tensor]:
    """The second pass of the two-pass computation: a masked backward."""
    model.zero_grad()
    with gr.route(model, gr.RouteMask.weights(m=1.0, g_d=1 - removed, g_q=1.0)):
        loss_fn(model).sum().backward()
    found = gradients(model)
    model.zero_grad()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-30)
        assert error < tolerance, (name, float(error))
