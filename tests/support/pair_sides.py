"""Features of both sides of pairs, drawn at random."""

import torch
from torch import Tensor

Sides = tuple[dict[str, Tensor], dict[str, Tensor]]


def random_sides(pairs: int = 6, widths: tuple[int, ...] = (4, 3), seed: int = 0) -> Sides:
    generator = torch.Generator().manual_seed(seed)

    def side(shift: float) -> dict[str, Tensor]:
        return {
            f"m{i}": torch.randn(pairs, d, generator=generator, dtype=torch.float64) * (1 + torch.arange(d)) + shift
            for i, d in enumerate(widths)
        }

    return side(0.7), side(0.0)
