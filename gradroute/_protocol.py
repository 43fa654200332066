"""The interface of a layer with two blocks, for every other part of the library.

    y = W x + s_d B_d A_d x + m s_q B_q A_q x

`adapters` implements `RoutedLayer`; `directions` reads features from it without importing `adapters`.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from gradroute._module_tree import plain_name, walked
from gradroute._sharding import whole, wide
from gradroute._transfers import read_together
from gradroute.errors import GradRouteError, TargetError


class Block(NamedTuple):
    """One low-rank block: `scaling * B @ A`, with `A` of shape (r, d_in) and `B` of shape (d_out, r)."""

    A: Float[Tensor, "r d_in"]
    B: Float[Tensor, "d_out r"]
    scaling: float

    def whole(self, name: str = "") -> "Block":
        """The same with whole matrices, where they are sharded gathered on every rank; `name` is the layer's."""
        return Block(whole(self.A, name), whole(self.B, name), self.scaling)


def delta_norms(blocks: Iterable[Block]) -> list[float]:
    """|s B A|_F = |s| sqrt(tr(B^T B A A^T)) of each, by r x r numbers in float64; exactly zero for split blocks too.

    The host reads once, whatever the number of blocks.
    """
    scalings, squares = [], []
    for block in blocks:
        # MPS has no float64.
        A, B = ((factor.cpu() if factor.device.type == "mps" else factor).double() for factor in block.whole()[:2])
        scalings.append(abs(block.scaling))
        squares.append(((B.T @ B) * (A @ A.T)).sum())
    # Rounding can leave a zero a hair below zero; nan stays nan.
    return [
        scaling * math.sqrt(squared) if not squared < 0 else 0.0
        for scaling, squared in zip(scalings, read_together(squares), strict=True)
    ]


BlockName = Literal["deployed", "quarantine"]
BLOCKS: tuple[BlockName, ...] = ("deployed", "quarantine")


class RoutedLayer(nn.Module, ABC):
    """A linear layer that carries a deployed and a quarantine block."""

    @property
    @abstractmethod
    def deployed(self) -> Block:
        """The block that is kept at deployment."""

    @property
    @abstractmethod
    def quarantine(self) -> Block:
        """The block that is ablated at deployment."""

    @abstractmethod
    def block_parameters(self, block: BlockName) -> Iterator[nn.Parameter]:
        """The trainable tensors of one block; not `block.A` and `block.B` where those are computed from others."""

    @abstractmethod
    def base_weight(self) -> Float[Tensor, "d_out d_in"]:
        """The frozen W of y = W x, floating point also where the layer stores it transposed or quantised."""

    @property
    def gain_readout(self) -> Float[Tensor, "d_out r"]:
        """dy/dz of gains z on the bottleneck h, in float32 or wider; their gradient is h * (delta @ gain_readout).

        s_d B_d, for a diagonal gain on h = A_d x that is one. A layer that trains such gains itself overrides it.
        """
        return self.deployed.scaling * wide(whole(self.deployed.B))

    @property
    @abstractmethod
    def has_open_route(self) -> bool:
        """Whether a forward made now would be routed."""

    @property
    @abstractmethod
    def view(self) -> str:
        """The view that a forward would show now: "on", "ablated", "scaled 0.5", "scaled by rows" or "disabled"."""

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the blocks now, where neither a route nor a view can reach them."""
        return False


def routed_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """Every routed layer of `model` by qualified name, in module order.

    Raises:
        GradRouteError: there is none.
        TargetError: an adapter that was to have a quarantine has none in some layer, or a target of it matched nothing.
    """
    walk, found = walked(check_module(model))
    known: tuple[_Layers, _Injected] | None = walk.memo.get("routed")
    if known is None or any(found[i].__dict__.get("peft_config") != configs for i, configs in known[1]):
        known = walk.memo["routed"] = _routed(walk.named(found), found)
    return {name: found[i] for name, i in known[0]}


# By place in a walk: the routed layers with their names, and the modules that PEFT injected adapters into.
_Layers = list[tuple[str, int]]
_Injected = list[tuple[int, dict[str, Any]]]


def _routed(named: Iterable[tuple[str, nn.Module]], found: Sequence[nn.Module]) -> tuple[_Layers, _Injected]:
    modules: list[tuple[str, Any]] = list(named)
    kinds = {kind: issubclass(kind, RoutedLayer) for kind in {type(module) for _, module in modules}}
    layers: dict[str, RoutedLayer] = {name: module for name, module in modules if kinds[type(module)]}
    places = {id(module): i for i, module in enumerate(found)}
    injected: dict[str, nn.Module] = {}
    for name, module in modules:
        configs = module.__dict__.get("peft_config")
        # PEFT leaves one and the same dictionary at its tuner and at the model inside it, which is checked with it.
        above = [f"{key}." if key else "" for key, m in injected.items() if m.__dict__["peft_config"] is configs]
        if configs is not None and not any(name.startswith(prefix) for prefix in above):
            injected[name] = module
            # What is inside may have been met before, under another name.
            _check_injected(configs, modules if name == "" else list(module.named_modules()), layers)
    if injected:
        _check_encoders(modules, layers)
    if not layers:
        raise GradRouteError(
            f"`model` should contain routed layers. Found none in a {type(modules[0][1]).__name__}. "
            "Fix: call gradroute.attach(model, ...), or get_peft_model(model, QuarantineLoraConfig(...)), first."
        )
    configs_at = [(places[id(module)], dict(module.__dict__["peft_config"])) for module in injected.values()]
    return [(name, places[id(layer)]) for name, layer in layers.items()], configs_at


def check_module(model: object) -> nn.Module:
    """`model`, if it is an nn.Module."""
    if not isinstance(model, nn.Module):
        found = type(model).__name__
        raise GradRouteError(f"`model` should be an nn.Module. Found {found}. Fix: pass the model itself.")
    return model


def _check_injected(
    configs: Mapping[str, Any], modules: Sequence[tuple[str, nn.Module]], layers: Mapping[str, RoutedLayer]
) -> None:
    """Raise where PEFT left something of an adapter out: its config is not asked again once PEFT has injected it."""
    configs = {name: config for name, config in configs.items() if hasattr(config, "r_quarantine")}
    adapted = [(name, module) for name, module in modules if "lora_A" in module._modules] if configs else []
    for adapter, config in configs.items():
        for name, module in adapted:
            if _has_adapter(module, adapter) and not isinstance(module, RoutedLayer):
                raise TargetError(
                    f"Adapter {adapter!r} should have a quarantine in `{name}`. Found plain LoRA: the layer was made "
                    "for an adapter without one. Fix: add the adapter with a quarantine first, or unload the other one."
                )
        names = [plain_name(name) for name, layer in layers.items() if _has_adapter(layer, adapter)]
        targets = config.target_modules if isinstance(config.target_modules, list | set | tuple) else ()
        idle = [str(t) for t in sorted(targets) if not any(name == t or name.endswith(f".{t}") for name in names)]
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                idle.append(pattern)
        chosen = config.layers_to_transform
        for index in () if chosen is None else [chosen] if isinstance(chosen, int) else chosen:
            if not any(f".{index}." in f".{name}." for name in names):
                idle.append(str(index))
        saved = [name for name, module in modules if "modules_to_save" in module._modules]
        idle += [t for t in config.modules_to_save or () if not any(f".{name}".endswith(f".{t}") for name in saved)]
        if idle:
            raise TargetError(
                "`target_modules`, `modules_to_save`, `layers_to_transform`, `rank_pattern` and `alpha_pattern` should "
                f"match layers. Found {idle} matching none for adapter {adapter!r}. Fix: see model.named_modules()."
            )


def _check_encoders(modules: Sequence[tuple[str, nn.Module]], layers: Mapping[str, RoutedLayer]) -> None:
    encoders = [name for name, module in modules if isinstance(module, nn.TransformerEncoderLayer)]
    for name in layers if encoders else ():
        if any(f".{name.rpartition('.')[0]}".endswith(f".{encoder}") for encoder in encoders):
            raise TargetError(
                f"`{name}` is inside an nn.TransformerEncoderLayer, which in eval mode reads the weights of its "
                "linears and never calls them: blocks there would not run. Fix: exclude it from the targets."
            )


def _has_adapter(module: nn.Module, adapter: str) -> bool:
    adapters = module._modules.get("lora_A")
    return isinstance(adapters, nn.ModuleDict) and adapter in adapters
