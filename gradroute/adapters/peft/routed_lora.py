"""PEFT's LoRA layers with a quarantine mixed in: nn.Linear, transformers' Conv1D, bitsandbytes 8 and 4 bit.

    y = base(x) + s_d B_d A_d D(x) + m s_q B_q A_q D(x)        D: one dropout for both blocks

The object is the one that PEFT built for its backend; only its class is extended, so save, load, device moves, adapter
switching and deletion are PEFT's own. What PEFT does with LoRA's matrices by name, it does with the quarantine's.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from gradroute._protocol import Block, BlockName
from gradroute._sharding import whole
from gradroute._transfers import in_memory, is_offloaded, offloaded_training
from gradroute.adapters._targets import check_base_layer
from gradroute.adapters.peft._merging import MergedLayer
from gradroute.adapters.peft._private import combining, move_to_base
from gradroute.errors import RouteError, TargetError


class RoutedLoraLayer(MergedLayer):
    """Mixed into the class of a PEFT LoRA layer; not to be built by hand."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_A_quarantine", "lora_B_quarantine")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """PEFT adds another adapter to the layer: with a quarantine if its config says so."""
        method = combining()
        if method is not None:  # it writes the matrices that PEFT knows: the quarantines would be lost, or merged in
            raise TargetError(
                f"{method} should work on adapters without a quarantine: it would combine the deployed blocks and "
                "start a new quarantine. Fix: export_deployed each, and combine those."
            )
        check_base_layer(self.name, self.get_base_layer())
        if hasattr(config, "r_quarantine"):
            config.check_options()
            if config.stop_gradient != self.stop_gradient:
                raise TargetError(
                    f"`stop_gradient` should be {self.stop_gradient!r}, as of the other adapters of `{self.name}`. "
                    f"Found {config.stop_gradient!r}. Fix: one value for all adapters of a model."
                )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[misc]
        if hasattr(config, "r_quarantine"):
            self.add_quarantine(adapter_name, config)

    def add_quarantine(self, adapter_name: str, config: Any) -> None:
        """Give one adapter its quarantine: A as PEFT draws it, B = 0; raise if it was trained on other weights."""
        r = self.r[adapter_name]
        r_quarantine = config.r_quarantine or r
        A = nn.Linear(self.in_features, r_quarantine, bias=False)
        B = nn.Linear(r_quarantine, self.out_features, bias=False)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(A.weight, std=1 / r_quarantine)
        nn.init.zeros_(B.weight)
        self.lora_A_quarantine[adapter_name], self.lora_B_quarantine[adapter_name] = A, B
        move_to_base(self, adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        stash = self.base_before_merge
        config.check_base(self.name, stash.parameters["weight"][1] if stash else self.get_base_layer().weight)

    @property
    def routed_adapter(self) -> str:
        """The active adapter, which has both blocks; raises if there is none, or more than one is active."""
        active = self._active()
        if len(active) == 1 and active[0] in self.lora_A_quarantine:
            return active[0]
        if len(active) > 1:
            raise self._several_active(active)
        raise RouteError(
            f"`{self.name}` should have an active adapter with a quarantine. Found {active or 'none active'}; with a "
            f"quarantine: {sorted(self.lora_A_quarantine)}. Fix: model.set_adapter(...)."
        )

    @property
    def deployed(self) -> Block:
        with torch.no_grad():  # offloaded blocks can be read, but not trained
            return self._blocks(self.routed_adapter, alone=True)[0]

    @property
    def quarantine(self) -> Block:
        with torch.no_grad():
            quarantine = self._blocks(self.routed_adapter, alone=False)[1]
        assert quarantine is not None
        return quarantine

    def _blocks(self, adapter: str, alone: bool) -> tuple[Block, Block | None]:
        # Past nn.Module's look-up of attributes, which costs as much as a small product: decoding comes here often.
        modules: Any = self._modules
        A, B = _weight(modules["lora_A"], adapter), _weight(modules["lora_B"], adapter)
        scaling = self.scaling[adapter]
        if A.is_meta:
            A, B = self._fetched("lora_A", adapter), self._fetched("lora_B", adapter)
        if alone:
            return Block(A, B, scaling), None
        A_q, B_q = _weight(modules["lora_A_quarantine"], adapter), _weight(modules["lora_B_quarantine"], adapter)
        if A_q.is_meta:
            A_q, B_q = self._fetched("lora_A_quarantine", adapter), self._fetched("lora_B_quarantine", adapter)
        # Of equal ranks the scalings are equal, if they are numbers.
        equal = type(scaling) is float and A.shape == A_q.shape
        s_q = scaling if equal else self._quarantine_scaling(adapter, A.shape[0] / A_q.shape[0])
        return Block(A, B, scaling), Block(A_q, B_q, s_q)

    def _fetched(self, matrix: str, adapter: str) -> Tensor:
        """A matrix on the meta device: its values, if accelerate has them."""
        factor = self.get_submodule(matrix)[adapter]  # type: ignore[index]
        weight: Tensor = factor.weight
        if not is_offloaded(factor):
            if self.get_base_layer().weight.is_meta:
                return weight  # the whole model is without values
            raise RouteError(
                f"`{self.name}` should have blocks with values. Found `{matrix}` on the meta device. "
                "Fix: load_quarantined onto the base model, or inject without low_cpu_mem_usage."
            )
        if torch.is_grad_enabled() and weight.requires_grad:
            raise offloaded_training(self.name)
        return in_memory(factor, "weight")

    def block_parameters(self, block: BlockName) -> Iterator[nn.Parameter]:
        suffix, adapter, modules = "" if block == "deployed" else "_quarantine", self.routed_adapter, self._modules
        for side in ("lora_A", "lora_B"):
            factor: Any = _weight(modules[f"{side}{suffix}"], adapter)
            yield factor

    def base_weight(self) -> Float[Tensor, "d_out d_in"]:
        base = self.get_base_layer()
        if base.weight.is_floating_point():
            weight = whole(base.weight, self.name)
            return weight.T if self.fan_in_fan_out else weight
        # By its own forward: what bitsandbytes and PEFT offer for reading a quantised weight moves and repacks it.
        with torch.no_grad():
            identity = torch.eye(self.in_features, device=base.weight.device)
            columns: Tensor = base(identity)
            return (columns if base.bias is None else columns - base.bias).T

    @property
    def view(self) -> str:
        return "disabled" if self.disable_adapters else self.state.view

    def register_forward_pre_hook(self, hook: Any, **kwargs: Any) -> Any:
        """As nn.Module's; PEFT's hook for `adapter_names=` is refused here, for an error in forward would leave it."""
        if isinstance(hook, partial) and hook.keywords.keys() & {"adapter_names", "alora_offsets"}:
            raise RouteError(_PER_ROW_ADAPTERS.format(name=next(iter(hook.keywords))))
        return super().register_forward_pre_hook(hook, **kwargs)

    def forward(self, x: Float[Tensor, "*batch d_in"], *args: Any, **kwargs: Any) -> Float[Tensor, "*batch d_out"]:
        for unsupported in ("adapter_names", "alora_offsets") if kwargs else ():
            if kwargs.pop(unsupported, None) is not None:
                raise RouteError(_PER_ROW_ADAPTERS.format(name=unsupported))
        disabled = self.disable_adapters
        if disabled and self.merged:
            self.unmerge()
        modules: Any = self._modules
        active, with_quarantine = self._active(), modules["lora_A_quarantine"]._modules
        routed = len(active) == 1 and active[0] in with_quarantine
        without_quarantine = not routed and not any(name in with_quarantine for name in active)
        if without_quarantine and self.state.route is None and self.state.view == "on":
            # Nobody asks for a route or a view.
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        base_layer = modules["base_layer"]
        if disabled or self.merged_adapters or self.state.disabled:
            self.ran = True
            base_output: Tensor = base_layer(x, *args, **kwargs)
            if self.merged and not disabled:
                self._check_merged_view()
            return base_output
        name = active[0] if routed else self.routed_adapter
        call = (lambda t: base_layer(t, *args, **kwargs)) if args or kwargs else None
        return self.with_blocks(x, base_layer, name, modules["lora_dropout"]._modules[name], call)

    def extra_repr(self) -> str:
        """Ranks of both blocks for each adapter that has them."""
        r, quarantines = self.r, self.lora_A_quarantine.items()
        ranks = ", ".join(f"{name}: r={r[name]}, r_quarantine={A.out_features}" for name, A in quarantines)
        return ranks if self.view == "on" else f"{ranks}, view={self.view}"


def _weight(factors: Any, adapter: str) -> Tensor:
    factor: Any = factors._modules[adapter]
    try:
        weight: Tensor = factor._parameters["weight"]
    except KeyError:
        weight = factor.weight  # FSDP1 and parametrizations keep it elsewhere
    return weight


_PER_ROW_ADAPTERS = (
    "`{name}=` cannot be used with a quarantine: it picks an adapter per row, past every mask. "
    "Fix: ablate_quarantine(model, rows=...) picks rows."
)
