"""The deployed gradient split into what is kept and what is removed, over the micro-batches of one optimizer step.

    kept = sum_i (1 - share_i) G_i,    removed = sum_i share_i G_i,    kept + removed = p.grad

Both sums are formed from the rollouts themselves: with every share 1, `kept` is exactly zero and no residue of a
subtraction, which Adam would scale up to a full step. That they add up to the gradient which backward left is
checked; it is how a rollout that was not recorded, or a gradient clipped since, is found.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gradroute._protocol import RoutedLayer
from gradroute._sharding import as_blocks, as_row, full_gradient, is_sharded
from gradroute._transfers import read_together
from gradroute.directions.estimators.base import unit
from gradroute.errors import GradRouteError
from gradroute.filters._recorder import LayerPass, weighted_sum
from gradroute.filters.base import FilteredGradients
from gradroute.filters.stats import FilterStats, SquaredNorms, shares, squared_norms

_ONE = "all"
Sums = dict[str, list[Tensor]]
"""Of one source in one module: kept and removed gradients, a tensor per parameter, and kept and removed features."""
Placed = Callable[[torch.device], tuple[Tensor, Tensor]]
"""Device -> weights and rows of one forward there."""


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
        self._sums: dict[str, dict[str, Sums]] = {}
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
                chosen = _rows_of_forwards(share, rows, counts)
                for name, of_layer in passes.items():
                    sums = self._sums.setdefault(source, {}).setdefault(name, {})
                    for layer_pass, each in zip(of_layer, chosen, strict=True):
                        weights, index = each(layer_pass.dots.device)
                        _add(sums, part, [weighted_sum(matrices, weights, index) for matrices in layer_pass.gradients])
                        if layer_pass.features is not None:
                            f = layer_pass.features[index]
                            _add(sums, f"{part} features", [weights.to(f) @ f])
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
            total: Sums = {}
            for of_source in self._sums.values():
                for part, tensors in of_source[name].items():
                    _add(total, part, tensors)
            total = {part: _mean_over_ranks(tensors) for part, tensors in total.items()}
            parameters = list(layer.block_parameters("deployed"))
            gradient = as_row([full_gradient(name, parameter) for parameter in parameters])
            residual = gradient - as_row(total["kept"]) - as_row(total["removed"])
            missing[name] = self._beyond_rounding(name, residual, parameters)
            writes += zip(parameters, total["kept"], strict=True)
            norms[name] = self._norms(name, total, fired)._replace(
                residual=residual.square().sum(), whole=gradient.square().sum()
            )
        _check_complete(missing)
        pooled, modules = shares(norms)
        sources = {}
        if self.labelled:
            for source, sums in self._sums.items():
                share = torch.cat(self._shares[source]).mean()
                sources[source] = shares({name: self._norms(name, sums[name], share) for name in layers})[0]
        return FilteredGradients(writes, FilterStats("one", pooled, modules, sources, self.kept_bytes))

    def _norms(self, name: str, sums: Sums, fired: Tensor) -> SquaredNorms:
        suffix = " features" if "kept features" in sums else ""
        kept, removed = as_row(sums[f"kept{suffix}"]), as_row(sums[f"removed{suffix}"])
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
                f"The deployed gradient of `{name}` should be the sum of the recorded rollouts. It is off by "
                f"{norm:.3g}. Fix: record every micro-batch, on unscaled losses, and filter before anything changes it."
            )


def _add(sums: Sums, part: str, tensors: Sequence[Tensor]) -> None:
    before = sums.get(part)
    sums[part] = list(tensors) if before is None else [a + b for a, b in zip(before, tensors, strict=True)]


def _rows_of_forwards(share: Float[Tensor, " rows"], rows: Sequence[int], counts: Sequence[int]) -> list[Placed]:
    """Those of `rows` that each forward has, brought to each device once; the forwards have `counts` rows each."""
    index = torch.tensor(rows, dtype=torch.long, device=share.device)
    chosen: list[Placed] = []
    first = 0
    for count in counts:
        of_forward = index[bisect_left(rows, first) : bisect_left(rows, first + count)]
        chosen.append(cache(partial(_moved, share[of_forward], of_forward - first)))
        first += count
    return chosen


def _moved(weights: Tensor, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return weights.to(device), rows.to(device)


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
