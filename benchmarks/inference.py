"""P2: forwards without gradients: ablated scoring, cached decoding, merged."""

from functools import partial
from inspect import signature

import torch
from torch import nn
from transformers import DynamicCache, LlamaModel

import gradroute as gr
from benchmarks import models
from benchmarks.models import Shape
from benchmarks.row import Row, compared
from benchmarks.timing import Clock, interleaved

# Renamed in transformers 5.24.
_CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"


@torch.no_grad()
def forward(model: nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, use_cache=False)


class Decoding:
    """One token at a time from a cache that holds the prompt, filled beforehand."""

    def __init__(self, model: nn.Module, prompt: torch.Tensor, tokens: int) -> None:
        self.model, self.prompt, self.tokens = model, prompt, tokens
        self.cache = DynamicCache(config=model.config)
        self._run(prompt)

    def __call__(self) -> None:
        for _ in range(self.tokens):
            self._run(self.prompt[:, :1])
        self.cache.crop(-self.tokens)

    @torch.no_grad()
    def _run(self, ids: torch.Tensor) -> None:
        self.model(input_ids=ids, use_cache=True, **{_CACHE: self.cache})


def views(shape: Shape, clock: Clock, rounds: int) -> list[Row]:
    """P2. A generation is inside one `ablate_quarantine`, so that is entered outside of what is timed."""
    ids, routed, ablated = models.token_ids(shape), models.routed(shape).eval(), models.routed(shape).eval()
    same, double = models.lora(shape, shape.r).eval(), models.lora(shape, 2 * shape.r).eval()
    bare = models.base(shape).eval()
    merged = gr.merge_deployed(models.routed(shape)).eval()
    forwards = {"ablated": ablated, "on": routed, "LoRA r": same, "LoRA 2r": double, "bare": bare, "merged": merged}
    decoded = {name: forwards[name] for name in ("ablated", "LoRA r", "on", "LoRA 2r")}
    with gr.ablate_quarantine(ablated):
        seconds = interleaved({name: partial(forward, m, ids) for name, m in forwards.items()}, rounds, clock)
        tokens = interleaved({n: Decoding(m, ids[:1, :8], 8) for n, m in decoded.items()}, 5 * rounds, clock)
    return [
        compared("P2", "ablated forward / LoRA of rank r", seconds, ("ablated", "LoRA r"), 1.00, clock),
        compared("P2", "one-token decode, ablated / LoRA of rank r", tokens, ("ablated", "LoRA r"), 1.00, clock),
        compared("P2", "one-token decode, on / LoRA of rank 2r", tokens, ("on", "LoRA 2r"), 1.00, clock),
        compared("P2", "merged forward / bare model", seconds, ("merged", "bare"), 1.02, clock),
        compared("", "forward, on / LoRA of rank 2r", seconds, ("on", "LoRA 2r"), None, clock),
    ]
