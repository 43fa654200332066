"""Two processes (gloo): what every rank ends with is the average of the ranks' own reference gradients."""

import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from matrix import Record, cells
from ranks import BATCHES, SCENARIOS, WORLD_SIZE, WRAPPERS, file_name
from two_pass import Gradients, TwoPass, added, relative_error, routed_model

SECONDS = 180


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes, started here, left the gradients of every scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("ranks.py")
    logs = [folder / f"rank{rank}.log" for rank in range(WORLD_SIZE)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("wb") as output:
                command = [sys.executable, str(script), str(rank), str(folder)]
                processes.append(subprocess.Popen(command, stdout=output, stderr=output))
        deadline = time.monotonic() + SECONDS
        # A rank that failed leaves the others waiting for it.
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        found = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in logs)
        pytest.fail(f"the processes hung or failed: {[p.returncode for p in processes]}\n{found}")
    return folder


@cache
def averages(adapters: str, batches: str) -> tuple[Gradients, Gradients]:
    """The average over the ranks of the reference's routed gradients, and of its unrouted ones."""
    two_pass = TwoPass(routed_model("llama", adapters))
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
