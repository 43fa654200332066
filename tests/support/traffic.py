"""Bytes that a rank gets from, or sends to, others inside a block, by kind of collective."""

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Counts collectives of c10d, and DTensor's functional ones."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        namespace, name = func.namespace, func._schema.name.partition("::")[2]
        if namespace in ("c10d", "_c10d_functional"):
            share = (dist.get_world_size() - 1) / dist.get_world_size()
            if "gather" in name:
                whole = args[0] if namespace == "c10d" else out
                self.bytes["gathered"] += round(share * _bytes(whole))
            elif "reduce_scatter" in name:
                whole = args[1] if namespace == "c10d" else args[0]
                self.bytes["scattered"] += round(share * _bytes(whole))
            elif "reduce" in name:
                self.bytes["reduced"] += _bytes(args[0])
        return out


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors)) if isinstance(tensors, list | tuple) else 0
