"""The routed layer: a frozen linear with a deployed and a quarantine low-rank block.

    y = W x + b + s_d B_d A_d x + m s_q B_q A_q x,      s = lora_alpha / r

A is Kaiming-uniform, B is zero: at initialisation y = W x + b, bitwise.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import get_ident
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._checks import one_of, positive_integer, positive_number
from gradroute._protocol import Block, BlockName, routed_layers
from gradroute._sharding import whole
from gradroute._transfers import is_offloaded, offloaded_training
from gradroute.adapters._checkpointing import record_forward
from gradroute.adapters._gates import NO_GATES, Gates
from gradroute.adapters._op import add_lora_blocks
from gradroute.adapters._products import autocast_type, few_rows, frozen_linear, plain_forward
from gradroute.adapters._state import StatefulLayer, check_thread
from gradroute.adapters._targets import check_base_layer
from gradroute.errors import RouteError, TargetError

StopGradient = Literal["parameters", "branch"]


@dataclass(frozen=True)
class Attachment:
    """The record for `detach`: how many layers `attach` made, and which parameters it froze, by name."""

    layers: int
    frozen: tuple[str, ...]


class RoutedLinear(StatefulLayer):
    """The forward of a routed layer, whatever holds its parameters: reads the state and calls the fused operation."""

    stop_gradient: StopGradient = "parameters"

    def with_blocks(
        self,
        x: Float[Tensor, "*batch d_in"],
        base_layer: nn.Module,
        adapter: str = "",
        dropout: nn.Module | None = None,
        call: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "*batch d_out"]:
        """base_layer(x) + s_d B_d A_d D(x) + m s_q B_q A_q D(x), under the route and ablation in force.

        Args:
            x: the input.
            base_layer: the frozen layer.
            adapter: whose blocks, where a layer holds several.
            dropout: D; None for none.
            call: called in the place of `base_layer`, if that takes more arguments than x.
        """
        state, record = self.state, None
        grad = has_backward = torch.is_grad_enabled()
        compiling = torch.compiler.is_compiling()
        if not compiling:
            record = record_forward(self, state)
            if state.thread and state.thread != get_ident() and not record.recomputing:
                check_thread(state, self.name)
            state, has_backward = record.state, record.has_backward
        if state.disabled:
            self.ran = True
            return (call or base_layer)(x)
        if grad and state.ablates_what_trains:
            raise RouteError(
                f"Rows that train the quarantine should not be ablated. Found some in a forward with gradients of "
                f"`{self.name}`: they would train nothing. Fix: end ablate_quarantine before the forward of the loss, "
                "or ablate only rows that do not train the quarantine (keep)."
            )
        base = frozen_linear(base_layer, x) if call is None else None
        dropped = None if dropout is None or _is_identity(dropout) else dropout(x)
        route = state.route
        alone = state.quarantine_is_off and (not grad or (route is None and not self._trains_quarantine()))
        gates = NO_GATES if alone and route is None else state.gates(x, self.name)
        # A compiled forward only writes its marks: what it reads it is compiled for.
        if record is None or not (record.recomputing or (self.ran and (self.ran_under_route or route is None))):
            self.ran = True
            if route is not None and (has_backward or route.forward_only):
                self.ran_under_route = True
        deployed, quarantine = self._blocks(adapter, alone)
        if base is not None and dropped is None and not grad and not compiling:
            one_by_one = quarantine is None or (gates is NO_GATES and few_rows(x) and quarantine.A.dtype == x.dtype)
            if one_by_one and deployed.A.dtype == x.dtype and autocast_type(x) is None:
                return plain_forward(x, *base, deployed, quarantine, self.bottlenecks)
        return add_lora_blocks(
            x,
            (call or base_layer)(x) if base is None else base,
            deployed,
            quarantine,
            gates=gates,
            branch=self.stop_gradient == "branch",
            dropped=dropped,
            record=record,
            bottlenecks=self.bottlenecks,
        )

    def _blocks(self, adapter: str, alone: bool) -> tuple[Block, Block | None]:  # noqa: ARG002
        """(deployed, quarantine); `alone`, without the latter."""
        return self.deployed, None if alone else self.quarantine

    def _trains_quarantine(self) -> bool:
        # Then it takes part in the graph also where it is ablated: a parameter without a gradient would hang DDP.
        return any(p.requires_grad for p in self.block_parameters("quarantine"))


class WrappedLinear(RoutedLinear):
    """Base of the layers that `attach` puts around a frozen `nn.Linear`, whatever their blocks are made of.

    Args:
        base_layer, r, r_quarantine, lora_alpha, stop_gradient: see `QuarantineLoRA`.

    Raises:
        TargetError: a base layer that cannot carry blocks, or a size out of range.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        *,
        r: int,
        r_quarantine: int | None,
        lora_alpha: float,
        stop_gradient: StopGradient,
    ) -> None:
        super().__init__()
        _check_linear(base_layer)
        self.r = positive_integer("r", r, TargetError)
        self.r_quarantine = r if r_quarantine is None else positive_integer("r_quarantine", r_quarantine, TargetError)
        self.lora_alpha = positive_number("lora_alpha", lora_alpha, TargetError)
        self.stop_gradient = one_of("stop_gradient", stop_gradient, get_args(StopGradient), TargetError)
        self.base_layer = base_layer.requires_grad_(False)
        self.attachment: Attachment | None = None
        self.train(base_layer.training)

    def base_weight(self) -> Float[Tensor, "d_out d_in"]:
        return whole(self.base_layer.weight, self.name)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that asks a linear for its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias

    @property
    def in_features(self) -> int:
        """Input width of the base layer."""
        return self.base_layer.in_features

    @property
    def out_features(self) -> int:
        """Output width of the base layer."""
        return self.base_layer.out_features

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if "_hf_hook" in self.__dict__ and torch.is_grad_enabled() and is_offloaded(self):
            raise offloaded_training(self.name)
        return self.with_blocks(x, self.base_layer)

    def extra_repr(self) -> str:
        text = f"r={self.r}, r_quarantine={self.r_quarantine}, lora_alpha={self.lora_alpha:g}"
        return text if self.stop_gradient == "parameters" else f"{text}, stop_gradient={self.stop_gradient!r}"


class QuarantineLoRA(WrappedLinear):
    """y = base_layer(x) + s_d B_d A_d x + m s_q B_q A_q x around a frozen `nn.Linear`.

    Args:
        base_layer: the linear to adapt; its parameters are frozen and stay where they are.
        r: rank of the deployed block.
        r_quarantine: rank of the quarantine block; None means r.
        lora_alpha: s_d = lora_alpha / r, s_q = lora_alpha / r_quarantine.
        stop_gradient: see `quarantine_lora`.
        generator: source of the initialisation of A; None means torch's global one.

    Parameters have the dtype and device of the base weight; initial values do not depend on the device.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        *,
        r: int,
        r_quarantine: int | None = None,
        lora_alpha: float,
        stop_gradient: StopGradient = "parameters",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base_layer, r=r, r_quarantine=r_quarantine, lora_alpha=lora_alpha, stop_gradient=stop_gradient)
        self.lora_A = nn.Parameter(_kaiming(self.r, base_layer, generator))
        self.lora_B = nn.Parameter(base_layer.weight.new_zeros(base_layer.out_features, self.r))
        self.lora_A_quarantine = nn.Parameter(_kaiming(self.r_quarantine, base_layer, generator))
        self.lora_B_quarantine = nn.Parameter(base_layer.weight.new_zeros(base_layer.out_features, self.r_quarantine))

    @property
    def deployed(self) -> Block:
        return Block(self.lora_A, self.lora_B, self.lora_alpha / self.r)

    @property
    def quarantine(self) -> Block:
        return Block(self.lora_A_quarantine, self.lora_B_quarantine, self.lora_alpha / self.r_quarantine)

    def block_parameters(self, block: BlockName) -> Iterator[nn.Parameter]:
        yield from (
            (self.lora_A, self.lora_B) if block == "deployed" else (self.lora_A_quarantine, self.lora_B_quarantine)
        )


def quarantine_lora(
    x: Float[Tensor, "*batch d_in"],
    base_output: Float[Tensor, "*batch d_out"],
    deployed: Block,
    quarantine: Block,
    *,
    m: Float[Tensor, "*batch"] | None = None,
    g_d: Float[Tensor, "*batch"] | None = None,
    g_q: Float[Tensor, "*batch"] | None = None,
    stop_gradient: StopGradient = "parameters",
) -> Float[Tensor, "*batch d_out"]:
    """y = base_output + s_d B_d A_d x + m s_q B_q A_q x, with parameter gradients weighted by g_d and g_q.

    The operation of a routed layer as a function, for a layer of your own.

    Args:
        x: input of the layer.
        base_output: output of the frozen layer; it is not written to.
        deployed, quarantine: `Block(A, B, scaling)` with A (r, d_in), B (d_out, r).
        m, g_d, g_q: one float per leading index of `x`; None means 1 everywhere.
        stop_gradient: "parameters" (exact dx) or "branch" (dx is gated too).

    Raises:
        RouteError: a gate of another shape, not floating point, or that requires a gradient itself; a double backward.
    """
    one_of("stop_gradient", stop_gradient, get_args(StopGradient), RouteError)
    for name, gate in (("m", m), ("g_d", g_d), ("g_q", g_q)):
        if gate is not None and (gate.shape != x.shape[:-1] or not gate.is_floating_point() or gate.requires_grad):
            raise RouteError(
                f"`{name}` should be floating point, of shape {tuple(x.shape[:-1])}, and not require a gradient. Found "
                f"{gate.dtype}, {tuple(gate.shape)}, requires_grad={gate.requires_grad}."
            )
    branch = stop_gradient == "branch"
    return add_lora_blocks(x, base_output, deployed, quarantine, gates=Gates(m, g_d, g_q), branch=branch)


def routed_linears(model: nn.Module) -> dict[str, RoutedLinear]:
    """The routed layers of `model` whose state can be changed; one built by hand learns its name here."""
    layers = {name: layer for name, layer in routed_layers(model).items() if isinstance(layer, RoutedLinear)}
    for name, layer in layers.items():
        layer.name = layer.name or name
    return layers


def _is_identity(dropout: nn.Module) -> bool:
    """Whether a dropout need not be called: PEFT's place holder for none, without hooks."""
    return type(dropout) is nn.Identity and not (dropout._forward_hooks or dropout._forward_pre_hooks)


def _kaiming(r: int, base_layer: nn.Linear, generator: torch.Generator | None) -> Tensor:
    # Drawn on the CPU in float32, so that a seed gives the same model on every device and in every dtype.
    A = torch.empty(r, base_layer.in_features, device="cpu", dtype=torch.float32)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    return A.to(base_layer.weight)


def _check_linear(base_layer: nn.Module) -> None:
    if not isinstance(base_layer, nn.Linear):
        raise TargetError(f"`base_layer` should be an nn.Linear. Found {type(base_layer).__name__}.")
    check_base_layer("base_layer", base_layer)
    if not base_layer.weight.is_floating_point():
        raise TargetError(f"`base_layer` should have floating point weights. Found {base_layer.weight.dtype}.")
