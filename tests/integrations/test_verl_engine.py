"""verl's FSDP2 engine with a quarantine: two processes and one, against rows one by one."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.processes import run_ranks
from support.sharded_figures import record
from support.verl_batches import PROMPTS, RESPONSES, rollouts
from support.verl_models import load_model, write_models

import gradroute as gr

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed: see .ci/verl"),
]

CASES = ["padded", "packed", "dynamic", "tied"]
ENGINE = "verl, FSDP2"
Found = dict[str, Any]


def started(folder: Path, size: int, *cases: str) -> None:
    on_cpu = {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "support.verl_cpu"}
    run_ranks("distributed_verl.py", folder, cases, on_cpu, size=size, seconds=1800)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verl")
    write_models(path)
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[str, list[Found]]:
    """What both processes found, by case."""
    started(folder, 2, *CASES)
    return {case: [torch.load(folder / f"{case} 2 {rank}.pt") for rank in (0, 1)] for case in CASES}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Found]:
    """What one process found, by case; and what it refused."""
    started(folder, 1, *CASES, "refusals")
    return {case: torch.load(folder / f"{case} 1 0.pt") for case in CASES}


def model_of(folder: Path, case: str, dtype: torch.dtype) -> Any:
    return load_model(folder / ("tied" if case == "tied" else "untied"), dtype)


def rows() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(ids, loss mask over all tokens, advantage) of each rollout."""
    data = rollouts(slice(0, 8))
    masks = [torch.nn.functional.pad(m, (p, 0)) for m, p in zip(data["loss_mask"].unbind(), PROMPTS, strict=True)]
    return list(zip(data["input_ids"].unbind(), masks, data["advantages"], strict=True))


def gradients(model: Any, mask: gr.RouteMask) -> dict[str, torch.Tensor]:
    """Of the loss in `support.verl_batches`, row by row."""
    model.zero_grad()
    for row, (ids, loss_mask, advantage) in enumerate(rows()):
        with gr.route(model, mask[[row]]):
            log_probs = model(ids[None, :-1], use_cache=False).logits.log_softmax(-1)
            chosen = log_probs.gather(2, ids[None, 1:, None])[0, :, 0]
            (-advantage * (chosen * loss_mask[1:]).sum() / 8).backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """|found - expected| / |expected|, over all parameters."""
    assert found.keys() == expected.keys()
    difference = torch.stack([(found[name] - expected[name]).norm() for name in expected]).norm()
    return float(difference / torch.stack([each.norm() for each in expected.values()]).norm())


def mask_of(found: Found | list[Found]) -> gr.RouteMask:
    every = found if isinstance(found, list) else [found]
    columns = (torch.cat([each["columns"][f"gradroute_{name}"] for each in every]) for name in ("m", "g_d", "g_q"))
    return gr.RouteMask(*columns)


def scores_of(found: Found | list[Found]) -> torch.Tensor:
    every = found if isinstance(found, list) else [found]
    return torch.cat([each["columns"]["gradroute_score"] for each in every])


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_each_row_alone_with_its_quarantine_on(
    folder: Path, ranks: dict[str, list[Found]], alone: dict[str, Found], case: str
) -> None:
    model = model_of(folder, case, torch.float32)
    directions = gr.Directions.load(folder / f"{case} 1 0.safetensors", model=model)
    expected, ablated = [], []
    for ids, loss_mask, _ in rows()[:-1]:
        for view, into in (("on", expected), ("ablated", ablated)):
            with torch.no_grad(), gr.ablate_quarantine(model, 0.0 if view == "ablated" else 1.0):
                with gr.capture_activations(model, pool=loss_mask[None]) as features:
                    model(ids[None], use_cache=False)
            into.append(directions.score(features, view=view))
    on = torch.cat(expected)
    assert (torch.cat(ablated) - on).abs().max() > 0.1
    for found in (alone[case], ranks[case]):
        scores = scores_of(found)
        assert scores[-1].isnan()  # it has no token of its own
        torch.testing.assert_close(scores[:-1], on, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_one_gate_and_one_set_of_directions_on_all_ranks(
    ranks: dict[str, list[Found]], alone: dict[str, Found], case: str
) -> None:
    first, second = ranks[case]
    for name in ("directions", "refreshed"):
        assert all(torch.equal(rows, second[name][module]) for module, rows in first[name].items())
    assert first["ends"] == second["ends"] == alone[case]["ends"]
    low, high = first["ends"]
    routed = (scores_of(ranks[case])[:-1] - low) / (high - low) >= 0.5
    assert 0 < int(routed.sum()) < 7
    assert mask_of(ranks[case]).routed.tolist() == [*routed.tolist(), False]
    assert mask_of(alone[case]).routed.tolist() == [*routed.tolist(), False]


def test_gradients_are_those_of_rows_one_by_one(
    folder: Path, ranks: dict[str, list[Found]], alone: dict[str, Found]
) -> None:
    errors = []
    for case in CASES:
        model = model_of(folder, case, torch.float64)
        expected = gradients(model, mask_of(alone[case]))
        absorbed = gradients(model, gr.RouteMask.zones(torch.ones(8, dtype=torch.long)))
        assert distance(absorbed, expected) > 0.1
        errors += [distance(found["gradients"][0], expected) for found in (alone[case], *ranks[case])]
    record(ENGINE, "routed gradient", max(errors), 5e-6, "rows one by one in float64")


@pytest.mark.parametrize(
    ("column", "kept", "tolerance"), [("directions", "directions", 1e-5), ("refresh", "refreshed", 1e-4)]
)
def test_directions_are_those_of_one_process(
    ranks: dict[str, list[Found]], alone: dict[str, Found], column: str, kept: str, tolerance: float
) -> None:
    errors = [distance(found[kept], alone[case][kept]) for case in CASES for found in ranks[case]]
    record(ENGINE, column, max(errors), tolerance)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_pass_scores_nothing(ranks: dict[str, list[Found]], case: str) -> None:
    assert [found["of reference"] for found in ranks[case]] == [["log_probs"]] * 2


@pytest.mark.parametrize("case", CASES)
def test_a_refresh_comes_after_every_second_step(ranks: dict[str, list[Found]], case: str) -> None:
    for found in ranks[case]:
        assert found["reports"] == [(2, True)]
        assert [figures["routing/age"] for figures in found["figures"]] == [[1.0], [0.0]]
        assert any(not torch.equal(rows, found["directions"][name]) for name, rows in found["refreshed"].items())


def test_both_views_are_sent_as_plain_lora_and_merged(ranks: dict[str, list[Found]], alone: dict[str, Found]) -> None:
    errors = []
    for found in (alone["packed"], *ranks["packed"]):
        weights, seen = found["weights"], 0
        assert found["config"] == {"r": 7, "lora_alpha": 7}
        assert found["config, ablated"] == {"r": 4, "lora_alpha": 4}
        for key, base in weights.items():
            if not key.endswith(".base_layer.weight"):
                continue
            name = key.removesuffix(".base_layer.weight")
            plain = name.removeprefix("base_model.model.") + ".weight"
            A, B, A_q, B_q = (
                weights[f"{name}.lora_{side}.default.weight"] for side in ("A", "B", "A_quarantine", "B_quarantine")
            )
            deployed, quarantine = 2.0 * B @ A, 8 / 3 * B_q @ A_q
            assert quarantine.norm() > 0.1 * deployed.norm()
            for view, delta in (("", deployed + quarantine), (", ablated", deployed)):
                sent = found[f"adapter{view}"]
                product = sent[f"{name}.lora_B.weight"] @ sent[f"{name}.lora_A.weight"]
                errors.append(distance({"product": product}, {"product": delta}))
                torch.testing.assert_close(found[f"merged{view}"][plain], (base + delta).to(torch.bfloat16))
            seen += 1
        assert seen == 14
        assert len(found["adapter"]) == len(found["adapter, ablated"]) == 2 * seen
        assert not any("lora_" in name or "base_layer" in name for name in found["merged"])
    record(ENGINE, "export", max(errors), 1e-6, "the products of the blocks")


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(ranks: dict[str, list[Found]], alone: dict[str, Found]) -> None:
    for found in (alone["packed"], *ranks["packed"]):
        before, figures, weights, directions = found["resumed"]
        assert before == 1
        assert figures == found["figures"][1]
        assert all(torch.equal(weight, found["weights"][name]) for name, weight in weights.items())
        assert all(torch.equal(rows, found["refreshed"][name]) for name, rows in directions.items())
    record(ENGINE, "resume", 0.0, 0.0, "the same run, not interrupted")


EXPECTED = {
    "a second call": "call it once",
    "no function": "`directions` should be a function",
    "fsdp": "strategy=fsdp2",
    "no LoRA": "lora_rank=16",
    "other blocks": "blocks of \\(r, r_quarantine, lora_alpha\\)",
    "pad_to_length": "pad_to_length=False",
    "offload_policy": "param_offload=True",
    "reference": "forward_only",
    "fp16": "param_dtype=bf16",
    "no route": "without .*bypass_mode",
    "outside": "train_batch",
    "no room": "model.lora.rank=7",
    "checkpoint engine": "lora.merge=True",
    "shards": "delta_sharded",
    "no state": "gradroute/state.pt",
    "ablated rollouts": "val_only=True",
    "stale": "this refresh did nothing",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_cannot_happen_raises(folder: Path, alone: dict[str, Found], name: str) -> None:
    message = torch.load(folder / "refusals.pt")[name]
    assert re.search(EXPECTED[name], message), message


def test_the_rollouts_of_these_tests_have_every_length() -> None:
    assert len({p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)}) > 3
