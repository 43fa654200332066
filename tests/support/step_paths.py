"""Every path that a training step may take, on a model of any depth: what is set up once, and what a step does.

STEPS[name](model) -> a function that takes one step; it is built on the emulated GPU too
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

import gradroute as gr
from gradroute.directions.estimators import MeanDifference, Ridge, Svd, TStatistic
from gradroute.errors import RouteError
from gradroute.evaluation.card._blocks import blocks_of
from gradroute.optim import decay_toward_start, project_updates, purge_moments
from gradroute.optim.slow_start import block_groups, slow_start
from support.models import randomize_blocks
from support.tiny_models import VOCAB, config, token_ids

Step = Callable[[], object]
IDS = token_ids(4, 6)
FLAGS = torch.tensor([True, False, True, False])
PAIRS = [
    gr.ContrastivePair([3, 4, 5], [20, 21], [22, 23]),
    gr.ContrastivePair([6, 7, 8], [20, 25], [24, 26]),
    gr.ContrastivePair([8, 9, 9], [21, 20], [24, 23]),
]


class Stack(nn.Module):
    """Residual linears between an embedding and a head, of few operations."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def stack(depth: int) -> nn.Module:
    """With `depth` routed layers of non-zero blocks; made before the GPU is emulated, so that it lies there then."""
    torch.manual_seed(0)
    model = get_peft_model(Stack(depth), config(target_modules=r"layers\.\d+"), autocast_adapter_dtype=False)
    return randomize_blocks(model, std=0.2).train()


def losses(model: nn.Module) -> Tensor:
    logits = model(input_ids=IDS)
    return -logits[:, :-1].log_softmax(-1).gather(-1, IDS[:, 1:, None]).squeeze(-1).mean(1)


def mask() -> gr.RouteMask:
    return gr.RouteMask.classic(FLAGS)


def backward(model: nn.Module) -> None:
    losses(model).sum().backward()


def routed(model: nn.Module) -> Step:
    def step() -> None:
        with gr.route(model, mask()):
            backward(model)
        model.zero_grad()

    return step


def route_alone(model: nn.Module) -> Step:
    def step() -> None:
        with suppress(RouteError), gr.route(model, mask()):  # no layer runs inside, which raises
            pass

    return step


def ablate(model: nn.Module) -> Step:
    def step() -> None:
        with torch.no_grad(), gr.ablate_quarantine(model), gr.ablate_quarantine(model, rows=FLAGS):
            losses(model)

    return step


def activations(model: nn.Module, **options: Any) -> gr.Directions:
    with gr.ablate_quarantine(model):
        return gr.extract_activation_directions(model, PAIRS, progress=False, **options)


def gradients(model: nn.Module, **options: Any) -> gr.Directions:
    with gr.ablate_quarantine(model):
        return gr.extract_gradient_directions(model, PAIRS, progress=False, **options)


def captured(model: nn.Module, pool: Any = None, **options: Any) -> gr.directions.Capture:
    pool = torch.ones_like(IDS) if pool is None else pool
    with torch.no_grad(), gr.ablate_quarantine(model), gr.capture_activations(model, pool=pool, **options) as capture:
        losses(model)
    return capture


def capture_and_score(model: nn.Module, pool: Any = None, **options: Any) -> Step:
    directions = activations(model, **options)
    return lambda: directions.score(captured(model, pool))


def gradients_and_score(model: nn.Module, features: Any, ghost: bool = False) -> Step:
    directions = gradients(model, features=features)

    def step() -> None:
        given = {"features": features, "directions": directions if ghost else None}
        with gr.ablate_quarantine(model), gr.capture_gradients(model, **given) as capture:
            backward(model)
        directions.score(capture)
        model.zero_grad()

    return step


def gate(model: nn.Module, make: Callable[[gr.Directions], Any], *, reads: str = "scores", refreshed: bool) -> Step:
    directions = activations(model)
    made, capture = make(directions), captured(model)

    def step() -> None:
        if refreshed:
            directions.update_(fresh, step=0)
        made(FLAGS if reads == "flags" else capture if reads == "features" else directions.score(capture))

    fresh = activations(model)
    return step


def log_ratio(_: nn.Module) -> Step:
    made, on = gr.LogRatioGate(window=3), -torch.ones_like(IDS.float())
    return lambda: made(on, on - FLAGS[:, None].float(), torch.ones_like(IDS))  # the flagged rows are routed


def refresh(model: nn.Module, extract: Callable[..., gr.Directions], *, every: int = 1, **options: Any) -> Step:
    extracted = partial(extract, model, **options)
    refresher = gr.Refresher(extracted(), extracted, model=model, every=every)
    deployed = [parameter for _, parameter in gr.deployed_parameters(model)]

    def step() -> None:
        with torch.no_grad():
            torch._foreach_mul_(deployed, 1.01)
        refresher.step()

    return step


def filtered(
    model: nn.Module,
    make: Callable[[gr.Directions], Any],
    *,
    attach: bool = False,
    refreshed: bool = False,
    **features: Any,
) -> Step:
    directions = gradients(model, **features)
    fresh, by = gradients(model, **features), make(directions)
    optimizer = adamw(model)
    if attach:
        gr.attach_filter(optimizer, by, model=model)

    def step() -> None:
        if refreshed:
            directions.update_(fresh, step=0)
        for _ in range(2):
            if isinstance(by, gr.RolloutFilter):
                with by.record(model, sources=["a", "b", "a", "b"]):
                    backward(model)
            else:
                backward(model)
        if not attach:
            gr.apply_filter(model, by)
        optimizer.step()
        optimizer.zero_grad()

    return step


def gain_filtered(model: nn.Module, **options: Any) -> Step:
    """On gains, which take the place of the LoRA that the model has."""
    model = model.unload()
    gr.attach(model, r=3, lora_alpha=6.0, target_modules=r"layers\.\d+", parametrization="svd_gain")
    randomize_blocks(model, std=0.2)
    return filtered(model, lambda d: gr.ProjectionFilter(d, **options), features="bottleneck")


def skipped_rollouts(model: nn.Module) -> Step:
    """A filter whose gradients zero_grad has taken before the next micro-batch."""
    by = gr.RolloutFilter(gradients(model, features="parameter"))

    def step() -> None:
        with by.record(model):
            backward(model)
        model.zero_grad(set_to_none=False)

    return step


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(block_groups(model), lr=1e-3, weight_decay=0.0, **options)


def optimized(model: nn.Module, attach: Callable[..., object], **features: Any) -> Step:
    directions = gradients(model, features="parameter") if "directions" in features else None
    optimizer = adamw(model)
    handle: Any = attach(model, optimizer, *([] if directions is None else [directions]))
    idle = gr.RouteMask.weights(m=1.0, g_d=torch.zeros_like(FLAGS, dtype=torch.float32), g_q=1.0)

    def step() -> None:
        with gr.route(model, idle if features.get("idle") else mask()):
            backward(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if features.get("read"):
            handle.read()

    return step


def purged(model: nn.Module) -> Step:
    optimizer = adamw(model)
    directions = gradients(model, features="parameter")
    backward(model)
    optimizer.step()
    return lambda: purge_moments(model, optimizer, directions)


def block_norms(model: nn.Module) -> Step:
    return lambda: blocks_of(model)


STEPS: Mapping[str, Callable[[nn.Module], Step]] = {
    "routed forward and backward": routed,
    "route() enter and exit": route_alone,
    "ablate_quarantine, of all rows and of some": ablate,
    "capture_activations and score": capture_and_score,
    "capture_activations, pool a function": partial(
        capture_and_score, pool=lambda x: torch.ones(x.shape[:2], device=x.device)
    ),
    "capture_activations and score, ridge": partial(capture_and_score, estimator="ridge"),
    "capture_gradients and score, bottleneck": partial(gradients_and_score, features="bottleneck"),
    "capture_gradients and score, parameter": partial(gradients_and_score, features="parameter"),
    "capture_gradients and score, inner products": partial(gradients_and_score, features="parameter", ghost=True),
    "LabelGate": partial(gate, make=lambda _: gr.LabelGate(window=10**9), reads="flags", refreshed=False),
    "ThresholdGate": partial(gate, make=lambda _: gr.ThresholdGate(0.0, window=10**9), refreshed=False),
    "BandGate": partial(gate, make=lambda d: gr.BandGate(d, window=10**9), refreshed=False),
    "BandGate after a refresh": partial(gate, make=lambda d: gr.BandGate(d, window=10**9), refreshed=True),
    "QuantileGate": partial(
        gate, make=lambda d: gr.QuantileGate(d, window=10**9, warm_up=2), reads="features", refreshed=False
    ),
    "QuantileGate after a refresh": partial(
        gate, make=lambda d: gr.QuantileGate(d, window=10**9, warm_up=2), reads="features", refreshed=True
    ),
    "LogRatioGate": log_ratio,
    "Refresher.step, not due": partial(refresh, extract=activations, every=10**9),
    **{
        f"Refresher.step, due, {name}": partial(refresh, extract=activations, estimator=estimator)
        for name, estimator in {
            "mean difference": MeanDifference(standardise=True),
            "t-statistic": TStatistic(),
            "svd": Svd(k=2),
            "ridge": Ridge(),
        }.items()
    },
    "Refresher.step, due, gradients": partial(refresh, extract=gradients),
    "Refresher.step, due, parameter gradients": partial(refresh, extract=gradients, features="parameter"),
    "ProjectionFilter and apply_filter": partial(
        filtered, make=lambda d: gr.ProjectionFilter(d, mode="erase"), features="parameter"
    ),
    "ProjectionFilter after a refresh": partial(
        filtered, make=lambda d: gr.ProjectionFilter(d, mode="erase"), features="parameter", refreshed=True
    ),
    "ProjectionFilter and attach_filter": partial(
        filtered, make=lambda d: gr.ProjectionFilter(d, mode="erase", side="two"), features="parameter", attach=True
    ),
    "ProjectionFilter of gains, route": partial(gain_filtered, mode="route"),
    "RolloutFilter and apply_filter": partial(filtered, make=gr.RolloutFilter, features="parameter"),
    "RolloutFilter and attach_filter": partial(filtered, make=gr.RolloutFilter, features="parameter", attach=True),
    "RolloutFilter, bottleneck": partial(filtered, make=gr.RolloutFilter, features="bottleneck"),
    "RolloutFilter, scores by dot product": partial(
        filtered,
        make=lambda d: gr.RolloutFilter(d, score="dot"),
        features="parameter",
        estimator=MeanDifference(standardise=True),
    ),
    "RolloutFilter after a refresh": partial(filtered, make=gr.RolloutFilter, features="parameter", refreshed=True),
    "RolloutFilter, gradients dropped": skipped_rollouts,
    "skip_idle_blocks, a block idle": partial(optimized, attach=gr.skip_idle_blocks, idle=True),
    "audit_updates": partial(optimized, attach=gr.audit_updates, read=True),
    "audit_updates with directions": partial(optimized, attach=gr.audit_updates, directions=True, read=True),
    "project_updates": partial(optimized, attach=project_updates, directions=True),
    "purge_moments": purged,
    "slow_start": partial(optimized, attach=partial(slow_start, steps=10**6)),
    "block norms": block_norms,
    "decay_toward_start": partial(optimized, attach=partial(decay_toward_start, weight_decay=0.1)),
}
