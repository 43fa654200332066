"""Per-rollout gradients of the deployed block of one layer, from what its forward and its backward see.

    LoRA    G_A = sum_t dz_t^T x_t,    G_B = sum_t dy_t^T (s u_t),      u = A x,  dy = dL/dy,  dz = s B^T dy
    gain    sum_t u_t * (dy_t @ readout)                                r wide; readout = s B for LoRA
    ghost   <G_A, V_A> + <G_B, V_B> = s sum_t (B^T dy_t)^T V_A x_t + dy_t^T V_B u_t

A rollout is a row of the batch, t its tokens. The ghost product never forms G: it keeps 2 r numbers per token until the
backward. Source: Goodfellow 2015 (arXiv:1510.01799) for norms, "ghost clipping"; here for inner products with a fixed
V. Per-sample gradients as in Opacus; the gain is "route 2" of the founding commit (wassname).
"""

from collections.abc import Callable
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._protocol import RoutedLayer
from gradroute._sharding import size_of, whole, wide
from gradroute.errors import GradRouteError

FromDelta = Callable[[Float[Tensor, "batch *seq d_out"]], Float[Tensor, "batch d_feature"]]
"""Reads the features of each rollout from dL/dy."""
Factors = tuple[Tensor, Tensor]
"""`left` (batch, tokens, p) and `right` (batch, tokens, q) of the matrices sum_t left_t^T right_t, one per rollout."""


def block_kind(name: str, layer: nn.Module) -> Literal["gain", "lora"]:
    """The kind of parameters that the deployed block of layer `name` trains.

    Raises:
        GradRouteError: neither the matrices A and B themselves nor gains.
    """
    assert isinstance(layer, RoutedLayer)
    if type(layer).gain_readout is not RoutedLayer.gain_readout:
        return "gain"  # only such a layer defines a read-out
    trained, block = list(layer.block_parameters("deployed")), layer.deployed
    if len(trained) != 2 or trained[0] is not block.A or trained[1] is not block.B:
        raise GradRouteError(
            f"`{name}` should train LoRA matrices or gains. Found a {type(layer).__name__} with {len(trained)} "
            "deployed parameters. Fix: exclude it."
        )
    return "lora"


def check_width(name: str, found: int, width: int) -> None:
    """Raise unless directions of layer `name`, `found` wide, are as wide as what they are to act on."""
    if found != width:
        raise GradRouteError(
            f"`directions` of `{name}` should be {width} wide. Found {found}. Fix: extract them from this model, with "
            "features that are as wide."
        )


def sum_over_tokens(tokens: Float[Tensor, "batch *seq d"]) -> Float[Tensor, "batch d"]:
    """Sum over all axes between the first and the last."""
    return tokens.flatten(1, -2).sum(1) if tokens.ndim > 2 else tokens


def lora_factors(x: Tensor, dy: Tensor, u: Tensor, dz: Tensor, scaling: float) -> tuple[Factors, Factors]:
    """The factors of G_A and of G_B; a route's g_d belongs on u and dz."""
    return (dz, x), (dy, scaling * u)


def formed(factors: Factors) -> Float[Tensor, "batch p q"]:
    """sum_t left_t^T right_t of each rollout."""
    left, right = factors
    return left.mT @ right


def gain_sum(
    u: Float[Tensor, "batch *seq r"], dy: Float[Tensor, "batch *seq d_out"], readout: Float[Tensor, "d_out r"]
) -> Float[Tensor, "batch r"]:
    """sum_t u_t * (dy_t @ readout)."""
    return sum_over_tokens(u * (dy @ readout.detach().to(dy.dtype)))


def gain_gradient(layer: RoutedLayer, x: Float[Tensor, "batch *seq d_in"]) -> FromDelta:
    """The gradient of each rollout for a diagonal gain on the bottleneck; of a layer that trains gains, theirs."""
    x = wide(x)
    u = x @ wide(whole(layer.deployed.A)).to(x.dtype).T
    return lambda dy: gain_sum(u, dy, layer.gain_readout)


def parameter_gradient(name: str, layer: RoutedLayer, x: Float[Tensor, "batch *seq d_in"]) -> FromDelta:
    """[G_A, G_B] of each rollout, flattened: r d_in + d_out r wide; of a layer that trains gains, their gradient."""
    if block_kind(name, layer) == "gain":
        return gain_gradient(layer, x)
    (A, B, scaling), x = layer.deployed.whole(name), _tokens(wide(x))

    def read(dy: Tensor) -> Tensor:
        dy = _tokens(dy)
        dz = scaling * (dy @ B.to(dy.dtype))
        factors = lora_factors(x, dy, x @ A.to(x.dtype).T, dz, scaling)
        return torch.cat([formed(each).flatten(1) for each in factors], dim=1)

    return read


def ghost_product(
    name: str, layer: RoutedLayer, x: Float[Tensor, "batch *seq d_in"], V: Float[Tensor, " d_feature"]
) -> FromDelta:
    """<[G_A, G_B], V> of each rollout, one number; equal to `parameter_gradient(...) @ V`."""
    check_width(name, len(V), sum(size_of(p) for p in layer.block_parameters("deployed")))
    if block_kind(name, layer) == "gain":
        gradient = gain_gradient(layer, x)
        return lambda dy: gradient(dy) @ V.to(dy)[:, None]
    (A, B, scaling), x = layer.deployed.whole(name), wide(x)
    V_A, V_B = torch.split(V.to(x), [A.numel(), B.numel()])
    u = x @ A.to(x.dtype).T
    V_x = x @ rearrange(V_A, "(r d_in) -> d_in r", r=len(A))
    V_B = rearrange(V_B, "(d_out r) -> d_out r", r=len(A))

    def read(dy: Tensor) -> Tensor:
        products = (dy @ V_B.to(dy)) * u + (dy @ B.to(dy.dtype)) * V_x
        return scaling * sum_over_tokens(products).sum(1, keepdim=True)

    return read


def _tokens(x: Float[Tensor, "batch *seq d"]) -> Float[Tensor, "batch tokens d"]:
    return x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
