"""What every other part of the library may know of a layer with two blocks.

    y = W x + s_d B_d A_d x + m s_q B_q A_q x

`adapters` implements `RoutedLayer`; `directions` reads features from it without importing `adapters`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from gradroute.errors import GradRouteError


class Block(NamedTuple):
    """One low-rank block: `scaling * B @ A`, with `A` of shape (r, d_in) and `B` of shape (d_out, r)."""

    A: Float[Tensor, "r d_in"]
    B: Float[Tensor, "d_out r"]
    scaling: float


BlockName = Literal["deployed", "quarantine"]


class RoutedLayer(nn.Module, ABC):
    """A linear layer that carries a deployed and a quarantine block."""

    @property
    @abstractmethod
    def deployed(self) -> Block:
        """The block that is kept at deployment."""

    @property
    @abstractmethod
    def quarantine(self) -> Block:
        """The block that is ablated at deployment."""

    @abstractmethod
    def block_parameters(self, block: BlockName) -> Iterator[nn.Parameter]:
        """The trainable tensors of one block; not `block.A` and `block.B` where those are computed from others."""

    @abstractmethod
    def base_weight(self) -> Float[Tensor, "d_out d_in"]:
        """The frozen W of y = W x, floating point also where the layer stores it transposed or quantised."""

    @property
    @abstractmethod
    def has_open_route(self) -> bool:
        """Whether a forward made now would be routed."""

    @property
    @abstractmethod
    def view(self) -> str:
        """What a forward made now would show: "on", "ablated", "scaled" or "disabled"."""


def routed_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """Every routed layer of `model` by qualified name, in module order; raises if there is none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RoutedLayer)}
    if not layers:
        raise GradRouteError(
            f"`model` should contain routed layers. Found none in a {type(model).__name__}. "
            "Fix: call gradroute.attach(model, ...) first."
        )
    return layers
