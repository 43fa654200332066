"""Would stock PEFT load this export as it was trained? Found out by loading it onto a plain twin of the model.

    twin = the same modules without blocks, around the same weights       loaded(twin) must hold A and B bitwise

PEFT rewrites some targets on its own (since transformers 5 packs experts, `gate_proj` of a dense layer becomes the
experts' parameter), and refuses others (Mamba's `out_proj`). Neither can be told from the files that are written.
"""

import copy
import warnings
from collections import OrderedDict
from typing import Any

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from gradroute._module_tree import inner_of
from gradroute._protocol import RoutedLayer
from gradroute.errors import GradRouteError

Factors = dict[str, tuple[Tensor, Tensor]]
"""Name in the base model -> A (r, d_in) and B (d_out, r)."""


def named(factors: Factors) -> dict[str, Tensor]:
    """The factors as PEFT names them in a checkpoint, without its prefix."""
    return {f"{name}.lora_{side}.weight": pair[i] for name, pair in factors.items() for i, side in enumerate("AB")}


def check_reloads(model: nn.Module, config: LoraConfig, factors: Factors) -> None:
    """Raise unless stock PEFT, given `config` and the factors, adapts exactly these layers with exactly these values.

    Args:
        model: with routed layers; unwrapped. Nothing in it is changed.
        config: what is written as adapter_config.json.
        factors: name in the base model -> A (r, d_in) and B (d_out, r), as they are written.

    Raises:
        GradRouteError: PEFT would drop or move a layer's LoRA, or refuses the config on this model.
    """
    config = copy.deepcopy(config)
    # Copies of whole modules are written next to the blocks, under names that PEFT does not rewrite.
    config.modules_to_save, config.ensure_weight_tying = None, False
    try:
        loaded = _loaded(_plain_twin(model), config, factors)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise GradRouteError(
            f"PEFT should load the exported adapter onto the base model. Found that it refuses: {reason} Fix: {_FIX}."
        ) from error
    lost = [name for name, pair in factors.items() if not _same(pair, loaded.get(name))]
    added = [name for name in loaded if name not in factors]
    if lost or added:
        why = ""
        if config.target_parameters:
            why = f": PEFT takes these names for the packed experts' {', '.join(sorted(config.target_parameters))}"
        raise GradRouteError(
            "PEFT should load the exported adapter as it was trained. Found that it would lose the LoRA of "
            f"{len(lost)} of {len(factors)} layers{_examples(lost)} and adapt {len(added)} others{_examples(added)}"
            f"{why}. Fix: {_FIX}."
        )


_FIX = "merge_deployed(model) and save the model, or train without these targets"


def _examples(names: list[str]) -> str:
    return f" ({', '.join(f'`{name}`' for name in names[:2])}{', ...' if len(names) > 2 else ''})" if names else ""


def _loaded(twin: nn.Module, config: LoraConfig, factors: Factors) -> dict[str, tuple[Tensor, Tensor] | None]:
    """The LoRA of every layer that PEFT adapts in `twin`; None for a kind of layer that holds no single pair."""
    parameters = [(parameter, parameter.requires_grad) for parameter in twin.parameters()]
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, twin, low_cpu_mem_usage=True)
            set_peft_model_state_dict(twin, named(factors), low_cpu_mem_usage=True)
    finally:
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)
    found: dict[str, tuple[Tensor, Tensor] | None] = {}
    for name, module in twin.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            plain = "default" in layer.lora_A and not hasattr(module, "parameter_name")
            found[name] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight) if plain else None
    return found


def _same(written: tuple[Tensor, Tensor], loaded: tuple[Tensor, Tensor] | None) -> bool:
    if loaded is None or any(a.shape != b.shape for a, b in zip(written, loaded, strict=True)):
        return False
    # Next to offloaded weights PEFT's blocks have no values before they run.
    return all(b.is_meta or torch.equal(a.to(b.dtype), b.detach().cpu()) for a, b in zip(written, loaded, strict=True))


def _plain_twin(model: nn.Module) -> nn.Module:
    """The base model inside of `model`: modules of their own around the same parameters, without blocks and hooks."""
    twins: dict[nn.Module, nn.Module] = {}

    def twin_of(module: nn.Module) -> nn.Module:
        module = _base_of(module)
        if module not in twins:
            twin: nn.Module = object.__new__(type(module))
            twins[module] = twin
            state = {name: value for name, value in module.__dict__.items() if name not in _MARKS}
            hooks: dict[str, Any] = {name: OrderedDict() for name, value in state.items() if _is_hooks(name, value)}
            children = {n: None if child is None else twin_of(child) for n, child in module._modules.items()}
            own = {name: dict(state[name]) for name in ("_parameters", "_buffers")}
            twin.__dict__.update({**state, **hooks, **own, "_modules": children})
        return twins[module]

    return twin_of(model)


def _base_of(module: nn.Module) -> nn.Module:
    """The module of the base model that a wrapper is around."""
    while True:
        if isinstance(module, RoutedLayer | BaseTunerLayer):
            module = module.get_submodule("base_layer")
        elif isinstance(module, PeftModel):
            module = module.get_base_model()
        elif isinstance(module, ModulesToSaveWrapper):
            module = module.original_module
        elif (inner := inner_of(module)) is not None:
            module = inner
        else:
            return module


def _is_hooks(name: str, value: object) -> bool:
    return isinstance(value, OrderedDict) and name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))


# What PEFT and transformers leave on a model to know an adapter by, and what would call the original in the twin.
_MARKS = {"peft_config", "active_adapter", "_hf_peft_config_loaded", "forward", "_hf_hook"}
