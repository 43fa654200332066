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
nothing else can hold it then. So the only tensor as wide as the output is the output, and the only one as wide as x is
dx.
Saved for backward: x, which every linear that shares it saves too, and [u_d, m u_q], as narrow as the ranks.

Where a gate is zero, u and dz are filled with zero, so one that overflowed contributes nothing. A row whose x or dy is
itself not finite reaches dA or dB of both blocks, as it would in plain LoRA.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from gradroute._protocol import Block
from gradroute._torch_private import unsafe_view
from gradroute.adapters._checkpointing import ForwardRecord
from gradroute.adapters._gates import Columns, Gates, Undecided
from gradroute.adapters._products import (
    autocast_type,
    cast,
    few_rows,
    joined_A,
    joined_B,
    plus,
    plus_product,
    weigh,
)
from gradroute.errors import RouteError

Linear = tuple[Tensor, Tensor | None]
"""(weight, bias) of a frozen nn.Linear."""


class Setting(NamedTuple):
    """Everything that the operation depends on, except for the tensors that it may be differentiated by.

    Args:
        base: weight and bias of the frozen linear, if W x + b is computed here.
        s_d, s_q: the scalings of the blocks.
        M: [1, m] in the columns of the blocks; None for 1.
        G: [g_d, g_q] in the columns of the blocks; None for 1. What is not decided yet is read in backward.
        base_dtype, compute: the types that W x and the blocks are computed in.
        branch: whether G weighs dx too.
        record: the forward's, compared with the state in backward.
    """

    base: Linear | None
    s_d: float
    s_q: float
    M: Columns | None
    G: Columns | Undecided | None
    base_dtype: torch.dtype
    compute: torch.dtype
    branch: bool = False
    record: ForwardRecord | None = None


class Factors(NamedTuple):
    """The matrices of both blocks; those of the quarantine are None where it adds nothing."""

    A_d: Float[Tensor, "r d_in"]
    B_d: Float[Tensor, "d_out r"]
    A_q: Float[Tensor, "r_q d_in"] | None
    B_q: Float[Tensor, "d_out r_q"] | None


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
    bottlenecks: list[Tensor] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """base + s_d B_d A_d x + m s_q B_q A_q x, for gates that are known to fit.

    Args:
        x: input of the layer.
        base: output of the frozen layer, which is not written to; or its weight and bias: W x + b is then computed
            here and accumulated into.
        deployed, quarantine: the blocks; a quarantine of None adds nothing, and there are no gates then.
        gates, branch: see `quarantine_lora`.
        dropped: the input of the blocks, where it is not x.
        record: ties the backward to the state of its forward, so that a recomputation in another one raises.
        bottlenecks: where a forward without gradients leaves [A_d x, ...], the first r columns of its tokens.
    """
    output, linear_of_base = (base, None) if isinstance(base, Tensor) else (None, base)
    A_d, B_d, s_d = deployed
    A_q, B_q, s_q = quarantine or (None, None, 0.0)
    autocast = autocast_type(x)
    compute = autocast or A_d.dtype
    base_dtype = compute if linear_of_base is None or autocast is not None else linear_of_base[0].dtype
    M, G = (None, None) if A_q is None else gates.columns(A_d.shape[0], A_q.shape[0], compute)
    setting = Setting(linear_of_base, s_d, s_q, M, G, base_dtype, compute, branch, record)
    with nullcontext() if autocast is None else torch.autocast(x.device.type, enabled=False):
        if not torch.is_grad_enabled():
            y, u, _ = _forward(x, dropped, output, Factors(A_d, B_d, A_q, B_q), setting, without_graph=True)
            if bottlenecks is not None:
                bottlenecks.append(u)
        else:
            y = QuarantineLoraFunction.apply(x, dropped, output, A_d, B_d, A_q, B_q, setting)  # type: ignore[no-untyped-call]
    return y


def _forward(
    x: Float[Tensor, "*batch d_in"],
    dropped: Float[Tensor, "*batch d_in"] | None,
    output: Float[Tensor, "*batch d_out"] | None,
    factors: Factors,
    setting: Setting,
    *,
    without_graph: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, [u_d, m u_q], what the blocks read): without gradients, or inside the autograd function.

    `without_graph`: [u_d, u_q] may be that of the deployed block alone; see `plus` for half precision.
    """
    (A_d, B_d, A_q, B_q), (base, s_d, s_q, M, _, base_dtype, compute, _, _) = factors, setting
    eager = not torch.compiler.is_compiling()
    if output is None:
        assert base is not None
        weight, bias = base
        y = linear(cast(x, base_dtype), cast(weight, base_dtype), None if bias is None else cast(bias, base_dtype))
    else:
        y = output
    block_input = cast(x if dropped is None else dropped, compute)
    rows = block_input.reshape(-1, block_input.shape[-1])
    if A_q is None or B_q is None:
        parts = [(cast(A_d, compute), cast(B_d, compute), s_d)]
    elif eager and few_rows(rows):
        blocks = (A_d, B_d, s_d), (A_q, B_q, s_q)
        parts = [(cast(A, compute), cast(B, compute), scaling) for A, B, scaling in blocks]
    else:
        parts = [(joined_A(A_d, A_q, compute), *joined_B(B_d, B_q, s_d, s_q, compute))]
    us = [linear(rows, A) for A, _, _ in parts]
    u = us[0] if len(us) == 1 or (without_graph and M is None) else torch.cat(us, dim=1)
    u = weigh(M, u, in_place=True)
    if len(us) == 1:
        us = [u]
    elif M is not None:
        us = [u[:, : len(A_d)], u[:, len(A_d) :]]
    total = y.reshape(-1, y.shape[-1])
    if total.dtype != compute:
        # Two types are added in the wider one and rounded once, as PEFT does.
        total = total.to(torch.promote_types(total.dtype, compute))
    # Nobody else holds what was made here.
    in_place = output is None or total.dtype != y.dtype
    written = in_place and total.dtype == y.dtype
    for bottleneck, (_, B, scaling) in zip(us, parts, strict=True):
        z, B = cast(bottleneck, total.dtype), cast(B, total.dtype)  # noqa: PLW2901
        total = plus(total, z, B, scaling, in_place=in_place, stepwise=A_q is None and without_graph)
        in_place = True
    # No view of something that was made in here: its caller could not change it in place.
    if written and eager and not y._is_view():
        return y, u, block_input
    return unsafe_view(cast(total, y.dtype), y.shape), u, block_input


class QuarantineLoraFunction(torch.autograd.Function):
    """The operation with the derivatives above.

    Set `y.grad_fn.observer = f` to receive f(x, dy, u_d, dz_d) from backward instead of recomputing them: what the
    blocks read, and a row per token of the others, in the type of the products.
    """

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        output: Tensor | None,
        A_d: Tensor,
        B_d: Tensor,
        A_q: Tensor | None,
        B_q: Tensor | None,
        setting: Setting,
    ) -> Tensor:
        y, u, block_input = _forward(x, dropped, output, Factors(A_d, B_d, A_q, B_q), setting, without_graph=False)
        read = x if dropped is None else dropped
        # Of one tensor in two types the narrower is kept; a cast costs less than memory.
        kept = block_input if block_input.dtype.itemsize < read.dtype.itemsize else read
        _, _, _, need_A_d, need_B_d, need_A_q, need_B_q, _ = ctx.needs_input_grad
        weight = None if setting.base is None else setting.base[0]
        state_id = None if setting.record is None else setting.record.state.id
        ctx.save_for_backward(
            kept if need_A_d or need_A_q else None, u if need_B_d or need_B_q else None, weight, state_id,
            A_d, B_d, A_q, B_q,
        )  # fmt: skip
        # The gates are kept apart from the saved tensors: those come back from a checkpoint's recomputation, which may
        # have run under other gates; `check_backward` compares the two states and raises.
        ctx.setting, ctx.shape, ctx.dtypes = setting, x.shape, (x.dtype, read.dtype)
        ctx.is_dropped, ctx.observer = dropped is not None, None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Not `once_differentiable`: that lets a gradient through as a constant where dy is one, as under a linear loss.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RouteError(
                "A routed layer cannot be differentiated twice. Found a double backward. Fix: create_graph=False."
            )
        block_input, u, weight, state_id, *factors = ctx.saved_tensors  # read once: a checkpoint lets go of them
        if ctx.setting.record is not None:
            ctx.setting.record.check_backward(state_id)
        with nullcontext() if autocast_type(dy) is None else torch.autocast(dy.device.type, enabled=False):
            return _backward(ctx, dy, block_input, u, weight, Factors(*factors))


def _backward(  # noqa: PLR0917
    ctx: Any, dy: Tensor, block_input: Tensor | None, u: Tensor | None, weight: Tensor | None, factors: Factors
) -> tuple[Tensor | None, ...]:
    (A_d, B_d, A_q, B_q), (_, s_d, s_q, M, G, base_dtype, compute, branch, _) = factors, ctx.setting
    G = G.columns() if isinstance(G, Undecided) else G
    need_x, need_dropped, need_output, need_A_d, need_B_d, need_A_q, need_B_q, _ = ctx.needs_input_grad
    need_A, need_B = need_A_d or need_A_q, need_B_d or need_B_q
    rank = A_d.shape[0]
    dy_rows = dy.reshape(-1, dy.shape[-1])
    dy_blocks = cast(dy_rows, compute)
    dx = d_dropped = dA_d = dB_d = dA_q = dB_q = None

    if need_x and weight is not None:
        dx = cast(dy_rows, base_dtype) @ cast(weight, base_dtype)
    if need_dropped or (need_x and not ctx.is_dropped) or need_A:
        B, scaling = (cast(B_d, compute), s_d) if B_q is None else joined_B(B_d, B_q, s_d, s_q, compute)
        dz = dy_blocks @ B
        dz = weigh(M, dz if scaling == 1.0 else dz.mul_(scaling), in_place=True)
        if ctx.observer is not None and block_input is not None and u is not None:
            ctx.observer(block_input, dy_blocks, u[:, :rank], dz[:, :rank])
        # G weighs dz, which already carries m: the quarantine's own derivative, times its gate.
        gated = weigh(G, dz) if need_A or branch else dz
        if need_A:
            assert block_input is not None
            both = gated.T @ cast(block_input.reshape(-1, block_input.shape[-1]), compute)
            dA_d, dA_q = (both[:rank] if need_A_d else None), (both[rank:] if need_A_q else None)
        dz = gated if branch else dz
        if need_dropped or not ctx.is_dropped:
            A = cast(A_d, compute) if A_q is None else joined_A(A_d, A_q, compute)
            if need_dropped:
                d_dropped = dz @ A
            elif need_x:
                dx = dz @ A if dx is None else plus_product(dx, dz, A)
    if need_B:
        assert u is not None
        both = dy_blocks.T @ weigh(G, u)
        dB_d, dB_q = (s_d * both[:, :rank] if need_B_d else None), (s_q * both[:, rank:] if need_B_q else None)

    x_dtype, read_dtype = ctx.dtypes
    return (
        None if dx is None else cast(dx, x_dtype).reshape(ctx.shape),
        None if d_dropped is None else cast(d_dropped, read_dtype).reshape(ctx.shape),
        dy if need_output else None,
        _as(dA_d, A_d), _as(dB_d, B_d), _as(dA_q, A_q), _as(dB_q, B_q), None,
    )  # fmt: skip


def _as(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return None if gradient is None or parameter is None else cast(gradient, parameter.dtype)
