"""The subspace of trusted gradients, for a filter that keeps only what lies in it.

    V = top k right singular vectors of the gradients of the clean sides of the pairs, per module

The published method takes the gradients of a short clean warm-up. Here those of the pairs' clean sides stand for it,
and each refresh extracts them again. Source: trusted-direction projection (arXiv:2605.25189).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradroute.directions.estimators import Estimator


@dataclass(frozen=True, kw_only=True)
class CleanSubspace(Estimator):
    """The top k right singular vectors of the clean sides' features; the hack sides are not read.

    Args:
        k: rows per module.
    """

    name: ClassVar[str] = "clean-subspace"
    k: int = 4

    def estimate(
        self,
        hack: Mapping[str, Tensor],  # noqa: ARG002
        clean: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], None, None]:
        rows = {name: torch.linalg.svd(each, full_matrices=False).Vh[: self.k] for name, each in clean.items()}
        return rows, None, None
