"""Train the deployed block beside a quarantine that has learned the hacks already, and leave that as it is.

    y = W x + s_d B_d A_d x + m s_q B_q A_q x,      B_q A_q != 0 and constant,   m = 1

What the quarantine does already, the reward does not teach the deployed block. Source: inoculation adapters
(arXiv:2606.30252).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from gradroute._checks import listed
from gradroute._hashing import block_fingerprint
from gradroute._protocol import delta_norms
from gradroute._step_hooks import LocalHook
from gradroute.adapters._state import Layers, StatefulLayer, is_expert
from gradroute.adapters.layer import routed_linears
from gradroute.errors import GradRouteError


def frozen_quarantine(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """d/dA_q = d/dB_q = 0: inside, a quarantine that was trained stays as it is, bitwise, and in every forward.

    Its `.grad` is dropped, and its `requires_grad` is off until the end. PEFT turns that on again after a reference
    pass; the next forward turns it off. Make the optimizer, and wrap the model (DDP, compile), inside.

    Args:
        model: with a quarantine that was trained.

    Raises:
        GradRouteError: at the start, a quarantine that adds nothing in some layer, experts excepted. At the end, unless
            the block raised: no forward ran with gradients on; every such forward had the quarantine off for all of its
            rows; or a parameter of the quarantine was changed.
    """
    layers = routed_linears(model)
    norms = delta_norms(layer.quarantine for layer in layers.values())
    idle = [name for name, norm in zip(layers, norms, strict=True) if norm == 0 and not is_expert(name)]
    if idle:
        raise GradRouteError(
            f"`model` should have a quarantine that was trained before it is frozen. Found one that adds nothing in "
            f"{len(idle)} of {len(layers)} layers: {listed(idle)}. Fix: train it first, on rows in the route zone."
        )
    return _frozen(model, layers)


@contextmanager
def _frozen(model: nn.Module, layers: Layers) -> Iterator[nn.Module]:
    before, seen = block_fingerprint(model, "quarantine"), _Seen()
    trainable = [parameter.requires_grad for _, parameter in _quarantines(layers)]
    hook = LocalHook(seen.before_forward)
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers.values()]
    try:
        for _, parameter in _quarantines(layers):
            parameter.requires_grad_(False)
            # An optimizer steps along a gradient of zeros too: by momentum and decay.
            parameter.grad = None
        yield model
        after = block_fingerprint(model, "quarantine")
        names = [name for name, _ in _quarantines(layers)]
        seen.check(sorted({name for name, old, new in zip(names, before, after, strict=True) if old != new}))
    finally:
        for handle in handles:
            handle.remove()
        # Read again: a model that was sharded meanwhile has others.
        for (_, parameter), was in zip(_quarantines(layers), trainable, strict=True):
            parameter.requires_grad_(was)


def _quarantines(layers: Layers) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, layer in layers.items() for p in layer.block_parameters("quarantine"))


class _Seen:
    """What the forwards inside the block were like."""

    def __init__(self) -> None:
        self.trained = self.on = False

    def before_forward(self, layer: StatefulLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        self.trained = True
        for parameter in layer.block_parameters("quarantine"):
            if parameter.requires_grad:
                parameter.requires_grad_(False)
        if not self.on and not layer.state.disabled:
            m = layer.state.gates(args[0] if args else next(iter(kwargs.values())), layer.name).m
            self.on = m is None or bool((m != 0).any())

    def check(self, changed: list[str]) -> None:
        if changed:
            raise GradRouteError(
                f"A frozen quarantine should be bitwise as it was. Found that it was changed in {len(changed)} layers: "
                f"{listed(changed)}. Fix: make the optimizer inside the block, or of deployed_parameters(model)."
            )
        if not self.trained:
            raise GradRouteError(
                "`model` should be trained while its quarantine is frozen. Found no forward with gradients on inside "
                "the block. Fix: run the training inside it, on this model."
            )
        if not self.on:
            raise GradRouteError(
                "A frozen quarantine should be on while the deployed block is trained. Found it off for every row of "
                "every forward with gradients on. Fix: RouteMask.weights(m=1, ...), outside of ablate_quarantine."
            )
