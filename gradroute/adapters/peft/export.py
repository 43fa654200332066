"""Plain LoRA checkpoints of a routed model, for engines that know nothing of gradroute.

    deployed:  A = A_d,         B = s_d B_d
    full:      A = [A_d; A_q],  B = [s_d B_d, s_q B_q]

Scalings are folded into B (alpha / r = 1) and ranks are padded with zeros to one r, for readers such as vLLM's ignore
`rank_pattern` and `alpha_pattern`.
"""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from gradroute._all_ranks import written_by_one
from gradroute._hashing import deployed_hash, hash_in_card
from gradroute._logging import warn
from gradroute._offloading import check_in_memory
from gradroute._protocol import Block, RoutedLayer, check_module, routed_layers
from gradroute._sharding import whole
from gradroute._wrappers import plain_name, unwrapped
from gradroute.adapters.peft._reload import check_reloads
from gradroute.errors import GradRouteError

BlocksOf = Callable[[RoutedLayer], list[Block]]

_PREFIX = "base_model.model."


def export_deployed(model: nn.Module, path: str | Path, *, card: str | Path | None = None) -> None:
    """Write the deployed block alone, rank r, as a plain LoRA checkpoint that stock `peft` loads.

    Of a sharded model every rank calls it: all gather the blocks, the first one writes, and none returns before that.

    Args:
        model: from `attach`, `get_peft_model`, or with an adapter injected by PEFT or transformers.
        path: a folder; it is created, and files of an earlier export in it are overwritten.
        card: the file that `write_card` returned for these weights; copied beside them as `README.md`.

    Raises:
        GradRouteError: a block is not finite; a card of other weights, given or left in `path`; a sharded model that
            some rank does not export.
    """
    folder = checked_folder(path)
    readme = folder / "README.md"
    with written_by_one("export_deployed", check_module(model)) as writes:
        text = _card_of(model, readme if card is None else Path(card), given=card is not None)
        _export(model, folder, lambda layer: [layer.deployed], writes=writes)
        if writes and text is not None:
            readme.write_text(text, encoding="utf-8")


def export_full(model: nn.Module, path: str | Path) -> None:
    """Write both blocks, rank r + r_quarantine, as one plain LoRA: the policy that is trained, for sampling.

    Args:
        model, path: as for `export_deployed`.

    Raises:
        GradRouteError: a block is not finite; a sharded model that some rank does not export.
    """
    folder = checked_folder(path)
    with written_by_one("export_full", check_module(model)) as writes:
        _export(model, folder, lambda layer: [layer.deployed, layer.quarantine], writes=writes)


def checked_folder(path: object) -> Path:
    """`path`, if it is a folder or can become one."""
    if not isinstance(path, str | PathLike) or Path(path).is_file():
        found = f"the file {path}" if isinstance(path, str | PathLike) else type(path).__name__
        raise GradRouteError(f"`path` should be a folder, there or to be made. Found {found}.")
    return Path(path)


def _card_of(model: nn.Module, file: Path, *, given: bool) -> str | None:
    """The text of a card that speaks of these weights; None where there is no card and none was given."""
    found = hash_in_card(file.read_text(encoding="utf-8")) if file.is_file() else None
    if found is None and given:
        raise GradRouteError(f"`card` should be a file that write_card wrote. Found none at {file}.")
    if found is not None and found != deployed_hash(model):
        where = "`card`" if given else "The card in `path`"
        raise GradRouteError(
            f"{where} should be of the weights that are exported. Found one of other weights: {file}. "
            "Fix: write_card(...) of this model."
        )
    return None if found is None else file.read_text(encoding="utf-8")


def export_refusal(model: nn.Module) -> str | None:
    """Why `export_deployed` would refuse the model; None if it would not."""
    try:
        _plain_lora(unwrapped(model), lambda layer: [layer.deployed])
    except GradRouteError as error:
        return str(error)
    return None


def _export(model: nn.Module, path: Path, blocks_of: BlocksOf, *, writes: bool) -> None:
    model = unwrapped(model)
    config, factors = _plain_lora(model, blocks_of)
    modules = _trained_whole(model)
    if modules:
        first = next(iter(modules)).removeprefix(_PREFIX)
        warn(
            f"The export holds whole modules, such as `{first}` (`modules_to_save`): "
            "PEFT loads them, vLLM refuses the adapter. Fix, for vLLM: merge_deployed(model) and save the model."
        )
    tensors = {
        f"{_PREFIX}{name}.lora_{side}.weight": pair[i] for name, pair in factors.items() for i, side in enumerate("AB")
    }
    if not writes:
        return
    path.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **modules}, path / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(path))


def _plain_lora(model: nn.Module, blocks_of: BlocksOf) -> tuple[LoraConfig, dict[str, tuple[Tensor, Tensor]]]:
    """The config and the factors by name in the base model, which stock PEFT is known to load."""
    layers = {_base_name(model, name): layer for name, layer in routed_layers(model).items()}
    factors = {name: _folded(name, blocks_of(layer)) for name, layer in layers.items()}
    r = max(A.shape[0] for A, _ in factors.values())
    factors = {name: _padded(A, B, r - A.shape[0]) for name, (A, B) in factors.items()}
    trained = _peft_config(model)
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=_target_modules(model, layers),
        fan_in_fan_out=any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        modules_to_save=getattr(trained, "modules_to_save", None),
        ensure_weight_tying=getattr(trained, "ensure_weight_tying", False),
        task_type=getattr(trained, "task_type", None),
        base_model_name_or_path=getattr(trained, "base_model_name_or_path", None),
        inference_mode=True,
    )
    check_reloads(model, config, factors)
    return config, factors


def _base_name(model: nn.Module, name: str) -> str:
    """The module's name in the base model."""
    return plain_name(name.removeprefix(_PREFIX) if isinstance(model, PeftModel) else name)


def _folded(name: str, blocks: list[Block]) -> tuple[Tensor, Tensor]:
    check_in_memory(name, *(block.A for block in blocks), *(block.B for block in blocks))
    blocks = [block.whole(name) for block in blocks]
    A = torch.cat([block.A for block in blocks])
    # In float32 at least: a scaling that is no power of two would be rounded into every entry of B.
    dtype = torch.promote_types(A.dtype, torch.float32)
    B = torch.cat([block.scaling * block.B.to(dtype) for block in blocks], dim=1)
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise GradRouteError(f"The blocks of `{name}` should be finite. Found inf or nan. Fix: export an earlier step.")
    return A.to(dtype).cpu(), B.cpu()


def _padded(A: Tensor, B: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    pad = torch.nn.functional.pad
    return pad(A, (0, 0, 0, ranks)).contiguous(), pad(B, (0, ranks)).contiguous()


def _target_modules(model: nn.Module, layers: Mapping[str, RoutedLayer]) -> list[str]:
    """Last parts of the names (as readers expect them) where they select exactly these layers, else whole names."""
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    inside = tuple(f"{name}." for name in layers)
    others = [
        name for name in (_base_name(model, name) for name, _ in model.named_modules())
        if name and name not in layers and not name.startswith(inside)
    ]  # fmt: skip
    for targets in (leaves, sorted(layers)):
        if not any(other == t or other.endswith(f".{t}") for other in others for t in targets):
            return targets
    raise GradRouteError(
        f"No `target_modules` selects exactly the {len(layers)} routed layers: some name ends another one's. "
        "Fix: merge_deployed(model) and save the model."
    )


def _peft_config(model: nn.Module) -> Any:
    """The config of the active adapter, or None for an attached model."""
    layer: Any = next(iter(routed_layers(model).values()))
    configs = getattr(model, "peft_config", None)
    return None if configs is None else configs[layer.routed_adapter]


def _trained_whole(model: nn.Module) -> dict[str, Tensor]:
    """The modules that PEFT trained whole (`modules_to_save`); both exports carry them."""
    if _peft_config(model) is None:
        return {}
    layer: Any = next(iter(routed_layers(model).values()))
    state = get_peft_model_state_dict(model, adapter_name=layer.routed_adapter, save_embedding_layers=False)
    others = {_PREFIX + name.removeprefix(_PREFIX): t for name, t in state.items() if ".lora_" not in name}
    # Copies: tied modules share memory, which the file format refuses.
    return {name: whole(tensor, name).cpu().clone().contiguous() for name, tensor in others.items()}
