"""The fused operation of a routed layer.

    y   = base + s_d B_d u_d + m s_q B_q u_q,      u_d = A_d x,  u_q = A_q x
    dz  = [s_d B_d, s_q B_q]^T dy                  (gradient at the rank-r bottleneck)
    dx  = A_d^T dz_d + A_q^T (m dz_q)              (the true derivative: the gates g do not enter)
    dA_d = (g_d dz_d)^T x,    dA_q = (g_q m dz_q)^T x
    dB_d = s_d dy^T (g_d u_d),  dB_q = s_q dy^T (g_q m u_q)

Gates act on *parameter* gradients. With `stop_gradient="branch"` they act on dx as well, which is what detaching a
branch's output computes; lower layers then train on a wrong derivative. Kept for replication only.
Identity: with m = g_d = g_q = 1 this is LoRA of rank r + r_quarantine.
"""

from contextlib import nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradroute.adapters.recompute import ForwardRecord
from gradroute.adapters.state import Gates
from gradroute.errors import RouteError
from gradroute.protocol import Block

StopGradient = Literal["parameters", "branch"]


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
    return add_lora_blocks(x, base_output, deployed, quarantine, Gates(m, g_d, g_q), stop_gradient == "branch", None)


def add_lora_blocks(  # noqa: PLR0917
    x: Float[Tensor, "*batch d_in"],
    base_output: Float[Tensor, "*batch d_out"],
    deployed: Block,
    quarantine: Block,
    gates: Gates,
    branch: bool,
    record: ForwardRecord | None,
) -> Float[Tensor, "*batch d_out"]:
    """`quarantine_lora` with gates that are known to fit.

    `record` ties the backward to the state of its forward, so that a checkpoint recomputation in another one raises.
    """
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    compute = torch.get_autocast_dtype(device) if autocast else deployed.A.dtype
    # Casts stay outside the Function, where autograd differentiates them.
    x, A_d, B_d, A_q, B_q = (t.to(compute) for t in (x, deployed.A, deployed.B, quarantine.A, quarantine.B))
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        y: Tensor = _QuarantineLora.apply(  # type: ignore[no-untyped-call]
            x, base_output, A_d, B_d, A_q, B_q, deployed.scaling, quarantine.scaling,
            _column(gates.m), _column(gates.g_d), _column(gates.g_q), branch, record,
            None if record is None else record.state_id,
        )  # fmt: skip
    return y


def _column(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.reshape(-1, 1)


def _weigh(weights: Tensor | None, values: Tensor) -> Tensor:
    """weights * values, and exactly zero where the weight is zero even if the value is not finite."""
    if weights is None:
        return values
    # The product is formed in the wider of the two types: an advantage rounded to bf16 would be off by 0.4 %.
    return torch.where(weights == 0, 0.0, weights * values).to(values.dtype)


class _QuarantineLora(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        x: Tensor,
        base_output: Tensor,
        A_d: Tensor,
        B_d: Tensor,
        A_q: Tensor,
        B_q: Tensor,
        s_d: float,
        s_q: float,
        m: Tensor | None,
        g_d: Tensor | None,
        g_q: Tensor | None,
        branch: bool,
        record: ForwardRecord | None,
        state_id: Tensor | None,
    ) -> Tensor:
        rank = A_d.shape[0]
        x_rows = x.reshape(-1, x.shape[-1])
        u = x_rows @ torch.cat([A_d, A_q]).T
        z = u if m is None else torch.cat([u[:, :rank], _weigh(m, u[:, rank:])], dim=1)
        B = torch.cat([s_d * B_d, s_q * B_q], dim=1)
        base_rows = base_output.reshape(-1, base_output.shape[-1])
        same = base_rows.dtype == z.dtype
        # Two types are added in the wider one and rounded once, as PEFT does.
        y = torch.addmm(base_rows, z, B.T) if same else (base_rows + z @ B.T).to(base_rows.dtype)
        ctx.save_for_backward(x, u, A_d, B_d, A_q, B_q, state_id)
        # Gates are kept apart from the saved tensors: those come back from a checkpoint recomputation, which may have
        # run under other gates; `check_backward` compares the two states and raises.
        ctx.gates, ctx.scalings, ctx.branch, ctx.record = (m, g_d, g_q), (s_d, s_q), branch, record
        return y.reshape(base_output.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Not `once_differentiable`: that lets a gradient through as a constant where dy is one, as under a linear loss.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RouteError(
                "A routed layer cannot be differentiated twice. Found a double backward (create_graph=True). "
                "Fix: create_graph=False."
            )
        x, u, A_d, B_d, A_q, B_q, state_id = ctx.saved_tensors
        m, g_d, g_q = ctx.gates
        if ctx.record is not None:
            ctx.record.check_backward(state_id)
        (s_d, s_q), rank = ctx.scalings, A_d.shape[0]
        need_x, need_base, need_A_d, need_B_d, need_A_q, need_B_q = ctx.needs_input_grad[:6]
        dy_rows = dy.reshape(-1, dy.shape[-1]).to(u.dtype)
        dx = dA = dB = None

        if need_x or need_A_d or need_A_q:
            dz = dy_rows @ torch.cat([s_d * B_d, s_q * B_q], dim=1)
            du_d, du_q = dz[:, :rank], _weigh(m, dz[:, rank:])
            # g_q weighs du_q, which already carries m: the quarantine's own derivative, times its gate.
            gated = torch.cat([_weigh(g_d, du_d), _weigh(g_q, du_q)], dim=1)
            if need_x:
                du = gated if ctx.branch else torch.cat([du_d, du_q], dim=1)
                dx = (du @ torch.cat([A_d, A_q])).reshape(x.shape)
            if need_A_d or need_A_q:
                dA = gated.T @ x.reshape(-1, x.shape[-1])
        if need_B_d or need_B_q:
            kept = torch.cat([_weigh(g_d, u[:, :rank]), _weigh(g_q, _weigh(m, u[:, rank:]))], dim=1)
            dB = dy_rows.T @ kept

        return (
            dx,
            dy if need_base else None,
            dA[:rank] if dA is not None and need_A_d else None,
            s_d * dB[:, :rank] if dB is not None and need_B_d else None,
            dA[rank:] if dA is not None and need_A_q else None,
            s_q * dB[:, rank:] if dB is not None and need_B_q else None,
            *[None] * 8,
        )
