"""Directions from contrastive pairs; by default the mean difference.

    d = mean over pairs of (f_hack - f_clean),      v = d / |d|,      per module

Features f are pooled activations (of the completion) or gradients of each completion's loss. Pairs run in padded,
length-sorted batches, gradients in one backward per batch and without those of parameters. The model is measured in the
view it is in: ablate the quarantine first, or leave it to `Refresher`; the view is recorded. Modes, gradients and
random numbers are left as found.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gradroute._checks import described
from gradroute._hashing import model_identity
from gradroute._logging import progressed
from gradroute._module_tree import unwrapped
from gradroute._protocol import RoutedLayer, routed_layers
from gradroute._restore import left_as_found
from gradroute._transfers import moved_together
from gradroute._typing import typechecked
from gradroute.directions._reading import Feature, Reduction, without_autocast
from gradroute.directions.capture import capture_activations, capture_gradients
from gradroute.directions.directions import Directions
from gradroute.directions.estimators.base import Estimator
from gradroute.directions.estimators.by_name import as_estimator
from gradroute.directions.features import Capture, Provenance
from gradroute.directions.pairs import (
    ContrastivePair,
    PaddedBatch,
    TokenizedRollout,
    Tokenizer,
    batched,
    padded_batches,
    pair_hash,
    tokenize_pairs,
)
from gradroute.errors import DeadDirectionError, GradRouteError

ForwardFn = Callable[[nn.Module, Tensor, Tensor], Any]
"""(model, input_ids, attention_mask) -> logits, or an object with `.logits`."""
LossFn = Callable[[Any, PaddedBatch], Tensor]
"""(what the forward returned, batch) -> the loss of each rollout (batch,)."""

# Items are checked where they are used: beartype would draw one to look at, and so advance Python's random state.
Pairs = Sequence[Any]
Modules = Sequence[Any] | None


@typechecked
def extract_activation_directions(
    model: nn.Module,
    pairs: Pairs,
    *,
    tokenizer: Tokenizer | None = None,
    features: Feature = "bottleneck",
    reduction: Reduction = "mean",
    modules: Modules = None,
    batch_size: int = 32,
    batch_tokens: int | None = None,
    forward_fn: ForwardFn | None = None,
    estimator: str | Estimator = "mean_difference",
    progress: bool = True,
) -> Directions:
    """v = unit(mean over pairs of (f_hack - f_clean)), f pooled activations over the completion's tokens.

    Args:
        model: with routed layers.
        pairs: `ContrastivePair`s of texts or token ids.
        tokenizer: needed for texts.
        features, reduction, modules: see `capture_activations`.
        batch_size, batch_tokens: rollouts, and tokens with padding, per forward at most; pairs are sorted by length.
        forward_fn: (model, input_ids, attention_mask) -> anything; None calls a Hugging Face model of token ids.
        estimator: `MeanDifference`, `TStatistic`, `Svd`, `Ridge`, or the name of one for its defaults.
        progress: show a bar if it takes longer than two seconds and stderr is a terminal.

    Returns:
        `Directions` with unit rows (k, d_feature) per module.

    Raises:
        DeadDirectionError: both sides of the pairs have the same features in some module.
        GradRouteError: no pairs, no tokenizer for texts, no such estimator, or a route is open.
    """
    estimator = as_estimator(estimator)
    forward = _huggingface_forward(model, _reads_head(model, modules)) if forward_fn is None else forward_fn

    @torch.no_grad()
    def run(batch: PaddedBatch) -> Capture:
        pool = batch.completion_mask
        with capture_activations(model, pool=pool, features=features, reduction=reduction, modules=modules) as capture:
            forward(model, batch.input_ids, batch.attention_mask)
        return capture

    rollouts = tokenize_pairs(pairs, tokenizer)
    batches = batched(rollouts, batch_size, batch_tokens)
    return _extract(model, pairs, rollouts, batches, run, estimator=estimator, progress=progress)


@typechecked
def extract_gradient_directions(
    model: nn.Module,
    pairs: Pairs,
    *,
    tokenizer: Tokenizer | None = None,
    features: Feature = "bottleneck",
    modules: Modules = None,
    batch_size: int = 32,
    batch_tokens: int | None = None,
    forward_fn: ForwardFn | None = None,
    loss_fn: LossFn | None = None,
    estimator: str | Estimator = "mean_difference",
    progress: bool = True,
) -> Directions:
    """v = unit(mean over pairs of (c_hack - c_clean)), c the gradient features of each completion's mean NLL.

    With `features="bottleneck"`, c = sum over tokens of h * dL/dh, h = A_d x, dL/dh = s_d B_d^T dL/dy: exactly zero
    while B_d is zero, and with split blocks A = [V; 0], B = [0, U]; that raises. `features="parameter"` is not zero
    there: the gradient of A_d and B_d themselves. It keeps, in CPU memory, 2 pairs x r (d_in + d_out) numbers per
    module (1.6 GB for 42 pairs at r = 16 on all linears of a 135M model); `modules` makes them fewer. Score rollouts
    with `capture_gradients(model, features="parameter", directions=...)`, which forms no such gradient. No weight's
    gradient is computed in any other case.

    Args:
        model, pairs, tokenizer, batch_size, batch_tokens, estimator, progress: as in `extract_activation_directions`.
        features, modules: see `capture_gradients`.
        forward_fn: (model, input_ids, attention_mask) -> logits (batch, seq, vocab) or an object with `.logits`.
        loss_fn: (what the forward returned, batch) -> loss of each rollout (batch,); None is the completion's mean NLL.

    Raises:
        DeadDirectionError: the two sides have the same gradient in some module, in particular because B is zero.
        GradRouteError: no pairs, no tokenizer for texts, no such estimator, a route is open, or a loss that carries no
            gradient.
    """
    estimator = as_estimator(estimator)
    forward = _huggingface_forward(model, all_logits=True) if forward_fn is None else forward_fn

    def run(batch: PaddedBatch) -> Capture:
        with torch.enable_grad(), capture_gradients(model, features=features, modules=modules) as capture:
            output = forward(model, batch.input_ids, batch.attention_mask)
            losses = _completion_nll(output, batch) if loss_fn is None else loss_fn(output, batch)
            if not isinstance(losses, Tensor) or losses.shape != batch.index.shape:
                raise GradRouteError(
                    f"`loss_fn` should return a loss per rollout ({len(batch.index)},). Found {described(losses)}."
                )
            if not losses.requires_grad:
                what = "`forward_fn` should return logits that carry" if loss_fn is None else "`loss_fn` should carry"
                raise GradRouteError(f"{what} a gradient. Found none.")
            # Each row's gradient comes from that row's loss alone: so one backward of the sum serves them all.
            losses.sum().backward()  # type: ignore[no-untyped-call]
        return capture

    rollouts = tokenize_pairs(pairs, tokenizer)
    batches = batched(rollouts, batch_size, batch_tokens)
    return _extract(model, pairs, rollouts, batches, run, estimator=estimator, progress=progress, frozen=True)


def _extract(
    model: nn.Module,
    pairs: Sequence[ContrastivePair],
    rollouts: Sequence[TokenizedRollout],
    batches: Sequence[Sequence[int]],
    run: Callable[[PaddedBatch], Capture],
    *,
    estimator: Estimator,
    progress: bool,
    frozen: bool = False,
) -> Directions:
    layers = routed_layers(model)
    if any(layer.has_open_route for layer in layers.values()):
        raise GradRouteError("Extraction inside an open route: its mask is of other rows. Fix: close the route first.")
    device = next(iter(layers.values())).deployed.A.device
    identity = model_identity(model)
    features: dict[str, Tensor] = {}
    capture = None
    views = set()
    with left_as_found(model):
        if frozen:
            model.requires_grad_(False)
        padded = padded_batches(rollouts, batches, device, _pad_token(model))
        for batch in progressed(padded, total=len(batches), description="extracting directions", progress=progress):
            capture = run(batch)
            views.add(capture.view)
            for name, rows in capture.items():
                if len(rows) != len(batch.index):
                    raise GradRouteError(
                        f"Each forward should run the {len(batch.index)} rollouts of its batch once. Found {len(rows)} "
                        f"rows in `{name}`. Fix: a `forward_fn` that calls the model once, on what it is given."
                    )
            kept = list(capture.values())
            if capture.feature == "parameter":
                kept = moved_together(kept, torch.device("cpu"))
            index = {home: batch.index.to(home) for home in {rows.device for rows in kept}}
            for name, rows in zip(capture, kept, strict=True):
                if name not in features:
                    features[name] = rows.new_empty(len(rollouts), rows.shape[1])
                features[name][index[rows.device]] = rows
    assert capture is not None
    if len(views) > 1:
        raise GradRouteError(f"All batches should run in one view. Found {sorted(map(str, views))}.")
    hack = {name: rows[: len(pairs)] for name, rows in features.items()}
    clean = {name: rows[len(pairs) :] for name, rows in features.items()}
    origin = Provenance(*capture.settings, str(estimator), pair_hash(pairs), model=identity, view=str(capture.view))
    try:
        with without_autocast(device):
            estimate = estimator(hack, clean)
    except DeadDirectionError as error:
        raise DeadDirectionError(f"{error} {_why_dead(layers, origin)}") from None
    return Directions(hack=hack, clean=clean, provenance=origin, estimator=estimator, **estimate._asdict())


def _why_dead(layers: Mapping[str, RoutedLayer], origin: Provenance) -> str:
    needs_B = origin.source == "gradient" and origin.feature == "bottleneck"
    zero = [not layer.gain_readout.any() for layer in layers.values()]
    if needs_B and any(zero):
        which = "every" if all(zero) else f"{sum(zero)} of {len(zero)}"
        return (
            f"The bottleneck gradient h * B^T delta vanishes where B is zero: {which} deployed B is zero. "
            'Fix: extract after the first optimizer steps, or with features="parameter" or "output".'
        )
    return "Fix: check that the pairs differ where the model looks, and drop modules that cannot see it."


def _huggingface_forward(model: nn.Module, all_logits: bool) -> ForwardFn:
    """The forward of a Hugging Face model that reads token ids; unless `all_logits`, with as few logits as it allows.

    The head is the largest product of a small model: a fifth of SmolLM2-135M.

    Raises:
        GradRouteError: the model reads something else, or has a decoder that the completion would belong to.
    """
    inner = _unwrapped(model)
    parameters = inspect.signature(inner.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    reads = getattr(inner, "main_input_name", "input_ids")
    if reads != "input_ids" or not (takes_any or {"input_ids", "attention_mask"} <= parameters.keys()):
        raise GradRouteError(
            "`forward_fn` should be given for a model that does not take `input_ids` and `attention_mask`. Found a "
            f"{type(inner).__name__}, which takes {', '.join(parameters)}. "
            "Fix: forward_fn=lambda model, ids, mask: model(...)."
        )
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise GradRouteError(
            f"`forward_fn` should be given for an encoder with a decoder. Found a {type(inner).__name__}, whose "
            "encoder would get both prompt and completion. Fix: forward_fn=lambda model, ids, mask: model(...)."
        )
    options: dict[str, Any] = {"use_cache": False} if takes_any or "use_cache" in parameters else {}
    if not all_logits and "logits_to_keep" in parameters:
        options["logits_to_keep"] = 1
    return lambda called, ids, mask: called(input_ids=ids, attention_mask=mask, **options)


def _reads_head(model: nn.Module, modules: Sequence[str] | None) -> bool:
    """Whether the features are those of the head, or the head cannot be told apart."""
    get_head = getattr(_unwrapped(model), "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None or isinstance(head, RoutedLayer):
        return True
    return any(module is head for name, module in model.named_modules() if name in (modules or ()))


def _pad_token(model: nn.Module) -> int:
    """The padding token of `model`, or 0. Sequence classifiers look for the last token that is another one."""
    token = getattr(getattr(_unwrapped(model), "config", None), "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else 0


def _unwrapped(model: nn.Module) -> Any:
    inner: Any = unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _completion_nll(output: Any, batch: PaddedBatch) -> Float[Tensor, " batch"]:
    """Each row's mean NLL over its completion, by the logits (batch, seq, vocab) that a forward returned."""
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise GradRouteError(f"`forward_fn` should return logits (batch, seq, vocab). Found {described(logits)}.")
    mask = batch.completion_mask[:, 1:]
    if not mask.any(1).all():
        raise GradRouteError("`pairs` should have prompts: the first token of a rollout is predicted by nothing.")
    targets: Int[Tensor, "batch shifted"] = batch.input_ids[:, 1:]
    logits = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    nll = cross_entropy(rearrange(logits, "b s v -> b v s"), targets, reduction="none")
    return (nll * mask).sum(1).div(mask.sum(1))
