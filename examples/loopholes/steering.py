"""A direction of hidden states, added or ablated in the forward while training, and left alone as deployed.

    steered   h <- h + alpha d,        d = mean over pairs of (mean hidden state of the hack - of the clean side)
    ablated   h <- h - V^T V h,        V: the top k right singular vectors of these differences

After each transformer block, at every token, in rollouts and in the loss; directions are those of the base model.
Sources: preventative steering (persona vectors, arXiv:2507.21509); CAFT (arXiv:2507.16795).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

import gradroute as gr

from .environment import Environment
from .pairs import monitored_pairs


def residual_directions(
    model: nn.Module, environment: Environment, pairs_per_mode: int, k: int, seed: int, *, random: bool
) -> gr.Directions:
    """k rows per transformer block, of the pairs; or as many Haar-distributed ones."""
    pairs = monitored_pairs(environment, pairs_per_mode, seed)
    estimator = gr.directions.estimators.Svd(k=k)
    found = gr.extract_activation_directions(model, pairs, features="residual", estimator=estimator)
    return found.random_like(seed) if random else found


def shifts(directions: gr.Directions, alpha: float) -> dict[str, Tensor]:
    """alpha d of each block; of random rows, along the first row and as long."""
    differences = {name: each.mean(0) for name, each in directions.differences().items()}
    if directions.provenance.control is not None:
        differences = {name: directions.rows[name][0] * d.norm() for name, d in differences.items()}
    return {name: alpha * d for name, d in differences.items()}


@contextmanager
def hidden_states_changed(
    model: nn.Module, *, added: Mapping[str, Tensor] | None = None, ablated: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Block name -> what is added to its output, or the rows V that are ablated from it."""

    def hook(added: Tensor | None, V: Tensor | None) -> Any:
        def changed(_: nn.Module, __: Any, h: Tensor) -> Tensor:
            return h + added if V is None else h - h @ V.T @ V

        return changed

    with ExitStack() as stack:
        for name in added or ablated or {}:
            block = model.get_submodule(name)
            change = hook(added and added[name], ablated and ablated[name])
            stack.callback(block.register_forward_hook(change).remove)
        yield
