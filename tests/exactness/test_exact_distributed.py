"""Two processes (gloo): every rank ends with the average of the reference gradients of all ranks."""

from functools import cache
from pathlib import Path

import pytest
import torch
from matrix import Record, cells
from ranks import BATCHES, SCENARIOS, WORLD_SIZE, WRAPPERS, Ranks, file_name
from two_pass import Gradients, added, reference, relative_error

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.touches_peft]


@pytest.fixture(scope="module")
def results(ranks: Ranks) -> Path:
    """The folder in which two processes left the gradients of every scenario."""
    ranks.wait(seconds=180)
    return ranks.folder


@cache
def averages(adapters: str, batches: str) -> tuple[Gradients, Gradients]:
    """The average over the ranks of the reference's routed gradients, and of its unrouted ones."""
    two_pass = reference("llama", adapters)
    ranks = BATCHES[batches]
    routed = [two_pass.gradients(*step) for steps in ranks for step in steps]
    unrouted = [two_pass.gradients(rows, None) for steps in ranks for rows, _ in steps]
    return added(*routed, scale=1 / WORLD_SIZE), added(*unrouted, scale=1 / WORLD_SIZE)


@cells("{wrapper}, {scenario}", PEFT="llama", attach="llama", wrapper=WRAPPERS, scenario=SCENARIOS)
def test_the_ranks_average_their_routed_gradients(
    architecture: str, adapters: str, wrapper: str, scenario: str, results: Path, record: Record
) -> None:
    expected, unrouted = averages(adapters, SCENARIOS[scenario][0])
    assert relative_error(unrouted, expected) > 0.3
    found = torch.load(results / file_name(adapters, wrapper, scenario))
    record.exact(relative_error(found, expected), 1e-12)
