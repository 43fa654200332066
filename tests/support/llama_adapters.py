"""A small llama in PEFT, with one routed adapter or two."""

from peft import PeftModel

import gradroute as gr
from support.models import randomize_blocks
from support.peft_cases import Case, X

LLAMA = Case("llama")
KEEP = gr.RouteMask.zones(["keep"] * len(X))


def with_second(name: str = "second", seed: int = 1) -> PeftModel:
    """Two routed adapters of other values; "default" is active."""
    model = LLAMA.model()
    model.add_adapter(name, LLAMA.config())
    model.set_adapter(name)
    randomize_blocks(model, seed, std=0.2)
    model.set_adapter("default")
    return model
