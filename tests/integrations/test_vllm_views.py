"""A real vLLM engine on the CPU: each row is sampled as the model's own forward says, in its view, at every sync."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: .ci/vllm")

import torch
from peft import LoraConfig, get_peft_model
from support import vllm_engine as ve
from torch import nn
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest

import gradroute as gr
from gradroute.adapters.peft.plain_lora import PlainLora
from gradroute.evaluation import assert_ablation_reaches, assert_engine_follows
from gradroute.integrations.vllm import EngineViews, lora_options, options
from gradroute.integrations.vllm.rows import ablated_rows

# Longer than two blocks of the prefix cache.
PROMPTS = [[1, *((7 * j + i) % 280 + 3 for j in range(80))] for i in range(4)]
MIXED = [True, False, False, True]


def attached() -> Any:
    return gr.attach(
        ve.base_model(), r=4, r_quarantine=4, lora_alpha=12, target_modules=["q_proj", "o_proj", "up_proj"]
    )


def with_peft(**options: Any) -> Any:
    return get_peft_model(ve.base_model(), gr.QuarantineLoraConfig(**options))


MODELS: dict[str, Callable[[], Any]] = {
    "attach": attached,
    "all linear": lambda: with_peft(r=8, r_quarantine=6, lora_alpha=12, target_modules="all-linear"),
    "rsLoRA": lambda: with_peft(
        r=2, r_quarantine=3, lora_alpha=4, use_rslora=True, target_modules=["k_proj", "gate_proj"]
    ),
    # vLLM packs q, k and v into one layer, of which the adapter has two.
    "unequal ranks": lambda: with_peft(
        r=4, r_quarantine=2, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"down_proj": 7}
    ),
}


@pytest.fixture(scope="module")
def llm() -> Any:
    """One engine for all models: its base is the same."""
    return ve.engine(enable_lora=True, max_loras=2, max_lora_rank=16)


def own_logps(model: nn.Module, prompt: list[int], completion: list[int], ablated: bool) -> torch.Tensor:
    with torch.no_grad(), gr.ablate_quarantine(model, scale=0.0 if ablated else 1.0):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("name", MODELS)
def test_each_row_of_a_mixed_batch_is_sampled_in_its_own_view(name: str, llm: Any) -> None:
    model = ve.randomized(MODELS[name]()).eval()
    views = EngineViews(model, llm)
    with gr.ablate_quarantine(model, rows=torch.tensor(MIXED)):
        requests = views.requests(4)
    # Twice: the second time the prompts lie in the engine's cache.
    for _ in range(2):
        ids, logps = ve.sampled(llm, PROMPTS, requests)
        for prompt, completion, found, ablated in zip(PROMPTS, ids, logps, MIXED, strict=True):
            own, other = (own_logps(model, prompt, completion, view) for view in (ablated, not ablated))
            torch.testing.assert_close(torch.tensor(found), own, atol=1e-4, rtol=0)
            assert (torch.tensor(found) - other).abs().max() > 0.1
            assert len(set(completion)) > 1
    views.close()


def test_each_sync_has_new_names_ids_and_paths_and_the_engine_holds_the_last_two(llm: Any) -> None:
    model = ve.randomized(attached())
    views = EngineViews(model, llm)
    seen: list[Any] = []
    for seed in range(3):
        with gr.ablate_quarantine(model, rows=torch.tensor([False, True])):
            on, ablated = views.requests(2)
        assert on is not ablated
        assert llm.llm_engine.list_loras() == {on.lora_int_id, ablated.lora_int_id}
        folder = Path(on.lora_path).parent
        assert sorted(str(path) for path in folder.iterdir()) == sorted([on.lora_path, ablated.lora_path])
        seen += [x for each in (on, ablated) for x in (each.lora_name, each.lora_int_id, each.lora_path)]
        ve.randomized(model, seed)
        views.sync()
    assert len(set(seen)) == len(seen)
    views.close()
    assert llm.llm_engine.list_loras() == set()
    assert not folder.exists()


def test_an_id_that_the_engine_knows_is_not_taken(llm: Any, tmp_path: Path) -> None:
    model = ve.randomized(attached())
    views = EngineViews(model, llm)
    next_id = views.held["ablated"].lora_int_id + 1
    views.close()
    gr.export_deployed(ve.randomized(attached(), 9), tmp_path)
    llm.llm_engine.add_lora(LoRARequest("of the user", next_id, str(tmp_path)))
    views = EngineViews(model, llm)
    assert next_id not in {request.lora_int_id for request in views.held.values()}
    views.close()
    llm.llm_engine.remove_lora(next_id)


def generate_by(views: EngineViews, llm: Any) -> Callable[..., Any]:
    def generate(prompts: Any) -> Any:
        views.sync()
        return ve.sampled(llm, prompts, views.requests(len(prompts)))

    return generate


@pytest.mark.parametrize("zero", [False, True], ids=["trained", "before the first step"])
def test_the_engine_follows(zero: bool, llm: Any) -> None:
    model = attached() if zero else ve.randomized(attached())
    views = EngineViews(model, llm)
    assert assert_engine_follows(model, generate_by(views, llm)) < 1e-4
    assert views.is_current
    if not zero:
        assert assert_ablation_reaches(model, lambda _: generate_by(views, llm)(PROMPTS)[0]) > 0
    views.close()


class Naive:
    """The recipe that one writes first: constant names, ids and paths, or one of them wrong."""

    def __init__(self, model: nn.Module, llm: Any, folder: Path, fault: str) -> None:
        self.model, self.llm, self.folder, self.fault = model, llm, folder, fault
        self.syncs = 0

    def __call__(self, prompts: Any) -> Any:
        self.syncs += self.fault != "constant"
        number = 1001 + 2 * self.syncs
        paths = {view: self.folder / f"{view}-{self.syncs}" for view in ("on", "off")}
        gr.export_full(self.model, paths["on"])
        gr.export_deployed(self.model, paths["off"])
        requests = {view: LoRARequest(path.name, number + (view == "off"), str(path)) for view, path in paths.items()}
        flags = ablated_rows(self.model, len(prompts))
        if self.fault == "one view":
            flags = [flags[-1]] * len(flags)
        rows: list[Any] = [requests["off" if flag else "on"] for flag in flags]
        if self.fault == "none":
            rows = [None if flag else request for flag, request in zip(flags, rows, strict=True)]
        return ve.sampled(self.llm, prompts, rows)


FAULTS = {"constant": "before the move", "one view": "fit the other view", "none": "Found log-probabilities"}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_one_writes_first_is_caught(fault: str, llm: Any, tmp_path: Path) -> None:
    model = ve.randomized(attached())
    with pytest.raises(gr.GradRouteError, match=FAULTS[fault]):
        assert_engine_follows(model, Naive(model, llm, tmp_path, fault))
    # Without the fault the same recipe is right.
    assert assert_engine_follows(model, Naive(model, llm, tmp_path, "")) < 1e-4


def test_a_forgotten_scaling_is_caught(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ve.randomized(attached())
    views = EngineViews(model, llm)
    written = views._plain.factors

    def unscaled(blocks: Any, dtype: Any) -> Any:
        return {name: (A, B / 3) for name, (A, B) in written(blocks, dtype).items()}

    monkeypatch.setattr(views._plain, "factors", unscaled)
    with pytest.raises(gr.GradRouteError, match="fit no other view either.*scaling"):
        assert_engine_follows(model, generate_by(views, llm))
    views.close()


def test_blocks_that_changed_since_the_last_sync_raise(llm: Any) -> None:
    model = ve.randomized(attached())
    views = EngineViews(model, llm)
    ve.randomized(model, 5)
    with pytest.raises(gr.GradRouteError, match="changed since the last sync"):
        views.requests(1)
    views.close()


def test_an_engine_that_cannot_hold_both_views_is_refused_when_it_is_given(llm: Any) -> None:
    wide = gr.attach(ve.base_model(), r=16, r_quarantine=1, target_modules=["q_proj"])
    with pytest.raises(gr.GradRouteError, match=r"max_lora_rank of 17 at least. Found 16.*lora_options"):
        EngineViews(wide, llm)
    assert lora_options(wide)["max_lora_rank"] == 32
    with pytest.raises(gr.GradRouteError, match="should be a vllm.LLM with LoRA"):
        EngineViews(attached(), object())


def test_ranks_are_those_that_this_vllm_takes() -> None:
    assert get_args(MaxLoRARanks) == options._RANKS


def test_what_vllm_refuses_to_load_raises_at_construction(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PlainLora.config
    monkeypatch.setattr(
        PlainLora, "config", lambda self, r: LoraConfig(**config(self, r).to_dict() | {"use_dora": True})
    )
    with pytest.raises(gr.GradRouteError, match="vLLM should load.*refuses: .*DoRA"):
        EngineViews(ve.randomized(attached()), llm)


def test_layers_that_the_engine_knows_by_other_names_are_found(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM drops them without a word, so that every row is the base model's.
    monkeypatch.setattr("gradroute.adapters.peft.plain_lora.PREFIX", "base_model.model.other.")
    model = ve.randomized(attached())
    views = EngineViews(model, llm)
    with pytest.raises(gr.GradRouteError, match="fit the base model"):
        assert_engine_follows(model, generate_by(views, llm))
    views.close()
