"""Refusals in the place of Hugging Face's methods that do the wrong thing to an attached model.

`save_pretrained` writes names that `from_pretrained` does not know, and draws those weights at random with no error;
`resize_token_embeddings` puts a plain head in the place of a routed one; `merge_and_unload` is PEFT's.
"""

import weakref
from typing import Any

from torch import nn

from gradroute._logging import warn
from gradroute._protocol import RoutedLayer
from gradroute.adapters._targets import embeddings
from gradroute.errors import GradRouteError, TargetError

_NOT_LOADED = (
    "save_pretrained(...) of an attached model writes weights under names that from_pretrained does not know: it would "
    "draw every targeted layer at random. Fix: merge_deployed(model) first, or export_deployed(model, path); to go on "
    "training, save model.state_dict() and load it into a model with the same attach(...)."
)


def put_signposts(model: nn.Module) -> None:
    """Put a refusal in the place of each such method that `model` has, or that users expect of it."""
    model.__dict__["merge_and_unload"] = _merge_and_unload
    if callable(getattr(model, "save_pretrained", None)):
        model.__dict__["save_pretrained"] = _SavePretrained(model)
    if isinstance(embeddings(model, "output"), RoutedLayer):
        model.__dict__["resize_token_embeddings"] = _resize


def take_signposts(model: nn.Module) -> None:
    """Give `model` and the modules inside it their methods back."""
    for module in model.modules():
        for name in ("merge_and_unload", "save_pretrained", "resize_token_embeddings"):
            found = module.__dict__.get(name)
            if found in (_merge_and_unload, _resize) or isinstance(found, _SavePretrained):
                del module.__dict__[name]


def _merge_and_unload(*_: Any, **__: Any) -> None:
    raise GradRouteError(
        "merge_and_unload() is a method of PEFT's models. Found a model with attached blocks. "
        "Fix: gradroute.merge_deployed(model) merges the deployed block and drops the quarantine."
    )


def _resize(*_: Any, **__: Any) -> None:
    raise TargetError(
        "resize_token_embeddings(...) of a model whose head has blocks would put a plain head in its place. "
        "Fix: resize first and attach then, or leave the head out of `target_modules`."
    )


class _SavePretrained:
    """Refuses, unless a Trainer calls it, or the caller says what to save."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)  # in a cycle a model would outlive its last use

    def __reduce__(self) -> Any:
        # Copies and pickles of the model hold one that belongs to them.
        return type(self), (self._model(),)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if "is_main_process" in options:
            # A Trainer's checkpoint, which load_state_dict reads back under the names it was written with.
            warn(_NOT_LOADED)
        elif options.get("state_dict") is None:
            raise GradRouteError(_NOT_LOADED)
        model: Any = self._model()
        return type(model).save_pretrained(model, *arguments, **options)
