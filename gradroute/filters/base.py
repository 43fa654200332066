"""The base of every filter: new gradients for the blocks, and figures of the change."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from gradroute._protocol import BlockName, RoutedLayer
from gradroute.filters.stats import FilterStats


class FilteredGradients(NamedTuple):
    """New gradients of some parameters, and figures of the change.

    Args:
        writes: each parameter with its new gradient.
        stats: figures of the gradient before and after.
    """

    writes: Sequence[tuple[nn.Parameter, Tensor]]
    stats: FilterStats


class GradientFilter(ABC):
    """Base of the filters that `apply_filter` and `attach_filter` run."""

    @property
    def writes_blocks(self) -> tuple[BlockName, ...]:
        """The blocks whose gradients it may change."""
        return ("deployed",)

    @abstractmethod
    def filtered(self, layers: Mapping[str, RoutedLayer]) -> FilteredGradients:
        """The gradients that should replace the present ones; changes none itself."""

    @abstractmethod
    def describe(self) -> str:
        """Say what the filter does to gradients, in a sentence for a model card."""
