"""Two processes (gloo) get the gradient of rows one by one, also where only some of their rows run twice."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.distributed_trl import CASES
from support.trl_reference import Row, Run, distance, reference
from support.trl_runs import move_reference, quiet, wrapped

import gradroute as gr

pytestmark = [*quiet, pytest.mark.distributed, pytest.mark.slow]
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ranks]:
    """What both processes saw, by case: all cases in one pair of processes, which take long to start."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parents[1] / "support" / "distributed_trl.py"
    root = Path(gr.__file__).parents[1]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "PYTHONPATH": f"{root}:{script.parent.parent}", "HOME": str(folder), "PATH": os.environ["PATH"],
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(folder), *CASES],
            env={**shared, "RANK": rank, "LOCAL_RANK": rank}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors.decode()[-3000:]
    return {case: [torch.load(folder / f"{case} {rank}.pt") for rank in (0, 1)] for case in CASES}


def merged(of_case: Ranks, case: str, step: int) -> tuple[Run, dict[Row, bool]]:
    """The step as one process would see it, and which rows were routed."""
    model = wrapped()
    if "args_beta" in CASES[case]:
        model.add_adapter("ref", model.peft_config["default"])
        for name, parameter in model.named_parameters():
            if ".ref." in name:
                parameter.data.copy_(model.get_parameter(name.replace(".ref.", ".default.")))
        move_reference(model)
        model.set_adapter("default")
    of_rows = ("sampled_ablated", "prompts", "routed")
    sampled, prompts, routed = (of_case[0][each] | of_case[1][each] for each in of_rows)
    return Run(model, sampled, prompts, [rank["steps"][step] for rank in of_case]), routed


def test_processes_that_share_a_group(ranks: dict[str, Ranks]) -> None:
    of_case = ranks["shared group"]
    run, routed = merged(of_case, "shared group", 0)
    assert sum(run.sampled_ablated.values()) == 1
    assert len(routed) == 4
    assert torch.cat([batch["route_score"] for batch in run.batches]).isfinite().all()
    assert [rank["log"]["routing/flag_rate"] for rank in of_case] == [sum(routed.values()) / 4] * 2
    assert [rank["refreshes"] for rank in of_case] == [1, 1]
    expected = reference(run, beta=0.2, flagged=routed)
    assert distance(reference(run, clean=False, beta=0.2, flagged=routed), expected) > 0.02
    for rank in of_case:
        assert distance(rank["gradients"][0], expected) < 5e-6  # in float32, with a term that is an exponential


def test_log_ratios_of_a_group_on_two_processes(ranks: dict[str, Ranks]) -> None:
    of_case = ranks["log ratios"]
    run, routed = merged(of_case, "log ratios", 0)
    scores = torch.cat([batch["route_log_ratio"] for batch in run.batches])
    assert scores.isfinite().all()
    assert 0 < (scores > 0.3).sum() < 4
    for rank in of_case:
        log = rank["log"]
        assert log["routing/log_ratio_flagged"] == log["routing/flag_rate"] == sum(routed.values()) / 4
        assert log["routing/log_ratio_p50"] == pytest.approx(float(scores.double().quantile(0.5)), rel=1e-5)
        assert log["routing/log_ratio_p50"] != pytest.approx(float(run.batches[0]["route_log_ratio"].mean()), rel=1e-3)
        assert distance(rank["gradients"][0], reference(run, flagged=routed)) < 1e-6


@pytest.mark.corner(
    "under DDP, one process has more rows that train on two advantages than another",
    "each process runs equally many rows twice, in one forward; surplus ones are in no loss",
)
@pytest.mark.parametrize("case", ["three and two", "some and none"])
def test_processes_with_unequally_many_rows_to_run_twice(case: str, ranks: dict[str, Ranks]) -> None:
    for step in range(CASES[case]["args_max_steps"]):
        run, routed = merged(ranks[case], case, step)
        split = [int(batch["route_split"].sum()) for batch in run.batches]
        assert split == [3, 2] if case == "three and two" else split[0] > split[1] == 0
        expected = reference(run, beta=CASES[case].get("args_beta", 0.0), flagged=routed)
        for rank in ranks[case]:
            assert distance(rank["gradients"][step], expected) < 1e-6
