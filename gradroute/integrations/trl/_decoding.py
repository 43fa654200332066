"""Features of rollouts, pooled while `generate` samples them: each in the state in which it is sampled, at no forward.

    f_i = sum_t w_it A_d x_it  (/ sum_t w_it),      w_it = 1 where token t is of completion i and not its last

Each token but the last is the input of a forward, which makes the next one. What a layer computes of it anyway, A_d x,
is kept for some tokens of all rows and then summed, so that a token costs a layer one entry of a list.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from gradroute._protocol import routed_layers
from gradroute._sharding import wide
from gradroute._step_hooks import LocalHook
from gradroute.directions import Capture, Provenance

_KEPT_TOKENS = 32


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
    ) -> tuple[Capture | None, Int[Tensor, " scored"]]:
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
