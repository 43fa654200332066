"""Put the routed engine into verl's registry, for the device of this process; no line of verl is changed.

    # my_routing.py, named by actor_rollout_ref.model.external_lib=my_routing
    register(directions=lambda model, tokenizer: extract_activation_directions(model, pairs, tokenizer=tokenizer))

verl imports an `external_lib` in each worker before it makes the engine, and an import that fails stops the run. (It
only logs a failed entry point of `verl.plugins`, and would go on with plain LoRA.)
"""

import importlib.util
import os
from typing import Any

from gradroute.errors import GradRouteError
from gradroute.gates.band import BandGate
from gradroute.integrations.verl.settings import MakeDirections, MakeGate, Rollouts, RoutingSettings

_OTHER_STRATEGIES = ("fsdp", "fsdp_turbo", "megatron", "veomni", "torchtitan", "automodel")


def register(
    *,
    directions: MakeDirections,
    gate: MakeGate = BandGate,
    refresh_every: int | None = 5,
    r_quarantine: int | None = None,
    rollouts: Rollouts = "on",
) -> type:
    """Have verl train language models of strategy fsdp2 by a routed engine; returns its class.

    Args:
        directions: a function of the model and its tokenizer that extracts directions of activations; called on every
            rank with the quarantine ablated, when the model is there and at each refresh.
        gate: a function of these directions that makes a gate which reads scores.
        refresh_every: optimizer steps between two refreshes; None: the directions stay as they are.
        r_quarantine: rank of the quarantine; None: `model.lora_rank`.
        rollouts: the view that rollouts are sampled from. "ablated" is for `trainer.val_only=True`: training on
            rollouts of it raises.

    Raises:
        GradRouteError: arguments that cannot be used; another verl than 0.9; a second call in one process.
    """
    settings = RoutingSettings(directions, gate, refresh_every, r_quarantine, rollouts)
    if importlib.util.find_spec("verl") is None:
        raise GradRouteError("`register` should find verl. Found none. Fix: pip install verl==0.9.1.")
    from verl.utils.device import get_device_name, get_vendor  # noqa: PLC0415 - slow, and only workers need it
    from verl.workers.engine import BaseEngine, EngineRegistry  # noqa: PLC0415

    from gradroute.integrations.verl.engine import RoutedFSDPEngine  # noqa: PLC0415

    class RegisteredEngine(RoutedFSDPEngine):
        routing = settings

    class OtherStrategy(BaseEngine):  # type: ignore[misc]
        def __init__(self, *args: Any, engine_config: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
            raise GradRouteError(
                "`strategy` of a routed run should be fsdp2. Found "
                f"{getattr(engine_config, 'strategy', 'another')!r}, whose engine does not route. Fix: "
                "actor_rollout_ref.actor.strategy=fsdp2."
            )

    # As `EngineRegistry.get_engine_cls` asks; a key with a vendor goes before verl's own, which has none.
    device = os.getenv("VERL_ENGINE_DEVICE") or get_device_name()
    vendor = os.getenv("VERL_ENGINE_VENDOR") or get_vendor()
    for backends, engine in ((["fsdp2"], RegisteredEngine), (list(_OTHER_STRATEGIES), OtherStrategy)):
        try:
            EngineRegistry.register("language_model", backends, device=device, vendor=vendor)(engine)
        except AssertionError as error:
            raise GradRouteError(
                f"`register` should be the one to register engines for {device}, {vendor}. Found that {error} "
                "Fix: call it once, in one module."
            ) from error
    return RegisteredEngine
