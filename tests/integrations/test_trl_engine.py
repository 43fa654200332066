"""What TRL's vLLM backend does around an engine, without one: rows of a server's answers, figures, refusals."""

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.trl_runs import flags, quiet, trainer
from trl.generation.vllm_client import VLLMClient

import gradroute as gr
from gradroute.integrations.trl._engine import AdapterClient, TwoViewGeneration, _WithViews, check_engine
from gradroute.integrations.trl._logs import logp_differences
from gradroute.integrations.trl.grpo_config import Options

pytestmark = [*quiet]


class Client(AdapterClient):
    def __init__(self, ablated: list[bool]) -> None:
        self.model, self.ablated = "base", ablated
        self.views: Any = SimpleNamespace(name_of=lambda view: f"adapter-{view}")


@pytest.mark.parametrize(
    ("ablated", "n", "asked"),
    [
        ([True, False, False, False] * 2, 4, [("ablated", [0, 1], 1), ("on", [0, 1], 3)]),
        ([False] * 4, 2, [("on", [0, 1], 2)]),
        ([True, False, False, True], 1, [("ablated", [0, 3], 1), ("on", [1, 2], 1)]),
        (
            [True, True, False, False, False, True], 2,
            [("ablated", [0], 2), ("on", [1], 2), ("ablated", [2], 1), ("on", [2], 1)],
        ),
    ],
)  # fmt: skip
def test_a_server_is_asked_once_per_view_and_rows_come_back_in_order(
    ablated: list[bool], n: int, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def generate(self: Any, prompts: Any, features: Any = None, n: int = 1, **sampling: Any) -> dict[str, Any]:
        seen.append((self.model.removeprefix("adapter-"), [prompt[0] for prompt in prompts], n))
        assert sampling == {"temperature": 0.5}
        rows = [[prompt[0], self.model] for prompt in prompts for _ in range(n)]
        return {"prompt_ids": prompts, "completion_ids": rows, "logprobs": rows, "logprob_token_ids": rows}

    monkeypatch.setattr(VLLMClient, "generate", generate)
    client = Client(ablated)
    made = client.generate([[i, 7] for i in range(len(ablated) // n)], None, n=n, temperature=0.5)
    assert seen == asked
    assert made["prompt_ids"] == [[i, 7] for i in range(len(ablated) // n)]
    expected = [[i // n, f"adapter-{'ablated' if off else 'on'}"] for i, off in enumerate(ablated)]
    assert made["completion_ids"] == made["logprobs"] == made["logprob_token_ids"] == expected
    assert client.model == "base"


def test_a_trl_that_speaks_to_a_server_of_its_own_is_refused() -> None:
    client = Client([False])
    del client.model
    with pytest.raises(gr.GradRouteError, match="knows adapters.*trl 1.16"):
        client.generate([[1]])


def test_calls_past_the_trainer_which_no_adapter_would_answer_are_refused() -> None:
    engine = SimpleNamespace(chat=lambda messages: "the base model", get_tokenizer=lambda: "its tokenizer")
    llm = _WithViews(engine, TwoViewGeneration.__new__(TwoViewGeneration))
    assert llm.get_tokenizer() == "its tokenizer"
    client = Client([])
    for call in (lambda: llm.chat([]), lambda: client.chat([]), lambda: client.generate([[1]])):
        with pytest.raises(gr.GradRouteError, match="through the trainer"):
            call()


def test_an_engine_that_failed_its_check_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = TwoViewGeneration.__new__(TwoViewGeneration)
    generation._check, generation._checked = 0.1, False
    monkeypatch.setattr(TwoViewGeneration, "_longest_prompt", lambda _: 9)
    monkeypatch.setattr(TwoViewGeneration, "_plain_sampling", lambda _: nullcontext())
    generation.model, outcomes = None, iter([gr.GradRouteError("does not follow"), None])

    def follows(*_: Any, **options: Any) -> None:
        assert options == {"prompts": 9, "tolerance": 0.1}
        if (error := next(outcomes)) is not None:
            raise error

    monkeypatch.setattr("gradroute.integrations.trl._engine.assert_engine_follows", follows)
    with pytest.raises(gr.GradRouteError, match="does not follow"):
        generation.check_once()
    generation.check_once()
    generation.check_once()
    assert list(outcomes) == []


def test_differences_are_means_over_the_tokens_of_each_view() -> None:
    sampled = torch.zeros(3, 4)
    old = torch.tensor([[1.0, 3.0, 9.0, 9.0], [-2.0, 9.0, 9.0, 9.0], [float("nan"), 0.5, 1.5, 9.0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    tools = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    rollouts = {
        "old_per_token_logps": old, "sampling_per_token_logps": sampled, "completion_mask": mask, "tool_mask": tools,
    }  # fmt: skip
    with_engine: Any = SimpleNamespace(use_vllm=True, accelerator=SimpleNamespace(gather=lambda t: t))
    found = logp_differences(with_engine, rollouts, torch.tensor([False, False, True]))
    assert found == {"sampling/logp_difference_on": 2.0, "sampling/logp_difference_ablated": 1.0}
    assert list(logp_differences(with_engine, rollouts, torch.zeros(3).bool())) == ["sampling/logp_difference_on"]
    # Of two processes the tokens count, and not the means.
    two: Any = SimpleNamespace(use_vllm=True, accelerator=SimpleNamespace(gather=lambda t: torch.cat([t, 3 * t])))
    assert logp_differences(two, rollouts, torch.zeros(3).bool()) == {
        "sampling/logp_difference_on": pytest.approx(8 / 5)
    }
    assert logp_differences(SimpleNamespace(use_vllm=False), rollouts, torch.zeros(3).bool()) == {}
    rollouts["completion_mask"] = mask.bool()
    logp_differences(with_engine, rollouts, torch.zeros(3).bool())
    assert torch.equal(rollouts["completion_mask"], mask.bool())
    del rollouts["old_per_token_logps"]
    assert logp_differences(with_engine, rollouts, torch.zeros(3).bool()) == {}


@pytest.mark.parametrize(("name", "value"), [("engine", {"dtype": "float32"}), ("engine_check", False)])
def test_arguments_of_an_engine_that_is_not_used_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(gr.GradRouteError, match=f"`{name}` is read with use_vllm=True"):
        trainer(tmp_path, detector=flags, **{name: value})


@pytest.mark.parametrize("check", [0.0, -1.0])
def test_a_tolerance_that_is_none_is_refused_when_the_trainer_is_made(check: float, tmp_path: Path) -> None:
    with pytest.raises(gr.GradRouteError, match="`engine_check` should be"):
        trainer(tmp_path, detector=flags, engine_check=check)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_trainer_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(gr.GradRouteError, match="vLLM should be installed.*pip install vllm"):
        trainer(tmp_path, detector=flags, args_use_vllm=True)


def test_a_server_is_refused_where_the_model_is_sharded() -> None:
    state = SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=SimpleNamespace(fsdp_version=2))
    sharded: Any = SimpleNamespace(
        args=SimpleNamespace(use_vllm=True), vllm_mode="server", is_fsdp_enabled=True,
        accelerator=SimpleNamespace(state=state),
    )  # fmt: skip
    with pytest.raises(gr.GradRouteError, match="`vllm_mode='server'` with a sharded model.*vllm_mode='colocate'"):
        check_engine(sharded, Options())
    sharded.vllm_mode = "colocate"
    with pytest.raises(gr.GradRouteError, match="should generate by gradroute's vLLM backend"):
        check_engine(sharded, Options())
