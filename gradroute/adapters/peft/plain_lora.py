"""The plain LoRA that a routed model's blocks make: names, config and factors, worked out once and written many times.

    A = [A_d; A_q],   B = [s_d B_d, scale s_q B_q]        of the blocks asked for; ranks are padded with zeros to one r

What takes walking the model (names, targets, whether stock PEFT loads it) happens once; a write reads the blocks alone.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from gradroute._module_tree import named_modules, plain_name, unwrapped
from gradroute._protocol import Block, BlockName, RoutedLayer, check_module, routed_layers
from gradroute._sharding import reshard, shape_of, whole
from gradroute._transfers import check_in_memory
from gradroute.adapters.peft._reload import Factors, check_reloads, named
from gradroute.errors import GradRouteError

PREFIX = "base_model.model."


class PlainLora:
    """What a checkpoint of `model` holds, for as long as the model keeps its layers and its active adapter.

    Args:
        model: with routed layers.

    Raises:
        GradRouteError: no `target_modules` selects exactly the routed layers.
    """

    def __init__(self, model: nn.Module) -> None:
        check_module(model)
        self._model = unwrapped(model)
        self.layers = {_base_name(self._model, name): layer for name, layer in routed_layers(self._model).items()}
        self._adapter = _adapter(self.layers)
        self._targets = _target_modules(self._model, self.layers)

    def rank(self, blocks: Sequence[BlockName]) -> int:
        """The rank of a checkpoint of these blocks: the largest of all layers."""
        return max(sum(shape_of(_block(layer, name).A)[0] for name in blocks) for layer in self.layers.values())

    def numbers(self, blocks: Sequence[BlockName]) -> int:
        """How many numbers a checkpoint of these blocks holds."""
        widths = (shape_of(layer.deployed.A)[1] + shape_of(layer.deployed.B)[0] for layer in self.layers.values())
        return self.rank(blocks) * sum(widths)

    def factors(self, blocks: Sequence[BlockName], dtype: torch.dtype | None = None, scale: float = 1.0) -> Factors:
        """Name in the base model -> A (r, d_in) and B (d_out, r), on the CPU; of a sharded model, on every rank.

        Args:
            blocks: which of the two, one after the other.
            dtype: to round to; None: that of the blocks, float32 at least.
            scale: of the quarantine.

        Raises:
            GradRouteError: a block is not finite, or the layers or the active adapter are no longer those of the start.
        """
        self._check_unchanged()
        self.reshard()
        r = self.rank(blocks)
        return {
            name: _folded(name, [_block(layer, block, scale) for block in blocks], dtype, r)
            for name, layer in self.layers.items()
        }

    def reshard(self) -> None:
        """Put the shards of a sharded model back, whose forward may have left whole parameters."""
        reshard(self._model)

    def config(self, r: int) -> LoraConfig:
        """What is written as adapter_config.json."""
        configs = getattr(self._model, "peft_config", None)
        trained = None if configs is None or self._adapter is None else configs[self._adapter]
        return LoraConfig(
            r=r,
            lora_alpha=r,
            target_modules=self._targets,
            fan_in_fan_out=any(getattr(layer, "fan_in_fan_out", False) for layer in self.layers.values()),
            modules_to_save=getattr(trained, "modules_to_save", None),
            ensure_weight_tying=getattr(trained, "ensure_weight_tying", False),
            task_type=getattr(trained, "task_type", None),
            base_model_name_or_path=getattr(trained, "base_model_name_or_path", None),
            inference_mode=True,
        )

    def check(self, factors: Factors) -> None:
        """Raise unless stock PEFT loads these factors as they are.

        Raises:
            GradRouteError: PEFT would drop or move a layer's LoRA, or refuses the config.
        """
        check_reloads(self._model, self.config(_rank_of(factors)), factors)

    def whole_modules(self) -> dict[str, Tensor]:
        """The modules that PEFT trained whole (`modules_to_save`); every checkpoint carries them."""
        if self._adapter is None:
            return {}
        # The parameters themselves: of those that ZeRO-3 has partitioned, a detached one is empty.
        state = get_peft_model_state_dict(
            self._model,
            state_dict=self._model.state_dict(keep_vars=True),
            adapter_name=self._adapter,
            save_embedding_layers=False,
        )
        others = {PREFIX + name.removeprefix(PREFIX): t for name, t in state.items() if ".lora_" not in name}
        # Copies: tied modules share memory, which the file format refuses.
        return {name: whole(tensor, name).cpu().clone().contiguous() for name, tensor in others.items()}

    def write(self, path: Path, factors: Factors, whole: Mapping[str, Tensor]) -> None:
        """adapter_model.safetensors and adapter_config.json."""
        tensors = {PREFIX + name: tensor for name, tensor in named(factors).items()}
        path.mkdir(parents=True, exist_ok=True)
        # Each file appears whole: under DDP every rank may write the same.
        with tempfile.TemporaryDirectory(dir=path) as aside:
            save_file({**tensors, **whole}, Path(aside) / "adapter_model.safetensors", metadata={"format": "pt"})
            self.config(_rank_of(factors)).save_pretrained(aside)
            for file in sorted(Path(aside).iterdir()):
                file.replace(path / file.name)

    def _check_unchanged(self) -> None:
        found = named_modules(self._model).items()
        # By names without wrappers: blocks may have been checkpointed or compiled meanwhile.
        layers = {_base_name(self._model, name): m for name, m in found if isinstance(m, RoutedLayer)}
        moved = any(layers.get(name) is not layer for name, layer in self.layers.items())
        if moved or _adapter(self.layers) != self._adapter:
            what = "other layers" if moved else f"the active adapter {_adapter(self.layers)!r}, not {self._adapter!r}"
            raise GradRouteError(
                f"`model` should have the routed layers and the active adapter that it had at first. Found {what}. "
                "Fix: make the object that writes its blocks after the last change of adapters."
            )


def _block(layer: RoutedLayer, name: BlockName, scale: float = 1.0) -> Block:
    """A block; the quarantine times `scale`."""
    if name == "deployed":
        return layer.deployed
    return layer.quarantine._replace(scaling=scale * layer.quarantine.scaling)


def _adapter(layers: Mapping[str, RoutedLayer]) -> str | None:
    """The active adapter; None for an attached model."""
    layer: Any = next(iter(layers.values()))
    return getattr(layer, "routed_adapter", None)


def _rank_of(factors: Factors) -> int:
    return next(iter(factors.values()))[0].shape[0]


def _base_name(model: nn.Module, name: str) -> str:
    """The module's name in the base model."""
    return plain_name(name.removeprefix(PREFIX) if isinstance(model, PeftModel) else name)


def _folded(name: str, blocks: list[Block], dtype: torch.dtype | None, r: int) -> tuple[Tensor, Tensor]:
    check_in_memory(name, *(block.A for block in blocks), *(block.B for block in blocks))
    blocks = [block.whole(name) for block in blocks]
    A = torch.cat([block.A for block in blocks])
    # In float32 at least: a scaling that is no power of two would be rounded into every entry of B.
    wide = torch.promote_types(A.dtype, torch.float32)
    B = torch.cat([block.scaling * block.B.to(wide) for block in blocks], dim=1)
    # Rounded before the copy to the CPU, and judged after: a narrow type may overflow, and a device is not waited for.
    A, B = (factor.to(dtype or wide).cpu() for factor in (A, B))
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        raise GradRouteError(f"The blocks of `{name}` should be finite. Found inf or nan. Fix: export an earlier step.")
    more = r - A.shape[0]
    return pad(A, (0, 0, 0, more)).contiguous(), pad(B, (0, more)).contiguous()


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
