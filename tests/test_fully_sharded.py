"""A plain loop whose model `fully_shard` splits between two processes (gloo), against one process, in float64."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import run_ranks
from support.sharded_corners import card, scored_in_backward
from support.sharded_figures import record
from support.sharded_loop import CASES, alone
from support.tiny_models import VOCAB, base_model
from torch import Tensor, nn

import gradroute as gr
from benchmarks.models import Shape
from benchmarks.sharding import of_shape

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
Found = dict[str, Any]
STEPS = [f"step {i}" for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what they found; all cases in one pair, which takes long to start."""
    made = tmp_path_factory.mktemp("sharded")
    run_ranks("sharded_loop.py", made)
    return made


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def one(case: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Path]:
    made = tmp_path_factory.mktemp("one")
    return alone(case, made), made


@pytest.fixture(scope="module")
def ranks(case: str, folder: Path) -> list[Found]:
    return [torch.load(folder / case / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def corners(folder: Path) -> list[Found]:
    return [torch.load(folder / f"corners {rank}.pt", weights_only=False) for rank in (0, 1)]


def tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        for value in found.values():
            yield from tensors(value)


def distance(found: Any, expected: Any) -> float:
    """The largest relative difference of a tensor."""
    pairs = list(zip(tensors(found), tensors(expected), strict=True))
    assert pairs
    return max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)) for a, b in pairs)


def test_the_blocks_are_sharded_and_every_step_routes_some_rows(one: tuple[Found, Path], ranks: list[Found]) -> None:
    assert all(found["sharded"] for found in ranks)
    for step in STEPS:
        assert 0 < int(one[0][step]["routed"].sum()) < 8
        assert all(torch.equal(found[step]["routed"], one[0][step]["routed"]) for found in ranks)


def test_routed_gradients_and_scores(case: str, one: tuple[Found, Path], ranks: list[Found]) -> None:
    for step in STEPS:
        assert distance(ranks[0][step]["scores"], one[0][step]["scores"]) < 1e-12
    error = max(distance(found[step]["gradients"], one[0][step]["gradients"]) for found in ranks for step in STEPS)
    record(f"plain loop, FSDP2, {case}", "routed gradient", error, 1e-12)


def test_directions_are_those_of_the_whole_model_on_every_rank(
    case: str, one: tuple[Found, Path], ranks: list[Found]
) -> None:
    for kind in ("erased", "directions"):
        assert all(map(torch.equal, tensors(ranks[0][kind]), tensors(ranks[1][kind])))
    error = max(distance(ranks[0][kind], one[0][kind]) for kind in ("erased", "directions"))
    record(f"plain loop, FSDP2, {case}", "directions", error, 1e-12)


def test_refreshes(case: str, one: tuple[Found, Path], ranks: list[Found]) -> None:
    assert [one[0][step]["refreshed"] is None for step in STEPS] == [True, False, True, False]
    assert distance(one[0]["step 1"]["refreshed"], one[0]["directions"]) > 0.01
    for step in ("step 1", "step 3"):
        assert all(map(torch.equal, *(tensors(found[step]["refreshed"]) for found in ranks)))
        assert ranks[0][step]["angle"] == pytest.approx(one[0][step]["angle"], abs=1e-5)
    error = max(distance(ranks[0][step]["refreshed"], one[0][step]["refreshed"]) for step in ("step 1", "step 3"))
    record(f"plain loop, FSDP2, {case}", "refresh", error, 1e-12)


def test_filters_and_audits(case: str, one: tuple[Found, Path], ranks: list[Found]) -> None:
    for step in STEPS:
        cin, cout, *_ = one[0][step]["figures"]
        assert cin > 0.05 > 1e-12 > cout
        torch.testing.assert_close(ranks[1][step]["figures"], one[0][step]["figures"], rtol=1e-6, atol=1e-12)
    error = max(distance(found[step]["filtered"], one[0][step]["filtered"]) for found in ranks for step in STEPS)
    record(f"plain loop, FSDP2, {case}", "filter", error, 1e-12)


def test_four_steps_of_training_and_what_the_model_says_of_itself(one: tuple[Found, Path], ranks: list[Found]) -> None:
    for found in ranks:
        assert distance(found["values"], one[0]["values"]) < 1e-12
        assert distance(one[0]["step 0"]["gradients"], one[0]["step 3"]["gradients"]) > 0.1
        for name in ("identity", "summary", "findings"):
            assert found[name] == one[0][name]
        for name in ("hash", "fingerprint"):
            assert found[name] == ranks[0][name] != one[0][name]  # bits, which rounding moves


def test_an_export_of_the_shards_is_that_of_the_whole(
    case: str, one: tuple[Found, Path], ranks: list[Found], folder: Path
) -> None:
    if case == "svd_gain":
        pytest.skip("gains are exported like matrices")
    errors = []
    for kind in ("deployed", "full"):
        files = [where / kind / "adapter_model.safetensors" for where in (folder / case, one[1])]
        found, expected = map(load_file, files)
        assert found.keys() == expected.keys()
        errors.append(distance({name: found[name] for name in expected}, expected))
    record(f"plain loop, FSDP2, {case}", "export", max(errors), 1e-12)


def test_both_blocks_of_shards_are_saved_by_peft_and_loaded_again(case: str, ranks: list[Found], folder: Path) -> None:
    if case != "PEFT":
        pytest.skip("PEFT saves its own models")
    model = gr.load_quarantined(base_model("llama", torch.float64), folder / case / "checkpoint")
    for name, parameter in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]:
        assert torch.equal(parameter, ranks[0]["values"][name])


def test_a_resumed_run_goes_on_bitwise(case: str, ranks: list[Found]) -> None:
    for found in ranks:
        assert all(map(torch.equal, tensors(found["resumed"]), tensors(found["values"])))
    record(f"plain loop, FSDP2, {case}", "resume", 0.0, 0.0, "the same run, not interrupted")


# Corners


@pytest.mark.corner(
    "`if is_main_process: export_deployed(model, path)` on a sharded model",
    "raises after two minutes: the other ranks did not come; the process group would wait for ten or thirty",
)
def test_a_rank_that_exports_alone_is_told(corners: list[Found]) -> None:
    assert "all 2 ranks which hold a part of it should call it. Found that 1 did" in corners[0]["alone"]
    assert not any(found["wrote"] for found in corners)


def test_a_rank_that_does_not_write_knows_that_nothing_was_written(corners: list[Found]) -> None:
    assert corners[0]["blocked"].startswith("IsADirectoryError")
    assert "should have written its files on one rank. Found that it raised IsADirectoryError" in corners[1]["blocked"]


def test_a_card_is_that_of_the_whole_model_once_any_rank_returns(corners: list[Found], tmp_path: Path) -> None:
    expected = card(tmp_path, whole_model)
    assert [found["card"] for found in corners] == [expected, expected]


@pytest.mark.corner(
    "blocks are added to, initialised in, or merged into a model that is sharded already",
    "raises: adapt the model first and shard it then; merge a whole one",
)
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("attach", "would be trained by each rank alone"),
        ("get_peft_model", "would be trained by each rank alone"),
        ("init", "initialise first, shard then"),
        ("merge", "load the export onto another copy of the base model"),
    ],
)
def test_what_has_to_be_done_before_sharding_is_refused_after_it(call: str, reason: str, corners: list[Found]) -> None:
    assert all(reason in found[call] for found in corners)


def test_the_identity_of_a_sharded_base_costs_one_small_reduction(corners: list[Found]) -> None:
    for found in corners:
        assert found["sharded"] == found["hybrid 2 x 1"] == found["hybrid 1 x 2"] == found["whole"]
        assert found["collectives"] == {"c10d.allreduce_": 1}


@pytest.mark.corner(
    "FSDP2 keeps rounded copies of the root's parameters after a forward without gradients",
    "they are neither read, nor handed to an optimizer: the shards are put back first",
)
def test_rounded_copies_that_a_forward_leaves_behind_are_not_read(corners: list[Found]) -> None:
    for found in corners:
        assert found["rounded"]
        assert found["same"]
        assert found["trained"]


def test_inner_products_with_gradients_in_hooks(corners: list[Found]) -> None:
    expected = scored_in_backward(whole_model)
    assert expected["scores"].abs().min() > 1e-4
    assert all(distance(found["in backward"], expected) < 1e-12 for found in corners)


@pytest.mark.corner(
    "FSDP2 has left whole parameters where blocks are added, initialised or merged, or an optimizer is made",
    "raises as for shards; `block_groups` puts the shards back and gives those to the optimizer",
)
def test_parameters_that_a_forward_has_left_whole_are_known_as_sharded(corners: list[Found]) -> None:
    reasons = {
        "attach": "would be trained by each rank alone", "get_peft_model": "would be trained by each rank alone",
        "merge_adapter": "its base weight could not be put back", "init": "initialise first, shard then",
    }  # fmt: skip
    for found in (each["after a forward"] for each in corners):
        assert [name for name, reason in reasons.items() if reason not in found["refused"][name]] == []
        assert found["grouped"]


def test_a_write_to_the_shards_of_the_base_is_seen(corners: list[Found]) -> None:
    assert [found["written"] for found in corners] == [True, True]


def test_a_refresher_that_is_not_called_is_found_where_blocks_lie_in_the_root(corners: list[Found]) -> None:
    assert all("should be called once after each optimizer step" in found["unwatched"] for found in corners)


def test_a_card_is_read_by_the_rank_that_writes(corners: list[Found]) -> None:
    assert corners[0]["card of one"] == corners[1]["card of one"]
    assert "deployed_sha256" in corners[0]["card of one"]


def test_an_engine_gets_both_views_of_the_shards(corners: list[Found], folder: Path) -> None:
    for found in (each["synced"] for each in corners):
        assert found["stale"]
        assert found["current"]
        for view in ("on", "ablated"):
            expected = load_file(folder / "views" / view / "adapter_model.safetensors")
            assert found[view].keys() == expected.keys()
            assert all(torch.equal(found[view][name], expected[name]) for name in expected)


def test_an_engine_is_checked_by_moved_shards_that_are_put_back(corners: list[Found]) -> None:
    for found in (each["followed"] for each in corners):
        assert found["error"] < 1e-6  # log-probabilities are compared in float32
        assert "they fit the blocks before the move" in found["stale"]
        assert found["bitwise"]


def whole_model(model: nn.Module) -> nn.Module:
    return model


def test_a_model_that_is_not_sharded_waits_for_nobody(tmp_path: Path) -> None:
    model = gr.attach(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"], r=2, lora_alpha=4)
    gr.export_deployed(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_the_formulas_of_memory_and_traffic_hold_for_a_small_model(corners: list[Found]) -> None:
    shape = Shape(hidden=32, mlp=64, layers=2, heads=4, kv_heads=2, vocab=VOCAB, r=4)
    sizes = of_shape(shape, ranks=2)
    # In float32, and counted before its blocks are added: what the formulas call P.
    sizes = replace(sizes, base_bytes=4)
    for found in (each["traffic"] for each in corners):
        assert 16 * found["held"] == sizes.quarantine()["memory"]
        rank_4, rank_8 = (sum(step.values()) for step in found["steps"])
        assert rank_8 - rank_4 == sizes.quarantine()["traffic"]
        refresh = sizes.refresh(pairs=3, batch=32)
        assert 2 * found["features"] == refresh["memory"]
        assert sum(found["refresh"].values()) == refresh["traffic"]
        assert sum(found["two views"].values()) == sizes.two_views()["traffic"]
