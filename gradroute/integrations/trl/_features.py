"""Which pass the features of rollouts come from, for a gate on directions; said once in the log.

score_view="ablated"    quarantine ablated, as the pairs were measured: a separate forward, without the head
score_view="sampled"    each rollout in the state in which it was sampled
    old log-probabilities     TRL computes them in any case: with an engine, or where rollouts serve several steps
    decoding                  `generate` samples: every completion token but the last
    a separate forward        neither can give them

Features that are pooled while `generate` samples:

    f_i = sum_t w_it A_d x_it  (/ sum_t w_it),      w_it = 1 where token t is of completion i and not its last

Each token but the last is the input of a forward, which makes the next one. What a layer computes of it anyway, A_d x,
is kept for some tokens of all rows and then summed, so that a token costs a layer one entry of a list.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from gradroute._hashing import known_identity
from gradroute._logging import logger
from gradroute._protocol import routed_layers
from gradroute._sharding import ranks_of, wide
from gradroute._step_hooks import LocalHook
from gradroute.directions import Capture
from gradroute.directions.directions import Directions
from gradroute.directions.features import Provenance
from gradroute.integrations._rollouts import captured_for
from gradroute.integrations.trl._scoring import InSampledState, captured_rollouts, is_random, loss_mask

_KEPT_TOKENS = 32

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
        with captured_for(
            self.directions,
            trainer.accelerator.unwrap_model(trainer.model),
            lambda _: of_chunk.setdefault(model.chunk.start, pool[model.chunk]),
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
            named = model.named_modules()
            reasons[why] = any(isinstance(m, nn.Embedding) and re.search(r"wpe|position", n) for n, m in named)
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


class DecodedFeatures:
    """The sums of one call of `generate`.

    Args:
        model: the language model whose forward `generate` calls, with its head.
        modules: names of the routed layers in `root`.
        root: the model that these names are of.
        ends: tokens that end a completion.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str], root: nn.Module, ends: Sequence[int]) -> None:
        layers = routed_layers(root)
        self._model, self._root = model, root
        self._layers: dict[str, Any] = {name: layers[name] for name in modules}
        self._ranks = {name: layer.deployed.A.shape[0] for name, layer in self._layers.items()}
        self._ending = list(ends)
        self._weights: list[Bool[Tensor, " rows"]] = []
        self._tokens: list[Int[Tensor, " rows"]] = []
        self._running: Bool[Tensor, " rows"] | None = None
        self._ends = torch.empty(0)
        self._sums: dict[str, Tensor] = {}
        self._counts: Tensor | None = None
        self.view: str = "on"
        self.fault: str | None = None

    @contextmanager
    def pooled(self) -> Iterator[None]:
        """Around the call of `generate`."""
        handle = self._model.register_forward_pre_hook(LocalHook(self._before), with_kwargs=True)
        try:
            yield
            self._add()
        finally:
            handle.remove()
            self._keep(False)

    def capture(
        self, provenance: Provenance, ids: Int[Tensor, "rows tokens"], own: Int[Tensor, "rows tokens"]
    ) -> Scored:
        """The features of rows with two tokens and more, and which rows these are; sets `fault` if they do not fit.

        Args:
            provenance: of the directions; says whether features are sums or means.
            ids: the completions that are trained on, padded on the right.
            own: which of these tokens count; none of a completion that TRL has masked.
        """
        lengths = own.sum(1)
        counts = torch.zeros_like(lengths) if self._counts is None else self._counts
        if self.fault is None and not self._decoded(ids, own, counts):
            self.fault = "the tokens that were decoded are not those of the completions"
        rows = (lengths > 1).nonzero().squeeze(1)
        if self.fault is not None or not len(rows):
            return None, rows
        settings: Any = (provenance.source, provenance.feature, provenance.reduction)
        capture = Capture(self._root, settings, list(self._layers))
        for name, sums in self._sums.items():
            chosen = sums[rows]
            per_row = counts[rows, None].to(chosen) if provenance.reduction == "mean" else 1.0
            capture.fill(name, capture.open_slot(name, self.view), chosen / per_row)
        capture.finish()
        return capture, rows

    def _decoded(self, ids: Tensor, own: Tensor, counts: Tensor) -> bool:
        """Whether the tokens that were decoded are those of the completions, each but its last."""
        lengths = own.sum(1)
        if counts.shape != lengths.shape or bool((counts != lengths - 1)[lengths > 0].any()):
            return False
        steps = int((lengths - 1).clamp(min=0).max())
        read = own[:, 1 : steps + 1].bool()
        tokens = torch.stack(self._tokens[:steps], dim=1) if steps else ids[:, :0]
        return bool((tokens == ids[:, :steps])[read].all())

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor):
            self._stop("`generate` gave embeddings to the model, and no tokens")
        elif self._running is None:
            # The prompts. What comes next are tokens of the completions.
            self._running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
            self._ends = torch.tensor(self._ending, device=ids.device)
        elif ids.shape[1] != 1:
            self._stop("`generate` ran several tokens of a completion in one forward")
        elif self.fault is None:
            if len(self._weights) == _KEPT_TOKENS:
                self._add()
            if not self._weights:
                self._keep(True)
                self.view = next(iter(self._layers.values())).view
            self._tokens.append(ids[:, 0])
            self._running = self._running & ~torch.isin(ids[:, 0], self._ends)
            self._weights.append(self._running)

    def _keep(self, on: bool) -> None:
        for layer in self._layers.values():
            layer.bottlenecks = [] if on else None

    def _stop(self, fault: str) -> None:
        self.fault = fault
        self._keep(False)

    def _add(self) -> None:
        """Sum what was kept."""
        if not self._weights or self.fault is not None:
            return
        weights = torch.stack(self._weights)
        unread = ~weights.unsqueeze(2)
        for name, layer in self._layers.items():
            kept: list[Tensor] = layer.bottlenecks
            if len(kept) != len(weights) or kept[0].shape[:1] != weights.shape[1:]:
                self._stop(f"`{name}` did not run once for every token, or is compiled")
                return
            # A token that is not read does not count, also where it is not finite.
            r = self._ranks[name]
            found = wide(torch.stack(kept)[..., :r]).masked_fill(unread, 0).sum(0)
            self._sums[name] = self._sums[name] + found if name in self._sums else found
        counts = weights.sum(0)
        self._counts = counts if self._counts is None else self._counts + counts
        self._weights = []
