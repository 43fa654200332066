"""Per-rollout gradients of one routed layer, from what its forward and its backward see: x, u = A x, delta = dL/dy.

    gain        u * (delta @ readout)                                  (r wide; readout = s B for LoRA)
    parameter   G_A = s sum_t (B^T delta_t) x_t^T,   G_B = s sum_t delta_t u_t^T      (one gradient per rollout)
    ghost       <G_A, V_A> + <G_B, V_B> = s sum_t (B^T delta_t)^T V_A x_t + delta_t^T V_B u_t

The ghost product never forms G: it keeps 2 r numbers per token until the backward. Source: Goodfellow 2015
(arXiv:1510.01799) for norms, "ghost clipping"; here for inner products with a fixed V.
"""

from collections.abc import Callable

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._protocol import RoutedLayer
from gradroute.directions._reading import wide
from gradroute.errors import GradRouteError

FromDelta = Callable[[Float[Tensor, "batch *seq d_out"]], Float[Tensor, "batch d_feature"]]
"""Reads the features of each rollout from dL/dy."""


def sum_over_tokens(tokens: Float[Tensor, "batch *seq d"]) -> Float[Tensor, "batch d"]:
    """Sum over all axes between the first and the last."""
    return tokens.flatten(1, -2).sum(1) if tokens.ndim > 2 else tokens


def gain_gradient(module: nn.Module, x: Float[Tensor, "batch *seq d_in"]) -> FromDelta:
    """sum_t u_t * (delta_t @ gain_readout), r wide."""
    layer = _routed(module)
    bottleneck = wide(x) @ wide(layer.deployed.A).to(wide(x).dtype).T
    return lambda delta: sum_over_tokens(bottleneck * (delta @ layer.gain_readout.detach().to(delta.dtype)))


def parameter_gradient(module: nn.Module, x: Float[Tensor, "batch *seq d_in"]) -> FromDelta:
    """[G_A, G_B] of each rollout, flattened: r d_in + d_out r wide; of a layer that trains gains, their gradient."""
    if _trains_gains(module):
        return gain_gradient(module, x)
    A, B, scaling = _matrices(module)
    x = _tokens(wide(x))

    def read(delta: Tensor) -> Tensor:
        delta = scaling * _tokens(delta)
        G_A = einsum(delta @ B.to(delta.dtype), x, "b t r, b t d_in -> b r d_in")
        G_B = einsum(delta, x @ A.to(x.dtype).T, "b t d_out, b t r -> b d_out r")
        return torch.cat([G_A.flatten(1), G_B.flatten(1)], dim=1)

    return read


def ghost_product(module: nn.Module, x: Float[Tensor, "batch *seq d_in"], V: Float[Tensor, " d_feature"]) -> FromDelta:
    """<[G_A, G_B], V> of each rollout, one number; equal to `parameter_gradient(...) @ V`."""
    width = sum(p.numel() for p in _routed(module).block_parameters("deployed"))
    if len(V) != width:
        raise GradRouteError(f"`directions` should be {width} wide here. Found {len(V)}.")
    if _trains_gains(module):
        gradient = gain_gradient(module, x)
        return lambda delta: gradient(delta) @ V.to(delta)[:, None]
    A, B, scaling = _matrices(module)
    x = wide(x)
    V_A, V_B = torch.split(V.to(x), [A.numel(), B.numel()])
    u = x @ A.to(x.dtype).T
    V_x = x @ rearrange(V_A, "(r d_in) -> d_in r", r=len(A))
    V_B = rearrange(V_B, "(d_out r) -> d_out r", r=len(A))

    def read(delta: Tensor) -> Tensor:
        products = (delta @ V_B.to(delta)) * u + (delta @ B.to(delta.dtype)) * V_x
        return scaling * sum_over_tokens(products).sum(1, keepdim=True)

    return read


def _tokens(x: Float[Tensor, "batch *seq d"]) -> Float[Tensor, "batch tokens d"]:
    return x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)


def _routed(module: nn.Module) -> RoutedLayer:
    assert isinstance(module, RoutedLayer)
    return module


def _trains_gains(module: nn.Module) -> bool:
    """Only such a layer has a read-out of its own."""
    return type(_routed(module)).gain_readout is not RoutedLayer.gain_readout


def _matrices(module: nn.Module) -> tuple[Tensor, Tensor, float]:
    layer = _routed(module)
    A, B, scaling = layer.deployed
    trained = tuple(layer.block_parameters("deployed"))
    if len(trained) != 2 or trained[0] is not A or trained[1] is not B:
        raise GradRouteError(
            f'`features="parameter"` needs layers that train A and B, or gains. Found a {type(layer).__name__}.'
        )
    return A.detach(), B.detach(), scaling
