"""Models with adapters whose blocks are not zero, in folders, for verl to load."""

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import gradroute as gr
from support.models import randomize_blocks
from support.tiny_models import llama


def write_models(folder: Path) -> None:
    """`untied` and `tied`, each with `base` and `adapter`."""
    for name, tied in (("untied", False), ("tied", True)):
        torch.manual_seed(0)
        base = llama(tie_word_embeddings=tied, initializer_range=0.2)
        base.save_pretrained(folder / name / "base")
        config = gr.QuarantineLoraConfig(r=4, lora_alpha=8, r_quarantine=3, target_modules="all-linear")
        wrapped = get_peft_model(base, config)
        randomize_blocks(wrapped)
        wrapped.save_pretrained(folder / name / "adapter")


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model and its blocks in one of these folders, in one process."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="sdpa")
    return gr.load_quarantined(base.to(dtype), folder / "adapter")
