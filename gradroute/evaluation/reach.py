"""Does text generation follow the ablation? An engine that merges, fuses or copies weights may not, silently.

    on = generate(model);      off = generate(model), quarantine ablated;      on != off  where  B_q A_q != 0

An engine that ignores the ablation shows the on view twice, so that every hack rate "as deployed" is that of the model
in training. With B_q A_q = 0 both views are one model, and there is nothing to see.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradroute._protocol import delta_norms, routed_layers
from gradroute._typing import typechecked
from gradroute.errors import GradRouteError
from gradroute.evaluation._views import Views


@typechecked
def assert_ablation_reaches(model: nn.Module, generate_fn: Callable[[nn.Module], Any]) -> float:
    """Raise unless `generate_fn(model)` gives something else with the quarantine ablated than with it in place.

    Args:
        model: with routed layers, under no route, after some training; modes, gradients and random numbers are left as
            found.
        generate_fn: syncs the engine with `model`, if there is one, and generates for a few fixed prompts as rollouts
            or evaluations do: token ids (batch, seq), texts, or log-probabilities. It runs three times from the same
            random state of Python, numpy and torch; an engine with its own random numbers should decode greedily.

    Returns:
        The share of rows that differ, more than 0.

    Raises:
        GradRouteError: the same output in both views; a quarantine of zero net delta, or outputs that differ from call
            to call in one view, so that nothing can be told; no outputs.
        RouteError: as `evaluate_on_off`.
    """
    views = Views(model)
    layers = routed_layers(model)
    if not any(norm > 0 for norm in delta_norms(layer.quarantine for layer in layers.values())):
        raise GradRouteError(
            f"The quarantine should change the model. Found a net delta of zero in all {len(layers)} layers (B is zero "
            "before the first step), so both views are one model. Fix: check after a few steps that trained it."
        )
    on, off, again = (_outputs(views, scale, model, generate_fn) for scale in (1.0, 0.0, 1.0))
    if again != on:
        raise GradRouteError(
            "`generate_fn` should give the same output for the same model. Found two different ones, so a difference "
            "between the views would mean nothing. Fix: decode greedily, or seed the engine in `generate_fn`."
        )
    if on == off:
        raise GradRouteError(
            f"`generate_fn` should give other outputs ablated than on. Found the same {len(on)} outputs: what "
            "generates holds merged, fused or older weights and ignores the ablation, or the quarantine is too small "
            "to change a token. Fix: sync in `generate_fn` (export_deployed for the ablated view, export_full for the "
            "other), or return log-probabilities."
        )
    if len(on) != len(off):
        return 1.0
    return float(sum(a != b for a, b in zip(on, off, strict=True)) / len(on))


def _outputs(views: Views, scale: float, model: nn.Module, generate_fn: Callable[[nn.Module], Any]) -> list[Any]:
    with views.at(scale), torch.no_grad():
        outputs = generate_fn(model)
    # What transformers' generate returns with return_dict_in_generate=True.
    outputs = getattr(outputs, "sequences", outputs)
    if isinstance(outputs, Tensor):
        outputs = outputs.tolist()
    if isinstance(outputs, str) or not isinstance(outputs, Sequence) or not outputs:
        found = "nothing" if isinstance(outputs, Sequence) and not outputs else type(outputs).__name__
        raise GradRouteError(f"`generate_fn` should return one output per row, a tensor or a list. Found {found}.")
    return [row.tolist() if isinstance(row, Tensor) else row for row in outputs]
