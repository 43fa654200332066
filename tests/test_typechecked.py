"""`typechecked` refuses wrong types and shapes, and draws nothing from the user's random numbers."""

import random
from collections.abc import Mapping, Sequence

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from gradroute._typing import typechecked


@typechecked
def total(values: Sequence[float], named: Mapping[str, list[int]], x: Float[Tensor, " n"], y: Float[Tensor, " n"]):
    return sum(values)


X = torch.zeros(3)


def test_a_checked_call_leaves_the_random_state_as_found() -> None:
    """beartype looks at one random item of each sequence."""
    state = random.getstate()
    assert total([1.0, 2, 3.0], {"a": [1, 2]}, X, X) == 6
    assert random.getstate() == state


def test_wrong_items_and_shapes_are_refused() -> None:
    with pytest.raises(TypeError, match="values"):
        total(["1"], {}, X, X)
    with pytest.raises(TypeError, match="y"):
        total([1.0], {}, X, torch.zeros(4))
