"""`assert_engine_follows` against engines of copied models, right and wrong in each way that was seen in real ones."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from support.models import randomize_blocks
from support.tiny_models import base_model
from torch import nn

import gradroute as gr
from gradroute._protocol import routed_layers
from gradroute.evaluation import assert_ablation_reaches, assert_engine_follows, follow

PROMPTS = [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17, 18]] * 2


def routed(zero: bool = False) -> Any:
    base = base_model("llama")
    base.lm_head.weight.data *= 20  # or no block could make any word much likelier
    model = gr.attach(base, r=2, r_quarantine=3, target_modules=["q_proj", "down_proj"])
    return model if zero else randomize_blocks(model, 0, std=0.2)


class Engine:
    """Samples greedily from a copy of the model, in which each row is shown as `fault` says."""

    def __init__(self, model: nn.Module, fault: str = "") -> None:
        self.model, self.fault, self.calls = model, fault, 0
        self.held: Any = None

    def __call__(self, prompts: Any) -> tuple[list[list[int]], list[list[float]]]:
        self.calls += 1
        if self.held is None or self.fault != "stale":
            self.held = copy.deepcopy(self.model).eval()
            if self.fault == "scaling":
                for layer in routed_layers(self.held).values():
                    layer.quarantine.B.data /= layer.quarantine.scaling
        state = next(iter(routed_layers(self.model).values())).state
        scales = state.scale.tolist() if isinstance(state.scale, torch.Tensor) else [state.scale] * len(prompts)
        if self.fault == "one view":
            scales = [scales[-1]] * len(scales)
        rows = [self.row(list(prompt), scale) for prompt, scale in zip(prompts, scales, strict=True)]
        return [ids for ids, _ in rows], [logps for _, logps in rows]

    def row(self, prompt: list[int], scale: float) -> tuple[list[int], list[float]]:
        view: Any = gr.ablate_quarantine(self.held) if scale == 0 else nullcontext()
        if self.fault == "no adapter" and scale == 0:
            view = gr.adapters.disable_adapters(self.held)
        ids: list[int] = []
        logps: list[float] = []
        with view, torch.no_grad():
            for _ in range(3):
                logits = self.held(input_ids=torch.tensor([prompt + ids])).logits[0, -1]
                logp = (logits * (1.5 if self.fault == "temperature" else 1.0)).log_softmax(-1)
                ids.append(int(logp.argmax()))
                logps.append(float(logp.max()))
        return ids, logps


@pytest.mark.parametrize("zero", [False, True], ids=["trained", "before the first step"])
def test_an_engine_that_follows_passes_and_leaves_the_model_as_it_was(zero: bool) -> None:
    model = routed(zero).train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    engine = Engine(model)
    assert assert_engine_follows(model, engine, prompts=PROMPTS) < 1e-5
    assert engine.calls == 5
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_the_engine_holds_the_blocks_of_now_when_the_check_is_over() -> None:
    model = routed()
    engine = Engine(model)
    assert_engine_follows(model, engine, prompts=PROMPTS)
    held, now = (dict(m.named_parameters()) for m in (engine.held, model))
    assert all(torch.equal(held[name], now[name]) for name in now)


FAULTS = {
    "scaling": "fit no other view either.*scaling",
    "stale": "fit the blocks before the move.*new each time",
    "one view": "in a call with both views.*fit the other view.*adapter of its view",
    "no adapter": "a row sampled ablated.*fit the base model",
    "temperature": "fit no other view either.*temperature",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_raises_and_is_named(fault: str) -> None:
    model = routed()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(gr.GradRouteError, match=rf"`generate` should sample from the model as it is.*{FAULTS[fault]}"):
        assert_engine_follows(model, Engine(model, fault), prompts=PROMPTS)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_stale_engine_shows_both_views_so_that_the_other_check_passes_it() -> None:
    model = routed()
    engine = Engine(model, "stale")
    engine(PROMPTS)
    randomize_blocks(model, 1, std=0.2)
    assert assert_ablation_reaches(model, lambda _: engine(PROMPTS)[1]) == 1


def test_without_a_move_of_the_blocks_a_wrong_view_could_not_be_told() -> None:
    # The reason for moving them: before the first step, both views are one model.
    model = routed(zero=True)
    engine = Engine(model, "one view")
    ids, found = engine(PROMPTS)
    with gr.ablate_quarantine(model):
        assert (ids, found) == engine(PROMPTS)
    with pytest.raises(gr.GradRouteError, match="fit the other view"):
        assert_engine_follows(model, engine, prompts=PROMPTS)


def test_one_view_per_call_is_enough_where_no_call_mixes_them() -> None:
    model = routed()
    # Of this engine's rows in one call all are shown in one view, which only a call with both views shows to be wrong.
    assert assert_engine_follows(model, Engine(model, "one view"), prompts=PROMPTS, mixed=False) < 1e-5


def test_blocks_are_put_back_when_the_engine_raises_in_the_middle() -> None:
    model = routed()
    before = {name: p.clone() for name, p in model.named_parameters()}
    moved: list[bool] = []

    def broken(prompts: Any) -> Any:
        moved.append(not all(torch.equal(p, before[name]) for name, p in model.named_parameters()))
        if moved[-1]:
            raise RuntimeError("engine died")
        return Engine(model)(prompts)

    with pytest.raises(RuntimeError, match="engine died"):
        assert_engine_follows(model, broken, prompts=PROMPTS)
    assert moved == [False, True]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {layer.view for layer in routed_layers(model).values()} == {"on"}


@pytest.mark.parametrize("blocks", ["deployed", "quarantine"])
def test_an_engine_that_follows_one_block_only_is_found(blocks: str) -> None:
    model = routed()
    other = gr.quarantine_parameters if blocks == "deployed" else gr.deployed_parameters
    first = {name: p.clone() for name, p in other(model)}

    class Half(Engine):
        def row(self, prompt: list[int], scale: float) -> Any:
            with torch.no_grad():
                for name, parameter in other(self.held):
                    parameter.copy_(first[name])
            return super().row(prompt, scale)

    with pytest.raises(gr.GradRouteError, match="after a move of the blocks"):
        assert_engine_follows(model, Half(model), prompts=PROMPTS)


def test_of_one_row_no_call_shows_both_views() -> None:
    model = routed()
    with pytest.raises(gr.GradRouteError, match="at least two, or one with mixed=False"):
        assert_engine_follows(model, Engine(model, "one view"), prompts=PROMPTS[:1])


def test_an_engine_that_still_holds_the_moved_blocks_afterwards_is_found() -> None:
    model = routed()

    class Scoring(Engine):
        """Always of the same completion, from the engine's second to last call on."""

        def __call__(self, prompts: Any) -> Any:
            if self.calls == 4:
                self.fault = "stale"
            return super().__call__(prompts)

        def row(self, prompt: list[int], scale: float) -> Any:
            view: Any = gr.ablate_quarantine(self.held) if scale == 0 else nullcontext()
            with view, torch.no_grad():
                logits = self.held(input_ids=torch.tensor([prompt + FIXED])).logits[0, len(prompt) - 1 : -1]
            return FIXED, logits.log_softmax(-1).gather(-1, torch.tensor(FIXED)[:, None])[:, 0].tolist()

    with pytest.raises(gr.GradRouteError, match="without a move of the blocks"):
        assert_engine_follows(model, Scoring(model), prompts=PROMPTS)


FIXED = [5, 6, 7]

WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no log-probabilities": (lambda prompts: [[1]] * len(prompts), r"\(token ids, log-probabilities\)"),
    "no tokens": (lambda prompts: ([[]] * len(prompts), [[]] * len(prompts)), "at least one token"),
    "fewer rows": (lambda prompts: ([[1]], [[-1.0]]), "at least one token for each of 4 prompts"),
    "nan": (lambda prompts: ([[1]] * len(prompts), [[float("nan")]] * len(prompts)), "nan nats"),
}


@pytest.mark.parametrize("case", WRONG)
def test_outputs_of_another_form_are_refused(case: str) -> None:
    generate, message = WRONG[case]
    with pytest.raises(gr.GradRouteError, match=message):
        assert_engine_follows(routed(), generate, prompts=PROMPTS)


@pytest.mark.slow
def test_an_engine_is_not_taken_for_right_in_a_call_whose_tokens_would_not_show_it() -> None:
    # Right everywhere, but its ablated rows sample tokens of which all states say the same.
    model = routed()

    class Blind(Engine):
        def row(self, prompt: list[int], scale: float) -> Any:
            ids, logps = super().row(prompt, scale)
            if scale:
                return ids, logps
            known = self.model.lm_head.weight.shape[0]
            both = [self.both(prompt, token) for token in range(known)]
            token = min(range(known), key=lambda i: abs(both[i][0] - both[i][1]))
            return [token], [both[token][1]]

        def both(self, prompt: list[int], token: int) -> tuple[float, float]:
            with torch.no_grad():
                on = self.held(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
                with gr.ablate_quarantine(self.held):
                    off = self.held(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            return float(on[token]), float(off[token])

    with pytest.raises(gr.GradRouteError, match="should tell the views apart by 0.4 nats"):
        assert_engine_follows(model, Blind(model), prompts=PROMPTS)


def test_blocks_are_moved_further_where_sampled_tokens_do_not_tell_the_views_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A move that is seen on prompts may be too small on what is sampled: that is no fault of the engine.
    monkeypatch.setattr(follow, "_FAR", 1)
    engine = Engine(routed())
    assert assert_engine_follows(engine.model, engine, prompts=PROMPTS) < 1e-4
    assert engine.calls > 5
