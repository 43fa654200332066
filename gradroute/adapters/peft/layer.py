"""PEFT's LoRA layers with a quarantine mixed in: nn.Linear, transformers' Conv1D, bitsandbytes 8 and 4 bit.

    y = base(x) + s_d B_d A_d D(x) + m s_q B_q A_q D(x)        D: one dropout for both blocks

The object is the one that PEFT built for its backend; only its class is extended, so save, load, device moves, adapter
switching and deletion are PEFT's own. What PEFT does with LoRA's matrices by name, it does with the quarantine's.
"""

import copy
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from gradroute.adapters.layer import RoutedLinear
from gradroute.adapters.peft.config import QuarantineLoraConfig
from gradroute.errors import RouteError, TargetError
from gradroute.protocol import Block, BlockName

_QUANTISED = ("Linear8bitLt", "Linear4bit")


class _BaseBeforeMerge:
    """The weights of a base layer, bitwise; bitsandbytes keeps part of them in attributes and in `state`."""

    def __init__(self, base: nn.Module) -> None:
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            # Packed by a forward on the CPU, where PEFT would merge into codes in another order: saving unpacks them.
            base.state_dict()
        parameters = base.named_parameters(recurse=False)
        self.parameters = {name: (p, p.data.clone(), dict(p.__dict__)) for name, p in parameters}
        self.quantised_state = copy.copy(getattr(base, "state", None))


class RoutedLoraLayer(RoutedLinear):
    """What is added to the class of a PEFT LoRA layer; not to be built by hand."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_A_quarantine", "lora_B_quarantine")
    other_param_names = (*LoraLayer.other_param_names, "rank_ratio")

    # ModuleDicts of nn.Linear, as PEFT's lora_A and lora_B.
    lora_A_quarantine: Any
    lora_B_quarantine: Any
    rank_ratio: dict[str, float]
    base_before_merge: _BaseBeforeMerge | None = None
    merged_scale: float = 1.0

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """PEFT adds another adapter to the layer: with a quarantine if its config says so."""
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[misc]
        if isinstance(config, QuarantineLoraConfig):
            self.add_quarantine(adapter_name, config)

    def add_quarantine(self, adapter_name: str, config: QuarantineLoraConfig) -> None:
        """Give one adapter its quarantine: A as PEFT draws it, B = 0."""
        peft_layer: Any = self
        r = peft_layer.r[adapter_name]
        r_quarantine = config.r_quarantine or r
        A = nn.Linear(peft_layer.in_features, r_quarantine, bias=False)
        B = nn.Linear(r_quarantine, peft_layer.out_features, bias=False)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(A.weight, std=1 / r_quarantine)
        nn.init.zeros_(B.weight)
        self.lora_A_quarantine[adapter_name], self.lora_B_quarantine[adapter_name] = A, B
        # s_q as a multiple of s_d: then whatever rescales an adapter in PEFT rescales both blocks.
        self.rank_ratio[adapter_name] = math.sqrt(r / r_quarantine) if config.use_rslora else r / r_quarantine
        peft_layer._move_adapter_to_device_of_base_layer(adapter_name)
        peft_layer.set_adapter(peft_layer.active_adapters, inference_mode=config.inference_mode)

    @property
    def routed_adapter(self) -> str:
        """The active adapter, which has both blocks; raises if there is none, or more than one is active."""
        peft_layer: Any = self
        active: list[str] = [name for name in peft_layer.active_adapters if name in peft_layer.lora_A]
        if len(active) == 1 and active[0] in self.lora_A_quarantine:
            return active[0]
        if len(active) > 1:
            raise RouteError(
                f"`{self.name}` should have one active adapter. Found {active}: which of them a mask gates would be "
                "undefined. Fix: model.set_adapter(one name)."
            )
        raise RouteError(
            f"`{self.name}` should have an active adapter with a quarantine. Found {active or 'none active'}; with a "
            f"quarantine: {sorted(self.lora_A_quarantine)}. Fix: model.set_adapter(...)."
        )

    @property
    def deployed(self) -> Block:
        name, peft_layer = self.routed_adapter, self._peft_layer()
        return Block(peft_layer.lora_A[name].weight, peft_layer.lora_B[name].weight, peft_layer.scaling[name])

    @property
    def quarantine(self) -> Block:
        name, peft_layer = self.routed_adapter, self._peft_layer()
        scaling = peft_layer.scaling[name] * self.rank_ratio[name]
        return Block(self.lora_A_quarantine[name].weight, self.lora_B_quarantine[name].weight, scaling)

    def block_parameters(self, block: BlockName) -> Iterator[nn.Parameter]:
        yield from getattr(self, block)[:2]

    def base_weight(self) -> Float[Tensor, "d_out d_in"]:
        peft_layer = self._peft_layer()
        base = peft_layer.get_base_layer()
        if base.weight.is_floating_point():
            weight: Tensor = base.weight.detach()
            return weight.T if peft_layer.fan_in_fan_out else weight
        # By its own forward: what bitsandbytes and PEFT offer for reading a quantised weight moves and repacks it.
        with torch.no_grad():
            identity = torch.eye(peft_layer.in_features, device=base.weight.device)
            columns: Tensor = base(identity)
            return (columns if base.bias is None else columns - base.bias).T

    @property
    def view(self) -> str:
        return "disabled" if self._peft_layer().disable_adapters else super().view

    def forward(self, x: Float[Tensor, "*batch d_in"], *args: Any, **kwargs: Any) -> Float[Tensor, "*batch d_out"]:
        peft_layer = self._peft_layer()
        for unsupported in ("adapter_names", "alora_offsets"):
            if kwargs.pop(unsupported, None) is not None:
                raise RouteError(
                    f"`{unsupported}=` cannot be used with a quarantine: it picks an adapter per row, past every mask. "
                    "Fix: ablate_quarantine(model, rows=...) picks rows."
                )
        if peft_layer.disable_adapters and peft_layer.merged:
            self.unmerge()
        base_output: Tensor = peft_layer.base_layer(x, *args, **kwargs)
        if peft_layer.disable_adapters or (self.state.disabled and not peft_layer.merged):
            return base_output
        if peft_layer.merged:
            self._check_merged_view()
            return base_output
        dropout = peft_layer.lora_dropout[self.routed_adapter]
        return self.add_blocks(dropout(x), base_output)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s_d B_d A_d + scale * s_q B_q A_q, laid out as the base weight: what the layer adds in its present view."""
        delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        scale = self._uniform_scale()
        if adapter not in self.lora_A_quarantine or scale == 0.0:
            return delta
        peft_layer = self._peft_layer()
        A, B = self.lora_A_quarantine[adapter].weight.float(), self.lora_B_quarantine[adapter].weight.float()
        quarantine: Tensor = scale * peft_layer.scaling[adapter] * self.rank_ratio[adapter] * (B @ A)
        quarantine = quarantine.T if peft_layer.fan_in_fan_out else quarantine
        return (delta + quarantine).to(delta.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge what the layer computes now: both blocks, or the deployed one alone under `ablate_quarantine`.

        Raises:
            RouteError: under a route or an ablation of some rows, which no single weight can hold.
        """
        peft_layer = self._peft_layer()
        if not check_adapters_to_merge(peft_layer, adapter_names):
            return
        self.merged_scale = self._uniform_scale()
        if not peft_layer.merged:
            # Adding and subtracting a delta a hundred times in bf16 drifts by a third of the mean weight.
            self.base_before_merge = _BaseBeforeMerge(peft_layer.get_base_layer())
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        except BaseException:
            if not peft_layer.merged:
                self._restore_base()
            raise

    def unmerge(self) -> None:
        """Put the original base weight back, bitwise."""
        peft_layer = self._peft_layer()
        if not peft_layer.merged:
            super().unmerge()  # type: ignore[misc]
            return
        peft_layer.merged_adapters.clear()
        self._restore_base()

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's, refused while merged: the base weight could not be told from the delta any more."""
        if adapter_name in self._peft_layer().merged_adapters:
            raise RouteError(f"`{self.name}`: adapter {adapter_name!r} is merged. Fix: unmerge before deleting it.")
        super().delete_adapter(adapter_name)  # type: ignore[misc]

    def extra_repr(self) -> str:
        """Ranks of both blocks for each adapter that has them."""
        pairs = {name: (A.out_features, self.lora_A_quarantine[name].out_features) for name, A in self._routed_A()}
        ranks = ", ".join(f"{name}: r={r}, r_quarantine={r_q}" for name, (r, r_q) in pairs.items())
        return ranks if self.view == "on" else f"{ranks}, view={self.view}"

    def _routed_A(self) -> list[tuple[str, nn.Linear]]:
        return [(name, A) for name, A in self._peft_layer().lora_A.items() if name in self.lora_A_quarantine]

    def _restore_base(self) -> None:
        base = self._peft_layer().get_base_layer()
        stash = self.base_before_merge
        assert stash is not None
        for name, (parameter, values, attributes) in stash.parameters.items():
            now = getattr(base, name)
            parameter.data = values.to(device=now.device, dtype=values.dtype if now is not parameter else now.dtype)
            parameter.__dict__.update(attributes)
            setattr(base, name, parameter)
        if stash.quantised_state is not None:
            base.state = stash.quantised_state
        self.base_before_merge = None

    def _check_merged_view(self) -> None:
        if self._uniform_scale() != self.merged_scale:
            raise RouteError(
                f"`{self.name}` is merged with its quarantine at scale {self.merged_scale:g} and cannot show it at "
                f"{self._uniform_scale():g}. Fix: unmerge, then ablate."
            )

    def _uniform_scale(self) -> float:
        """The quarantine's weight in the present view, if it is one number for all rows."""
        state = self.state
        if state.route is not None or state.disabled or isinstance(state.scale, Tensor):
            what = "a route" if state.route is not None else "disable_adapters" if state.disabled else "ablated rows"
            raise RouteError(f"`{self.name}`: one merged weight cannot show {what}. Fix: leave that block, or unmerge.")
        return state.scale

    def _peft_layer(self) -> Any:
        return self


class RoutedLoraLinear(RoutedLoraLayer, LoraLinear):
    """PEFT's layer for nn.Linear and Conv1D with a quarantine."""


@cache
def routed_class(peft_class: type) -> type:
    """The class of a PEFT layer, extended by routing."""
    if peft_class is LoraLinear:
        return RoutedLoraLinear
    name = f"Routed{peft_class.__name__}"
    return type(name, (RoutedLoraLayer, peft_class), {"__module__": __name__, "__doc__": RoutedLoraLayer.__doc__})


def __getattr__(name: str) -> type:
    # Unpickling looks the quantised classes up here; they are made on demand, for bitsandbytes is slow to import.
    if name.removeprefix("Routed") in _QUANTISED:
        import peft.tuners.lora.bnb as quantised  # noqa: PLC0415

        return routed_class(getattr(quantised, name.removeprefix("Routed")))
    raise AttributeError(name)


def build_routed_layer(
    target: nn.Module, adapter_name: str, config: QuarantineLoraConfig, *, target_name: str = "", **kwargs: Any
) -> nn.Module:
    """PEFT's layer for `target`, with routing mixed in.

    Raises:
        TargetError: PEFT's layer for it is none of nn.Linear, Conv1D, bitsandbytes 8 or 4 bit.
    """
    if config.target_parameters:
        # PEFT adds these by itself on architectures whose experts are packed, after the config was checked.
        raise TargetError(
            f"The targets include {sorted(config.target_parameters)}: experts packed into one parameter, which have no "
            "layer whose tokens a mask could reach. Fix: name the attention, as in "
            'target_modules=["q_proj", "k_proj", "v_proj", "o_proj"].'
        )
    if isinstance(target, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TargetError(
            f"`{target_name}` is the output projection of nn.MultiheadAttention, which reads its weight and never "
            "calls it: blocks there would never run. Fix: exclude_modules."
        )
    factories, config._custom_modules = config._custom_modules, None
    try:
        create: Any = LoraModel._create_new_module
        layer: Any = create(config, adapter_name, target, target_name=target_name, **kwargs)
    finally:
        config._custom_modules = factories
    quantised = type(layer).__module__ == "peft.tuners.lora.bnb" and type(layer).__name__ in _QUANTISED
    if type(layer) is not LoraLinear and not quantised:
        raise TargetError(
            f"`{target_name}` is a {type(target).__name__}, whose LoRA would have no quarantine. Only nn.Linear, "
            "Conv1D and bitsandbytes 8 / 4 bit linears have one. Fix: name other `target_modules`."
        )
    if getattr(target, "_hf_tp_plan", None) is not None:
        raise TargetError(f"`{target_name}` is tensor-parallel; its quarantine would not be. Fix: load it unsharded.")
    peft_class: type[nn.Module] = type(layer)
    layer.__class__ = routed_class(peft_class)  # type: ignore[arg-type]
    layer.name, layer.stop_gradient = target_name, config.stop_gradient
    layer.lora_A_quarantine, layer.lora_B_quarantine, layer.rank_ratio = nn.ModuleDict(), nn.ModuleDict(), {}
    layer.add_quarantine(adapter_name, config)
    config.check_base(target_name, layer.get_base_layer().weight)
    routed: nn.Module = layer
    return routed
