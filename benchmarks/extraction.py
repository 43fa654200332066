"""P3: extracting directions against the bare passes over the same padded batches."""

from functools import partial

import torch
from torch import nn

import gradroute as gr
from benchmarks import models
from benchmarks.models import Shape
from benchmarks.row import Row, compared
from benchmarks.timing import Clock, interleaved
from gradroute.directions.pairs import PaddedBatch, batched, padded_batches, tokenize_pairs


def bare_forward(model: nn.Module, batches: list[PaddedBatch]) -> None:
    with torch.no_grad(), gr.ablate_quarantine(model):
        for batch in batches:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)


def forward_and_backward(model: nn.Module, batches: list[PaddedBatch]) -> None:
    """To the activations alone: no parameter has a gradient."""
    embeddings = model.get_input_embeddings()
    with gr.ablate_quarantine(model):
        for batch in batches:
            x = embeddings(batch.input_ids).detach().requires_grad_()
            logits = model(inputs_embeds=x, attention_mask=batch.attention_mask, use_cache=False).logits[:, :-1].float()
            nll = -logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
            (nll * batch.completion_mask[:, 1:]).sum().backward()


def extraction(shape: Shape, clock: Clock, rounds: int) -> list[Row]:
    """P3."""
    model, authored = models.routed(shape).eval(), models.pairs(shape, 8)
    rollouts = tokenize_pairs(authored, None)
    batches = list(padded_batches(rollouts, batched(rollouts, 8), torch.device(shape.device)))
    frozen = models.routed(shape).eval().requires_grad_(False)

    def extracted(extract: partial) -> None:
        with gr.ablate_quarantine(model):
            extract(model, authored, batch_size=8)

    arms = {
        "activations": partial(extracted, partial(gr.extract_activation_directions)),
        "forward": partial(bare_forward, model, batches),
        "gradients": partial(extracted, partial(gr.extract_gradient_directions)),
        "both": partial(forward_and_backward, frozen, batches),
        "parameter": partial(extracted, partial(gr.extract_gradient_directions, features="parameter")),
        "one by one": partial(pair_by_pair, model, authored),
    }
    seconds = interleaved(arms, rounds, clock)
    both = "forward + backward to activations"
    return [
        compared("P3", "activation extraction / bare forward", seconds, ("activations", "forward"), 1.05, clock),
        compared("P3", f"gradient extraction / {both}", seconds, ("gradients", "both"), 1.10, clock),
        compared("", f"gradient extraction, parameter features / {both}", seconds, ("parameter", "both"), None, clock),
        compared("", "activations pair by pair / bare forward", seconds, ("one by one", "forward"), None, clock),
    ]


def pair_by_pair(model: nn.Module, authored: list[gr.ContrastivePair]) -> None:
    """The slow reference."""
    with gr.ablate_quarantine(model):
        gr.extract_activation_directions(model, authored, batch_size=1)
