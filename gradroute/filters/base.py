"""What a filter is: new gradients for the blocks, and figures of what was changed."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from gradroute._protocol import BlockName, RoutedLayer
from gradroute.filters.stats import FilterStats


class FilteredGradients(NamedTuple):
    """What to put into the gradients of which parameters, and the figures.

    Args:
        writes: each parameter with its new gradient.
        stats: what the filter measured and removed.
    """

    writes: Sequence[tuple[nn.Parameter, Tensor]]
    stats: FilterStats


class GradientFilter(ABC):
    """What `apply_filter` and `attach_filter` take."""

    @property
    def writes_blocks(self) -> tuple[BlockName, ...]:
        """The blocks whose gradients it may change."""
        return ("deployed",)

    @abstractmethod
    def filtered(self, layers: Mapping[str, RoutedLayer]) -> FilteredGradients:
        """The gradients that should replace the present ones; changes none itself."""

    @abstractmethod
    def describe(self) -> str:
        """What the filter did to the gradients, in a sentence for a model card."""
