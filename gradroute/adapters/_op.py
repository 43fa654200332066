"""The fused operation of a routed layer: base product, both blocks and their gates in one autograd function.

    y   = base + s_d B_d u_d + m s_q B_q u_q,      u_d = A_d x,  u_q = A_q x,      base = W x + b, or what it is given
    dz  = [s_d B_d, s_q B_q]^T dy                  (gradient at the rank-r bottleneck)
    dx  = W^T dy + A_d^T dz_d + A_q^T (m dz_q)     (the true derivative: the gates g do not enter)
    dA_d = (g_d dz_d)^T x,    dA_q = (g_q m dz_q)^T x
    dB_d = s_d dy^T (g_d u_d),  dB_q = s_q dy^T (g_q m u_q)

Gates act on *parameter* gradients. With `stop_gradient="branch"` they act on dx as well, which is what detaching a
branch's output computes; lower layers then train on a wrong derivative. Kept for replication only.
Identity: with m = g_d = g_q = 1 this is LoRA of rank r + r_quarantine.

Both blocks are one product with x and one that accumulates into W x, in place where W x was computed here, since
nothing else can hold it then. So no tensor as wide as the output is made besides the output, and none as wide as x
besides dx.
Saved for backward: x, which every linear that shares it saves too, and [u_d, m u_q], as narrow as the ranks.
"""

from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear

from gradroute._protocol import Block
from gradroute.adapters._checkpointing import ForwardRecord
from gradroute.errors import RouteError

_FEW_ROWS = 8
"""With fewer rows, joining the matrices of both blocks costs more than reading x and y twice."""


def fused_forward(  # noqa: PLR0917
    x: Float[Tensor, "*batch d_in"],
    dropped: Float[Tensor, "*batch d_in"] | None,
    output: Float[Tensor, "*batch d_out"] | None,
    weight: Float[Tensor, "d_out d_in"] | None,
    bias: Float[Tensor, " d_out"] | None,
    A_d: Tensor,
    B_d: Tensor,
    s_d: float,
    A_q: Tensor | None,
    B_q: Tensor | None,
    s_q: float,
    M: Float[Tensor, "rows ranks"] | None,
    M_zero: Bool[Tensor, "rows ranks"] | None,
    base_dtype: torch.dtype,
    compute: torch.dtype,
    *,
    without_graph: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, [u_d, m u_q], what the blocks read): without gradients, or inside the autograd function.

    Args:
        x, dropped, output, weight, bias: see `add_lora_blocks`.
        A_d, B_d, s_d, A_q, B_q, s_q: the blocks.
        M, M_zero: [1, m] in the columns of the blocks, and where it is zero; see `_weigh` for None.
        base_dtype, compute: the types that W x and the blocks are computed in.
        without_graph: [u_d, u_q] may be that of the deployed block alone; see `_plus` for half precision.
    """
    if output is None:
        assert weight is not None
        y = linear(_cast(x, base_dtype), _cast(weight, base_dtype), None if bias is None else _cast(bias, base_dtype))
    else:
        y = output
    entered = _cast(x if dropped is None else dropped, compute)
    rows = entered.reshape(-1, entered.shape[-1])
    if A_q is None or B_q is None:
        parts = [(_cast(A_d, compute), _cast(B_d, compute), s_d)]
    elif not torch.compiler.is_compiling() and few_rows(rows):
        blocks = (A_d, B_d, s_d), (A_q, B_q, s_q)
        parts = [(_cast(A, compute), _cast(B, compute), scaling) for A, B, scaling in blocks]
    else:
        parts = [(_joined_A(A_d, A_q, compute), *_joined_B(B_d, B_q, s_d, s_q, compute))]
    us = [linear(rows, A) for A, _, _ in parts]
    u = torch.cat(us, dim=1) if len(us) > 1 and not (without_graph and M_zero is None) else us[0]
    u = _weigh(M, M_zero, u)
    zs = us if M_zero is None else torch.split(u, [len(A) for A, _, _ in parts], dim=1)
    total = y.reshape(-1, y.shape[-1])
    if total.dtype != compute:
        # Two types are added in the wider one and rounded once, as PEFT does.
        total = total.to(torch.promote_types(total.dtype, compute))
    # Nobody else holds what was made here.
    in_place = output is None or total.dtype != y.dtype
    for bottleneck, (_, B, scaling) in zip(zs, parts, strict=True):
        z, B = _cast(bottleneck, total.dtype), _cast(B, total.dtype)  # noqa: PLW2901
        total = _plus(total, z, B, scaling, in_place=in_place, stepwise=A_q is None and without_graph)
        in_place = True
    # No view of something that was made in here: whoever gets it could not change it in place.
    return torch.ops.aten._unsafe_view(_cast(total, y.dtype), y.shape), u, entered


def plain_forward(
    x: Float[Tensor, "*batch d_in"], weight: Tensor, bias: Tensor | None, deployed: Block, quarantine: Block | None
) -> Float[Tensor, "*batch d_out"]:
    """W x + b + s_d B_d A_d x + s_q B_q A_q x, without gradients or gates and all in one type: what decoding needs."""
    y = linear(x, weight, bias)
    rows, total = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    A, B, scaling = deployed
    if quarantine is None:
        _plus(total, linear(rows, A), B, scaling, in_place=True, stepwise=True)
        return y
    total.addmm_(linear(rows, A), B.t(), alpha=scaling)
    A, B, scaling = quarantine
    total.addmm_(linear(rows, A), B.t(), alpha=scaling)
    return y


def _plus(total: Tensor, z: Tensor, B: Tensor, scaling: float, *, in_place: bool, stepwise: bool) -> Tensor:
    """total + scaling z B^T; in half precision `stepwise`, with the rounding of each step that PEFT makes.

    So the ablated view is bitwise the deployed block in stock PEFT, and an exported adapter is what was evaluated.
    """
    if stepwise and total.dtype.itemsize < 4:
        delta = linear(z, B).mul_(scaling)
        return total.add_(delta) if in_place else delta.add_(total)
    return total.addmm_(z, B.T, alpha=scaling) if in_place else torch.addmm(total, z, B.T, alpha=scaling)


def few_rows(x: Float[Tensor, "*batch d_in"]) -> bool:
    """Whether the blocks are multiplied one by one, as when one token of some rollouts is decoded."""
    return x.numel() < _FEW_ROWS * x.shape[-1]


def _weigh(weights: Tensor | None, zero: Tensor | None, values: Tensor) -> Tensor:
    """weights * values, and exactly zero where the weight is zero even if the value is not finite.

    Where `zero` is None all weights are 1; where only `weights` is None they are 1 where they are not 0.
    """
    if zero is None:
        return values
    if weights is None:
        return values.masked_fill(zero, 0.0)
    # The product is formed in the wider of the two types: an advantage rounded to bf16 would be off by 0.4 %.
    return _cast((weights * values).masked_fill_(zero, 0.0), values.dtype)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Asking first costs a tenth of a `Tensor.to` that has nothing to do.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _joined_A(A_d: Tensor, A_q: Tensor, compute: torch.dtype) -> Tensor:
    return torch.cat([_cast(A_d, compute), _cast(A_q, compute)])


def _joined_B(B_d: Tensor, B_q: Tensor, s_d: float, s_q: float, compute: torch.dtype) -> tuple[Tensor, float]:
    """[s_d B_d, s_q B_q] as a matrix and a factor; where the scalings are the same, the matrix is not multiplied."""
    B_d, B_q = _cast(B_d, compute), _cast(B_q, compute)
    if s_d == 0.0:
        return torch.cat([s_d * B_d, s_q * B_q], dim=1), 1.0
    return torch.cat([B_d, B_q if s_q == s_d else (s_q / s_d) * B_q], dim=1), s_d


class QuarantineLoraFunction(torch.autograd.Function):
    """`fused_forward` with the derivatives above.

    Whoever wants what backward works with, and not compute it again, sets `observer` on an output's `grad_fn`: it is
    called with what the blocks read, dy (a row per token each, in the type of the products), u_d and dz_d.
    """

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        output: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        A_d: Tensor,
        B_d: Tensor,
        s_d: float,
        A_q: Tensor | None,
        B_q: Tensor | None,
        s_q: float,
        M: Tensor | None,
        M_zero: Tensor | None,
        G: Tensor | None,
        G_zero: Tensor | None,
        base_dtype: torch.dtype,
        compute: torch.dtype,
        branch: bool,
        record: ForwardRecord | None,
        state_id: Tensor | None,
    ) -> Tensor:
        y, u, entered = fused_forward(
            x, dropped, output, weight, bias, A_d, B_d, s_d, A_q, B_q, s_q, M, M_zero, base_dtype, compute,
            without_graph=False,
        )  # fmt: skip
        read = x if dropped is None else dropped
        # Of one tensor in two types the narrower is kept; a cast costs less than memory.
        kept = entered if entered.dtype.itemsize < read.dtype.itemsize else read
        needs_A, needs_B = (
            ctx.needs_input_grad[5] or ctx.needs_input_grad[8],
            ctx.needs_input_grad[6] or ctx.needs_input_grad[9],
        )
        ctx.save_for_backward(kept if needs_A else None, u if needs_B else None, weight, A_d, B_d, A_q, B_q, state_id)
        # Gates are kept apart from the saved tensors: those come back from a checkpoint recomputation, which may have
        # run under other gates; `check_backward` compares the two states and raises.
        ctx.gates, ctx.scalings, ctx.branch, ctx.record = (M, M_zero, G, G_zero), (s_d, s_q), branch, record
        ctx.types, ctx.shape, ctx.dtypes = (base_dtype, compute), x.shape, (x.dtype, read.dtype)
        ctx.is_dropped, ctx.observer = dropped is not None, None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Not `once_differentiable`: that lets a gradient through as a constant where dy is one, as under a linear loss.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RouteError(
                "A routed layer cannot be differentiated twice. Found a double backward (create_graph=True). "
                "Fix: create_graph=False."
            )
        *saved, state_id = ctx.saved_tensors  # read once: a checkpoint lets go of them
        if ctx.record is not None:
            ctx.record.check_backward(state_id)
        device = dy.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if autocast else nullcontext():
            return _backward(ctx, dy, *saved)


def _backward(  # noqa: PLR0917
    ctx: Any,
    dy: Tensor,
    entered: Tensor | None,
    u: Tensor | None,
    weight: Tensor | None,
    A_d: Tensor,
    B_d: Tensor,
    A_q: Tensor | None,
    B_q: Tensor | None,
) -> tuple[Tensor | None, ...]:
    (M, M_zero, G, G_zero), (s_d, s_q), (base_dtype, compute) = ctx.gates, ctx.scalings, ctx.types
    needs = ctx.needs_input_grad
    need_x, need_dropped, need_A, need_B = needs[0], needs[1], (needs[5], needs[8]), (needs[6], needs[9])
    rank = A_d.shape[0]
    dy_rows = dy.reshape(-1, dy.shape[-1])
    dy_blocks = _cast(dy_rows, compute)
    dx = d_dropped = None
    dA: tuple[Tensor | None, Tensor | None] = (None, None)
    dB = dA

    if need_x and weight is not None:
        dx = _cast(dy_rows, base_dtype) @ _cast(weight, base_dtype)
    if need_dropped or (need_x and not ctx.is_dropped) or any(need_A):
        B, scaling = (_cast(B_d, compute), s_d) if B_q is None else _joined_B(B_d, B_q, s_d, s_q, compute)
        du = _weigh(M, M_zero, _scaled(dy_blocks @ B, scaling))
        if ctx.observer is not None and entered is not None and u is not None:
            ctx.observer(entered, dy_blocks, u[:, :rank], du[:, :rank])
        # G weighs du, which already carries m: the quarantine's own derivative, times its gate.
        gated = _weigh(G, G_zero, du) if any(need_A) or ctx.branch else du
        if any(need_A):
            assert entered is not None
            both = gated.T @ _cast(entered.reshape(-1, entered.shape[-1]), compute)
            dA = (both[:rank] if need_A[0] else None, both[rank:] if need_A[1] else None)
        du = gated if ctx.branch else du
        if need_dropped or not ctx.is_dropped:
            A = _cast(A_d, compute) if A_q is None else _joined_A(A_d, A_q, compute)
            if need_dropped:
                d_dropped = du @ A
            elif need_x:
                dx = du @ A if dx is None else _plus_product(dx, du, A)
    if any(need_B):
        assert u is not None
        both = dy_blocks.T @ _weigh(G, G_zero, u)
        dB = (s_d * both[:, :rank] if need_B[0] else None, s_q * both[:, rank:] if need_B[1] else None)

    x_dtype, read_dtype = ctx.dtypes
    return (
        None if dx is None else _cast(dx, x_dtype).reshape(ctx.shape),
        None if d_dropped is None else _cast(d_dropped, read_dtype).reshape(ctx.shape),
        dy if needs[2] else None,
        None, None, _as(dA[0], A_d), _as(dB[0], B_d), None, _as(dA[1], A_q), _as(dB[1], B_q), *[None] * 10,
    )  # fmt: skip


def _scaled(values: Tensor, scaling: float) -> Tensor:
    return values if scaling == 1.0 else values.mul_(scaling)


def _plus_product(dx: Tensor, du: Tensor, A: Tensor) -> Tensor:
    return (
        dx.addmm_(du, A) if dx.dtype == du.dtype else torch.addmm(dx.to(torch.promote_types(dx.dtype, du.dtype)), du, A)
    )


def _as(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else _cast(gradient, parameter.dtype)
