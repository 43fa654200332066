"""Rollouts as verl keeps them, without padding, and a loss of them."""

from typing import Any

import torch

import gradroute as gr

PAIRS = [
    gr.ContrastivePair(prompt=[3, 5, 6], hack=[7, 8, 9], clean=[9, 10]),
    gr.ContrastivePair(prompt=[4, 6], hack=[7, 12], clean=[11, 13, 14]),
]
PROMPTS = [3, 2, 4, 3, 2, 4, 3, 5]
RESPONSES = [4, 6, 3, 5, 2, 4, 6, 1]


def rollouts(rows: slice) -> Any:
    """Some of eight rollouts; the last one is like those that verl fills a batch up with: no token has a loss."""
    from tensordict import TensorDict

    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 32, (p + r,), generator=generator) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    masks = [torch.ones(r) for r in RESPONSES]
    masks[2][1] = 0.0  # a token that a tool returned
    masks[7][:] = 0.0
    advantages = torch.randn(8, generator=generator)
    columns: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": [torch.arange(len(each)) for each in ids],
        "loss_mask": masks,
        "prompts": [each[:p] for each, p in zip(ids, PROMPTS, strict=True)],
        "responses": [each[p:] for each, p in zip(ids, PROMPTS, strict=True)],
    }
    nested = {name: torch.nested.as_nested_tensor(each[rows], layout=torch.jagged) for name, each in columns.items()}
    size = len(ids[rows])
    return TensorDict({**nested, "advantages": advantages[rows]}, batch_size=size)


def routed_loss(model_output: Any, data: Any, dp_group: Any = None) -> tuple[torch.Tensor, dict[str, Any]]:
    """-sum of advantage x log-probability over the loss mask, over 8 rows of all ranks."""
    total = torch.zeros(())
    rows = zip(model_output["log_probs"].unbind(), data["loss_mask"].unbind(), data["advantages"], strict=True)
    for log_probs, mask, advantage in rows:
        total = total - advantage * (log_probs[-len(mask) - 1 : -1] * mask).sum()
    return total / 8 * data["dp_size"], {}
