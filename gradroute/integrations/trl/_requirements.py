"""Requirements of the mixin on TRL, checked before a run; it refuses the rest with the reason.

TRL's trainers are overridden by name. A method that was renamed would be overridden by nothing, and the run would look
routed; so every name, and every argument that is read, is checked at construction.
"""

import inspect
from typing import Any

import torch
import trl
from packaging.version import Version

from gradroute._protocol import routed_layers
from gradroute.adapters.check import check_model
from gradroute.errors import GradRouteError
from gradroute.integrations.deepspeed import register_blocks
from gradroute.integrations.trl.grpo_config import Options, group_share

LOWEST = "1.0"

# Each method that is overridden or called, with the arguments that are read.
METHODS = {
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("inputs",),
    "_generate_single_turn": ("prompt_ids",),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_save_checkpoint": ("model", "trial"),
    "create_optimizer": (),
    "compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch"),
    "get_high_entropy_mask": ("entropies", "mask", "threshold"),
    "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
    "log": ("logs", "start_time"),
    "training_step": ("model", "inputs", "num_items_in_batch"),
}
ATTRIBUTES = (
    "_buffered_inputs", "_logs", "_metrics", "_step", "accelerator", "beta", "log_completions", "loss_type",
    "num_generations", "reward_weights",
)  # fmt: skip


def check_trl(parent: Any) -> None:
    """`parent` is `super()` of the mixin: the trainer as TRL made it.

    Raises:
        GradRouteError: TRL is older than 1.0, or something that is overridden is not there as expected.
    """
    if Version(trl.__version__) < Version(LOWEST):
        raise GradRouteError(f"trl should be {LOWEST} or newer. Found {trl.__version__}. Fix: pip install -U trl.")
    for name, needed in METHODS.items():
        method = getattr(parent, name, None)
        parameters = {} if method is None else inspect.signature(method).parameters
        lacking = [each for each in needed if each not in parameters]
        if method is None or lacking:
            found = "no such method" if method is None else f"none called {', '.join(lacking)}"
            raise GradRouteError(_CHANGED.format(what=f"{name}({', '.join(needed)})", found=found))


def check_attributes(trainer: Any) -> None:
    """The trainer's state that is read and written, which exists once it has been built."""
    for name in ATTRIBUTES:
        if not hasattr(trainer, name):
            raise GradRouteError(_CHANGED.format(what=f"an attribute `{name}`", found="none"))


def check_run(trainer: Any, options: Options) -> None:
    """Refuse what cannot be routed in this run, or has not been shown to be.

    Raises:
        GradRouteError: the option, why it is refused, and what to do.
    """
    for reason, refused in _refused(trainer, options).items():
        if refused:
            raise GradRouteError(f"Not with gradient routing: {reason}")
    group_share(options.ablated_fraction, trainer.num_generations)
    if not hasattr(trainer.model, "peft_config"):
        raise GradRouteError(
            f"`model` should be trained through PEFT. Found a {type(trainer.model).__name__} without it, which TRL "
            "would save, and copy as its reference, as a whole. Fix: peft_config=gradroute.QuarantineLoraConfig(...)."
        )
    routed_layers(trainer.model)
    if is_zero3(trainer):
        register_blocks(trainer.model)
    _check_reference(trainer.model)
    errors = [str(finding) for finding in check_model(trainer.model) if finding.severity == "error"]
    if errors:
        more = f" And {len(errors) - 2} more: see check_model(model)." if len(errors) > 2 else ""
        raise GradRouteError("`model` cannot be routed. Found " + " ".join(errors[:2]) + more)


def shards(trainer: Any) -> bool:
    """Whether the model is split between the ranks once training begins: by FSDP2 or ZeRO-3."""
    state = trainer.accelerator.state
    if getattr(trainer, "is_fsdp_enabled", False):
        return getattr(state.fsdp_plugin, "fsdp_version", 1) == 2
    return getattr(trainer, "is_deepspeed_enabled", False) and is_zero3(trainer)


def is_zero3(trainer: Any) -> bool:
    """Whether DeepSpeed partitions the parameters."""
    return getattr(getattr(trainer.accelerator.state, "deepspeed_plugin", None), "zero_stage", None) == 3


def _check_reference(model: Any) -> None:
    """The adapter `ref` that TRL makes of an already adapted model is to be a copy of both blocks."""
    if "ref" not in model.peft_config or "default" not in model.peft_config:
        return
    parameters = dict(model.named_parameters())
    pairs = [(name, name.replace(".default.", ".ref.")) for name in parameters if ".default." in name]
    other = [name for name, ref in pairs if ref not in parameters or not torch.equal(parameters[name], parameters[ref])]
    if other:
        raise GradRouteError(
            f"The reference adapter `ref` should start as a copy of `default`. Found other values of `{other[0]}`, so "
            "the penalty would pull the policy elsewhere. Fix: give a model without an adapter called `ref`."
        )


def _refused(trainer: Any, options: Options) -> dict[str, bool]:
    args, filters = trainer.args, options.grad_filter is not None
    deepspeed = getattr(trainer, "is_deepspeed_enabled", False)
    tools = bool(getattr(trainer, "tools", None)) or bool(getattr(trainer, "environment_factories", None))
    return {
        "`use_transformers_continuous_batching=True`: rows are packed into one, so none can be ablated apart, and a "
        "captured graph keeps the view that it was captured in. Fix: leave it off.": (
            getattr(args, "use_transformers_continuous_batching", False)
        ),
        "`use_liger_kernel=True`: it replaces forwards that routed layers are part of, and in older versions the loss. "
        "Fix: leave it off.": getattr(args, "use_liger_kernel", False),
        "`rollout_func`: which view it samples a rollout in is not known, and old log-probabilities would be taken in "
        "another. Fix: let the trainer generate.": getattr(trainer, "rollout_func", None) is not None,
        "`ablated_fraction` with tools: after a tool call some rows are generated again, and which ones is not told. "
        "Fix: ablated_fraction=0.": tools and options.ablated_fraction > 0,
        "a vision-language model: rows of its vision tower are images, which no mask of rollouts fits. Fix: a text "
        "model.": getattr(trainer, "_is_vlm", False),
        "`grad_filter` under DeepSpeed, whose backward has consumed the gradients before a filter could read them. "
        "Fix: train with DDP.": deepspeed and filters,
        "`slow_start_steps` under DeepSpeed. Its optimizer takes no hooks, so the deployed block would not start "
        "slowly. Fix: train with DDP.": deepspeed and options.slow_start_steps > 0,
        "FSDP version 1, which is accelerate's default: parameters lie flat in one, where blocks cannot be told apart. "
        "Fix: version 2 (`fsdp_version: 2` in the config of accelerate, or FSDP_VERSION=2), or DDP.": (
            getattr(trainer, "is_fsdp_enabled", False) and not shards(trainer)
        ),
        "`grad_filter` with fp16: gradients are scaled, and may overflow, until the optimizer steps. Fix: bf16.": (
            getattr(args, "fp16", False) and filters
        ),
    }


_CHANGED = (
    f"trl {trl.__version__} is not what gradroute.integrations.trl was written for: the trainer should have {{what}}. "
    "Found {found}. Fix: a version of trl that its tests ran with (see docs/trl.md)."
)
