"""Which pass the features of rollouts come from, for a gate on directions; said once in the log.

score_view="ablated"    quarantine ablated, as the pairs were measured: a separate forward, without the head
score_view="sampled"    each rollout in the state in which it was sampled
    old log-probabilities     TRL computes them in any case: with an engine, or where rollouts serve several steps
    decoding                  `generate` samples: every completion token but the last
    a separate forward        neither can give them
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from gradroute._hashing import known_identity
from gradroute._logging import logger
from gradroute._sharding import ranks_of
from gradroute.directions import Capture, capture_activations
from gradroute.directions.directions import Directions
from gradroute.integrations.trl._decoding import DecodedFeatures
from gradroute.integrations.trl._scoring import InSampledState, captured_rollouts, is_random, loss_mask

Scored = tuple[Capture | None, Int[Tensor, " scored"]]


class RolloutFeatures:
    """Features of each batch: taken while TRL makes the batch, where that can be, or in a separate forward.

    Args:
        trainer: whose rollouts they are.
        directions: what the gate reads.
        score_view: "sampled" or "ablated".
    """

    def __init__(self, trainer: Any, directions: Directions, score_view: str) -> None:
        self._trainer, self.directions, self._view = trainer, directions, score_view
        self._said: set[str] = set()
        self.begin(None)

    def begin(self, ablated: Bool[Tensor, " rows"] | None) -> None:
        """Forget the batch before.

        Args:
            ablated: which rows of the next one are sampled without the quarantine; None outside of training.
        """
        self._ablated = ablated
        self._decoded: DecodedFeatures | None = None
        self._captured: Capture | None = None
        self._passed_by = "" if ablated is None else self._why_neither()

    @contextmanager
    def while_decoding(self) -> Iterator[None]:
        """Around the call that samples the rollouts."""
        if self._ablated is None or self._passed_by or self._makes_old_logps():
            yield
            return
        root = self._trainer.accelerator.unwrap_model(self._trainer.model)
        modules = list(self.directions.hack)
        ends = getattr(self._trainer, "eos_token_ids", None) or [self._trainer.eos_token_id]
        self._decoded = DecodedFeatures(root.get_base_model(), modules, root, ends)
        with self._decoded.pooled():
            yield

    def while_old_logps(self, run: Callable[..., Any], model: InSampledState, *args: Any, **kwargs: Any) -> Any:
        """`run(model, ...)`; the first time in a batch, where TRL takes old log-probabilities, its features are kept.

        Args:
            run: TRL's log-probabilities: model, ids, attention mask, number of completion tokens.
            model: what is called with chunks of rows.
        """
        trainer = self._trainer
        if self._ablated is None or self._passed_by or self._captured is not None or not self._makes_old_logps():
            return run(model, *args, **kwargs)
        named = dict(zip(("input_ids", "attention_mask", "logits_to_keep"), args, strict=False)) | kwargs
        attended, length = named["attention_mask"], named["logits_to_keep"]
        pool = attended.clone()
        pool[:, :-length] = 0
        pool = torch.where(pool.any(1, keepdim=True), pool, attended)
        of_chunk: dict[int, Tensor] = {}  # one tensor for all layers: it is looked at once
        provenance: Any = self.directions.provenance
        with capture_activations(
            trainer.accelerator.unwrap_model(trainer.model),
            pool=lambda _: of_chunk.setdefault(model.chunk.start, pool[model.chunk]),
            features=provenance.feature,
            reduction=provenance.reduction,
            modules=list(self.directions.hack),
        ) as self._captured:
            return run(model, *args, **kwargs)

    def of(self, rollouts: Mapping[str, Any], ablated: Bool[Tensor, " rows"]) -> Scored:
        """The features as the gate compares them with its directions, and which rows these are.

        Args:
            rollouts: as TRL made them.
            ablated: which of them were sampled without the quarantine.
        """
        if self._view == "ablated":
            self._say("in a separate forward, quarantine ablated")
            return captured_rollouts(self._trainer, rollouts, self.directions, torch.ones_like(ablated))
        capture, rows = self._taken_on_the_way(rollouts)
        if capture is None and self._passed_by:
            self._say(f"in a separate forward, each in the state in which it was sampled: {self._passed_by}")
            capture, rows = captured_rollouts(self._trainer, rollouts, self.directions, ablated)
        return None if capture is None else capture.as_view(self.directions.provenance.view), rows

    def _taken_on_the_way(self, rollouts: Mapping[str, Any]) -> Scored:
        own = loss_mask(rollouts)
        rows = own.any(1).nonzero().squeeze(1)
        if self._captured is not None and self._captured.view in ("on", "scaled by rows"):
            self._say("in the pass of the old log-probabilities")
            if ranks_of(self._trainer.model.parameters()):
                known_identity(self._trainer.model)  # collective, and read with scores, which some ranks may lack
            return (self._captured.take(rows) if len(rows) else None), rows
        if self._decoded is not None:
            found = self._decoded.capture(self.directions.provenance, rollouts["completion_ids"], own)
            if self._decoded.fault is None:
                self._say("while they are decoded, at every completion token but the last")
                return found
            self._passed_by = self._decoded.fault
        elif not self._passed_by:
            self._passed_by = "TRL computed no old log-probabilities of the policy where it was expected to"
        return None, rows

    def _why_neither(self) -> str:
        """Why no pass that is made anyway can give the features; "" where one can."""
        trainer, model, made_by = self._trainer, self._trainer.model, self.directions.provenance
        turns = any(getattr(trainer, each, None) for each in ("tools", "environment_factories"))
        reasons = {
            "it was asked for": self._view == "ablated",
            "tools and environments sample in turns": turns,
            "dropout, or the noise of a router, makes features of a pass in training mode random": is_random(model),
        }
        if self._makes_old_logps():
            why = "TRL counts the padding before a prompt in the positions that this model adds"
            reasons[why] = _adds_positions(model)
        else:
            pooled = made_by.feature == "bottleneck" and made_by.reduction != "last"
            reasons |= {
                "an engine samples, and TRL computes no old log-probabilities": trainer.use_vllm,
                "the model is sharded": bool(ranks_of(model.parameters())),
                f"decoding does not give features of {made_by.feature}, {made_by.reduction}": not pooled,
            }
        return next((why for why, holds in reasons.items() if holds), "")

    def _makes_old_logps(self) -> bool:
        """Whether TRL computes log-probabilities of the rollouts before the loss."""
        trainer = self._trainer
        generate_every = trainer.args.steps_per_generation * trainer.num_iterations
        corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        return bool(trainer.args.gradient_accumulation_steps % generate_every) or corrected

    def _say(self, where: str) -> None:
        if where not in self._said and self._trainer.accelerator.is_main_process:
            self._said.add(where)
            logger.info("Rollouts are scored %s.", where)


def _adds_positions(model: nn.Module) -> bool:
    return any(isinstance(m, nn.Embedding) and re.search(r"wpe|position", n) for n, m in model.named_modules())
