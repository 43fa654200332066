"""Extraction runs no block above the last that is read, and reads the same."""

from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from support.language_models import PAIRS, routed_mixer, tiny_llama
from torch import Tensor, nn

import gradroute as gr
from gradroute.directions._early_exit import EarlyExit

LOWER = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


class Counting(nn.Module):
    """Runs `inner`, and counts how often; a hook that counted would be somebody who notices."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.times = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.times += 1
        return self.inner(x)


def counting_llama() -> tuple[nn.Module, Callable[[], list[int]]]:
    """A model of two blocks, and how often each block and what follows them has run since it was last asked."""
    model = tiny_llama()
    parts = []
    for block in model.model.layers:
        block.mlp.act_fn = Counting(block.mlp.act_fn)
        parts.append(block.mlp.act_fn)
    model.model.norm = Counting(model.model.norm)
    parts.append(model.model.norm)

    def ran() -> list[int]:
        found = [part.times for part in parts]
        for part in parts:
            part.times = 0
        return found

    assert len(found := ran()) == 3, found
    return model, ran


def extracted(model: nn.Module, modules: list[str] | None = LOWER, **options: object) -> gr.Directions:
    return gr.extract_activation_directions(model, PAIRS, modules=modules, batch_size=8, **options)


@pytest.mark.parametrize("features", ["bottleneck", "input", "output"])
def test_blocks_above_the_last_that_is_read_are_not_run(features: str) -> None:
    model, ran = counting_llama()
    whole = extracted(model, None, features=features)
    assert ran() == [1, 1, 1]
    watched = extracted(model, features=features)  # the first that could end early runs through, and is watched
    assert ran() == [1, 1, 1]
    early = extracted(model, features=features)
    assert ran() == [1, 0, 0]
    assert set(early.hack) == set(LOWER)
    for name in LOWER:
        for found in (watched, early):
            assert torch.equal(whole.hack[name], found.hack[name])
            assert torch.equal(whole.clean[name], found.clean[name])
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]))  # no hook is left
    assert ran() == [1, 1, 1]


def test_of_several_batches_the_first_is_watched() -> None:
    model, ran = counting_llama()
    gr.extract_activation_directions(model, PAIRS, modules=LOWER, batch_size=2)
    assert ran() == [4, 1, 1]


def test_of_residuals_the_block_itself_is_run() -> None:
    model, ran = counting_llama()
    for _ in range(2):
        extracted(model, ["model.layers.0"], features="residual")
    assert ran() == [2, 1, 1]


def test_a_forward_of_ones_own_runs_through() -> None:
    model, ran = counting_llama()
    for _ in range(2):
        extracted(model, forward_fn=lambda m, ids, mask: m(ids, attention_mask=mask))
    assert ran() == [2, 2, 2]


def test_a_hook_on_the_embeddings_which_checkpointing_puts_there_changes_nothing() -> None:
    model, ran = counting_llama()
    model.enable_input_require_grads()
    assert model.get_input_embeddings()._forward_hooks
    for _ in range(2):
        extracted(model)
    assert ran() == [2, 1, 1]


def looped(model: nn.Module) -> None:
    model.config.num_hidden_layers = 4


def hooked_by_accelerate(model: nn.Module) -> None:
    model.model.layers[1]._hf_hook = object()


def compiled(model: nn.Module) -> None:
    model.model.layers[1]._compiled_call_impl = model.model.layers[1]._call_impl


def hooked_around(model: nn.Module) -> None:
    model.model.register_forward_hook(lambda *_: None)


def hooked_where_it_is_not_read(model: nn.Module) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: None)


def replaced(model: nn.Module) -> None:
    model.model.forward = model.model.forward


def collecting(model: nn.Module) -> None:
    model.config.output_hidden_states = True


@pytest.mark.parametrize(
    "change",
    [looped, hooked_by_accelerate, compiled, hooked_around, hooked_where_it_is_not_read, replaced, collecting],
)
def test_where_leaving_a_forward_would_skip_something_it_runs_through(change: Callable[[nn.Module], None]) -> None:
    model, ran = counting_llama()
    for _ in range(2):
        extracted(model)
    assert ran() == [2, 1, 1]
    change(model)
    through: list[bool] = []
    with EarlyExit(model, LOWER).forward():
        through.append(True)
    assert through
    assert EarlyExit(model, LOWER)._blocks == {}


class Loops(nn.Module):
    """A language model that runs its two blocks twice; its config says two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([nn.Sequential(OrderedDict(q=nn.Linear(8, 8), act=nn.Tanh())) for _ in range(2)])
        self.config = SimpleNamespace(num_hidden_layers=2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(2):
            for layer in self.layers:
                x = layer(x)
        return x


def test_a_model_whose_blocks_run_twice_never_ends_early() -> None:
    model = Loops()
    gr.attach(model, r=2, lora_alpha=4, target_modules=["q"])
    for _ in range(2):
        with torch.no_grad(), EarlyExit(model, ["layers.0.q"]).forward():
            out = model(torch.tensor([[1, 2]]), torch.ones(1, 2))
        assert out.shape == (1, 2, 8)
        del out
    with pytest.raises(RuntimeError):
        extracted(model, ["layers.0.q"])


def test_what_is_read_outside_the_blocks_or_in_the_last_runs_through() -> None:
    model, ran = counting_llama()
    for _ in range(2):
        extracted(model)
    ran()
    for names in (["model.layers.1.mlp.up_proj"], [*LOWER, "lm_head"]):
        with torch.no_grad(), EarlyExit(model, names).forward():
            model(input_ids=torch.tensor([[1, 2]]))
        assert ran() == [1, 1, 1]
    assert EarlyExit(routed_mixer(), ["q"])._blocks == {}


def test_only_its_own_exception_is_caught_and_the_hooks_are_gone_after_any_other() -> None:
    model = tiny_llama()
    with pytest.raises(ZeroDivisionError), EarlyExit(model, LOWER).forward():
        raise ZeroDivisionError
    assert not any(block._forward_pre_hooks for block in model.model.layers)
