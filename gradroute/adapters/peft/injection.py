"""Blocks onto a base model whose values may be on another rank.

Trainers that shard load the base model on the first rank and let it send the values; on the others it is on the meta
device, where a checkpoint cannot be loaded and its config alone says what the model consists of.
"""

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from gradroute.adapters.peft.checkpoint import load_quarantined
from gradroute.adapters.peft.config import QuarantineLoraConfig, read_config
from gradroute.errors import FileFormatError


def inject_blocks(model: nn.Module, config: QuarantineLoraConfig, path: str | Path | None = None) -> PeftModel:
    """`model` with both blocks in the type of its weights: new ones of `config`, or those saved in `path`.

    Args:
        model: the base model, on this rank maybe without values.
        config: of new blocks; r, r_quarantine and lora_alpha of saved ones have to be these.
        path: a folder that `save_pretrained` wrote.

    Raises:
        FileFormatError: saved blocks of another r, r_quarantine or lora_alpha, or see `load_quarantined`.
    """
    base: Any = model
    dtype = next(model.parameters()).dtype
    if path is None:
        injected: Any = get_peft_model(base, config)
    else:
        saved = read_config(Path(path))
        expected, found = ((c.r, c.r_quarantine or c.r, c.lora_alpha) for c in (config, saved))
        if found != expected:
            raise FileFormatError(
                f"`{path}` should hold blocks of (r, r_quarantine, lora_alpha) = {expected}, as configured. Found "
                f"{found}. Fix: the settings that they were trained with."
            )
        saved.inference_mode = False  # a saved config says True, and its blocks would be frozen on this rank alone
        without_values = any(parameter.is_meta for parameter in model.parameters())
        injected = get_peft_model(base, saved) if without_values else load_quarantined(model, path)
    for parameter in injected.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    wrapped: PeftModel = injected
    return wrapped
