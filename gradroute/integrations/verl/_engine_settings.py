"""What the engine cannot route, refused when verl makes it: each with the setting that can be routed."""

from typing import Any

from verl.utils.torch_dtypes import PrecisionType

from gradroute.errors import GradRouteError

_NEEDED = ("_gradient_sync_context", "_build_lora_module", "forward_step", "optimizer_step", "infer_batch")


def check_verl(engine_class: type) -> None:
    """Raise unless verl's engine has the methods that are overridden.

    Raises:
        GradRouteError: another version of verl.
    """
    missing = [name for name in _NEEDED if not hasattr(engine_class, name)]
    if missing:
        raise GradRouteError(f"verl's FSDP engine should have {missing}, as in 0.9.1. Fix: pip install verl==0.9.1.")


def check_engine(engine: Any) -> None:
    """Raise for settings under which something that was asked for would not happen.

    Raises:
        GradRouteError: such a setting.
    """
    model, config = engine.model_config, engine.engine_config
    refused = {
        "no LoRA (model.lora_rank=0), so that there are no blocks. Fix: model.lora_rank=16.": model.lora_rank <= 0,
        "a model that is not trained (forward_only), such as a separate reference model. Fix: use the model without "
        "its adapters as the reference, as verl does with model.lora_rank.": config.forward_only,
        "ulysses_sequence_parallel_size > 1: a rank has parts of rollouts only, and no features of them. Fix: "
        "ulysses_sequence_parallel_size=1.": config.ulysses_sequence_parallel_size > 1,
        "pad_to_length=True: a packed batch has tokens of no rollout. Fix: pad_to_length=False.": config.pad_to_length,
        "offload_policy=True: blocks that are on the CPU cannot be gathered. Fix: param_offload=True.": (
            config.offload_policy
        ),
        "QAT, which replaces linears by other layers. Fix: leave qat off.": engine._qat_enabled,
        "activation offloading, under which routed layers were not tested. Fix: "
        "model.enable_activation_offload=False.": model.enable_activation_offload,
        "fp16, whose gradient scaler may skip a step unseen. Fix: mixed_precision.param_dtype=bf16.": (
            PrecisionType.is_fp16((config.mixed_precision or {}).get("param_dtype", "bf16"))
        ),
    }
    found = [why for why, holds in refused.items() if holds]
    if found:
        raise GradRouteError(f"A routed engine cannot work with every setting of verl. Found {found[0]}")
