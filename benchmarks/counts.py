"""What a step computes, moves and keeps, counted and not timed: the same on every machine.

    flops     2 m n k of every matrix product (torch's own formulas), attention included
    bytes     what every operation that is not a view reads and writes
    saved     storages that the graph keeps for backward, each once, parameters not counted

and the floors by formula: per linear (d_in, d_out), N tokens, R = r + r_quarantine, e bytes per number of the base and
4 of the blocks,

    base      forward 2 N d_in d_out,   backward to x the same
    LoRA      forward 2 N R (d_in + d_out),   backward twice that
    bytes     a linear reads x and W and writes y; in backward it reads dy and W and writes dx
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.models import Shape

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmm_", "addmv", "addmv_", "mv")


@dataclass(frozen=True)
class Counts:
    """Of one step."""

    flops: int
    products: int
    bytes: int
    saved: int

    def minus(self, other: "Counts") -> "Counts":
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: mine[name] - theirs[name] for name in mine})


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = self.products = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        name = packet.__name__
        # In-place products have no formula of their own.
        counted = torch.ops.aten.addmm if name == "addmm_" else packet
        if counted in flop_registry:
            self.flops += flop_registry[counted](*args, **(kwargs or {}), out_val=out)
        elif name in ("mv", "addmv_"):  # nor has torch any for products with a vector
            self.flops += 2 * args[name == "addmv_"].numel()
        self.products += name in _PRODUCTS
        if not func.is_view and name not in ("_unsafe_view", "detach", "empty", "empty_like", "t"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def counted(model: nn.Module, step: Callable[[], object]) -> Counts:
    """Counts of `step`, which runs forward and backward of `model`."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no other storage gets the same address
        return tensor

    step()
    with _Counter() as counter, saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return Counts(counter.flops, counter.products, counter.bytes, sum(kept.values()))


def floors(shape: Shape, R: int) -> dict[str, dict[str, float]]:
    """Operations and fewest bytes of a step in all targeted linears: base, and what LoRA of rank R adds."""
    N = shape.tokens
    sums = sum(d_in + d_out for d_in, d_out in shape.linears)
    products = sum(d_in * d_out for d_in, d_out in shape.linears)
    base_flops = 2 * N * products * shape.layers
    e = shape.bytes_per_number
    base_bytes = e * shape.layers * (N * sums + products)
    lora_flops = 2 * N * R * sums * shape.layers
    # A and B are read; u is written, kept and read again; x and dy are read once more for dA and dB, which are written.
    lora_forward = 4 * shape.layers * (R * sums + 7 * N * R)
    lora_backward = shape.layers * (e * N * sums + 4 * (2 * R * sums + 14 * N * R))
    return {
        "base": {"flops": 2 * base_flops, "bytes": 2 * base_bytes},
        "LoRA": {"flops": 3 * lora_flops, "bytes": lora_forward + lora_backward},
    }
