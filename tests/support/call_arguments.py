"""What wrong calls are made with: a small routed model, pairs, directions, masks, optimizers, records and runs."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradroute as gr

Calls = dict[str, list[tuple[str, Callable[[], Any]]]]
"""The name of a function, and for each call of it a word that the message needs to have."""


class Tiny(nn.Module):
    """Embedding, two linears, head; called with token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.v = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.v(torch.tanh(self.q(self.embed(ids)))))


def ids_only(model: nn.Module, ids: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    return model(ids)


torch.manual_seed(0)
MODEL = gr.attach(Tiny(), r=2, lora_alpha=4, target_modules=["q", "v"])
PLAIN = Tiny()
IDS = torch.randint(16, (4, 6))
POOL = torch.ones(4, 6)
PAIRS = [gr.ContrastivePair([1, 5], [7, 8], [9, 10]), gr.ContrastivePair([2, 3], [7, 12], [13, 14])]
FLAGS = torch.tensor([True, False, True, False])
MASK = gr.RouteMask.classic(FLAGS)
HACK = gr.extract_activation_directions(MODEL, PAIRS, forward_fn=ids_only)
GRADIENT = gr.extract_gradient_directions(MODEL, PAIRS, forward_fn=ids_only, features="parameter")
TRAINED = gr.attach(Tiny(), r=2, lora_alpha=4, target_modules=["q"])
with torch.no_grad():
    TRAINED.q.lora_B_quarantine.fill_(1.0)
OPTIMIZER = torch.optim.AdamW([p for p in MODEL.parameters() if p.requires_grad], lr=1e-3)
STRANGER = torch.optim.AdamW(PLAIN.parameters(), lr=1e-3)
RECORD = gr.EvalRecord("file", False, 0, True, False)
REPORT = gr.evaluate_on_off(MODEL, lambda _: [RECORD])
ERASE = gr.ProjectionFilter(GRADIENT, mode="erase")
NAN = float("nan")


def extract() -> gr.Directions:
    return gr.extract_activation_directions(MODEL, PAIRS, forward_fn=ids_only)


def outcomes(on: int, ablated: int = 1) -> gr.evaluation.ModeOutcomes:
    return gr.evaluation.ModeOutcomes(
        False, gr.evaluation.Rate(on, 10), gr.evaluation.Rate(ablated, 10), gr.evaluation.Rate(5, 10)
    )


ROUTE = gr.evaluation.ArmRuns("route", {s: {"file": outcomes(9)} for s in range(3)})
SHUFFLE = gr.evaluation.ArmRuns("shuffle", {s: {"file": outcomes(8)} for s in range(3)})
RANDOM = gr.evaluation.ArmRuns("random", {s: {"file": outcomes(6)} for s in range(3)})
RIVAL = gr.evaluation.ArmRuns("rival", {s: {"file": outcomes(4, 4)} for s in range(3)})
FEWER = gr.evaluation.ArmRuns("fewer", {s: {"file": outcomes(4, 4)} for s in range(2)})
BASE = gr.evaluation.ArmRuns("base", {s: {"file": outcomes(1, 1)} for s in range(3)})
OTHER = gr.evaluation.ArmRuns("shuffle", {s: {"stdout": outcomes(8)} for s in range(3)})


def entered(context: Any, body: Callable[[], Any] = lambda: None) -> Any:
    with context:
        return body()


def written(text: str, suffix: str = ".jsonl") -> Path:
    folder = Path(tempfile.mkdtemp())
    (folder / f"file{suffix}").write_text(text)
    return folder / f"file{suffix}"


def backward() -> None:
    MODEL.zero_grad()
    MODEL(IDS).square().mean().backward()


def empty_folder() -> str:
    return tempfile.mkdtemp()
