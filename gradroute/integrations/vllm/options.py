"""What an engine has to be made with to hold both views of a model, and which models vLLM would refuse.

max_lora_rank >= r + r_quarantine,   max_loras >= 2
"""

from typing import Any

from packaging.version import Version
from torch import nn

from gradroute._protocol import BLOCKS
from gradroute._typing import typechecked
from gradroute.adapters.peft.plain_lora import PREFIX, PlainLora
from gradroute.errors import GradRouteError

LOWEST = "0.22"

# `max_lora_rank` takes these values and no others.
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@typechecked
def lora_options(model: nn.Module) -> dict[str, Any]:
    """The arguments of `vllm.LLM` that hold both views: enable_lora, max_loras = 2, max_lora_rank >= r + r_quarantine.

    Args:
        model: with routed layers.

    Raises:
        GradRouteError: vLLM would refuse the model's adapters, or lack what is trained beside them: modules trained
            whole, other trainable parameters, or a rank above its largest.
    """
    return {"enable_lora": True, "max_loras": 2, "max_lora_rank": _largest_rank(served_lora(model))}


def check_version() -> None:
    """Raise unless a vLLM is installed that this was written for."""
    try:
        import vllm  # noqa: PLC0415
    except ImportError as error:
        raise GradRouteError("vLLM should be installed. Found none. Fix: pip install vllm.") from error
    found = Version(vllm.__version__)
    # A build from source calls itself 0.1.dev, whatever it is made of.
    if found < Version(LOWEST) and not found.is_devrelease:
        raise GradRouteError(f"vllm should be {LOWEST} or newer. Found {vllm.__version__}. Fix: pip install -U vllm.")


def served_lora(model: nn.Module) -> PlainLora:
    """What vLLM is given of the model.

    Raises:
        GradRouteError: modules trained whole, or other parameters that are trained beside the blocks; a rank above the
            largest of vLLM, or names that PEFT would not load.
    """
    plain = PlainLora(model)
    whole = plain.whole_modules()
    if whole:
        raise GradRouteError(
            "`model` should train nothing but its blocks: vLLM refuses adapters with whole modules. Found "
            f"`{next(iter(whole)).removeprefix(PREFIX)}` (`modules_to_save`). Fix: leave modules_to_save out."
        )
    blocks = {id(p) for layer in plain.layers.values() for block in BLOCKS for p in layer.block_parameters(block)}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in blocks and ".lora_" not in n]
    if others:
        raise GradRouteError(
            "`model` should train nothing but its blocks: an engine is given nothing else, and would sample from other "
            f"weights. Found {len(others)} other trainable parameters, such as `{others[0]}`. "
            "Fix: requires_grad_(False)."
        )
    _largest_rank(plain)
    plain.check(plain.factors(BLOCKS))
    return plain


def _largest_rank(plain: PlainLora) -> int:
    rank = plain.rank(BLOCKS)
    if rank > _RANKS[-1]:
        raise GradRouteError(
            f"r + r_quarantine should be at most {_RANKS[-1]}, the largest rank of an adapter in vLLM. Found {rank}."
        )
    return next(allowed for allowed in _RANKS if allowed >= rank)
