"""Both views as the rollouts' engine takes them: an adapter of plain LoRA, or weights with the blocks merged in.

adapter, on         A = [A_d; A_q],  B = [s_d B_d, s_q B_q]        rank r + r_quarantine, lora_alpha = rank
adapter, ablated    A = A_d,         B = s_d B_d                   rank r
merged              W + s_d B_d A_d (+ s_q B_q A_q)                one layer at a time; no base weight is copied
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradroute._protocol import Block, RoutedLayer, routed_layers
from gradroute._sharding import is_sharded, whole
from gradroute.errors import GradRouteError
from gradroute.integrations.verl.settings import Rollouts

_OURS = ("r_quarantine", "stop_gradient", "quarantine_format", "base_fingerprint")


def blocks_of(layer: RoutedLayer, view: Rollouts) -> list[Block]:
    """The blocks that a view shows."""
    return [layer.deployed] if view == "ablated" else [layer.deployed, layer.quarantine]


def plain_adapter(
    module: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any], view: Rollouts
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter that an engine which knows plain LoRA alone samples from.

    Args:
        module: the PEFT model.
        state: PEFT's state of its adapter, gathered.
        config: PEFT's config of it.
        view: which blocks.

    Raises:
        GradRouteError: something of the adapter would not be sent.
    """
    left = dict(state)
    tensors: dict[str, Tensor] = {}
    ranks = set()
    for name, layer in routed_layers(module).items():
        found = [left.pop(f"{name}.lora_{side}{block}.weight") for block in ("", "_quarantine") for side in "AB"]
        blocks = blocks_of(layer, view)
        A = torch.cat(found[0 : 2 * len(blocks) : 2])
        # Scaled in float32, and rounded once.
        scaled = [block.scaling * B.float() for block, B in zip(blocks, found[1::2], strict=False)]
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": torch.cat(scaled, dim=1).to(A.dtype)}
        ranks.add(A.shape[0])
    if left or len(ranks) != 1:
        raise GradRouteError(
            f"The adapter should consist of blocks of one rank. Found the ranks {sorted(ranks)} and, in addition, "
            f"{sorted(left)[:3]}, which the rollouts would not see. Fix: actor_rollout_ref.model.lora.merge=True."
        )
    rank = ranks.pop()
    plain = {key: value for key, value in config.items() if key not in _OURS}
    scaling_in_B = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return tensors, plain | scaling_in_B


def merged_weights(
    module: nn.Module, names: Mapping[str, str], view: Rollouts, device: Any
) -> Iterator[tuple[str, Tensor]]:
    """The base model's weights with the blocks of a view merged in, one after the other.

    Args:
        module: the PEFT model.
        names: of the base parameters and buffers in its state -> as the rollouts' engine knows them.
        view: which blocks.
        device: where the weights are gathered.
    """
    layers = {f"{name}.base_layer.weight": layer for name, layer in routed_layers(module).items()}
    state = module.state_dict()
    for found_as, name in names.items():
        value = state[found_as]
        sharded = is_sharded(value)
        weight = _gathered(value, found_as, device)
        if found_as in layers:
            layer: Any = layers.pop(found_as)
            weight = weight.float()
            for A, B, scaling in blocks_of(layer, view):
                product = _gathered(B, found_as, device).float() @ _gathered(A, found_as, device).float()
                delta = scaling * (product.T if getattr(layer, "fan_in_fan_out", False) else product)
                weight = weight + delta
            weight = weight.to(value.dtype)
        # As verl sends them.
        yield name, weight.to(torch.bfloat16) if sharded and weight.is_floating_point() else weight.clone()
    if layers:
        raise GradRouteError(f"Every routed layer should be merged. Found no base weight for {sorted(layers)[:3]}.")


def _gathered(value: Tensor, name: str, device: Any) -> Tensor:
    return whole(value.detach().to(device), name)
