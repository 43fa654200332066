"""The deployed gradient of every layer, rollout by rollout, out of one forward and one backward.

    dA_i = sum_t (g_t dz_t)^T x_t,      dz = s B^T dy         dB_i = s sum_t dy_t^T (g_t u_t),      u = A x
    gain:   dgain_i = sum_t (J^T dy_t) * (g_t u_t),           J = s U diag(S (1 - tanh(gain)^2)), the `gain_readout`

A rollout i is a row of the batch, t its tokens, g the g_d of the route in force. Per rollout and matrix (p, q) either
the product is kept, p q numbers, or its factors, T (p + q) numbers: whichever is smaller. Source: ghost and per-sample
gradients as in Opacus; the mask in a gain's place is "route 2" of the founding commit (wassname).
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradroute._checks import listed
from gradroute._module_tree import walked
from gradroute._per_rollout import block_kind, formed, gain_sum, lora_factors, sum_over_tokens
from gradroute._protocol import RoutedLayer
from gradroute._sharding import as_blocks, wide
from gradroute._step_hooks import LocalHook
from gradroute._torch_private import in_backward
from gradroute.adapters.layer import RoutedLinear
from gradroute.errors import GradRouteError

Feature = Literal["parameter", "bottleneck"]
Matrices = tuple[Tensor, ...]
"""A matrix (or vector) per rollout: formed, or as the factors `left`, `right` of sum_t left_t^T right_t."""


def weighted_sum(matrices: Matrices, weights: Float[Tensor, " chosen"], rows: Int[Tensor, " chosen"]) -> Tensor:
    """sum over the chosen rows of w_i G_i in float32 or wider; of none, exactly 0."""
    if len(matrices) == 1:
        formed = wide(matrices[0][rows])
        total: Tensor = torch.tensordot(weights.to(formed), formed, dims=1)
        return total
    left, right = (wide(factor[rows]) for factor in matrices)
    left = weights[:, None, None].to(left) * left
    return rearrange(left, "rows seq p -> p (rows seq)") @ rearrange(right, "rows seq q -> (rows seq) q")


@dataclass(frozen=True)
class LayerPass:
    """One forward and backward of one layer.

    Args:
        gradients: per deployed parameter.
        features: bottleneck features per rollout; None where the features are the gradients.
        dots: <v, f_i> with this layer's direction v.
        squares: |f_i|^2.
        gradient_squares: |G_i|^2.
        axes: number of axes of the input.
        eps: relative rounding of the arithmetic.
    """

    gradients: Sequence[Matrices]
    features: Float[Tensor, "rows r"] | None
    dots: Float[Tensor, " rows"]
    squares: Float[Tensor, " rows"]
    gradient_squares: Float[Tensor, " rows"]
    axes: int
    eps: float


class RolloutRecorder:
    """Records every forward made with gradients on inside `hooked()`, and its backward.

    Args:
        model: that runs.
        layers: its routed layers.
        directions: per layer one vector v: of the layer's deployed gradient, or of its bottleneck.
        feature: which of the two.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, RoutedLayer],
        directions: Mapping[str, Float[Tensor, " _"]],
        feature: Feature,
    ) -> None:
        self.layers, self.directions, self.feature = layers, directions, feature
        self._dropouts = _dropouts(model, layers)
        self._passes: dict[str, list[LayerPass | None]] = {name: [] for name in layers}
        self._after_dropout: dict[str, Tensor] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on every layer for the duration of the block; raises at its end if a backward is missing."""
        handles: list[Any] = []
        try:
            for name, module in self._dropouts:
                handles.append(module.register_forward_hook(LocalHook(partial(self._keep_output, name))))
            for name, layer in self.layers.items():
                handles.append(layer.register_forward_hook(LocalHook(partial(self._tap, name)), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._after_dropout.clear()
        self._check_complete()

    @property
    def passes(self) -> dict[str, list[LayerPass]]:
        """Every forward and backward of every layer, in the order of the forwards."""
        return {name: [one for one in passes if one is not None] for name, passes in self._passes.items()}

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept until the decision; an input that several layers share counts once."""
        storages = {}
        for passes in self.passes.values():
            for one in passes:
                extra = [] if one.features is None else [one.features]
                for tensor in itertools.chain(extra, *one.gradients):
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    def _keep_output(self, name: str, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        if _is_first_forward():
            self._after_dropout[name] = output

    def _tap(
        self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        layer = self.layers[name]
        if not _is_first_forward() or layer.view == "disabled":
            return
        first_input = args[0] if args else next(iter(kwargs.values()))
        x: Tensor = self._after_dropout.pop(name, first_input).detach()
        if x.ndim < 2:
            raise GradRouteError(f"The input of `{name}` should have a row per rollout. Found {tuple(x.shape)}.")
        assert isinstance(layer, RoutedLinear)
        gates = layer.state.gates(x, name)
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        compute = torch.get_autocast_dtype(device) if autocast else None
        slots = self._passes[name]
        place = len(slots)
        slots.append(None)
        shape = x.shape
        node: Any = output.grad_fn

        def keep(x: Tensor, dy: Tensor, u: Tensor | None, dz: Tensor | None) -> None:
            if slots[place] is not None:
                raise GradRouteError(
                    f"A second backward through one forward of `{name}`: whose gradient a rollout's is would be "
                    "undefined. Fix: add the losses and call backward once per forward."
                )
            with torch.no_grad(), torch.autocast(device, enabled=False):
                slots[place] = self._layer_pass(name, shape, (x, dy, u, dz), gates.known.g_d, compute)

        lora = block_kind(name, layer) == "lora"
        free = getattr(node, "observer", node) is None
        if lora and free and all(p.requires_grad for p in layer.block_parameters("deployed")):
            node.observer = keep  # its backward has the bottleneck and the gradient there anyway
        else:
            output.register_hook(lambda dy: keep(x, dy.detach(), None, None))  # type: ignore[no-untyped-call]

    def _layer_pass(
        self,
        name: str,
        shape: torch.Size,
        found: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        g_d: Tensor | None,
        compute: torch.dtype | None,
    ) -> LayerPass:
        layer, v = self.layers[name], self.directions[name]
        A, B, s = layer.deployed
        compute = A.dtype if compute is None else compute
        x, dy, u, dz = (None if t is None else t.to(compute).reshape(shape[0], -1, t.shape[-1]) for t in found)
        assert x is not None and dy is not None  # noqa: PT018
        u = x @ A.to(compute).T if u is None else u
        dz = s * (dy @ B.to(compute)) if dz is None else dz
        gates = None if g_d is None else g_d.reshape(*x.shape[:2], 1)
        # Weighed as in the layer's own backward: a gate of zero gives zero, also of what is not finite.
        gated_u, gated_dz = u, dz
        if gates is not None:
            gated_u, gated_dz = (torch.where(gates == 0, 0.0, gates * t).to(compute) for t in (u, dz))
        if block_kind(name, layer) == "gain":
            matrices = [gain_sum(gated_u, wide(dy), layer.gain_readout)]
            gradients: list[Matrices] = [(matrices[0],)]
        else:
            factors = lora_factors(x, dy, gated_u, gated_dz, s)
            matrices = [formed(each) for each in factors]
            gradients = [_smaller(*pair, matrix) for pair, matrix in zip(factors, matrices, strict=True)]
        gradient_squares, eps = sum_of_squares(matrices), torch.finfo(compute).eps
        if self.feature == "bottleneck":
            features = matrices[0] if len(matrices) == 1 else sum_over_tokens(wide(gated_u * dz))
            dots, squares = features @ v.to(features), sum_of_squares([features])
            return LayerPass(gradients, features, dots, squares, gradient_squares, len(shape), eps)
        parts = as_blocks(v.to(x.device), [wide(matrix[0]) for matrix in matrices])
        pairs = [(wide(matrix).flatten(1), part.flatten()) for matrix, part in zip(matrices, parts, strict=True)]
        dots = torch.stack([matrix @ part.to(matrix) for matrix, part in pairs]).sum(0)
        return LayerPass(gradients, None, dots, gradient_squares, gradient_squares, len(shape), eps)

    def _check_complete(self) -> None:
        idle = [name for name, slots in self._passes.items() if not slots or any(one is None for one in slots)]
        if idle:
            raise GradRouteError(
                "Every routed layer should run forward and backward, with gradients on, inside `record`. Found that "
                f"these did not: {listed(idle)}. Fix: enclose both; under reentrant checkpointing, use_reentrant=False."
            )
        shapes = {name: [(len(one.dots), one.axes) for one in passes] for name, passes in self.passes.items()}
        if len({tuple(found) for found in shapes.values()}) > 1:
            raise GradRouteError(
                f"Every routed layer should see the same rollouts as often, with the same axes. Found (rows, axes) "
                f"{shapes}. Fix: exclude layers that run twice, or on some or flattened tokens; under reentrant "
                "checkpointing, use_reentrant=False."
            )


def _dropouts(model: nn.Module, layers: Mapping[str, RoutedLayer]) -> list[tuple[str, nn.Module]]:
    """(name of its layer, dropout) of each dropout inside of a layer, looked for once in a walk."""
    walk, found = walked(model)
    if "dropouts" not in walk.memo:
        places = {id(module): i for i, module in enumerate(found)}
        walk.memo["dropouts"] = [
            (name, places[id(module)])
            for name, layer in layers.items()
            for module in layer.modules()
            if isinstance(module, nn.Dropout)
        ]
    return [(name, found[place]) for name, place in walk.memo["dropouts"]]


def _is_first_forward() -> bool:
    """Neither a recomputation inside backward nor a forward without a graph."""
    return torch.is_grad_enabled() and not in_backward()


def _smaller(left: Tensor, right: Tensor, formed: Tensor) -> Matrices:
    if left.numel() + right.numel() < formed.numel():
        # Columns of a wider tensor would keep all of it.
        return left.contiguous(), right.contiguous()
    return (formed,)


def sum_of_squares(per_row: list[Tensor]) -> Float[Tensor, " rows"]:
    """|G_i|^2 over all tensors, in float32 or wider."""
    norms = [torch.linalg.vector_norm(wide(tensor).flatten(1), dim=1) for tensor in per_row]
    return torch.stack(norms).square().sum(0)
