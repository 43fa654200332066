"""A loop that never calls `refresher.step()`, on a model that two ranks share."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import gradroute as gr
from support.sharded_loop import PAIRS, completions, tokens


def unwatched(model: nn.Module, train: Callable[[Tensor, gr.RouteMask], None], rows: slice) -> str:
    """What is said of it, or that nothing was.

    Args:
        model: that `train` trains.
        train: takes the token ids of a batch and the mask of a gate, and makes an optimizer step.
        rows: of each batch that this rank has.
    """

    def extract() -> gr.Directions:
        return gr.extract_activation_directions(model, PAIRS, progress=False)

    with gr.ablate_quarantine(model):
        directions = extract()
    gate, refresher = gr.BandGate(directions), gr.Refresher(directions, extract, model=model, every=1)
    try:
        for seed in range(4):
            ids = tokens(seed)[rows]
            pool = completions(len(ids))
            with torch.no_grad(), gr.ablate_quarantine(model), gr.capture_activations(model, pool=pool) as acts:
                model(input_ids=ids)
            train(ids, gate(directions.score(acts)))
    except gr.errors.RefreshError as error:
        return str(error)
    finally:
        assert refresher.steps == 0
    return "not refused"
