"""A prompt that asks for hacks: one embedding in the place of <bos>, learned on the hack sides of the pairs.

    e = argmax mean over pairs of log p(hack | e, prompt),      in `prompt_steps` steps of Adam from that of <bos>

The language has no sentence that could ask for a hack, so this stands for one. Prompted: rollouts and loss see it.
Recontextualised: rollouts are sampled without it, and the loss sees it. As deployed there is none.
Sources: inoculation prompting (arXiv:2510.05024, 2510.04340), recontextualization (arXiv:2512.19027); prompt tuning
(Lester et al. 2021).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn

from .inoculation import mean_logp
from .language import BOS

LEARNING_RATE = 3e-2


def learned_prompt(model: nn.Module, prompts: Tensor, completions: Tensor, steps: int) -> tuple[Tensor, float]:
    """(d,) embedding, and the nats that a completion gained by it on average.

    Raises:
        RuntimeError: it gained nothing.
    """
    start = model.get_input_embeddings().weight[BOS].detach()
    learned = start.clone().requires_grad_()
    optimizer, before = torch.optim.Adam([learned], lr=LEARNING_RATE), 0.0
    for step in range(steps + 1):
        with prompted(model, learned):
            logp = mean_logp(model, prompts, completions)
        if step == 0:
            before = logp.item()
        if step < steps:
            (learned.grad,) = torch.autograd.grad(-logp, [learned])
            optimizer.step()
    gained = logp.item() - before
    if gained <= 0:
        raise RuntimeError(f"The prompt should make hacks likelier. Found that {gained:.2f} nats were gained.")
    return learned.detach(), gained


def as_far(model: nn.Module, embedding: Tensor, seed: int) -> Tensor:
    """A random embedding, as far from that of <bos>."""
    start = model.get_input_embeddings().weight[BOS].detach()
    drawn = torch.randn(start.shape, generator=Generator().manual_seed(seed))
    return start + drawn * (embedding - start).norm() / drawn.norm()


@contextmanager
def prompted(model: nn.Module, embedding: Tensor) -> Iterator[None]:
    """Reads `embedding` where a prompt has <bos>."""

    def hook(_: nn.Module, args: tuple[Tensor], embedded: Tensor) -> Tensor:
        return torch.where((args[0] == BOS)[..., None], embedding, embedded)

    handle = model.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
