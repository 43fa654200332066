"""The deployed gradient split into what is kept and what is removed, over the micro-batches of one optimizer step.

    kept = sum_i (1 - share_i) G_i,    removed = sum_i share_i G_i,    kept + removed = p.grad

Both sums are formed from the rollouts themselves: with every share 1, `kept` is exactly zero and no residue of a
subtraction, which Adam would scale up to a full step. That they add up to the gradient which backward left is
checked; it is how a rollout that was not recorded, or a gradient clipped since, is found.
"""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gradroute._protocol import RoutedLayer
from gradroute._sharding import as_blocks, as_row, full_gradient, is_sharded
from gradroute._transfers import read_together
from gradroute.directions.estimators.base import unit
from gradroute.errors import GradRouteError
from gradroute.filters._recorder import LayerPass
from gradroute.filters.base import FilteredGradients
from gradroute.filters.stats import FilterStats, SquaredNorms, shares, squared_norms

_ONE = "all"


class _Parts:
    """Sums over the rollouts of one source in one module: kept and removed gradients and features."""

    def __init__(self) -> None:
        self.sums: dict[str, list[Tensor]] = {}

    def add(self, part: str, tensors: Sequence[Tensor]) -> None:
        before = self.sums.get(part)
        self.sums[part] = list(tensors) if before is None else [a + b for a, b in zip(before, tensors, strict=True)]

    def mean_over_ranks(self) -> "_Parts":
        mean = _Parts()
        for part, tensors in self.sums.items():
            mean.sums[part] = _mean_over_ranks(tensors)
        return mean

    def row(self, part: str) -> Float[Tensor, " d"]:
        return as_row(self.sums[part])


class KeptRollouts:
    """Sums over rollouts since the last application.

    Args:
        vectors: the directions that cin and cout are measured on, by module.
        measured: the modules whose directions an estimator has not dropped.
        labelled: whether rollouts have labels.
    """

    def __init__(
        self, vectors: Mapping[str, Float[Tensor, " _"]], measured: Collection[str], *, labelled: bool
    ) -> None:
        self.vectors, self.labelled = vectors, labelled
        self._measured = frozenset(measured)
        self.kept_bytes = 0
        self._parts: dict[str, dict[str, _Parts]] = {}
        self._shares: dict[str, list[Tensor]] = {}
        self._sizes: dict[str, Tensor] = {}
        self._eps = 0.0
        self._written: Any = WeakTensorKeyDictionary()

    def add(
        self,
        layers: Mapping[str, RoutedLayer],
        passes: Mapping[str, Sequence[LayerPass]],
        removed: Float[Tensor, " rows"],
        labels: Sequence[str] | None,
        kept_bytes: int,
    ) -> None:
        """Add the rollouts of one `record`, of which the shares `removed` are to go."""
        if set(layers) != set(self.vectors) or self.labelled is not (labels is not None):
            raise GradRouteError(
                "The micro-batches of one step should run on one model, all with or all without `sources`. "
                "Fix: apply_filter before the next step's first `record`."
            )
        self.kept_bytes = max(self.kept_bytes, kept_bytes)
        counts = [len(layer_pass.dots) for layer_pass in next(iter(passes.values()))]  # the same in all layers
        shares_found = removed.tolist()
        for source in dict.fromkeys(labels or [_ONE]):
            mine = [i for i in range(len(removed)) if labels is None or labels[i] == source]
            self._shares.setdefault(source, []).append(removed[torch.tensor(mine, device=removed.device)])
            for part, share in (("kept", 1 - removed), ("removed", removed)):
                # Rows of weight zero are not multiplied; which these are is known for all layers.
                rows = [i for i in mine if (1 - shares_found[i] if part == "kept" else shares_found[i])]
                chosen = _Chosen.of_forwards(share, rows, counts)
                for name, of_layer in passes.items():
                    parts = self._parts.setdefault(source, {}).setdefault(name, _Parts())
                    for layer_pass, each in zip(of_layer, chosen, strict=True):
                        weights, index = each.on(layer_pass.dots.device)
                        parts.add(part, [matrices.weighted_sum(weights, index) for matrices in layer_pass.gradients])
                        if layer_pass.features is not None:
                            f = layer_pass.features[index]
                            parts.add(f"{part} features", [weights.to(f) @ f])
        for name, of_layer in passes.items():
            size = torch.stack([each.gradient_squares.sqrt().sum() for each in of_layer]).sum()
            self._sizes[name] = self._sizes[name] + size if name in self._sizes else size
            self._eps = max(self._eps, *(each.eps for each in of_layer))
        for name, parameter in _deployed(layers):
            full_gradient(name, parameter)
            self._written[parameter.grad] = parameter.grad._version  # type: ignore[union-attr]

    def belongs_to_dropped_gradients(self, layers: Mapping[str, RoutedLayer]) -> bool:
        """Whether the gradients that these rollouts made are gone: a step was skipped and zero_grad called."""
        gradients = [parameter.grad for _, parameter in _deployed(layers)]
        return not any(read_together(gradient.any() for gradient in gradients if gradient is not None))

    def filtered(self, layers: Mapping[str, RoutedLayer]) -> FilteredGradients:
        """The kept sums, checked to be a part of the gradients that are there."""
        if set(layers) != set(self.vectors):
            raise GradRouteError("`model` should be the one whose rollouts were recorded. Found other layers.")
        for name, parameter in _deployed(layers):
            gradient: Any = parameter.grad
            if gradient is not None and self._written.get(gradient) != gradient._version:
                raise GradRouteError(
                    f"The gradient of `{name}` has been written to since its rollouts were recorded (clipped, scaled, "
                    "or by a backward outside of `record`). Fix: apply_filter right after the last `record`, then clip."
                )
        writes: list[tuple[nn.Parameter, Tensor]] = []
        norms: dict[str, SquaredNorms] = {}
        fired = torch.cat([share for of_source in self._shares.values() for share in of_source]).mean()
        missing: dict[str, Tensor] = {}
        for name, layer in layers.items():
            totals = _total([modules[name] for modules in self._parts.values()]).mean_over_ranks()
            parameters = list(layer.block_parameters("deployed"))
            gradient = as_row([full_gradient(name, parameter) for parameter in parameters])
            residual = gradient - totals.row("kept") - totals.row("removed")
            missing[name] = self._beyond_rounding(name, residual, parameters)
            writes += zip(parameters, totals.sums["kept"], strict=True)
            norms[name] = self._norms(name, totals, fired)._replace(
                residual=residual.square().sum(), whole=gradient.square().sum()
            )
        _check_complete(missing)
        pooled, modules = shares(norms)
        sources = {}
        if self.labelled:
            for source, parts in self._parts.items():
                of_source = torch.cat(self._shares[source]).mean()
                sources[source] = shares({name: self._norms(name, parts[name], of_source) for name in layers})[0]
        return FilteredGradients(writes, FilterStats("one", pooled, modules, sources, self.kept_bytes))

    def _norms(self, name: str, parts: _Parts, fired: Tensor) -> SquaredNorms:
        suffix = " features" if "kept features" in parts.sums else ""
        kept, removed = parts.row(f"kept{suffix}"), parts.row(f"removed{suffix}")
        V = self.vectors[name].to(kept)[None]
        V = unit(V) if name in self._measured else V[:0]
        return squared_norms(kept + removed, kept, removed, V, sided="one", fired=fired.to(kept))

    def _beyond_rounding(
        self, name: str, residual: Float[Tensor, " d"], parameters: Sequence[nn.Parameter]
    ) -> Float[Tensor, ""]:
        """|residual| where it is more than rounding, else 0; also NaN is more."""
        # Relative to what the rollouts have, not to their sum: with advantages of both signs they cancel.
        precision = max(self._eps, *(torch.finfo(p.dtype).eps for p in parameters)) ** 0.5
        norm = residual.norm()
        return torch.where(norm <= precision * _mean_over_ranks([self._sizes[name].to(norm)])[0], 0.0, norm)


def _check_complete(missing: Mapping[str, Float[Tensor, ""]]) -> None:
    for name, norm in zip(missing, read_together(missing.values()), strict=True):
        if norm != 0:
            raise GradRouteError(
                f"The deployed gradient of `{name}` should be the sum of the rollouts that were recorded. It is off by "
                f"{norm:.3g}. Fix: record every micro-batch, on unscaled losses, and apply the filter before anything "
                "else changes the gradient."
            )


class _Chosen:
    """Rows of one forward and their weights, brought to each device once."""

    def __init__(self, weights: Float[Tensor, " chosen"], rows: Int[Tensor, " chosen"]) -> None:
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {weights.device: (weights, rows)}

    @classmethod
    def of_forwards(cls, share: Float[Tensor, " rows"], rows: Sequence[int], counts: Sequence[int]) -> "list[_Chosen]":
        """For each forward, the rows of it among `rows` of all; the forwards have `counts` rows each."""
        index = torch.tensor(rows, dtype=torch.long, device=share.device)
        chosen, first = [], 0
        for count in counts:
            start, stop = bisect_left(rows, first), bisect_left(rows, first + count)
            of_forward = index[start:stop]
            chosen.append(cls(share[of_forward], of_forward - first))
            first += count
        return chosen

    def on(self, device: torch.device) -> tuple[Float[Tensor, " chosen"], Int[Tensor, " chosen"]]:
        """(weights, rows)."""
        if device not in self._on:
            weights, rows = next(iter(self._on.values()))
            self._on[device] = weights.to(device), rows.to(device)
        return self._on[device]


def _deployed(layers: Mapping[str, RoutedLayer]) -> list[tuple[str, nn.Parameter]]:
    found = [(name, p) for name, layer in layers.items() for p in layer.block_parameters("deployed")]
    for name, parameter in found:
        if parameter.grad is not None and is_sharded(parameter.grad):
            raise GradRouteError(
                f"The gradient of `{name}` is sharded, while rollouts are recorded whole. Fix: train the blocks "
                "unsharded, or use a ProjectionFilter."
            )
    return found


def _mean_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As DDP has averaged the gradient these are parts of; if it has not, the parts do not add up, and that raises."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return list(tensors)
    row = as_row(tensors)
    dist.all_reduce(row)
    return as_blocks(row / dist.get_world_size(), tensors)


def _total(of_sources: Sequence[_Parts]) -> _Parts:
    total = _Parts()
    for parts in of_sources:
        for part, tensors in parts.sums.items():
            total.add(part, tensors)
    return total
