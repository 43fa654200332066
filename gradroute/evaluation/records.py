"""Records of an evaluation: one `EvalRecord` per rollout, over the same prompts in every view."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradroute.errors import GradRouteError
from gradroute.evaluation._views import Views


@dataclass(frozen=True)
class EvalRecord:
    """One evaluated rollout.

    Args:
        mode: the exploit its prompt allows, or a name for prompts that allow none.
        monitored: whether the detector knows that exploit; None where the prompt has no loophole.
        prompt_id: the same in both views of one prompt, and in all arms that are compared prompt by prompt.
        hacked, solved: what the rollout did.
    """

    mode: str
    monitored: bool | None
    prompt_id: int | str
    hacked: bool
    solved: bool


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
    records = list(returned) if isinstance(returned, Iterable) else [returned]
    if not records:
        raise GradRouteError(f"`eval_fn` should return at least one record. Found none {view}.")
    for record in records:
        if not isinstance(record, EvalRecord):
            raise GradRouteError(f"`eval_fn` should return EvalRecord objects. Found {type(record).__name__}.")
    return records
