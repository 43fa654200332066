"""The reading of features from a model: of which modules, in which forward, and with which weights over the tokens.

bottleneck, input, output   of routed layers (or of modules given by name)
residual                    the output of a transformer block: the elements of the model's list of blocks
parameter                   gradient of the deployed A and B, flattened: r d_in + d_out r wide
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from gradroute._checks import described, one_of
from gradroute._module_tree import Walk, named_modules, walked
from gradroute._protocol import RoutedLayer, routed_layers
from gradroute._sharding import wide
from gradroute._step_hooks import LocalHook
from gradroute.errors import GradRouteError

Feature = Literal["bottleneck", "input", "output", "residual", "parameter"]
Reduction = Literal["mean", "sum", "last"]
Source = Literal["activation", "gradient"]
Pool = Shaped[Tensor, "batch seq"] | Callable[[Tensor], Tensor] | None


def read_modules(model: nn.Module, names: Sequence[str] | None, features: Feature) -> Mapping[str, nn.Module]:
    """The modules that are read, by name: those asked for, else all routed layers, or all blocks for "residual".

    Raises:
        GradRouteError: an unknown feature or module, or a plain module where a routed layer is needed.
    """
    one_of("features", features, get_args(Feature))
    if names is None:
        return transformer_blocks(model) if features == "residual" else routed_layers(model)
    if isinstance(names, str) or not names:
        raise GradRouteError(f"`modules` should be a list of module names. Found {names!r}.")
    known = named_modules(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise GradRouteError(f"`modules` names what `model` does not have: {unknown[:5]}. See model.named_modules().")
    if features in ("bottleneck", "parameter"):
        plain = [name for name in names if not isinstance(known[name], RoutedLayer)]
        if plain:
            raise GradRouteError(f'`features="{features}"` needs routed layers. Found others: {plain[:5]}.')
    return {name: known[name] for name in names}


def transformer_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The elements of the outermost `nn.ModuleList` that holds routed layers, by name.

    Raises:
        GradRouteError: there is no such list, or more than one (an encoder and a decoder).
    """
    routed = routed_layers(model)
    lists = [
        name
        for name, module in named_modules(model).items()
        if isinstance(module, nn.ModuleList) and any(layer.startswith(f"{name}.") for layer in routed)
    ]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outermost) != 1:
        raise GradRouteError(
            f'`features="residual"` needs one list of transformer blocks with routed layers. Found {outermost}. '
            "Fix: modules=[...] with the names of the blocks."
        )
    (name,) = outermost
    return {f"{name}.{child}": block for child, block in model.get_submodule(name).named_children()}


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The input of a module, given by position or by keyword; of a block it may be something else than a tensor."""
    return args[0] if args else next(iter(kwargs.values()))


def hidden_states(name: str, output: Any) -> Tensor:
    """The output of a module; of a block that returns a tuple, the hidden states in front."""
    hidden = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(hidden, Tensor):
        raise GradRouteError(f"`{name}` should return a tensor, or a tuple that starts with one. Found {type(output)}.")
    return hidden


class Forwards:
    """Hooks on the modules that are read; counts the forwards of the model meanwhile, and finds their view.

    A forward is a call of the outermost module that runs, together with all that it calls. A module that runs twice in
    one forward has two rows per rollout, and a model whose layers are in different views is refused.

    Args:
        model: the model that is read.
        layers: the modules that are read, by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        walk, found = walked(model)
        modules = dict(walk.named(found))
        routed = {name: module for name, module in modules.items() if isinstance(module, RoutedLayer)}
        self._layers, self._routed = layers, list(routed.values())
        self._inside = {
            name: [routed[name]] if name in routed else _inside(walk, name, module, found)
            for name, module in layers.items()
        }
        above = {".".join(parts[:i]) for parts in (name.split(".") for name in layers) for i in range(len(parts))}
        self._above = [modules[name] for name in sorted(above) if name in modules]
        self._running = self._number = self._compared = 0

    @property
    def number(self) -> int | None:
        """Of the forward that runs now; None if none of the modules above those that are read runs."""
        return self._number if self._running else None

    def view(self, name: str) -> str:
        """The view in which the module `name` runs now; compared over all layers at the first module of a forward.

        Raises:
            GradRouteError: routed layers are in different views.
        """
        first = not self._running or self._compared != self._number
        self._compared = self._number
        layers = self._routed if first or not self._inside[name] else self._inside[name]
        views = sorted({layer.view for layer in layers})
        if len(views) > 1:
            raise GradRouteError(
                f"All routed layers should be in one view while features are read. Found {views}. "
                "Fix: ablate or disable the whole model, or read the part of it that is in one view."
            )
        # A model without routed layers shows what one with all adapters disabled does.
        return views[0] if views else "disabled"

    @contextmanager
    def hooked(self, hook: Callable[..., Any], *, before: bool = False) -> Iterator[None]:
        """`hook(name, ...)` after (or before) the forward of each module that is read, for the duration of the block.

        Args:
            hook: takes the name, and what torch gives to such a hook with keywords.
            before: hook in before the forward.

        A copy of the model that is made inside is another model, and nothing of it is read.
        """
        handles: list[Any] = []
        try:
            for module in self._above:
                handles.append(module.register_forward_pre_hook(LocalHook(self._enter)))
                handles.append(module.register_forward_hook(LocalHook(self._leave), always_call=True))
            for name, module in self._layers.items():
                register = module.register_forward_pre_hook if before else module.register_forward_hook
                handles.append(register(LocalHook(partial(hook, name)), with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, *_: Any) -> None:
        if self._running == 0:
            self._number += 1
        self._running += 1

    def _leave(self, *_: Any) -> None:
        # A forward that raised before it was counted is left all the same.
        self._running = max(self._running - 1, 0)


def _inside(walk: Walk, name: str, module: nn.Module, found: list[Any]) -> list[RoutedLayer]:
    """The routed layers inside of a block, looked for once in a walk."""
    places = walk.memo.setdefault("inside", {})
    if name not in places:
        inside = {id(each) for each in module.modules() if isinstance(each, RoutedLayer)}
        places[name] = list({id(each): i for i, each in enumerate(found) if id(each) in inside}.values())
    return [found[i] for i in places[name]]


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Around products of features, which are float32 or wider: autocast would round them to eight bits."""
    kind = device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


class TokenPooling:
    """(module name, tokens (batch, seq, d), the module's input) -> pooled rows (batch, d).

    Of a packed batch (1, tokens, d) the weights have a row per rollout, (rows, tokens), and so has the result. Weights
    that a function returns are judged by `check`, at the end: to look at them in each module would wait for the device.
    """

    def __init__(self, pool: Pool, reduction: Reduction) -> None:
        self._pool, self._reduction = pool, reduction
        self._latest: tuple[Tensor, int] | None = None
        self._weights: dict[tuple[torch.device, torch.dtype], Tensor] = {}  # of the latest pool, as tokens need them
        self._unread: list[Tensor] = []
        if pool is not None and not callable(pool):
            self._look_at(pool)
            self.check()

    def __call__(self, name: str, x: Tensor, module_input: Any) -> Tensor:
        pool = self._pool(module_input) if callable(self._pool) else self._pool
        x = wide(x.detach())
        if pool is None and self._pool is None:
            if x.ndim != 2:
                raise GradRouteError(
                    f"`pool` is needed for `{name}`, whose input has shape {tuple(x.shape)}. Fix: pool=completion_mask."
                )
            return x
        self._look_at(pool)
        if (x.device, x.dtype) not in self._weights:
            self._weights[x.device, x.dtype] = next(iter(self._weights.values())).to(x)
        weights = self._weights[x.device, x.dtype]
        if x.ndim == 3 and x.shape[0] == 1 and weights.shape[1] == x.shape[1]:
            # A token that no row reads does not count, also where it is not finite.
            return weights @ x[0].masked_fill((weights == 0).all(0)[:, None], 0)
        if weights.shape != x.shape[:-1]:
            raise GradRouteError(
                f"`pool` should have the shape {tuple(x.shape[:-1])} of the input of `{name}`. Found "
                f"{tuple(weights.shape)}. Fix: cut the mask to the tokens that are run, one capture per forward shape."
            )
        return _weighted_sum(weights, x)

    def check(self) -> None:
        """Raise unless all weights so far are finite, 0 or more, and not zero in a whole row; the host reads once."""
        unread, self._unread = self._unread, []
        for bad, empty, row in torch.stack([each.to(unread[0].device) for each in unread]).tolist() if unread else ():
            if bad:
                raise GradRouteError("`pool` should hold finite weights >= 0.")
            if empty:
                raise GradRouteError(f"`pool` should keep a token in every row. Found none in row {row}.")

    def _look_at(self, pool: Any) -> None:
        if not isinstance(pool, Tensor) or pool.ndim != 2:
            raise GradRouteError(f"`pool` should be a tensor of shape (batch, seq). Found {described(pool)}.")
        # All modules of a forward get the same pool, as a rule. An inference tensor has no version.
        version = 0 if pool.is_inference() else pool._version
        if self._latest is not None and self._latest[0] is pool and self._latest[1] == version:
            return
        # float64: these few numbers scale every feature, also those of a float64 model. (MPS has no float64.)
        weights = pool.to(torch.float32 if pool.device.type == "mps" else torch.float64)
        empty = (weights == 0).all(1)
        bad = ~(weights >= 0).all() | weights.isinf().any()
        self._unread.append(torch.stack([bad.long(), empty.any().long(), empty.long().argmax()]))
        self._latest = pool, version
        self._weights = {(weights.device, weights.dtype): _reduced(weights, self._reduction)}


def _weighted_sum(weights: Float[Tensor, "batch seq"], x: Float[Tensor, "batch seq d"]) -> Float[Tensor, "batch d"]:
    """sum_t w_t x_t. A token of weight zero does not count, also where it is not finite: 0 * nan would be nan."""
    unread = (weights == 0).unsqueeze(2)
    # On a GPU, filling costs less than waiting for the sum; on a CPU, looking at the sum costs less than filling.
    if x.device.type != "cpu":
        x = x.masked_fill(unread, 0)
    rows = (weights.unsqueeze(1) @ x).squeeze(1)
    if x.device.type == "cpu" and not torch.isfinite(rows).all():
        rows = (weights.unsqueeze(1) @ x.masked_fill(unread, 0)).squeeze(1)
    return rows


def _reduced(weights: Float[Tensor, "batch seq"], reduction: Reduction) -> Float[Tensor, "batch seq"]:
    if reduction == "sum":
        return weights
    if reduction == "mean":
        return weights / weights.sum(1, keepdim=True)
    positions = torch.arange(weights.shape[1], device=weights.device)
    last = torch.where(weights != 0, positions, -1).amax(1, keepdim=True)
    return (positions == last).to(weights.dtype)
