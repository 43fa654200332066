"""Merge a routed PEFT layer into its base weight, and take it out again bitwise.

    W' = W + s_d B_d A_d + scale * s_q B_q A_q,      scale: of the quarantine in the view that was in force

A merged weight shows one view; in every other the layer raises, because it cannot show it.
"""

import copy
import math
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from gradroute._sharding import is_split
from gradroute.adapters.layer import RoutedLinear
from gradroute.errors import RouteError


class _BaseBeforeMerge:
    """The weights of a base layer, bitwise; bitsandbytes keeps part of them in attributes and in `state`."""

    def __init__(self, base: nn.Module) -> None:
        if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
            # Packed by a forward on the CPU, where PEFT would merge into codes in another order: saving unpacks them.
            base.state_dict()
        parameters = base.named_parameters(recurse=False)
        self.parameters = {name: (p, p.data.clone(), dict(p.__dict__)) for name, p in parameters}
        self.quantised_state = copy.copy(getattr(base, "state", None))


class MergedLayer(RoutedLinear):
    """The merging half of `RoutedLoraLayer`: PEFT's merge, with the original weight kept."""

    if TYPE_CHECKING:
        # Attributes of PEFT's layer; lora_A_quarantine and lora_B_quarantine are ModuleDicts as its lora_A and lora_B.
        def __getattr__(self, name: str) -> Any: ...

    base_before_merge: _BaseBeforeMerge | None = None
    merged_scale: float = 1.0

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """s_d B_d A_d + scale * s_q B_q A_q, as the base weight lies: what the layer adds in its present view."""
        delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        scale = self._uniform_scale()
        if adapter not in self.lora_A_quarantine or scale == 0.0:
            return delta
        A, B = self.lora_A_quarantine[adapter].weight.float(), self.lora_B_quarantine[adapter].weight.float()
        s_q = self._quarantine_scaling(adapter, self.lora_A[adapter].weight.shape[0] / A.shape[0])
        quarantine: Tensor = scale * s_q * (B @ A)
        quarantine = quarantine.T if self.fan_in_fan_out else quarantine
        return (delta + quarantine).to(delta.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge what the layer computes now: both blocks, or the deployed one alone under `ablate_quarantine`.

        Raises:
            RouteError: under a route or an ablation of some rows, which no single weight can hold; a sharded layer.
        """
        if is_split(self):
            raise RouteError(
                f"`{self.name}` is sharded, and its base weight could not be put back. Fix: export_deployed(model, "
                "path) or export_full, load the export onto another copy of the base model, and merge there."
            )
        if self.merged:
            self._check_merged_view()
        names = check_adapters_to_merge(self, adapter_names)  # type: ignore[arg-type]
        if not names:
            return
        if len(names) > 1:
            raise self._several_active(names)
        self.merged_scale = self._uniform_scale()
        if not self.merged:
            # Adding and subtracting a delta a hundred times in bf16 drifts by a third of the mean weight.
            self.base_before_merge = _BaseBeforeMerge(self.get_base_layer())
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        except BaseException:
            if not self.merged:
                self._restore_base()
            raise

    def unmerge(self) -> None:
        """Put the original base weight back, bitwise."""
        if not self.merged:
            super().unmerge()  # type: ignore[misc]
            return
        self.merged_adapters.clear()
        self._restore_base()

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's, refused while merged: the base weight could not be told from the delta any more."""
        if adapter_name in self.merged_adapters:
            raise RouteError(f"`{self.name}`: adapter {adapter_name!r} is merged. Fix: unmerge before deleting it.")
        super().delete_adapter(adapter_name)  # type: ignore[misc]

    def _quarantine_scaling(self, adapter: str, ratio: float) -> float:
        """s_q from s_d and r / r_quarantine: so whatever rescales an adapter in PEFT rescales both blocks."""
        scaling = self.scaling[adapter]
        if isinstance(scaling, Tensor):
            raise RouteError(
                f"`{self.name}`: the scaling of adapter {adapter!r} should be a number. Found a tensor, as from PEFT's "
                "prepare_model_for_compiled_hotswap, which pads the deployed block alone. Fix: do without it."
            )
        return float(scaling * (math.sqrt(ratio) if self.use_rslora[adapter] else ratio))

    def _restore_base(self) -> None:
        base = self.get_base_layer()
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

    def _active(self) -> list[str]:
        modules: Any = self._modules
        return [name for name in self.active_adapters if name in modules["lora_A"]._modules]

    def _several_active(self, names: list[str]) -> RouteError:
        return RouteError(
            f"`{self.name}` should have one active adapter. Found {names}: which of them a mask gates would be "
            "undefined. Fix: model.set_adapter(one name)."
        )
