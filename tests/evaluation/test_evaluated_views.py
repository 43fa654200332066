"""Every evaluation starts from the on view, under no route, with the same random numbers, and leaves them as found."""

import random
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import numpy as np
import pytest
import torch
from support.import_hook import compiles
from support.models import Tower, randomize_blocks
from torch import nn

import gradroute as gr
from gradroute._protocol import routed_layers
from gradroute.evaluation import assert_ablation_reaches, dose_curve

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))


def tower() -> Tower:
    return randomize_blocks(gr.attach(Tower(), r=2, lora_alpha=4.0))


def evaluation(forward: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """Calls `forward` and returns what is a list of records and of outputs."""

    def evaluate(model: nn.Module) -> list[gr.EvalRecord]:
        forward(model)
        return [gr.EvalRecord("file", False, 0, hacked=True, solved=False)]

    return evaluate


def reaches(model: nn.Module, evaluate: Callable[[nn.Module], Any]) -> float:
    def outputs(model: nn.Module) -> list[Any]:
        return [evaluate(model), next(iter(routed_layers(model).values())).view]

    return assert_ablation_reaches(model, outputs)


EVALUATIONS = {
    "evaluate_on_off": gr.evaluate_on_off,
    "dose_curve": lambda model, evaluate: dose_curve(model, evaluate, scales=(0.0, 0.5, 1.0)),
    "assert_ablation_reaches": reaches,
}

every_evaluation = pytest.mark.parametrize("run", EVALUATIONS.values(), ids=EVALUATIONS.keys())


@pytest.mark.corner("an evaluation inside an open route", "`RouteError`, which names the route")
@every_evaluation
def test_an_open_route_is_named_as_the_cause(run: Callable[..., Any]) -> None:
    """The route would end with "14 of 14 layers did not run"."""
    model = tower()
    with pytest.raises(gr.errors.RouteError, match="without a route. Found one open in 2 of 2 layers.*Fix"):
        with gr.route(model, gr.RouteMask.classic([True] * 4)):
            run(model, evaluation(lambda model: model(X)))
    gr.adapters.set_route(model, gr.RouteMask.classic([True] * 4))
    with pytest.raises(gr.errors.RouteError, match=r"clear_route\(model\)"):
        run(model, evaluation(lambda model: model(X)))
    model(X).sum().backward()
    gr.adapters.clear_route(model)
    run(model, evaluation(lambda model: model(X)))


def drawn() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


@pytest.mark.corner("an evaluation that draws from Python, numpy and torch", "every view draws the same numbers")
@every_evaluation
def test_all_views_draw_the_same_random_numbers(run: Callable[..., Any]) -> None:
    draws = []
    run(tower(), evaluation(lambda model: draws.append(drawn())))
    drawn()
    run(tower(), evaluation(lambda model: draws.append(drawn())))
    first, second = draws[: len(draws) // 2], draws[len(draws) // 2 :]
    assert len(set(first)) == len(set(second)) == 1
    assert not set(first[0]) & set(second[0])


@every_evaluation
def test_random_numbers_are_left_as_found(run: Callable[..., Any]) -> None:
    def states() -> list[Any]:
        kind, keys, *place = np.random.get_state()
        return [random.getstate(), kind, keys.tolist(), place, torch.get_rng_state().tolist()]

    model = tower()
    before = states()
    run(model, evaluation(lambda model: drawn()))
    assert states() == before


# Layers that something else computes


def patched(module: nn.Module, forward: Callable[..., Any]) -> None:
    """As fused kernels do it: on this very object."""
    module.forward = forward  # type: ignore[method-assign]


def fused(layer: gr.QuarantineLoRA) -> Callable[[Any], Any]:
    """Both blocks, whatever the view says."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        deltas = (block.scaling * x @ block.A.T @ block.B.T for block in (layer.deployed, layer.quarantine))
        return layer.base_layer(x) + sum(deltas)

    return forward


@pytest.mark.corner("a fused kernel replaces the forward of routed layers", "`RouteError`, in every evaluation")
@every_evaluation
@pytest.mark.parametrize("layers", [["lower"], ["upper"], ["lower", "upper"]])
def test_a_layer_whose_own_forward_is_replaced_is_found(run: Callable[..., Any], layers: list[str]) -> None:
    model = tower()
    with torch.no_grad():
        on = model(X)
        with gr.ablate_quarantine(model):
            ablated = model(X)
        for name in layers:
            patched(getattr(model, name), fused(getattr(model, name)))
        torch.testing.assert_close(model(X), on)
    assert not torch.equal(on, ablated)
    with pytest.raises(gr.errors.RouteError, match="should run its . routed layers.*Fix"):
        run(model, evaluation(lambda model: model(X)))


@pytest.mark.corner("a fused kernel replaces a module around routed layers", "`RouteError`, in every evaluation")
@every_evaluation
def test_layers_that_a_patch_of_the_module_around_them_passes_by_are_found(run: Callable[..., Any]) -> None:
    model = nn.Sequential(tower())
    inner = model[0]
    patched(inner, lambda x: fused(inner.upper)(torch.tanh(inner.lower(x))))
    with pytest.raises(gr.errors.RouteError, match="`0.upper`"):
        run(model, evaluation(lambda model: model(X)))
    patched(inner, lambda x: fused(inner.upper)(torch.tanh(fused(inner.lower)(x))))
    with pytest.raises(gr.errors.RouteError, match="should run its 2 routed layers.*Fix"):
        run(model, evaluation(lambda model: model(X)))
    assert not any(module._forward_pre_hooks for module in model.modules())


@every_evaluation
def test_a_forward_that_is_only_wrapped_runs_its_layer(run: Callable[..., Any]) -> None:
    model = tower()
    own = model.upper.forward

    @wraps(own)
    def timed(x: torch.Tensor) -> torch.Tensor:
        return own(x)

    patched(model.upper, timed)
    run(model, evaluation(lambda model: model(X)))


@pytest.mark.corner("an evaluation whose second view is answered from a cache", "`RouteError`")
@every_evaluation
def test_an_answer_from_a_cache_in_the_second_view_is_found(run: Callable[..., Any]) -> None:
    model = tower()

    @lru_cache
    def outputs(_: int) -> torch.Tensor:
        return model(X)

    with pytest.raises(gr.errors.RouteError, match=r"should run in every view.*not at scale.*cache.*Fix"):
        run(model, evaluation(lambda model: outputs(0)))


@every_evaluation
def test_a_separate_engine_need_not_run_the_model(run: Callable[..., Any]) -> None:
    run(tower(), evaluation(lambda model: None))


@compiles
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("first", [True, False])
def test_a_compiled_model_is_evaluated(first: bool) -> None:
    model = tower()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    if first:
        compiled(X)
    seen = []
    for _ in range(2):
        gr.evaluate_on_off(model, evaluation(lambda _: seen.append(compiled(X))))
    on, ablated = seen[:2]
    assert not torch.equal(on, ablated)
    assert torch.equal(seen[2], on)
    assert torch.equal(seen[3], ablated)
