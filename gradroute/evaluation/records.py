"""Records of an evaluation: one `EvalRecord` per rollout, over the same prompts in every view."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gradroute.errors import GradRouteError


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


def checked_records(returned: object, view: str) -> list[EvalRecord]:
    """What `eval_fn` returned in one view, if it is one record or more.

    Raises:
        GradRouteError: anything else; `view` says where.
    """
    if not isinstance(returned, Iterable):
        raise GradRouteError(f"`eval_fn` should return EvalRecord objects. Found {type(returned).__name__}.")
    records = list(returned)
    if not records:
        raise GradRouteError(f"`eval_fn` should return at least one record. Found none {view}.")
    for record in records:
        if not isinstance(record, EvalRecord):
            raise GradRouteError(f"`eval_fn` should return EvalRecord objects. Found {type(record).__name__}.")
    return records


def check_same_prompts(by_view: Iterable[Sequence[EvalRecord]], views: str) -> None:
    """Raise unless all views have the same modes, prompt ids and monitored flags, each as often."""
    prompts = {tuple(sorted((str(r.mode), str(r.prompt_id), str(r.monitored)) for r in rs)) for rs in by_view}
    if len(prompts) > 1:
        raise GradRouteError(
            f"`eval_fn` should evaluate the same prompts {views}. Found different modes, prompt ids or monitored "
            "flags. Fix: draw prompts from a generator with a fixed seed inside `eval_fn`."
        )
