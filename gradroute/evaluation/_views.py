"""The views of one evaluation, each from the same start.

    on   y = W x + s_d B_d A_d x + scale * s_q B_q A_q x,  scale 1        ablated   the same with scale 0

Eval mode, no route, the same random numbers of Python, numpy and torch. Where the model runs, every routed layer has to
run, and in every view: a fused kernel that replaces a layer reads no scale, and a cache may hold another view.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from gradroute._restore import left_as_found
from gradroute.adapters.layer import RoutedLinear, routed_linears
from gradroute.adapters.views import ablate_quarantine
from gradroute.errors import GradRouteError, RouteError
from gradroute.evaluation.rates import EvalRecord


class Views:
    """Views of `model`, one at a time.

    Raises:
        GradRouteError: a model that is not in its on view, or has no routed layers.
        RouteError: an open route, or an active adapter without a quarantine.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._layers = model, routed_linears(model)
        self._first: tuple[str, bool] | None = None
        views = sorted({layer.view for layer in self._layers.values()} - {"on"})
        if views:
            raise GradRouteError(
                f"`model` should be in its on view. Found {views[0]!r}. "
                "Fix: leave ablate_quarantine / disable_adapters first."
            )
        routed = [name for name, layer in self._layers.items() if layer.has_open_route]
        if routed:
            raise RouteError(
                f"`model` should be evaluated without a route. Found one open in {len(routed)} of {len(self._layers)} "
                f"layers, as in `{routed[0]}`. Fix: leave `with route(...)`, or clear_route(model), first."
            )

    @contextmanager
    def at(self, scale: float) -> Iterator[None]:
        """The quarantine scaled by `scale`, in eval mode; the model and all random numbers are left as found.

        Raises:
            RouteError: a routed layer did not run where the model did, or the model ran in another view and not here.
        """
        with (
            left_as_found(self._model),
            ablate_quarantine(self._model, scale=scale),
            _calls(self._model, self._layers) as called,
        ):
            yield
            self._check_run(called)
            self._check_as_before(f"at scale {scale:g}")

    def _check_run(self, called: Mapping[str, list[RoutedLinear]]) -> None:
        """Raise where a module around all layers, or a layer, was called and its layers did not run.

        Where some ran and others did not, the view itself raises.
        """
        passed_by = [name for name, inside in called.items() if not any(layer.ran for layer in inside)]
        if passed_by:
            name, count = passed_by[0], len(called[passed_by[0]])
            raise RouteError(
                f"`{name or 'model'}` should run its {count} routed layers. Found that it ran without them: a fused "
                "kernel or patch that follows no ablation. Fix: turn it off; check_model(model) names it."
            )

    def _check_as_before(self, view: str) -> None:
        ran = any(layer.ran for layer in self._layers.values())
        self._first = self._first or (view, ran)
        before, ran_before = self._first
        if ran != ran_before:
            there, not_there = (view, before) if ran else (before, view)
            raise RouteError(
                f"`model` should run in every view, or in none. Found that it ran {there} and not {not_there}: a cache "
                "that answers for another view follows no ablation. Fix: generate again in each call."
            )


def evaluated(
    model: nn.Module,
    eval_fn: Callable[[nn.Module], Iterable[EvalRecord]],
    views: Iterable[tuple[float, str]],
    all_views: str,
) -> dict[float, list[EvalRecord]]:
    """Scale -> the records of `eval_fn(model)` with the quarantine at that scale, all over the same prompts.

    Args:
        model, eval_fn: see `evaluate_on_off`.
        views: each scale, and what a message calls it.
        all_views: what it calls all of them.

    Raises:
        GradRouteError: anything but records, no records, or other modes, prompt ids or monitored flags in one view than
            in another.
        RouteError: see `Views`.
    """
    measured, found = Views(model), {}
    for scale, view in views:
        with measured.at(scale):
            found[scale] = _checked(eval_fn(model), view)
    prompts = {tuple(sorted((str(r.mode), str(r.prompt_id), str(r.monitored)) for r in rs)) for rs in found.values()}
    if len(prompts) > 1:
        raise GradRouteError(
            f"`eval_fn` should evaluate the same prompts {all_views}. Found different modes, prompt ids or monitored "
            "flags. Fix: draw prompts from a generator with a fixed seed inside `eval_fn`."
        )
    return found


def _checked(returned: Any, view: str) -> list[EvalRecord]:
    records = list(returned) if isinstance(returned, Iterable) else None
    if records == []:
        raise GradRouteError(f"`eval_fn` should return at least one record. Found none {view}.")
    strangers = [returned] if records is None else [each for each in records if not isinstance(each, EvalRecord)]
    if records is None or strangers:
        raise GradRouteError(
            f"`eval_fn` should return a list of EvalRecord objects. Found {type(strangers[0]).__name__}."
        )
    return records


@contextmanager
def _calls(model: nn.Module, layers: Mapping[str, RoutedLinear]) -> Iterator[dict[str, list[RoutedLinear]]]:
    """The modules around all routed layers, and the layers themselves, that are called inside; each with its layers.

    Calls inside of a compiled graph are not seen: it was compiled without the hooks.
    """
    watched = {}
    for name, module in model.named_modules():
        inside = [layer for key, layer in layers.items() if key == name or key.startswith(f"{name}." if name else "")]
        if name in layers or len(inside) == len(layers):
            watched[name] = (module, inside)
    called: dict[str, list[RoutedLinear]] = {}

    def note(name: str, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            called[name] = watched[name][1]

    with ExitStack() as hooks:
        for name, (module, _) in watched.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(note, name)))
        yield called
