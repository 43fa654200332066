"""Find the linears that `attach` puts blocks around, and refuse those that cannot carry any.

"all-linear": every nn.Linear but the output head; a string: whole names; a list: a module's name, or its `.suffix`.
A name that matches nothing is an error.
"""

import difflib
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradroute._sharding import check_not_sharded
from gradroute._transfers import check_not_offloaded
from gradroute.errors import TargetError

_MAMBA = {"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"}


def find_targets(model: nn.Module, target_modules: str | Sequence[str]) -> dict[str, nn.Linear]:
    modules = dict(model.named_modules(remove_duplicate=False))
    del modules[""]
    if target_modules == "all-linear":
        head = embeddings(model, "output")
        names = [name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
        if not names:
            raise TargetError(f'`target_modules="all-linear"` found no nn.Linear inside a {type(model).__name__}.')
    elif isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise TargetError(f"`target_modules` is no regular expression: {target_modules!r} ({error}).") from error
        names = [name for name in modules if pattern.fullmatch(name)]
        if not names:
            raise TargetError(_nothing_matched(target_modules, modules, "A string must match whole module names."))
    else:
        names = []
        if not target_modules or not all(isinstance(entry, str) for entry in target_modules):
            raise TargetError(f"`target_modules` should be names of modules. Found {target_modules!r}.")
        for entry in target_modules:
            matched = [name for name in modules if name == entry or name.endswith(f".{entry}")]
            if not matched:
                raise TargetError(_nothing_matched(entry, modules, "An entry is a module's name or its suffix."))
            names += [name for name in matched if name not in names]
    return {name: _linear(model, name) for name in names}


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
        raise TargetError(
            f"`target_modules` matched `{name}`, inside an nn.TransformerEncoderLayer, which in eval mode reads the "
            "weights of its linears and never calls them: blocks there would not run. Fix: leave it out."
        )
    if not isinstance(module, nn.Linear):
        raise TargetError(
            f"`target_modules` matched `{name}`, a {type(module).__name__}; only nn.Linear can be adapted. "
            "Fix: name the linears inside it."
        )
    if not gives_one_tensor(module):
        head = embeddings(model, "output")
        linears = [key for key, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        others = sorted({key.rpartition(".")[2] for key in linears} - {name.rpartition(".")[2]})
        raise TargetError(
            f"`target_modules` matched `{name}`, a {type(module).__name__}, whose forward does not give one tensor of "
            f"its out_features (a router): blocks could not be added to it. Fix: target_modules={others}."
        )
    return module


def check_base_layer(name: str, module: nn.Module) -> None:
    """Raise `TargetError` if blocks around `module` would never run, or would be on another device or rank."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TargetError(
            f"`{name}` is the output projection of nn.MultiheadAttention, which reads its weight and never calls it: "
            "blocks there would never run. Fix: leave it out of the targets."
        )
    check_not_offloaded(name, module)
    check_not_sharded(name, module)


def gives_one_tensor(linear: nn.Linear) -> bool:
    """Whether a linear with a forward other than nn.Linear's returns (..., out_features), as tried on one row."""
    # A quantised weight may be repacked by the first forward (bitsandbytes does), and its layer gives one tensor.
    if type(linear).forward is nn.Linear.forward or type(linear.weight) is not nn.Parameter:
        return True
    devices = [linear.weight.device] if linear.weight.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            output = type(linear).forward(linear, linear.weight.new_zeros(1, linear.in_features))
        except Exception:  # what one row of zeros cannot tell, the first forward will
            return True
    return isinstance(output, Tensor) and output.shape == (1, linear.out_features)


def embeddings(model: nn.Module, side: str) -> nn.Module | None:
    """The "input" or "output" embeddings of a Hugging Face model; None where it has none, or does not say."""
    get = getattr(model, f"get_{side}_embeddings", None)
    try:
        found = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None  # a model of two towers (CLIP)
    return found if isinstance(found, nn.Module) else None


def refused_by_peft(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of `names` onto which PEFT does not load an adapter: the fused kernels of Mamba read their weights."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return [name for name in names if kind in _MAMBA and name.rpartition(".")[2] in ("out_proj", "conv1d")]


def _nothing_matched(entry: str, modules: dict[str, nn.Module], rule: str) -> str:
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    leaves = {name.rpartition(".")[2] for name in linears}
    near = difflib.get_close_matches(entry.rpartition(".")[2], sorted(leaves), n=3, cutoff=0.5)
    near += difflib.get_close_matches(entry, linears, n=2, cutoff=0.8)
    if near:
        hint = "Did you mean " + ", ".join(f"`{name}`" for name in dict.fromkeys(near)) + "?"
    else:
        hint = "Linear modules end in " + ", ".join(f"`{leaf}`" for leaf in sorted(leaves)[:12]) + "."
    return f"`{entry}` in `target_modules` matched nothing. {rule} {hint}"
