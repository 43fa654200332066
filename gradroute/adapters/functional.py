"""The operation of a routed layer, checked and prepared; `fused.py` computes it.

y = base + s_d B_d A_d x + m s_q B_q A_q x,      parameter gradients weighted by g_d and g_q
"""

from contextlib import nullcontext
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradroute._protocol import Block
from gradroute.adapters._base_product import autocast_type
from gradroute.adapters._checkpointing import ForwardRecord
from gradroute.adapters._op import QuarantineLoraFunction, fused_forward
from gradroute.adapters._state import Gates
from gradroute.errors import RouteError

StopGradient = Literal["parameters", "branch"]
Linear = tuple[Tensor, Tensor | None]
"""(weight, bias) of a frozen nn.Linear."""


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

    Args:
        x: input of the layer.
        base_output: output of the frozen layer; it is not written to.
        deployed, quarantine: `Block(A, B, scaling)` with A (r, d_in), B (d_out, r).
        m, g_d, g_q: one float per leading index of `x`; None means 1 everywhere.
        stop_gradient: "parameters" (exact dx) or "branch" (dx is gated too).

    Raises:
        RouteError: a gate of another shape, not floating point, or that requires a gradient itself; a double backward.
    """
    if stop_gradient not in ("parameters", "branch"):
        raise RouteError(f'`stop_gradient` should be "parameters" or "branch". Found {stop_gradient!r}.')
    for name, gate in (("m", m), ("g_d", g_d), ("g_q", g_q)):
        if gate is not None and (gate.shape != x.shape[:-1] or not gate.is_floating_point() or gate.requires_grad):
            raise RouteError(
                f"`{name}` should be floating point, of shape {tuple(x.shape[:-1])}, and not require a gradient. Found "
                f"{gate.dtype}, {tuple(gate.shape)}, requires_grad={gate.requires_grad}."
            )
    branch = stop_gradient == "branch"
    return add_lora_blocks(x, base_output, deployed, quarantine, gates=Gates(m, g_d, g_q), branch=branch)


def add_lora_blocks(
    x: Float[Tensor, "*batch d_in"],
    base: Float[Tensor, "*batch d_out"] | Linear,
    deployed: Block,
    quarantine: Block | None,
    *,
    gates: Gates,
    branch: bool = False,
    dropped: Float[Tensor, "*batch d_in"] | None = None,
    record: ForwardRecord | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """`quarantine_lora` with gates that are known to fit.

    Args:
        x: input of the layer.
        base: output of the frozen layer, which is not written to; or its weight and bias: W x + b is then computed
            here and accumulated into.
        deployed, quarantine: the blocks; a quarantine of None adds nothing, and there are no gates then.
        gates, branch: see `quarantine_lora`.
        dropped: what the blocks read in the place of x, if not x.
        record: ties the backward to the state of its forward, so that a recomputation in another one raises.
    """
    output, weight, bias = (base, None, None) if isinstance(base, Tensor) else (None, *base)
    A_d, B_d, s_d = deployed
    A_q, B_q, s_q = quarantine or (None, None, 0.0)
    autocast = autocast_type(x)
    compute = autocast or A_d.dtype
    base_dtype = compute if weight is None or autocast is not None else weight.dtype
    M, G = (None, None) if A_q is None else gates.columns(A_d.shape[0], A_q.shape[0])
    (m, m_zero), (g, g_zero) = M or (None, None), G or (None, None)
    with nullcontext() if autocast is None else torch.autocast(x.device.type, enabled=False):
        if not torch.is_grad_enabled():
            return fused_forward(
                x, dropped, output, weight, bias, A_d, B_d, s_d, A_q, B_q, s_q, m, m_zero, base_dtype, compute,
                without_graph=True,
            )[0]  # fmt: skip
        y: Tensor = QuarantineLoraFunction.apply(  # type: ignore[no-untyped-call]
            x, dropped, output, weight, bias, A_d, B_d, s_d, A_q, B_q, s_q, m, m_zero, g, g_zero, base_dtype, compute,
            branch, record, None if record is None else record.state_id,
        )  # fmt: skip
    return y
