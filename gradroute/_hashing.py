"""Identity of the base model, of directions and of deployed blocks; checksums that show whether the policy moved.

model_identity        the frozen base, the same attached or not         deployed_hash          what a card speaks of
rows_hash             what scores depend on                             block_fingerprint      has anything changed?
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Int
from torch import Tensor, nn

from gradroute._module_tree import named_modules
from gradroute._protocol import BLOCKS, BlockName, RoutedLayer, routed_layers
from gradroute._sharded_samples import evenly_spaced
from gradroute._sharding import held, is_partitioned, is_sharded, reshard, shape_of, whole
from gradroute._torch_private import times_written
from gradroute._transfers import check_in_memory, in_memory, read_together

CARD_KEY = "deployed_sha256"
SCALE_KEY = "quarantine_scale"
_SAMPLES = 16


class _Known(NamedTuple):
    """An identity, and the parameters that it was computed from, each with its stamp at that time."""

    identity: str
    parameters: list[tuple[Callable[[], nn.Parameter | None], tuple[int, int] | None]]

    @property
    def holds(self) -> bool:
        """Whether all of these parameters are still there, and nothing was written to any."""
        return all(_stamp(parameter()) == stamp for parameter, stamp in self.parameters)


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def known_identity(model: nn.Module) -> str:
    """`model_identity`, computed again only if a parameter of the base was written to or replaced: for every step.

    A write that autograd does not see either (`parameter.data.mul_(2)`) goes unnoticed until the next `model_identity`.
    """
    known = _KNOWN.get(model)
    return known.identity if known is not None and known.holds else model_identity(model)


def model_identity(model: nn.Module) -> str:
    """SHA-256 over name, shape and evenly spaced values of every parameter of the base model.

    The same before and after `attach` or `get_peft_model`, and however the model is sharded; training the blocks, or
    PEFT's `modules_to_save`, does not change it. Collective where the model is sharded; nothing is gathered.
    """
    reshard(model)
    blocks = {
        id(parameter)
        for module in named_modules(model).values()
        if isinstance(module, RoutedLayer)
        for block in BLOCKS
        for parameter in module.block_parameters(block)
    }
    parameters = dict(model.named_parameters())
    base = {_base_name(name): name for name, p in parameters.items() if id(p) not in blocks and not _added(name)}
    tensors = {}
    for name, found_as in sorted(base.items()):
        owner, _, leaf = found_as.rpartition(".")
        tensors[name] = in_memory(model.get_submodule(owner), leaf)
    digest = hashlib.sha256()
    for name, values in evenly_spaced(tensors, _SAMPLES).items():
        digest.update(f"{name} {tuple(shape_of(tensors[name]))} {values}".encode())
    identity = digest.hexdigest()
    _KNOWN[model] = _Known(identity, [(_kept(parameters[name]), _stamp(parameters[name])) for name in base.values()])
    return identity


def _kept(parameter: nn.Parameter) -> Callable[[], nn.Parameter | None]:
    """Gives the parameter as long as it is there, without keeping it."""
    # torch moves a sharded one (`model.to(...)`) by a swap that it refuses where there is a weak reference. Such a swap
    # keeps the object, so that it may be kept.
    return (lambda: parameter) if is_sharded(parameter) else ref(parameter)


def _stamp(parameter: nn.Parameter | None) -> tuple[int, int] | None:
    """(version, address): a write changes the version, `.data =` the address. Of shards, both versions.

    Ranks of a sharded model have to find the same, since an identity is computed by all of them: no address of theirs.
    """
    if parameter is None:
        return None
    share = held(parameter)
    return _version(parameter), share.data_ptr() if share is parameter else _version(share)


def _version(tensor: Tensor) -> int:
    # An inference tensor has none.
    return 0 if tensor.is_inference() else tensor._version


def rows_hash(groups: Mapping[str, Mapping[str, Tensor] | None]) -> str:
    """SHA-256 over name, shape and float64 values of tensors by kind ("rows", "scale") and module."""
    digest = hashlib.sha256()
    for kind, group in groups.items():
        for name, values in (group or {}).items():
            wide = values.detach().to("cpu", torch.float64).contiguous()
            digest.update(f"{kind} {name} {tuple(wide.shape)} ".encode() + wide.numpy().tobytes())
    return digest.hexdigest()


def _added(name: str) -> bool:
    """Whether PEFT put this parameter there: matrices of any adapter, trained copies of whole modules."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def _base_name(name: str) -> str:
    for wrapper in ("module.", "_orig_mod.", "base_model.model."):
        name = name.removeprefix(wrapper)
    return name.replace(".base_layer", "").replace(".original_module", "")


def deployed_hash(model: nn.Module, scale: float = 0.0) -> str:
    """SHA-256 over shapes, types, bytes and scalings of the blocks that are deployed, in module order.

    Those are the deployed ones; at a scale above 0 the quarantines and the scale as well. Names are not in it: the same
    blocks have one hash attached, in PEFT's wrapper, compiled, and sharded.
    """
    reshard(model)
    digest = hashlib.sha256()
    for name, layer in routed_layers(model).items():
        for A, B, scaling in [layer.deployed, layer.quarantine] if scale else [layer.deployed]:
            check_in_memory(name, A, B)
            for matrix in (A, B):
                values = whole(matrix, name).cpu().contiguous()
                digest.update(f"{tuple(values.shape)} {values.dtype} {float(scaling)!r} ".encode())
                digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    if scale:
        digest.update(f"{SCALE_KEY} {scale!r}".encode())
    return digest.hexdigest()


def hash_in_card(text: str) -> str | None:
    """The hash in a card's front matter; None in a text that `write_card` did not write."""
    found = re.search(rf"^{CARD_KEY}: ([0-9a-f]{{64}})$", text, flags=re.MULTILINE)
    return None if found is None else found[1]


def scale_in_card(text: str) -> float:
    """The scale of the quarantine in the model that a card speaks of; 0 in a card that says none."""
    found = re.search(rf"^{SCALE_KEY}: (\S+)$", text, flags=re.MULTILINE)
    return 0.0 if found is None else float(found[1])


def block_fingerprint(model: nn.Module, block: BlockName) -> list[int]:
    """A checksum over the bits of each parameter of a block: any change shows, and no copy is kept."""
    reshard(model)
    parameters = [whole(p) for layer in routed_layers(model).values() for p in layer.block_parameters(block)]
    bits = [bits_of(p).long() for p in parameters]
    # Weighted by position, so that values which change places show too; int64 wraps around.
    return read_together((b * torch.arange(1, 2 * b.numel(), 2, device=b.device)).sum() for b in bits)


def writes_to(parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
    """Changes with every write. torch does not count DeepSpeed's writes to the shares of ZeRO-3: those are read."""
    shares = [bits_of(held(p)).sum(dtype=torch.int64) for p in parameters if is_partitioned(p)]
    return times_written(parameters), int(torch.stack(shares).sum()) if shares else 0


def bits_of(tensor: Tensor) -> Int[Tensor, " n"]:
    """The bits of each number, as an integer of the same width."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().reshape(-1).view(sizes[tensor.element_size()])
