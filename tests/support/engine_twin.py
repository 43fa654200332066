"""An engine for a sharded model: a whole copy that takes over both blocks at each call, or only at the first."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import gradroute as gr
from gradroute._sharding import whole
from gradroute.evaluation import assert_engine_follows
from gradroute.integrations.vllm.rows import ablated_rows

PROMPTS = [[3, 4, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16], [20, 21, 22, 9, 10, 4]]


def blocks(model: nn.Module) -> list[Tensor]:
    """Of both, whole."""
    return [whole(p, name).clone() for name, p in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]]


class Twin:
    """Samples two tokens greedily, each row in the view that `model` shows it in."""

    def __init__(self, model: nn.Module, twin: nn.Module, stale: bool) -> None:
        self.model, self.twin, self.stale, self.copied = model, twin, stale, False

    def __call__(self, prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[float]]]:
        if not (self.stale and self.copied):
            held = [*gr.deployed_parameters(self.twin), *gr.quarantine_parameters(self.twin)]
            for (_, parameter), values in zip(held, blocks(self.model), strict=True):
                parameter.data.copy_(values)
            self.copied = True
        rows = [self.row(list(p), off) for p, off in zip(prompts, ablated_rows(self.model, len(prompts)), strict=True)]
        return [ids for ids, _ in rows], [logps for _, logps in rows]

    def row(self, prompt: list[int], ablated: bool) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        logps: list[float] = []
        with gr.ablate_quarantine(self.twin) if ablated else nullcontext(), torch.no_grad():
            for _ in range(2):
                logp = self.twin(input_ids=torch.tensor([prompt + ids])).logits[0, -1].log_softmax(-1)
                ids.append(int(logp.argmax()))
                logps.append(float(logp.max()))
        return ids, logps


def followed(model: nn.Module, twin: nn.Module) -> dict[str, Any]:
    """The error of an engine that follows, the message about one that does not, and whether the blocks are back."""
    before = blocks(model)
    found: dict[str, Any] = {
        "error": assert_engine_follows(model, Twin(model, twin, False), prompts=PROMPTS, tolerance=1e-3)
    }
    try:
        assert_engine_follows(model, Twin(model, twin, True), prompts=PROMPTS, tolerance=1e-3)
    except gr.GradRouteError as error:
        found["stale"] = str(error)
    return {**found, "bitwise": all(map(torch.equal, blocks(model), before))}
