"""Components removed from the trained difference when training is over.

    B A = sum_i sigma_i u_i v_i^T per layer,      B A <- the same without k of its components

Source: projecting the top two components out of the weights that RL has changed.
"""

from typing import Literal

import torch
from torch import Generator, nn

import gradroute as gr


@torch.no_grad()
def remove_components(model: nn.Module, k: int, which: Literal["largest", "random"], seed: int) -> None:
    """Take k components out of every deployed block: the largest, or random ones of as many as its rank.

    Raises:
        ValueError: k is not from 1 to the rank.
    """
    blocks = dict(gr.deployed_parameters(model))
    generator = Generator().manual_seed(seed)
    for name in [name for name in blocks if name.endswith("lora_A")]:
        A, B = blocks[name], blocks[name.removesuffix("lora_A") + "lora_B"]
        r = len(A)
        if not 0 < k <= r:
            raise ValueError(f"`removed_components` should be from 1 to the rank, {r}. Found {k}.")
        U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
        order = torch.randperm(r, generator=generator) if which == "random" else torch.arange(r)
        kept = torch.ones(r).index_fill(0, order[:k], 0.0)
        B.copy_(U[:, :r] * (S[:r] * kept))
        A.copy_(Vh[:r])
