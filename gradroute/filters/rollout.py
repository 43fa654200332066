"""Take whole rollouts out of the deployed gradient, chosen by their own gradients, in a single backward.

    score_i = sum_modules <w, f_i> / (|w| |f_i|)      w = sum of a module's rows, over their scale; norms over modules
    deployed gradient <- sum_i (1 - share_i) G_i,     share_i = 1 where score_i > threshold, or what the gate says

f_i is rollout i's own gradient G_i (directions of `feature="parameter"`), or its bottleneck feature sum_t h_t * dL/dh_t
(`feature="bottleneck"`). Directions point from the NLL gradients of clean completions to those of hacks, so a positive
score means: descending along this rollout's gradient makes hacks likelier (see `projection.py`).
Identity: the same as a second backward under `route` with g_d = 1 - share. The quarantine's gradient is not touched.
Source: "route 2" of the founding commit (wassname), with threshold 0 on the cosine.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._checks import instance_of, one_of
from gradroute._per_rollout import block_kind, check_width
from gradroute._protocol import RoutedLayer, routed_layers
from gradroute._sharding import shape_of, size_of, wide
from gradroute._transfers import moved_together, read_together
from gradroute.adapters.mask import RouteMask
from gradroute.directions.directions import Directions
from gradroute.directions.made_once import made_once
from gradroute.directions.parameter_rows import check_directions, scaled_rows
from gradroute.errors import GradRouteError
from gradroute.filters._kept_rollouts import KeptRollouts
from gradroute.filters._recorder import Feature, LayerPass, RolloutRecorder
from gradroute.filters.base import FilteredGradients, GradientFilter

Score = Literal["cosine", "dot"]
RolloutGate = Callable[[Tensor], RouteMask | Tensor]


class RolloutRecord:
    """Scores and shares of the rollouts of one `RolloutFilter.record`; filled when its block ends."""

    scores: Float[Tensor, " rows"]
    shares: Float[Tensor, " rows"]
    kept_bytes: int

    def __getattr__(self, name: str) -> Any:
        if name in ("scores", "shares", "kept_bytes"):
            raise GradRouteError(f"`{name}` is known when the block of `record` has ended. Fix: read it after it.")
        raise AttributeError(name)

    def __repr__(self) -> str:
        if "shares" not in self.__dict__:
            return "RolloutRecord(open)"
        return (
            f"RolloutRecord({len(self.shares)} rollouts, {float(self.shares.sum()):g} removed, "
            f"kept {self.kept_bytes:,d} bytes)"
        )


class RolloutFilter(GradientFilter):
    """deployed gradient <- sum_i (1 - share_i) G_i; see the module's formulas.

        with rollout_filter.record(model):          # around forward and backward, for each micro-batch
            loss(model, rollouts).backward()
        apply_filter(model, rollout_filter)         # once per step, before clipping

    Args:
        directions: of gradients, `feature="parameter"` or "bottleneck"; read at every `record`, so a refresh is seen.
        gate: a threshold, above which a rollout is removed; or a function of the scores (rows,) that returns flags, or
            shares in [0, 1] to remove, or a `RouteMask`, which removes 1 - g_d. Its m and g_q have to be 1: the forward
            has run, and the quarantine's gradient stays.
        score: "cosine", or "dot", which is `Directions.score` of the rollouts' features and grows with the loss.

    Raises:
        GradRouteError: directions of activations or other features; a gate that returns something else.
    """

    def __init__(self, directions: Directions, gate: float | RolloutGate = 0.0, *, score: Score = "cosine") -> None:
        provenance = instance_of("directions", directions, Directions).provenance
        if provenance.source != "gradient" or provenance.feature not in get_args(Feature):
            raise GradRouteError(
                '`directions` should be of gradients, of feature "parameter" or "bottleneck". Found '
                f"{provenance.source} {provenance.feature}. Fix: extract_gradient_directions."
            )
        if not callable(gate) and (isinstance(gate, bool) or not isinstance(gate, int | float) or math.isnan(gate)):
            raise GradRouteError(f"`gate` should be a number or a function of the scores. Found {gate!r}.")
        self.directions, self.gate = directions, gate
        self.score = one_of("score", score, get_args(Score))
        self._recording = False
        self._kept: KeptRollouts | None = None

    @contextmanager
    def record(self, model: nn.Module, *, sources: Sequence[str] | None = None) -> Iterator[RolloutRecord]:
        """Score and keep the rollouts whose forward and backward run inside the block; several blocks add up.

        Args:
            model: with routed layers; a row of its inputs is a rollout.
            sources: a label per rollout, in the order of the forwards, by which `FilterStats` is split.

        Raises:
            GradRouteError: a layer that did not run forward and backward exactly once per forward, or on other rows;
                reentrant checkpointing, whose first forward has no graph; scores that are not finite.
        """
        if self._recording:
            raise GradRouteError("`record` inside `record` of the same filter. Fix: leave the outer block first.")
        layers = routed_layers(model)
        vectors = self._vectors(layers)
        if self._kept is not None and self._kept.belongs_to_dropped_gradients(layers):
            self._kept = None
        feature = cast(Feature, self.directions.provenance.feature)
        recorder = RolloutRecorder(model, layers, vectors.by_module, feature)
        record = RolloutRecord()
        self._recording = True
        try:
            with recorder.hooked():
                yield record
        finally:
            self._recording = False
        passes = recorder.passes
        record.scores = self._scores(passes, vectors)
        record.shares = self._shares(record.scores)
        record.kept_bytes = recorder.kept_bytes
        labels = None if sources is None else list(sources)
        if labels is not None and len(labels) != len(record.scores):
            raise GradRouteError(f"`sources` should label {len(record.scores)} rollouts. Found {len(labels)} labels.")
        kept = self._kept or KeptRollouts(vectors.by_module, self.directions.rows, labelled=labels is not None)
        kept.add(layers, passes, record.shares, labels, record.kept_bytes)
        self._kept = kept

    def filtered(self, layers: Mapping[str, RoutedLayer]) -> FilteredGradients:
        """The deployed gradient of the rollouts that were kept, over all blocks recorded since the last call."""
        if self._recording:
            raise GradRouteError("The filter is applied inside its own `record`. Fix: leave the block first.")
        if self._kept is None:
            raise GradRouteError(
                "No rollout was recorded since this filter was applied. Fix: enclose forward and backward of each "
                "micro-batch in `with rollout_filter.record(model):`."
            )
        filtered = self._kept.filtered(layers)
        self._kept = None
        return filtered

    def describe(self) -> str:
        return "none: every rollout trained the quarantine; flagged ones were taken out of the deployed gradient"

    def pair_scores(self) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """(hack, clean): scores of the directions' own pairs as this filter scores rollouts, to place thresholds by."""
        known = self.directions
        found = []
        for features in known.sides:
            pairs = {name: wide(features[name]) for name in known.rows}
            vectors = {name: scaled_rows(known, name).sum(0).to(pairs[name]) for name in pairs}
            dots = torch.stack([pairs[name] @ v for name, v in vectors.items()]).sum(0)
            squares = torch.stack([rows.square().sum(1) for rows in pairs.values()]).sum(0)
            found.append(self._scale(dots, squares, _measured(vectors, known)))
        return found[0], found[1]

    def _vectors(self, layers: Mapping[str, RoutedLayer]) -> "_Vectors":
        check_directions(self.directions, layers, "RolloutFilter")
        bottleneck = self.directions.provenance.feature == "bottleneck"
        places = {}
        for name, layer in layers.items():
            block_kind(name, layer)
            A = layer.deployed.A
            width = shape_of(A)[0] if bottleneck else sum(size_of(p) for p in layer.block_parameters("deployed"))
            places[name] = (width, A.device)
        key = ("RolloutFilter", tuple(places.items()))
        return made_once(self.directions, key, lambda: _placed_vectors(self.directions, places))

    def _scores(self, passes: Mapping[str, Sequence[LayerPass]], vectors: "_Vectors") -> Float[Tensor, " rows"]:
        device = next(iter(vectors.by_module.values())).device
        dots, squares, vanish = [], [], []
        for name in self.directions.rows:
            of_layer = passes[name]
            dots.append(torch.cat([one.dots for one in of_layer]).to(device))
            squares.append(torch.cat([one.squares for one in of_layer]).to(device))
            gradients = torch.cat([one.gradient_squares for one in of_layer]).to(device)
            vanish.append(gradients.any() & ~squares[-1].any())
        scores = self._scale(torch.stack(dots).sum(0), torch.stack(squares).sum(0), vectors)
        *vanishing, finite = read_together([*vanish, torch.isfinite(scores).all()])
        for name, is_vanishing in zip(self.directions.rows, vanishing, strict=True):
            if is_vanishing:
                raise GradRouteError(
                    f"The bottleneck gradients of `{name}` all vanish while its gradient does not, because B is zero: "
                    'nothing could be scored. Fix: directions of features="parameter".'
                )
        if not finite:
            row = int((~torch.isfinite(scores)).nonzero()[0])
            raise GradRouteError(f"The gradient of rollout {row} is not finite. Fix: skip this step.")
        return scores

    def _scale(
        self, dots: Float[Tensor, " rows"], squares: Float[Tensor, " rows"], vectors: "_Vectors"
    ) -> Float[Tensor, " rows"]:
        if self.score == "dot":
            return dots - vectors.offset
        # A rollout without a gradient (an advantage of zero) takes part in nothing: it scores 0.
        zero_or_nan = torch.where(squares == 0, 0.0, squares)
        return torch.where(squares > 0, dots / (vectors.length * squares.sqrt()), zero_or_nan)

    def _shares(self, scores: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        if not callable(self.gate):
            return (scores > self.gate).to(scores)
        found = self.gate(scores)
        if isinstance(found, RouteMask):
            if found.shape != scores.shape or not ((found.m == 1) & (found.g_q == 1)).all():
                raise GradRouteError(
                    f"`gate` should return a mask of {len(scores)} rows with m = g_q = 1: the forward has run, and the "
                    f'quarantine\'s gradient stays. Found {found!r}. Fix: a gate with below="absorb", or a soft one as '
                    "gate=lambda scores: soft.z(scores).clamp(0, 1)."
                )
            found = 1 - found.g_d
        if not isinstance(found, Tensor) or found.shape != scores.shape:
            what = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise GradRouteError(f"`gate` should return a tensor of shape {tuple(scores.shape)}. Found {what}.")
        shares = found.detach().to(scores)
        if not ((shares >= 0) & (shares <= 1)).all():
            raise GradRouteError(f"`gate` should return shares to remove in [0, 1]. Found {shares.tolist()[:5]}.")
        return shares

    def __repr__(self) -> str:
        if not callable(self.gate):
            return f"RolloutFilter({self.score} > {self.gate:g}, {self.directions!r})"
        # A function by its name, without its address; a gate as it shows itself.
        gate = getattr(self.gate, "__name__", None) or repr(self.gate)
        return f"RolloutFilter({self.score} by {gate}, {self.directions!r})"


class _Vectors(NamedTuple):
    """w by module, |w| over all modules, and the sum of <w, c> over them, c the centre."""

    by_module: Mapping[str, Float[Tensor, " _"]]
    length: float
    offset: float


def _measured(vectors: Mapping[str, Tensor], directions: Directions) -> _Vectors:
    centre = directions.centre or {}
    squares = [v.square().sum() for v in vectors.values()]
    products = [v @ centre[name].to(v) for name, v in vectors.items() if name in centre]
    found = read_together(squares + products)
    return _Vectors(vectors, math.sqrt(sum(found[: len(squares)])), sum(found[len(squares) :], 0.0))


def _placed_vectors(directions: Directions, places: Mapping[str, tuple[int, torch.device]]) -> _Vectors:
    """The vectors on the devices of their layers; raises where one is of another width, or nothing."""
    rows = {name: scaled_rows(directions, name) for name in places}
    sums = {name: of_module.sum(0) for name, of_module in rows.items()}
    for name, (width, _) in places.items():
        check_width(name, len(sums[name]), width)
    cancel = {name: v.norm() <= 1e-4 * rows[name].norm() for name, v in sums.items() if len(rows[name])}
    for name, is_nothing in zip(cancel, read_together(cancel.values()), strict=True):
        if is_nothing:
            raise GradRouteError(f"The rows of `directions` of `{name}` add up to nothing. Fix: drop opposite ones.")
    placed = moved_together(list(sums.values()), [device for _, device in places.values()])
    return _measured(dict(zip(sums, placed, strict=True)), directions)
