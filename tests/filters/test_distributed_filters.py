"""Filters on two processes: the gradient is that of one, or the sharding is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.distributed_filters import CASES, expected

import gradroute as gr

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parents[1] / "support" / "distributed_filters.py"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(folder)],
            stderr=subprocess.PIPE,
            env={"PYTHONPATH": f"{Path(gr.__file__).parents[1]}:{script.parent.parent}", "HOME": str(folder)},
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_under_ddp_or_fully_shard_get_the_gradient_of_one(ranks: list[dict], case: str) -> None:
    whole = expected(case)
    for found in ranks:
        assert found[case].keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(found[case][name], gradient, rtol=0, atol=1e-12)
    assert (whole["figures"].min() if "updates" in case else whole["cin"][0]) > 1e-3


def test_sharding_that_is_not_supported_is_refused(ranks: list[dict]) -> None:
    for found in ranks:
        assert "is sharded, while rollouts are recorded whole" in found["sharded rollouts"]
        assert "FSDP1" in found["flat parameters"]
