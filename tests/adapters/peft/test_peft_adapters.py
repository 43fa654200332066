"""Several adapters in one model: each has both of its blocks, one is active, and plain LoRA stays plain."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.llama_adapters import KEEP, LLAMA, with_second
from support.models import gradients, randomize_blocks
from support.peft_cases import (
    Case,
    X,
    assert_near,
    assert_same_tensors,
    assert_views_equal,
    both_blocks_train,
    far,
    logits,
    tensors_of,
    trainable,
    unnamed_base,
    views,
)
from torch import nn

import gradroute as gr
from gradroute._protocol import routed_layers

pytestmark = [pytest.mark.touches_peft, unnamed_base]


def adapters_that_train(model: nn.Module) -> set[str]:
    return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}


# Several routed adapters


def test_a_second_adapter_has_a_quarantine_and_leaves_the_first_alone() -> None:
    model = with_second()
    assert_views_equal(model, LLAMA.views())
    model.set_adapter("second")
    second = views(model)
    assert far(second.on, LLAMA.views().on)
    assert far(second.ablated, LLAMA.views().ablated)
    assert torch.equal(second.base, LLAMA.views().base)


def test_a_copy_by_name_as_trl_makes_its_reference_has_both_blocks() -> None:
    model = LLAMA.model()
    model.add_adapter("ref", LLAMA.config())
    model.set_adapter("ref")
    assert torch.equal(logits(model), LLAMA.views().base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in [name for name in parameters if ".default." in name]:
            parameters[name.replace(".default.", ".ref.")].copy_(parameters[name])
    assert_views_equal(model, LLAMA.views())


def test_switching_back_and_forth_trains_both_blocks_of_the_active_adapter_and_nothing_else() -> None:
    model = with_second()
    flags = trainable(model)
    assert adapters_that_train(model) == {"default"}
    for name in ("second", "default", "second"):
        model.set_adapter(name)
        assert adapters_that_train(model) == {name}
        assert both_blocks_train(model)
    model.set_adapter("default")
    assert trainable(model) == flags
    assert_views_equal(model, LLAMA.views())


def test_a_pass_without_adapters_leaves_both_blocks_trainable() -> None:
    model = with_second()
    for switch in (model.disable_adapter, lambda: gr.disable_adapters(model)):
        with switch():
            assert torch.equal(logits(model), LLAMA.views().base)
        assert both_blocks_train(model)
        assert adapters_that_train(model) == {"default"}
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), LLAMA.views().base)
    model.base_model.enable_adapter_layers()
    assert both_blocks_train(model)
    assert_views_equal(model, LLAMA.views())


def test_adding_an_adapter_thaws_no_block_that_stock_peft_leaves_frozen() -> None:
    frozen = []
    for config in (LLAMA.config(), LoraConfig(r=3, target_modules="all-linear")):
        model = get_peft_model(LLAMA.base(), config)
        model.requires_grad_(False)
        model.add_adapter("second", copy.deepcopy(config))
        frozen.append({p.requires_grad for name, p in model.named_parameters() if ".default." in name})
    assert frozen[0] == frozen[1]


def test_a_reference_pass_with_another_adapter_between_two_steps_changes_no_gradient() -> None:
    """TRL's habit: set_adapter("ref"), forward, set_adapter("default"), and train on."""
    model = with_second("ref").train()

    def step() -> dict[str, torch.Tensor]:
        model.zero_grad()
        with gr.route(model, gr.RouteMask.zones(["keep", "absorb", "route"])):
            model(X, labels=X).loss.backward()
        return gradients(model)

    before = step()
    model.set_adapter("ref")
    logits(model)
    model.set_adapter("default")
    assert before
    assert all(before[name].any() for name, _ in gr.quarantine_parameters(model))
    assert_same_tensors(step(), before)


def test_deleting_an_adapter_removes_both_of_its_blocks_and_no_other() -> None:
    model = with_second()
    model.delete_adapter("second")
    assert not [name for name in tensors_of(model) if "second" in name]
    assert both_blocks_train(model)
    assert_views_equal(model, LLAMA.views())


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")
def test_deleting_the_active_adapter_leaves_the_other_with_both_blocks() -> None:
    model = with_second()
    model.set_adapter("second")
    expected = views(model)
    model.set_adapter("default")
    model.delete_adapter("default")
    assert model.active_adapter == "second"
    assert both_blocks_train(model)
    assert_views_equal(model, expected)


def test_every_adapter_is_saved_with_both_blocks(tmp_path: Path) -> None:
    model = with_second()
    model.save_pretrained(tmp_path)
    assert_views_equal(gr.load_quarantined(LLAMA.base(), tmp_path).eval(), LLAMA.views())
    model.set_adapter("second")
    assert_views_equal(gr.load_quarantined(LLAMA.base(), tmp_path / "second").eval(), views(model))


def test_a_second_adapter_remembers_its_base_model_too(tmp_path: Path) -> None:
    with_second().save_pretrained(tmp_path)
    with pytest.raises(gr.errors.FileFormatError, match="base model that it was trained on"):
        gr.load_quarantined(LLAMA.base(seed=1), tmp_path / "second")


@pytest.mark.parametrize("name", ["quarantine", "lora_A", "A_quarantine", "base_layer", "1", "my adapter"])
def test_the_name_of_an_adapter_does_not_matter(name: str, tmp_path: Path) -> None:
    model = get_peft_model(LLAMA.base(), LLAMA.config(), adapter_name=name).eval()
    randomize_blocks(model, std=0.2)
    assert_views_equal(model, LLAMA.views())
    model.save_pretrained(tmp_path)
    loaded = gr.load_quarantined(LLAMA.base(), tmp_path / name, adapter_name=name).eval()
    assert_views_equal(loaded, LLAMA.views())
    gr.export_deployed(model, tmp_path / "deployed")
    assert_near(logits(PeftModel.from_pretrained(LLAMA.base(), tmp_path / "deployed")), LLAMA.views().ablated)


def test_every_adapter_has_its_own_stop_gradient_or_is_refused() -> None:
    model = LLAMA.model()
    try:
        model.add_adapter("branch", Case("llama", options={"stop_gradient": "branch"}).config())
    except gr.errors.TargetError:
        return
    model.set_adapter("branch")
    assert {layer.stop_gradient for layer in routed_layers(model).values()} == {"branch"}
    model.set_adapter("default")
    assert {layer.stop_gradient for layer in routed_layers(model).values()} == {"parameters"}


def test_an_option_set_after_the_config_was_made_is_refused_for_a_second_adapter() -> None:
    model, late = LLAMA.model(), LLAMA.config()
    late.use_dora = True
    with pytest.raises(gr.errors.TargetError, match="`use_dora"):
        model.add_adapter("second", late)
    assert list(model.peft_config) == ["default"]


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
def test_an_adapter_that_was_added_while_merged_remembers_the_unmerged_base(tmp_path: Path) -> None:
    model = LLAMA.model()
    expected = logits(model)
    model.merge_adapter()
    model.add_adapter("second", LLAMA.config())
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    loaded = gr.load_quarantined(LLAMA.base(), tmp_path / "second")
    model.set_adapter("second")
    assert torch.equal(logits(loaded), logits(model))


# Two active at once, and adapters without a quarantine


@pytest.mark.parametrize(
    "use",
    [
        logits,
        lambda model: list(gr.deployed_parameters(model)),
        lambda model: list(gr.quarantine_parameters(model)),
        lambda model: model.merge_adapter(),
        gr.merge_deployed,
    ],
    ids=["forward", "deployed_parameters", "quarantine_parameters", "merge_adapter", "merge_deployed"],
)
def test_two_routed_adapters_active_at_once_raise(use: Callable[[nn.Module], object]) -> None:
    model = with_second()
    before = tensors_of(model)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(gr.errors.RouteError, match=r"one active adapter. Found \['default', 'second'\].*Fix"):
        use(model)
    assert_same_tensors(tensors_of(model), before)
    model.set_adapter("default")
    assert_views_equal(model, LLAMA.views())


def with_plain() -> PeftModel:
    """A routed adapter, active, and a plain LoRA adapter next to it."""
    model = LLAMA.model()
    model.add_adapter("plain", LoraConfig(r=3, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B.plain." in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return model


def test_a_plain_adapter_next_to_a_routed_one_runs_as_stock_lora() -> None:
    model = with_plain()
    assert_views_equal(model, LLAMA.views())
    stock = get_peft_model(LLAMA.base(), LoraConfig(r=3, target_modules="all-linear"), adapter_name="plain").eval()
    stock.load_state_dict({n: t for n, t in tensors_of(model).items() if ".default." not in n})
    assert far(logits(stock), LLAMA.views().base)
    model.set_adapter("plain")
    assert_near(logits(model), logits(stock))
    model.set_adapter("default")
    assert_views_equal(model, LLAMA.views())


def test_a_plain_adapter_runs_after_a_sticky_route_was_cleared() -> None:
    model = with_plain()
    gr.adapters.set_route(model, KEEP)
    model(X)
    gr.adapters.clear_route(model)
    model.set_adapter("plain")
    assert far(logits(model), LLAMA.views().base)


def test_a_route_over_a_plain_adapter_raises() -> None:
    model = with_plain()
    model.set_adapter("plain")
    with pytest.raises(gr.errors.RouteError, match=r"Found \['plain'\]; with a quarantine: \['default'\].*Fix"):
        with gr.route(model, KEEP):
            model(X)
    with pytest.raises(gr.errors.RouteError, match="'plain'"):
        list(gr.quarantine_parameters(model))


@pytest.mark.parametrize(
    "use",
    [
        lambda model: gr.route(model, KEEP),
        gr.ablate_quarantine,
        lambda model: list(gr.deployed_parameters(model)),
        lambda model: gr.export_deployed(model, "nowhere"),
        gr.merge_deployed,
    ],
    ids=["route", "ablate", "deployed_parameters", "export", "merge"],
)
def test_a_routed_adapter_added_onto_plain_lora_raises_at_first_use(use: Callable[[nn.Module], object]) -> None:
    model = get_peft_model(LLAMA.base(), LoraConfig(r=3, target_modules="all-linear"))
    model.add_adapter("routed", LLAMA.config())
    model.set_adapter("routed")
    assert torch.equal(logits(model), LLAMA.views().base)
    with pytest.raises(
        gr.errors.TargetError, match=r"'routed' should have a quarantine in `.*q_proj`. Found plain LoRA.*Fix"
    ):
        use(model)
