"""The forward of a Hugging Face model on a padded batch of token ids, where no `forward_fn` is given."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from gradroute._module_tree import unwrapped
from gradroute._protocol import RoutedLayer
from gradroute.errors import GradRouteError

ForwardFn = Callable[[nn.Module, Tensor, Tensor], Any]
"""(model, input_ids, attention_mask) -> logits, or an object with `.logits`."""


def huggingface_forward(model: nn.Module, all_logits: bool) -> ForwardFn:
    """The forward of a Hugging Face model that reads token ids; unless `all_logits`, with as few logits as it allows.

    The head is the largest product of a small model: a fifth of SmolLM2-135M.

    Raises:
        GradRouteError: the model reads something else, or has a decoder that the completion would belong to.
    """
    inner = _unwrapped(model)
    parameters = inspect.signature(inner.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    reads = getattr(inner, "main_input_name", "input_ids")
    if reads != "input_ids" or not (takes_any or {"input_ids", "attention_mask"} <= parameters.keys()):
        raise GradRouteError(
            "`forward_fn` should be given for a model that does not take `input_ids` and `attention_mask`. Found a "
            f"{type(inner).__name__}, which takes {', '.join(parameters)}. "
            "Fix: forward_fn=lambda model, ids, mask: model(...)."
        )
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise GradRouteError(
            f"`forward_fn` should be given for an encoder with a decoder. Found a {type(inner).__name__}, whose "
            "encoder would get both prompt and completion. Fix: forward_fn=lambda model, ids, mask: model(...)."
        )
    options: dict[str, Any] = {"use_cache": False} if takes_any or "use_cache" in parameters else {}
    if not all_logits and "logits_to_keep" in parameters:
        options["logits_to_keep"] = 1
    return lambda called, ids, mask: called(input_ids=ids, attention_mask=mask, **options)


def reads_head(model: nn.Module, modules: Sequence[str] | None) -> bool:
    """Whether the features are those of the head, or the head cannot be told apart."""
    get_head = getattr(_unwrapped(model), "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if head is None or isinstance(head, RoutedLayer):
        return True
    return any(module is head for name, module in model.named_modules() if name in (modules or ()))


def pad_token(model: nn.Module) -> int:
    """The padding token of `model`, or 0. Sequence classifiers look for the last token that is another one."""
    token = getattr(getattr(_unwrapped(model), "config", None), "pad_token_id", None)
    return token if isinstance(token, int) and token >= 0 else 0


def _unwrapped(model: nn.Module) -> Any:
    inner: Any = unwrapped(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner
