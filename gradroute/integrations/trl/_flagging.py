"""From finished rollouts to their masks: scores, the detector's answers, the gate, and the two advantages.

    gate on flags, or on scores without directions      mask = gate(the detector's answers)
    gate on directions                                  mask = gate(scores), or gate(features)
    and a detector                                      flagged rows are routed whatever the gate says
    and a gate on log ratios                            mask | its mask

A row that nothing is known of (no completion token to score, a detector that is undecided) is absorbed.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradroute._logging import warn
from gradroute.adapters.mask import RouteMask
from gradroute.errors import GradRouteError
from gradroute.integrations._rollouts import gated_rows
from gradroute.integrations.trl._features import RolloutFeatures
from gradroute.integrations.trl._log_ratios import LogRatios
from gradroute.integrations.trl._micro_batch import (
    CLEAN,
    LOG_RATIO,
    SPLIT,
    check_two_advantages,
    clean_advantages,
    two_advantages,
)
from gradroute.integrations.trl._scoring import InSampledState, old_logps
from gradroute.integrations.trl.routing import Routing


@dataclass(frozen=True)
class Routed:
    """The mask of a batch of rollouts, and what it was made from.

    Args:
        mask: of the loss; its weights may carry advantages.
        gated: the mask from the gates.
        scores: NaN where a row has none; None where nothing scores.
        entries: more entries of the dictionary of rollouts.
        figures: for the log.
    """

    mask: RouteMask
    gated: RouteMask
    scores: Float[Tensor, " rows"] | None
    entries: dict[str, Tensor]
    figures: dict[str, float]


class Flagging:
    """Collects what is known of a batch while TRL makes it (rewards, the detector's answers), and then routes it."""

    def __init__(self, trainer: Any, routing: Routing) -> None:
        self._trainer, self._routing = trainer, routing
        self._ask = None if routing.detector is None else DetectorCall(routing.detector, scores=routing.detector_scores)
        self._features = None
        if routing.reads_features:
            directions = getattr(routing.gate, "directions", None) or routing.directions
            assert directions is not None
            self._features = RolloutFeatures(trainer, directions, routing.score_view)
        self.log_ratios = None if routing.log_ratio_gate is None else LogRatios(trainer, routing.log_ratio_gate)
        self._warned = False
        if routing.clean_baseline:
            check_two_advantages(trainer)
        self.begin(None)

    def begin(self, ablated: Bool[Tensor, " rows"] | None) -> None:
        """Forget the batch before.

        Args:
            ablated: which rows of the next one are sampled without the quarantine; None where they do not train.
        """
        self._rewards: Tensor | None = None
        self._detected: Tensor | None = None
        if self._features is not None:
            self._features.begin(ablated)

    def while_decoding(self) -> AbstractContextManager[None]:
        """Around the call that samples the rollouts."""
        return nullcontext() if self._features is None else self._features.while_decoding()

    def while_old_logps(self, run: Callable[..., Any], model: InSampledState, *args: Any, **kwargs: Any) -> Any:
        """`run(model, ...)`, TRL's log-probabilities of the rollouts."""
        features = self._features
        return (
            run(model, *args, **kwargs) if features is None else features.while_old_logps(run, model, *args, **kwargs)
        )

    def see_rewards(self, rewards_per_function: Float[Tensor, "rows functions"]) -> None:
        """Of all processes, in the order in which groups lie together; NaN where a function returned None."""
        weights = self._trainer.reward_weights.to(rewards_per_function.device)
        rewards = (rewards_per_function * weights).nansum(1)
        self._rewards = rewards.masked_fill(rewards_per_function.isnan().all(1), torch.nan)

    def detect(self, inputs: Sequence[Any], prompts: Any, completions: Any, completion_ids: Any) -> float | None:
        """Ask the detector; returns the share of flags, or the mean score, over all rows that it decided on."""
        if self._ask is None:
            return None
        self._detected = self._ask(self._trainer, inputs, prompts, completions, completion_ids)
        every = self._trainer.accelerator.gather(self._detected)
        known = every[~every.isnan()]
        return float(known.mean()) if len(known) else None

    def route(self, rollouts: dict[str, Any], ablated: Bool[Tensor, " rows"]) -> Routed:
        """The mask of these rollouts, and what goes into their dictionary.

        Args:
            rollouts: as TRL made them.
            ablated: which of them were sampled without the quarantine.
        """
        trainer = self._trainer
        device = rollouts["advantages"].device
        gated, scores = self._gated(rollouts, ablated)
        gated = RouteMask.weights(gated.m.to(device), gated.g_d.to(device), gated.g_q.to(device))
        ablated = ablated.to(device)
        entries: dict[str, Tensor] = {}
        figures: dict[str, float] = {}
        sampled = None
        if self.log_ratios is not None:
            explained = self.log_ratios(rollouts, ablated)
            gated, sampled, figures = gated | explained.mask, explained.sampled, explained.figures
            entries[LOG_RATIO] = explained.scores
        mask = as_sampled(gated, ablated)
        moved = (mask.m != (~ablated).to(mask.m)).any()
        if "old_per_token_logps" not in rollouts and bool(trainer.accelerator.gather(moved).any()):
            entries["old_per_token_logps"] = old_logps(trainer, rollouts) if sampled is None else sampled
        if self._routing.clean_baseline:
            full = rollouts["advantages"]
            clean = self._clean_advantages(gated.routed, full)
            ratio_is_one = "old_per_token_logps" not in rollouts.keys() | entries.keys()
            two = two_advantages(mask, full, clean, one_term=trainer.beta == 0, ratio_is_one=ratio_is_one)
            mask = two.mask
            entries |= {"advantages": two.advantages, SPLIT: two.split, CLEAN: clean}
        return Routed(mask, gated, scores, entries, figures | self._figures(gated, ablated, scores))

    def _gated(self, rollouts: dict[str, Any], ablated: Bool[Tensor, " rows"]) -> tuple[RouteMask, Tensor | None]:
        gate: Any = self._routing.gate
        rows = len(rollouts["prompt_ids"])
        if gate is None:
            return RouteMask.zones(torch.ones(rows, dtype=torch.long)), None
        if self._routing.detector_decides:
            assert self._detected is not None
            decided = (~self._detected.isnan()).nonzero().squeeze(1)
            answers = self._detected[decided]
            if self._routing.detector_scores:
                return gated_rows(rows, decided, lambda: gate(answers)), self._detected
            return gated_rows(rows, decided, lambda: gate(answers.bool())), None
        assert self._features is not None
        directions = self._features.directions
        capture, scored = self._features.of(rollouts, ablated)
        scores = torch.full((rows,), torch.nan, device=scored.device)
        if capture is not None:
            found = directions.score(capture)
            scores = scores.to(found).index_copy(0, scored, found)
        mask = gated_rows(rows, scored, lambda: gate(capture if gate.reads == "features" else found))
        if self._detected is not None:
            mask = with_flags(mask, self._detected == 1)
        return mask, scores

    def _clean_advantages(self, flagged: Bool[Tensor, " rows"], full: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        accelerator = self._trainer.accelerator
        if self._rewards is None:
            raise GradRouteError("`clean_baseline` should see the rewards. Found none: they were not calculated.")
        flags, all_full = accelerator.gather(flagged), accelerator.gather(full)
        clean = clean_advantages(self._rewards, flags, all_full, self._trainer.num_generations)
        first = accelerator.process_index * len(full)
        return clean[first : first + len(full)].to(full)

    def _figures(self, gated: RouteMask, ablated: Tensor, scores: Tensor | None) -> dict[str, float]:
        off = gated.m == 0
        shares = {
            "routing/flag_rate": gated.routed,
            "routing/keep": off,
            "routing/absorb": ~off & (gated.g_d != 0),
            "routing/ablated": ablated,
        }
        gather = self._trainer.accelerator.gather
        figures = {name: float(gather(rows.float()).mean()) for name, rows in shares.items()}
        if scores is None:
            return figures
        every = gather(scores.float())
        every = every[~every.isnan()]
        if len(every):
            figures["routing/score"] = float(every.mean())
            z = getattr(self._routing.gate, "z", None)
            if z is not None:
                figures["routing/z"] = float(z(every).mean())
        elif not self._warned and self._trainer.accelerator.is_main_process:
            self._warned = True
            warn(
                "No rollout of a whole batch has a score, so that all of them absorb: each completion was truncated, "
                "and mask_truncated_completions hides it; or each has one token, and scores are taken while decoding; "
                "or the detector was undecided. Said once. Fix, if it goes on: a larger max_completion_length."
            )
        return figures


def sampled_ablated(rows: int, first: int, group_size: int, share: int) -> Bool[Tensor, " rows"]:
    """The first `share` rollouts of each group; `first` is the place of this process's first row among all rows."""
    return (first + torch.arange(rows)) % group_size < share


def as_sampled(mask: RouteMask, ablated: Bool[Tensor, " rows"]) -> RouteMask:
    """`mask`, in which rows that were sampled without the quarantine stay without it, and do not train it."""
    off = ablated.to(mask.m.device)
    return RouteMask.weights(mask.m.masked_fill(off, 0.0), mask.g_d, mask.g_q.masked_fill(off, 0.0))


def with_flags(mask: RouteMask, flags: Bool[Tensor, " rows"]) -> RouteMask:
    """`mask`, with flagged rows in the route zone whatever they were in."""
    on = flags.to(mask.m.device)
    return RouteMask.weights(mask.m.masked_fill(on, 1.0), mask.g_d.masked_fill(on, 0.0), mask.g_q.masked_fill(on, 1.0))


class DetectorCall:
    """Calls `detector` with what TRL gives to a reward function.

    Args:
        detector: a function, or an async one, that returns a flag or a score per completion, or None for undecided.
        scores: whether it returns scores.
    """

    def __init__(self, detector: Any, *, scores: bool) -> None:
        self._detector, self._scores = detector, scores
        self._loop: Any = None

    def __call__(
        self, trainer: Any, inputs: Sequence[Any], prompts: Any, completions: Any, completion_ids: Any
    ) -> Float[Tensor, " rows"]:
        """Flags as 1 and 0, or scores; NaN where the detector returned None."""
        columns = {key: [row[key] for row in inputs] for key in inputs[0]}
        for key in ("prompt", "completion", "completion_ids"):
            columns.pop(key, None)
        known: dict[str, Any] = {"trainer_state": trainer.state, "environments": getattr(trainer, "environments", None)}
        for name, method in (("log_extra", "_log_completion_extra"), ("log_metric", "_log_metric")):
            if hasattr(trainer, method):
                known[name] = getattr(trainer, method)
        answers = self._detector(
            prompts=prompts, completions=completions, completion_ids=completion_ids, **columns, **known
        )
        if inspect.isawaitable(answers):
            answers = asyncio.run_coroutine_threadsafe(_awaited(answers), self._event_loop(trainer)).result()
        return _as_tensor(answers, len(prompts), scores=self._scores).to(trainer.accelerator.device)

    def _event_loop(self, trainer: Any) -> Any:
        # One loop for all calls, as TRL has for reward functions: a client that a detector keeps belongs to its loop.
        loop = getattr(trainer, "async_loop", None) or self._loop
        if loop is None:
            loop = self._loop = asyncio.new_event_loop()
            Thread(target=loop.run_forever, name="gradroute-detector", daemon=True).start()
        return loop


async def _awaited(answers: Any) -> Any:
    return await answers


def _as_tensor(answers: Any, rows: int, *, scores: bool) -> Float[Tensor, " rows"]:
    if not isinstance(answers, Iterable):
        raise GradRouteError(f"`detector` should return a value per completion. Found {type(answers).__name__}.")
    values = [_as_number(each) for each in answers]
    if len(values) != rows:
        raise GradRouteError(f"`detector` should return {rows} values, one per completion. Found {len(values)}.")
    decided = [each for each in values if each is not None]
    shown = f"Found {values[:5]}."
    if scores:
        if not all(isinstance(each, int | float) and math.isfinite(each) for each in decided):
            raise GradRouteError(
                f"`detector` should return finite scores, or None for undecided, for a gate on scores. {shown}"
            )
    elif not all(isinstance(each, bool | int | float) and each in (0, 1) for each in decided):
        raise GradRouteError(
            f"`detector` should return flags: True, False, 1 or 0, or None for undecided. {shown} Fix: compare with a "
            "threshold, or gate=ThresholdGate(...)."
        )
    return torch.tensor([math.nan if each is None else float(each) for each in values])


def _as_number(answer: Any) -> Any:
    """numpy's and torch's scalars as Python's."""
    return answer.item() if hasattr(answer, "item") and getattr(answer, "ndim", 0) == 0 else answer
