"""A refresher of a small model's directions, and what extracts, ablates and moves for it."""

from collections.abc import Callable

import torch

import gradroute as gr
from support.language_models import PAIRS, Mixer, ids_only

REFUSED = (gr.GradRouteError, TypeError)


def activations(model: Mixer) -> gr.Directions:
    return gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)


def bottleneck_gradients(model: Mixer) -> gr.Directions:
    return gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only)


def ablated(model: Mixer, extract: Callable[[Mixer], gr.Directions] = activations) -> gr.Directions:
    with gr.ablate_quarantine(model):
        return extract(model)


def move(model: Mixer, by: float = 0.1) -> None:
    """Move the deployed blocks, as an optimizer step would."""
    with torch.no_grad():
        for _, parameter in gr.deployed_parameters(model):
            parameter.add_(by)


def refresher(model: Mixer, extract: Callable[[], object] | None = None, **settings: object) -> gr.Refresher:
    extract = extract or (lambda: activations(model))
    return gr.Refresher(ablated(model), extract, model=model, **settings)


def control(model: Mixer) -> gr.Directions:
    return ablated(model).random_like(seed=1)
