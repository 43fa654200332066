"""The products that a routed layer is made of: weighed, cast and joined, each as few times as the types allow.

weigh     weights * values, exactly zero where the weight is zero
joined    [A_d; A_q] and [s_d B_d, s_q B_q]: both blocks in one product
plain     W x + b + s_d B_d A_d x + s_q B_q A_q x, all in one type

A routed layer may compute W x itself and accumulate into the result, instead of calling its base layer, where the base
is nn.Linear itself, its weight is an ordinary frozen tensor, and nobody would notice that its forward was not called:
no hook on it, no forward put on the instance (as offloading does), not compiled.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from gradroute._protocol import Block
from gradroute._torch_private import forward_is_watched
from gradroute.adapters._gates import Columns

_FEW_ROWS = 8
"""With fewer rows, joining the matrices of both blocks costs more than reading x and y twice."""

_PLAIN = (Tensor, nn.Parameter)
_AUTOCAST = {torch.float32, torch.bfloat16, torch.float16}


def frozen_linear(base: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of a base layer whose forward is F.linear(x, weight, bias) and nothing else; None for others."""
    if type(base) is not nn.Linear or forward_is_watched(base):
        return None
    parameters = base._parameters
    if "weight" not in parameters or "bias" not in parameters:
        return None  # FSDP1 keeps them elsewhere
    weight, bias = parameters["weight"], parameters["bias"]
    # A subclass (DTensor, quantised) defines another product; a trained weight needs a gradient.
    ordinary = weight is not None and type(weight) in _PLAIN and not weight.requires_grad and type(x) in _PLAIN
    if not ordinary or (bias is not None and (type(bias) not in _PLAIN or bias.requires_grad)):
        return None
    assert weight is not None
    if x.dtype == weight.dtype and x.is_floating_point():
        return weight, bias
    # Autocast leaves float64 as it is.
    return (weight, bias) if autocast_type(x) is not None and {x.dtype, weight.dtype} <= _AUTOCAST else None


def autocast_type(x: Tensor) -> torch.dtype | None:
    """The type that autocast would compute in now, if it is on."""
    device = x.device.type
    if device == "cpu":
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def plain_forward(  # noqa: PLR0917
    x: Float[Tensor, "*batch d_in"],
    weight: Tensor,
    bias: Tensor | None,
    deployed: Block,
    quarantine: Block | None,
    bottlenecks: list[Tensor] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """W x + b + s_d B_d A_d x + s_q B_q A_q x, without gradients or gates and all in one type, as in decoding."""
    y, alone = linear(x, weight, bias), quarantine is None
    # One row: a vector costs less than a matrix of one row. In half precision its sums would be rounded at each step.
    one_row = x.numel() == x.shape[-1] and y.dtype.itemsize >= 4
    rows, total = (x.reshape(-1), y.view(-1)) if one_row else (x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
    us = []
    for A, B, scaling in (deployed,) if quarantine is None else (deployed, quarantine):
        if one_row:
            u = torch.mv(A, rows)
            total.addmv_(B, u, alpha=scaling)
        else:
            u = linear(rows, A)
            plus(total, u, B, scaling, in_place=True, stepwise=alone)
        us.append(u)
    if bottlenecks is not None:
        bottlenecks.append(us[0].view(-1, us[0].shape[-1]))
    return y


def plus(total: Tensor, z: Tensor, B: Tensor, scaling: float, *, in_place: bool, stepwise: bool) -> Tensor:
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


def weigh(columns: Columns | None, values: Tensor, *, in_place: bool = False) -> Tensor:
    """weights * values, and exactly zero where the weight is zero even if the value is not finite."""
    if columns is None:
        return values
    weights, bits = columns
    if weights is not None:
        # The product is formed in the wider of the two types: an advantage rounded to bf16 would be off by 0.4 %.
        values, in_place = cast(weights * values, values.dtype), True
    if in_place:
        values.view(bits.dtype).bitwise_and_(bits)
        return values
    return (values.view(bits.dtype) & bits).view(values.dtype)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Asking first costs a tenth of a `Tensor.to` that has nothing to do.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def joined_A(A_d: Tensor, A_q: Tensor, compute: torch.dtype) -> Tensor:
    return torch.cat([cast(A_d, compute), cast(A_q, compute)])


def joined_B(B_d: Tensor, B_q: Tensor, s_d: float, s_q: float, compute: torch.dtype) -> tuple[Tensor, float]:
    """[s_d B_d, s_q B_q] as a matrix and a factor; where the scalings are the same, the matrix is not multiplied."""
    B_d, B_q = cast(B_d, compute), cast(B_q, compute)
    if s_d == 0.0:
        return torch.cat([s_d * B_d, s_q * B_q], dim=1), 1.0
    return torch.cat([B_d, B_q if s_q == s_d else (s_q / s_d) * B_q], dim=1), s_d


def plus_product(dx: Tensor, dz: Tensor, A: Tensor) -> Tensor:
    return (
        dx.addmm_(dz, A) if dx.dtype == dz.dtype else torch.addmm(dx.to(torch.promote_types(dx.dtype, dz.dtype)), dz, A)
    )
