"""Directions from contrastive pairs, by the mean difference.

    d = mean over pairs of (f_hack - f_clean),      v = d / |d|,      per module

Features f are pooled activations (of the completion) or bottleneck gradients of each completion's mean NLL. Pairs run
in padded, length-sorted batches. The model is measured in the view it is in: ablate the quarantine first, or leave it
to `Refresher`; the view is recorded. Modes, gradients and random numbers are left as found.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradroute.directions.capture import Capture, Feature, Reduction, capture_activations, capture_gradients
from gradroute.directions.container import Directions, Provenance, unit
from gradroute.directions.identity import model_identity
from gradroute.directions.pairs import (
    ContrastivePair,
    PaddedBatch,
    Tokenizer,
    padded_batches,
    pair_hash,
    tokenize_pairs,
)
from gradroute.errors import DeadDirectionError, GradRouteError
from gradroute.preserve import left_as_found
from gradroute.protocol import routed_layers
from gradroute.typing import typechecked

ForwardFn = Callable[[nn.Module, Tensor, Tensor], Any]
"""(model, input_ids, attention_mask) -> logits, or an object with `.logits`."""

# Items are checked by `tokenize_pairs`: beartype would draw one to look at, and so advance Python's random state.
Pairs = Sequence[Any]

# Below this share of the features' own norm a difference is rounding noise of a float32 forward.
_DEAD = 1e-6


@typechecked
def extract_activation_directions(
    model: nn.Module,
    pairs: Pairs,
    *,
    tokenizer: Tokenizer | None = None,
    features: Feature = "bottleneck",
    reduction: Reduction = "mean",
    batch_size: int = 32,
    forward_fn: ForwardFn | None = None,
) -> Directions:
    """v = unit(mean over pairs of (f_hack - f_clean)), f pooled activations over the completion's tokens.

    Args:
        model: with routed layers.
        pairs: `ContrastivePair`s of texts or token ids.
        tokenizer: needed for texts.
        features, reduction: see `capture_activations`.
        batch_size: rollouts per forward.
        forward_fn: (model, input_ids, attention_mask) -> anything; None calls a Hugging Face model.

    Returns:
        `Directions` with one unit row (1, d_feature) per routed layer.

    Raises:
        DeadDirectionError: both sides of the pairs have the same features in some module.
        GradRouteError: no pairs, no tokenizer for texts, or a route is open.
    """

    def run(batch: PaddedBatch) -> Capture:
        with (
            torch.no_grad(),
            capture_activations(model, pool=batch.completion_mask, features=features, reduction=reduction) as capture,
        ):
            _forward(model, batch, forward_fn)
        return capture

    return _extract(model, pairs, tokenizer, batch_size, run)


@typechecked
def extract_gradient_directions(
    model: nn.Module,
    pairs: Pairs,
    *,
    tokenizer: Tokenizer | None = None,
    features: Feature = "bottleneck",
    batch_size: int = 32,
    forward_fn: ForwardFn | None = None,
) -> Directions:
    """v = unit(mean over pairs of (c_hack - c_clean)), c the gradient features of each completion's mean NLL.

    With `features="bottleneck"`, c = sum over tokens of h * dL/dh, h = A_d x, dL/dh = s_d B_d^T dL/dy: exactly zero
    while B_d is zero, which raises. No gradient of any parameter is formed.

    Args:
        model, pairs, tokenizer, batch_size: as in `extract_activation_directions`.
        features: see `capture_gradients`.
        forward_fn: (model, input_ids, attention_mask) -> logits (batch, seq, vocab) or an object with `.logits`.

    Raises:
        DeadDirectionError: the two sides have the same gradient in some module, in particular because B is zero.
        GradRouteError: no pairs, no tokenizer for texts, a route is open, or logits that carry no gradient.
    """

    def run(batch: PaddedBatch) -> Capture:
        with torch.enable_grad(), capture_gradients(model, features=features) as capture:
            loss = _completion_nll(_logits(_forward(model, batch, forward_fn)), batch)
            if not loss.requires_grad:
                raise GradRouteError("`forward_fn` should return logits that carry a gradient. Found none.")
            loss.backward()  # type: ignore[no-untyped-call]
        return capture

    return _extract(model, pairs, tokenizer, batch_size, run, frozen=True)


def _extract(
    model: nn.Module,
    pairs: Sequence[ContrastivePair],
    tokenizer: Tokenizer | None,
    batch_size: int,
    run: Callable[[PaddedBatch], Capture],
    *,
    frozen: bool = False,
) -> Directions:
    layers = routed_layers(model)
    if any(layer.has_open_route for layer in layers.values()):
        raise GradRouteError("Extraction inside an open route: its mask is of other rows. Fix: close the route first.")
    rollouts = tokenize_pairs(pairs, tokenizer)
    device = next(iter(layers.values())).deployed.A.device
    identity = model_identity(model)
    features: dict[str, Tensor] = {}
    capture = None
    with left_as_found(model):
        if frozen:
            model.requires_grad_(False)
        for batch in padded_batches(rollouts, batch_size, device):
            capture = run(batch)
            for name, rows in capture.items():
                if name not in features:
                    features[name] = rows.new_empty(len(rollouts), rows.shape[1])
                features[name][batch.index.to(rows.device)] = rows
    assert capture is not None
    hack = {name: rows[: len(pairs)] for name, rows in features.items()}
    clean = {name: rows[len(pairs) :] for name, rows in features.items()}
    views = {layer.view for layer in layers.values()}
    provenance = Provenance(
        source=capture.source,
        feature=capture.feature,
        reduction=capture.reduction,
        estimator="mean_difference",
        pair_hash=pair_hash(pairs),
        model=identity,
        view=views.pop() if len(views) == 1 else "mixed",
    )
    return Directions(mean_difference(hack, clean, _why_dead(model, provenance)), hack, clean, provenance)


def mean_difference(
    hack: Mapping[str, Float[Tensor, "pairs _"]], clean: Mapping[str, Float[Tensor, "pairs _"]], why_dead: str = ""
) -> dict[str, Float[Tensor, "1 _"]]:
    """unit(mean over pairs of (hack - clean)) per module, as one row.

    Raises:
        DeadDirectionError: |mean difference| is zero, or rounding noise against the features' own norm.
    """
    rows, dead = {}, []
    for name in hack:
        difference = (hack[name] - clean[name]).mean(0, keepdim=True)
        size = torch.cat([hack[name], clean[name]]).norm(dim=1).mean()
        if difference.norm() <= _DEAD * size:
            dead.append(name)
        else:
            rows[name] = unit(difference)
    if dead:
        shown = ", ".join(f"`{name}`" for name in dead[:5]) + (" ..." if len(dead) > 5 else "")
        raise DeadDirectionError(
            f"Hack and clean sides have the same features in {len(dead)} of {len(hack)} modules: {shown}. {why_dead}"
        )
    return rows


def _why_dead(model: nn.Module, provenance: Provenance) -> str:
    needs_B = provenance.source == "gradient" and provenance.feature == "bottleneck"
    zero = [not layer.deployed.B.any() for layer in routed_layers(model).values()]
    if needs_B and any(zero):
        which = "every" if all(zero) else f"{sum(zero)} of {len(zero)}"
        return (
            f"The bottleneck gradient h * B^T delta vanishes where B is zero: {which} deployed B is zero. "
            'Fix: extract after the first optimizer steps, or with features="output".'
        )
    return "Fix: check that the pairs differ where the model looks, and drop modules that cannot see it."


def _forward(model: nn.Module, batch: PaddedBatch, forward_fn: ForwardFn | None) -> Any:
    if forward_fn is not None:
        return forward_fn(model, batch.input_ids, batch.attention_mask)
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def _logits(output: Any) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise GradRouteError(f"`forward_fn` should return logits of shape (batch, seq, vocab). Found {found}.")
    return logits


def _completion_nll(logits: Float[Tensor, "batch seq vocab"], batch: PaddedBatch) -> Float[Tensor, ""]:
    """Sum over rows of each row's mean NLL, so that a row's gradient is that of its own loss."""
    mask = batch.completion_mask[:, 1:]
    if not mask.any(1).all():
        raise GradRouteError("`pairs` should have prompts: the first token of a rollout is predicted by nothing.")
    targets: Int[Tensor, "batch shifted"] = batch.input_ids[:, 1:]
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    nll = cross_entropy(rearrange(logits, "b s v -> b v s"), targets, reduction="none")
    return (nll * mask).sum(1).div(mask.sum(1)).sum()
