"""From finished rollouts to their masks: scores, the detector's flags, the gate, and the two advantages."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import gather_object
from jaxtyping import Bool, Float
from torch import Tensor
from trl.models.utils import disable_gradient_checkpointing

from gradroute.adapters.mask import RouteMask
from gradroute.errors import GradRouteError
from gradroute.gates.band import BandGate
from gradroute.integrations.trl._rollouts import (
    CLEAN,
    LOSS_TYPES,
    SPLIT,
    as_sampled,
    clean_advantages,
    two_advantages,
    with_flags,
)
from gradroute.integrations.trl._scoring import captured_rollouts
from gradroute.integrations.trl.options import RoutingOptions


@dataclass(frozen=True)
class Routed:
    """The mask of a batch of rollouts, what else goes into their dictionary, and figures for the log."""

    mask: RouteMask
    gated: RouteMask
    scores: Float[Tensor, " rows"] | None
    entries: dict[str, Tensor]
    figures: dict[str, float] = field(default_factory=dict)


class Flagging:
    """Collects what is known of a batch while TRL makes it (rewards, the detector's answers), and then routes it."""

    def __init__(self, trainer: Any, options: RoutingOptions) -> None:
        self._trainer, self._options = trainer, options
        if options.clean_baseline:
            check_two_advantages(trainer)
        self.begin()

    @property
    def may_split(self) -> bool:
        """Whether rows may have to be run twice, once for each block."""
        return self._options.clean_baseline

    def begin(self) -> None:
        """Forget the batch before."""
        self._rewards: Tensor | None = None
        self._detected: Tensor | None = None

    def see_rewards(self, rewards_per_function: Tensor) -> None:
        """Of all processes, (rows, functions), in the order in which groups lie together."""
        weights = self._trainer.reward_weights.to(rewards_per_function.device)
        rewards = (rewards_per_function * weights).nansum(1)
        self._rewards = rewards.masked_fill(rewards_per_function.isnan().all(1), torch.nan)

    def detect(self, inputs: Sequence[Any], prompts: Any, completions: Any, completion_ids: Any) -> float | None:
        """Ask the detector, with what a reward function is given; returns the share of flags, or the mean score."""
        detector, trainer = self._options.detector, self._trainer
        if detector is None:
            return None
        columns = {key: [row[key] for row in inputs] for key in inputs[0]}
        for key in ("prompt", "completion", "completion_ids"):
            columns.pop(key, None)
        known: dict[str, Any] = {"trainer_state": trainer.state, "environments": getattr(trainer, "environments", None)}
        for name, method in (("log_extra", "_log_completion_extra"), ("log_metric", "_log_metric")):
            if hasattr(trainer, method):
                known[name] = getattr(trainer, method)
        answers = detector(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns, **known)
        if inspect.isawaitable(answers):
            raise GradRouteError("`detector` should return a list. Found something to await. Fix: a plain function.")
        self._detected = _as_tensor(list(answers), len(prompts), scores=self._options.detector_scores)
        self._detected = self._detected.to(trainer.accelerator.device)
        return float(trainer.accelerator.gather(self._detected.float()).mean())

    def route(self, rollouts: dict[str, Any], ablated: Bool[Tensor, " rows"]) -> Routed:
        """The mask of these rollouts, and their advantages in place."""
        trainer, options = self._trainer, self._options
        device = rollouts["advantages"].device
        mask, scores = self._gated(rollouts)
        gated = RouteMask.weights(mask.m.to(device), mask.g_d.to(device), mask.g_q.to(device))
        mask = as_sampled(gated, ablated)
        entries: dict[str, Tensor] = {}
        ablated = ablated.to(device)
        moved = (mask.m != (~ablated).to(mask.m)).any()
        if "old_per_token_logps" not in rollouts and bool(trainer.accelerator.gather(moved).any()):
            entries["old_per_token_logps"] = old_logps(trainer, rollouts)
        if options.clean_baseline:
            flagged = trainer.accelerator.gather(gated.routed)
            full = trainer.accelerator.gather(rollouts["advantages"])
            if self._rewards is None:
                raise GradRouteError("`clean_baseline` should see the rewards. Found none: they were not calculated.")
            clean = clean_advantages(self._rewards, flagged, full, trainer.num_generations)
            first = trainer.accelerator.process_index * len(ablated)
            has_ratio = "old_per_token_logps" in {**rollouts, **entries}
            two = two_advantages(
                mask,
                rollouts["advantages"],
                clean[first : first + len(ablated)].to(rollouts["advantages"]),
                one_term=trainer.beta == 0,
                ratio_is_one=not has_ratio,
            )
            mask = two.mask
            entries |= {"advantages": two.advantages, SPLIT: two.split}
            entries[CLEAN] = clean[first : first + len(ablated)].to(rollouts["advantages"])
        return Routed(mask, gated, scores, entries, self._figures(gated, ablated, scores))

    def _gated(self, rollouts: dict[str, Any]) -> tuple[RouteMask, Tensor | None]:
        options, rows = self._options, len(rollouts["prompt_ids"])
        gate: Any = options.gate
        everything = RouteMask.zones(torch.ones(rows, dtype=torch.long))
        if gate is None:
            return everything, None
        if gate.reads == "flags" or options.detector_scores:
            assert self._detected is not None
            return gate(self._detected), self._detected if options.detector_scores else None
        directions = gate.directions or options.directions
        assert directions is not None
        capture, scored = captured_rollouts(self._trainer, rollouts, directions)
        found = directions.score(capture)
        mask = gate(capture) if gate.reads == "features" else gate(found)
        mask = _spread(mask, scored, everything)
        scores = found.new_full((rows,), torch.nan).index_copy(0, scored, found)
        if self._detected is not None:
            mask = with_flags(mask, self._detected)
        return mask, scores

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
        if scores is not None:
            every = gather(scores.float())
            every = every[~every.isnan()]
            figures["routing/score"] = float(every.mean())
            if isinstance(self._options.gate, BandGate):
                figures["routing/z"] = float(self._options.gate.z(every).mean())
        return figures

    @staticmethod
    def gathered_list(values: list[Any]) -> list[Any]:
        """The values of all processes, in order."""
        gathered: list[Any] = gather_object(values)
        return gathered


def old_logps(trainer: Any, rollouts: dict[str, Any]) -> Tensor:
    """Log-probabilities in the state in which each row was sampled, where TRL would take them from the loss's forward.

    That forward runs under the mask: a kept row (m = 0) that was sampled with its quarantine is off policy in it.
    """
    ids = torch.cat([rollouts["prompt_ids"], rollouts["completion_ids"]], dim=1)
    attended = torch.cat([rollouts["prompt_mask"], rollouts["completion_mask"]], dim=1)
    with torch.no_grad(), disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        logps: Tensor = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            ids,
            attended,
            rollouts["completion_ids"].shape[1],
            batch_size=trainer.args.per_device_train_batch_size,
        )[0]
    return logps


def rollout_table(
    rows: int, view: str, made: Routed | None = None, ablated: Tensor | None = None
) -> dict[str, list[Any]]:
    """Columns for TRL's table of completions; the same ones in training and in evaluation, as a table has to have."""
    if made is None or ablated is None:
        return {"view": [view] * rows, "zone": [""] * rows, "score": [None] * rows}
    mask = made.gated
    zones = ["route" if r else "keep" if m == 0 else "absorb" for r, m in zip(mask.routed, mask.m, strict=True)]
    scores = [None] * rows if made.scores is None else made.scores.tolist()
    return {"view": ["ablated" if off else view for off in ablated.tolist()], "zone": zones, "score": scores}


def check_two_advantages(trainer: Any) -> None:
    """Refuse losses that cannot be taken apart by block.

    Raises:
        GradRouteError: an entropy bonus, an auxiliary loss, or a type of loss that is not known here.
    """
    refused = {
        "an entropy bonus": getattr(trainer, "_entropy_bonus_enabled", False),
        "a router's auxiliary loss": getattr(trainer, "aux_loss_enabled", False),
        f"loss_type={trainer.loss_type!r}": trainer.loss_type not in LOSS_TYPES,
    }
    found = [name for name, is_on in refused.items() if is_on]
    if found:
        raise GradRouteError(
            "`clean_baseline` trains the two blocks on two advantages, which is not worked out for "
            f"{', '.join(found)}. Fix: leave that out, or clean_baseline=False."
        )


def _spread(mask: RouteMask, scored: Tensor, everything: RouteMask) -> RouteMask:
    if len(mask) == len(everything):
        return mask
    whole = [getattr(everything, name).to(scored.device) for name in ("m", "g_d", "g_q")]
    parts = [getattr(mask, name).to(scored.device) for name in ("m", "g_d", "g_q")]
    return RouteMask(*(w.to(p).index_copy(0, scored, p) for w, p in zip(whole, parts, strict=True)))


def _as_tensor(answers: list[Any], rows: int, *, scores: bool) -> Tensor:
    if len(answers) != rows:
        raise GradRouteError(f"`detector` should return {rows} values, one per completion. Found {len(answers)}.")
    if scores:
        if not all(isinstance(each, int | float) for each in answers):
            raise GradRouteError(f"`detector` should return scores for the ThresholdGate. Found {answers[:5]}.")
        return torch.tensor(answers, dtype=torch.float32)
    if not all(isinstance(each, bool | int | float) and each in (0, 1) for each in answers):
        raise GradRouteError(
            f"`detector` should return flags: True, False, 1 or 0. Found {answers[:5]}. Fix: compare with a threshold, "
            "or gate=ThresholdGate(...)."
        )
    return torch.tensor([bool(each) for each in answers])
