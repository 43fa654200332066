"""Directions on disk, found again by what they were made of and never by a path somebody gave them.

    key = SHA-256(token ids of the pairs, base model, values of the blocks, view, extractor and all its settings)

A policy that has moved has another key: what a cache returns is what an extraction would.
"""

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from gradroute._hashing import model_identity, trained_hash
from gradroute._logging import warn
from gradroute._protocol import routed_layers
from gradroute.directions.directions import Directions
from gradroute.directions.pairs import ContrastivePair, pair_hash, tokenize_pairs
from gradroute.errors import GradRouteError

_FORMAT = "gradroute-direction-cache-1"


class DirectionCache:
    """A folder of directions; `cache.extract(extract_activation_directions, model, pairs, tokenizer=tok, ...)`.

    Args:
        folder: made if it is not there. Files are named by their key. Errors are those of `extract`.
    """

    def __init__(self, folder: str | Path) -> None:
        if not isinstance(folder, str | os.PathLike):
            raise GradRouteError(f"`folder` should be a path. Found {type(folder).__name__}.")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hits, self.misses = 0, 0

    def extract(
        self,
        extractor: Callable[..., Directions],
        model: nn.Module,
        pairs: Sequence[ContrastivePair],
        **settings: Any,
    ) -> Directions:
        """`extractor(model, pairs, **settings)`, or the file that such a call wrote; on the CPU then, as of step 0.

        Args:
            extractor: `extract_activation_directions`, `extract_gradient_directions`, or a function like them.
            model, pairs: as the extractor takes them.
            settings: its other arguments: numbers, texts, tensors, lists and dataclasses (estimators) of these, a
                tokenizer (known by the ids it makes of the pairs), functions of a module (known by name and code; what
                those call is not looked at).

        Raises:
            GradRouteError: a setting whose content cannot be told, or an extractor that used other pairs or another
                model than it was given.

        A file that is damaged or not what its name says is extracted again, with a `GradRouteWarning`.
        """
        path = self.folder / f"{self.key(extractor, model, pairs, **settings)}.safetensors"
        if path.is_file():
            try:
                directions = Directions.load(path, model=model)
                _check_made_of(directions, model, pairs)
            except GradRouteError as error:
                warn(f"{path} is of no use and is made again: {error}")
            else:
                self.hits += 1
                return directions
        self.misses += 1
        directions = extractor(model, pairs, **settings)
        _check_made_of(directions, model, pairs)
        # Under another name first: a run that is stopped while it writes must not leave half a file to be found.
        unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
        directions.save(unfinished)
        unfinished.replace(path)
        return directions

    def key(
        self,
        extractor: Callable[..., Directions],
        model: nn.Module,
        pairs: Sequence[ContrastivePair],
        **settings: Any,
    ) -> str:
        """The name of the file for this call, for the values that the blocks have now."""
        bound = inspect.signature(extractor).bind(model, pairs, **settings)
        bound.apply_defaults()
        # The tokenizer is told by what it made of the pairs; a bar changes nothing.
        unread = ("tokenizer", "progress")
        given = {name: value for name, value in list(bound.arguments.items())[2:] if name not in unread}
        rollouts = tokenize_pairs(pairs, bound.arguments.get("tokenizer"))
        content = {
            "format": _FORMAT,
            "extractor": _told(extractor, "extractor"),
            "settings": {name: _told(value, name) for name, value in given.items()},
            "pairs": pair_hash(pairs),
            "rollouts": [[rollout.ids, rollout.completion_start] for rollout in rollouts],
            "base": model_identity(model),
            "trained": trained_hash(model),
            "view": sorted({layer.view for layer in routed_layers(model).values()}),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"DirectionCache({str(self.folder)!r}, {self.hits} hits, {self.misses} misses)"


def _check_made_of(directions: object, model: nn.Module, pairs: Sequence[ContrastivePair]) -> None:
    if not isinstance(directions, Directions):
        raise GradRouteError(f"`extractor` should return Directions. Found {type(directions).__name__}.")
    expected = {"pair_hash": pair_hash(pairs), "model": model_identity(model)}
    for name, value in expected.items():
        if getattr(directions.provenance, name) != value:
            raise GradRouteError(
                f"The directions should have the {name} {value[:8]} of what was given to the extractor. Found "
                f"{getattr(directions.provenance, name)[:8]}: it took something else."
            )


def _told(value: Any, name: str) -> Any:
    """`value` as JSON that changes with its content."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_told(each, name) for each in value]
    if isinstance(value, Tensor):
        return hashlib.sha256(save({"values": value.detach().cpu().contiguous().clone()})).hexdigest()
    if isinstance(value, Mapping):
        return [[_told(key, name), _told(each, name)] for key, each in value.items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        told = [[each.name, _told(getattr(value, each.name), name)] for each in dataclasses.fields(value)]
        return [type(value).__module__, type(value).__qualname__, told]
    function = inspect.unwrap(value) if callable(value) else None
    if isinstance(function, FunctionType) and not function.__closure__ and "<lambda>" not in function.__qualname__:
        defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        told = [_told(default, f"a default of {name}") for default in defaults]
        return [function.__module__, function.__qualname__, _code(function.__code__), told]
    raise GradRouteError(
        f"`{name}` should be a value or a named function, so that a key can be made of its content. Found {value!r}. "
        "Fix: a function of a module, without variables of an enclosing one; or extract without the cache."
    )


def _code(code: CodeType) -> list[Any]:
    constants = [_code(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), list(code.co_varnames), constants]
