"""GRPO in TRL whose model FSDP2 or DeepSpeed shards between two processes, against rows one by one in one process."""

import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from support.processes import run_ranks
from support.sharded_figures import record
from support.sharded_trl import CASES, ENGINES, FSDP2_ONLY, READY, parameter_directions
from support.tiny_models import config
from support.trl_reference import Blocks, Run, distance, reference
from support.trl_runs import extract, move_reference, quiet, wrapped
from torch import Tensor
from transformers import AutoModelForCausalLM

import gradroute as gr

pytestmark = [*quiet, pytest.mark.distributed, pytest.mark.slow]
Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    if request.param.startswith("ZeRO") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed here; .ci/sharded runs these in an environment of its own")
    return request.param


@pytest.fixture(scope="module")
def folder(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they saw; all cases in one pair, which takes long to start."""
    made = tmp_path_factory.mktemp("ranks")
    cases = [case for case in CASES if engine == "FSDP2" or case not in FSDP2_ONLY]
    run_ranks("sharded_trl.py", made, [engine, *cases], ENGINES[engine], seconds=900)
    return made


def load(folder: Path, case: str) -> Ranks:
    return [torch.load(folder / f"{case} {rank}.pt", weights_only=False) for rank in (0, 1)]


def with_values(model: Any, values: dict[str, Tensor]) -> Any:
    """`model` with these blocks; the names of a root that somebody wrapped are longer."""
    for name, parameter in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]:
        parameter.data.copy_(values[name])
    return model


def policy(case: str, folder: Path) -> Any:
    """One process's model before the step."""
    if case == "by name":
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        return get_peft_model(base, config(), autocast_adapter_dtype=False)
    model = wrapped()
    if "args_beta" in CASES[case]:
        model.add_adapter("ref", model.peft_config["default"])
        for name, parameter in model.named_parameters():
            if ".ref." in name:
                parameter.data.copy_(model.get_parameter(name.replace(".ref.", ".default.")))
        move_reference(model)
        model.set_adapter("default")
    return model


def merged(ranks: Ranks, case: str, folder: Path) -> tuple[Run, dict[Any, bool]]:
    """The step as one process would see it, and which rows were routed."""
    model = with_values(policy(case, folder), ranks[0]["before"])
    sampled, prompts, routed = (ranks[0][each] | ranks[1][each] for each in ("sampled_ablated", "prompts", "routed"))
    return Run(model, sampled, prompts, [rank["steps"][0] for rank in ranks]), routed


def step_of(found: dict[str, Any], like: Blocks) -> Blocks:
    """The gradient: a step of SGD with a learning rate of one. A parameter that had none did not move."""
    moved = {name: found["before"][name] - found["after"][name] for name in found["after"]}
    for name, change in moved.items():
        if not any(name in block for block in like.values()):
            assert not change.any()
    return {block: {name: moved[name] for name in names} for block, names in like.items()}


def largest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def same(first: Any, second: Any) -> bool:
    """Bitwise."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def check_gradient(engine: str, case: str, folder: Path, **options: Any) -> tuple[float, Run]:
    ranks = load(folder, case)
    assert ranks[0]["split"] == (engine != "ZeRO-2")
    run, routed = merged(ranks, case, folder)
    beta = CASES[case].get("args_beta", 0.0)
    expected = reference(run, beta=beta, flagged=routed, **options)
    unrouted = reference(run, beta=beta, flagged=dict.fromkeys(routed, False), **options)
    assert distance(unrouted, expected) > 0.02
    assert same(ranks[0]["after"], ranks[1]["after"])
    return max(distance(step_of(rank, expected), expected) for rank in ranks), run


def test_a_routed_step_with_everything_that_runs_the_model(engine: str, folder: Path) -> None:
    error, run = check_gradient(engine, "routed", folder)
    record(f"TRL, {engine}", "routed gradient", error, 5e-6, "rows one by one")
    assert sum(run.sampled_ablated.values()) == 1


def test_directions_of_both_ranks_are_bitwise_those_of_one_process(engine: str, folder: Path) -> None:
    ranks = load(folder, "routed")
    model = with_values(wrapped(), ranks[0]["before"])
    with gr.ablate_quarantine(model):
        expected = extract(model)
    assert same(ranks[0]["directions"], ranks[1]["directions"])
    record(f"TRL, {engine}", "directions", largest(ranks[0]["directions"], dict(expected.rows)), 1e-5)


def test_directions_are_refreshed_on_all_ranks(engine: str, folder: Path) -> None:
    ranks = load(folder, "routed")
    assert [rank["refreshes"] for rank in ranks] == [1, 1]
    assert same(ranks[0]["refreshed"], ranks[1]["refreshed"])
    model = with_values(wrapped(), ranks[0]["after"])
    with gr.ablate_quarantine(model):
        expected = extract(model)
    assert largest(ranks[0]["directions"], dict(expected.rows)) > 0.01
    record(f"TRL, {engine}", "refresh", largest(ranks[0]["refreshed"], dict(expected.rows)), 1e-4)


def test_an_export_is_that_of_a_whole_model(engine: str, folder: Path, tmp_path: Path) -> None:
    ranks = load(folder, "routed")
    model = with_values(wrapped(), ranks[0]["after"])
    errors = []
    for kind, export in (("deployed", gr.export_deployed), ("full", gr.export_full)):
        export(model, tmp_path / kind)
        found, expected = (load_file(where / kind / "adapter_model.safetensors") for where in (folder, tmp_path))
        assert max(float(values.abs().max()) for values in expected.values()) > 0.1
        errors.append(largest(found, expected) if not same(found, expected) else 0.0)
    record(f"TRL, {engine}", "export", max(errors), 0.0)


def test_both_views_are_evaluated(engine: str, folder: Path) -> None:
    for found in load(folder, "routed"):
        rewards = [found["evaluated"][f"eval_{view}_reward"] for view in ("on", "ablated")]
        assert rewards[0] != rewards[1]


def test_an_engine_is_checked_by_blocks_that_are_moved_and_put_back(engine: str, folder: Path) -> None:
    for found in (rank["followed"] for rank in load(folder, "routed")):
        assert found["error"] < 1e-4
        assert "they fit the blocks before the move" in found["stale"]
        assert found["bitwise"]


@pytest.mark.parametrize("mode", [False, True])
def test_unequally_many_rows_run_twice_under_checkpoints(engine: str, mode: bool, folder: Path) -> None:
    case = f"checkpoints, use_reentrant={mode}"
    assert [int(rank["steps"][0]["route_split"].sum()) for rank in load(folder, case)] == [3, 2]
    assert check_gradient(engine, case, folder)[0] < 5e-6


@pytest.mark.corner(
    "one process of a sharded model has rollouts without a completion token, and another has some",
    "all rows are run, so that the processes join the same gathers; rows without a token have no score and absorb",
)
@pytest.mark.parametrize("case", READY)
def test_a_rank_whose_rollouts_have_no_tokens_runs_as_many_forwards(engine: str, folder: Path, case: str) -> None:
    first, second = load(folder, case)
    assert first["steps"][0]["route_score"].isnan().all()
    assert second["steps"][0]["route_score"].isfinite().all()
    assert same(first["after"], second["after"])
    assert not same(first["before"], first["after"])


def test_a_model_given_by_name_is_read_once_training_begins(engine: str, folder: Path) -> None:
    ranks = load(folder, "by name")
    assert same(ranks[0]["directions"], ranks[1]["directions"])
    model = with_values(policy("by name", folder), ranks[0]["before"])
    with gr.ablate_quarantine(model):
        expected = extract(model)
    assert largest(ranks[0]["directions"], dict(expected.rows)) < 1e-5
    assert check_gradient(engine, "by name", folder)[0] < 5e-6


def test_log_ratios(engine: str, folder: Path) -> None:
    ranks = load(folder, "log ratios")
    scores = torch.cat([rank["steps"][0]["route_log_ratio"] for rank in ranks])
    assert 0 < (scores > 0.3).sum() < len(scores)
    assert check_gradient(engine, "log ratios", folder)[0] < 5e-6


def test_filtered_gradients(engine: str, folder: Path) -> None:
    if engine != "FSDP2":
        pytest.skip("refused: backward has consumed the gradients")
    ranks = load(folder, "filter")
    run, _ = merged(ranks, "filter", folder)
    with gr.ablate_quarantine(run.model):
        directions = parameter_directions(run.model)
    expected = reference(run, clean=False, flagged=dict.fromkeys(run.sampled_ablated, False))
    erased = {"deployed": dict(expected["deployed"]), "quarantine": expected["quarantine"]}
    for name, rows in directions.rows.items():
        names = [f"{name}.lora_{side}.default.weight" for side in "AB"]
        flat = torch.cat([erased["deployed"][each].flatten() for each in names])
        flat = flat - rows.T @ (rows @ flat)
        sizes = [erased["deployed"][each].numel() for each in names]
        parts = zip(names, torch.split(flat, sizes), strict=True)
        erased["deployed"] |= {each: part.view_as(erased["deployed"][each]) for each, part in parts}
    assert distance(expected, erased) > 0.01
    assert ranks[0]["log"]["routing/filter_cin"] > 0.01 > 1e-5 > ranks[0]["log"]["routing/filter_cout"]
    record(
        f"TRL, {engine}", "filter", max(distance(step_of(r, erased), erased) for r in ranks), 5e-6, "rows one by one"
    )


@cache
def resumed_cases(engine: str) -> list[str]:
    return [case for case in CASES if case.startswith("resumed") and (engine == "FSDP2" or case not in FSDP2_ONLY)]


def runs(engine: str, folder: Path) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    for case in resumed_cases(engine):
        for rank in load(folder, case):
            yield (case, *rank)


def test_resuming_in_the_middle_of_rollouts_is_bitwise(engine: str, folder: Path) -> None:
    for case, whole, rest in runs(engine, folder):
        assert len(rest["batches"]) == len(whole["batches"]) == 2
        for key in ("values", "rows", "reports", "batches"):
            assert same(whole[key], rest[key]), (case, key)
        assert len(whole["reports"]) == 2
        if case in FSDP2_ONLY:
            assert [entry["routing/slow_start"] for entry in rest["log"]] == [1, 1, 1, 1, 0]
    record(f"TRL, {engine}", "resume", 0.0, 0.0, "the same run, not interrupted")
