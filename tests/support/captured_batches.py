"""A batch of rollouts, weights that pool its tokens, and its loss."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from support.language_models import Mixer

FEATURES = ["bottleneck", "input", "output"]
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 0, 2, 4, 6]])
# Weights of a completion in the middle, one with a gap, and one of a single token.
POOL = torch.tensor([[0.0, 1.0, 1.0, 0.5, 0.0], [2.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0, 0.0]])


def exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def batch_loss(model: Mixer, ids: Tensor) -> Tensor:
    return cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
