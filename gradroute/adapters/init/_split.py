"""The split that makes oriented blocks start at zero net delta.

    A = [V; 0],  B = [0, U]:      B A = 0 V + U 0 = 0, bitwise
    dB = s dy (V x)^T on V's columns,   dA = s (U^T dy) x^T on U's rows:   half of each block's gradient is not zero

V has ceil(r / 2) rows and U floor(r / 2) columns, so r >= 2. With B = 0 alone only input directions could be chosen.
The rows of a frame are dealt out to the blocks, completed to an orthonormal frame, or drawn.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._protocol import BLOCKS, Block, BlockName, RoutedLayer, routed_layers
from gradroute._sharding import is_split, wide
from gradroute.errors import GradRouteError, RouteError, TargetError


class Frame(NamedTuple):
    """n = ceil(r / 2) input and output directions of one block; with odd r the last output direction is not used."""

    V: Float[Tensor, "n d_in"]
    U: Float[Tensor, "n d_out"]


Differences = Mapping[str, Float[Tensor, "_ _"]]
"""Module name -> (pairs, d_in): input of the hack minus input of the clean side of each pair."""

FrameFn = Callable[[str, Tensor, int, int], tuple[Frame, Frame]]
"""(module name, W, n_deployed, n_quarantine) -> the frames of both blocks."""


def initialise_split(model: nn.Module, frames: FrameFn) -> nn.Module:
    """Write A = [V; 0] and B = [0, U] into both blocks of every routed layer, in place; returns `model`.

    Args:
        model: with routed layers of LoRA matrices.
        frames: the directions of one layer, given its weight in float32 or wider.

    Raises:
        TargetError: a rank below 2, a layer whose blocks are no LoRA matrices, or a weight that is not finite.
        RouteError: inside a route or view, or while the blocks are merged.
        GradRouteError: whatever `frames` raises, with the module's name before it.
    """
    layers = routed_layers(model)
    for name, layer in layers.items():
        if layer.has_open_route or layer.view != "on" or layer.merged:
            raise RouteError(
                f"`{name}` should be initialised outside of routes and views, and unmerged. Found: view {layer.view}, "
                f"route open {layer.has_open_route}. Fix: leave the block, or unmerge, first."
            )
    # Everything is computed before anything is written: an error in the last layer leaves no half-initialised model.
    written: list[tuple[nn.Parameter, Tensor]] = []
    with torch.no_grad():
        for name, layer in layers.items():
            try:
                written += _split(name, layer, frames)
            except GradRouteError as error:
                raise type(error)(f"Module `{name}`: {error}") from error
        for parameter, values in written:
            parameter.copy_(values)
    return model


def _split(name: str, layer: RoutedLayer, frames: FrameFn) -> list[tuple[nn.Parameter, Tensor]]:
    """A = [V; 0] and B = [0, U] of both blocks, next to the parameters they are for."""
    matrices = [_matrices(layer, block) for block in BLOCKS]
    n_deployed, n_quarantine = (math.ceil(A.shape[0] / 2) for A, _ in matrices)
    weight = layer.base_weight()
    if weight.is_meta or not torch.isfinite(weight).all():
        raise TargetError("its frozen weight is on the meta device or not finite. Fix: load the model first.")
    written = []
    for (A, B), (V, U) in zip(matrices, frames(name, wide(weight), n_deployed, n_quarantine), strict=True):
        new_A, new_B = torch.zeros_like(A), torch.zeros_like(B)
        new_A[: len(V)] = V
        new_B[:, len(V) :] = rearrange(U[: B.shape[1] - len(V)], "n d_out -> d_out n")
        written += [(A, new_A), (B, new_B)]
    return written


def _matrices(layer: RoutedLayer, block: BlockName) -> tuple[nn.Parameter, nn.Parameter]:
    values: Block = layer.deployed if block == "deployed" else layer.quarantine
    parameters = tuple(layer.block_parameters(block))
    if len(parameters) != 2 or parameters[0] is not values.A or parameters[1] is not values.B:
        raise TargetError(
            f"a {type(layer).__name__} does not train A and B themselves, so they cannot be set. "
            'Fix: attach(..., parametrization="lora").'
        )
    if is_split(layer):
        raise TargetError(f"the {block} block is sharded: ranks would write parts. Fix: initialise first, shard then.")
    if values.A.shape[0] < 2:
        raise TargetError(f"the {block} block should have rank 2 or more, for V and for U. Found {values.A.shape[0]}.")
    return parameters[0], parameters[1]


def alternate(
    V: Float[Tensor, "n d_in"], U: Float[Tensor, "n d_out"], n_deployed: int, n_quarantine: int
) -> tuple[Frame, Frame]:
    """Ranks 0, 2, ... and 1, 3, ...; once the smaller block is full, the other takes the rest."""
    ranks = list(range(n_deployed + n_quarantine))
    pairs = min(n_deployed, n_quarantine)
    even, odd, rest = ranks[: 2 * pairs : 2], ranks[1 : 2 * pairs : 2], ranks[2 * pairs :]
    deployed = even + rest if n_deployed > n_quarantine else even
    quarantine = odd if n_deployed > n_quarantine else odd + rest
    return Frame(V[deployed], U[deployed]), Frame(V[quarantine], U[quarantine])


def completed(first: Float[Tensor, " d"], count: int, generator: torch.Generator) -> Float[Tensor, "count d"]:
    """`first`, and count - 1 random orthonormal rows orthogonal to it."""
    d = len(first)
    if count > d:
        raise TargetError(f"{count} orthogonal directions were asked in {d} dimensions. Fix: lower r or r_quarantine.")
    columns = torch.cat([first[:, None], normal(d, count - 1, generator, first)], dim=1)
    others = rearrange(torch.linalg.qr(columns).Q[:, 1:], "d n -> n d")
    return torch.cat([first[None], others])


def normal(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Float[Tensor, "{rows} {columns}"]:
    # Drawn on the CPU in float32, so that a seed gives the same model on every device and in every dtype.
    return torch.randn(rows, columns, generator=generator, device="cpu", dtype=torch.float32).to(like)


def unit(rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    lengths: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / lengths


def paired(D: Tensor, W: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "pairs d_in"]:
    """The differences of one module, in the type of its weight."""
    if D.ndim != 2 or D.shape[1] != W.shape[1]:
        raise GradRouteError(
            f"`differences` should be {W.shape[1]} wide, like its input. Found {tuple(D.shape)}. "
            'Fix: extract with features="input" and give Directions.differences().'
        )
    if len(D) < 1 or not torch.isfinite(D).all():
        bad = int((~torch.isfinite(D)).sum())
        raise GradRouteError(
            f"`differences` should be finite, of one pair or more. Found {len(D)} pairs, {bad} bad values."
        )
    return D.detach().to(W)


def check_names(model: nn.Module, differences: Differences) -> None:
    layers = routed_layers(model)
    missing, unknown = [n for n in layers if n not in differences], [n for n in differences if n not in layers]
    if missing or unknown:
        raise GradRouteError(
            f"`differences` should name every routed module and no other. Missing: {missing[:5]}; unknown: "
            f"{unknown[:5]}. Fix: extract the directions from this model."
        )
