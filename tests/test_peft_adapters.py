"""Several adapters in one model, and everything in PEFT that could drop the quarantine out without a word."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import gradients, randomize_blocks
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from test_peft_cases import (
    Case,
    X,
    assert_near,
    assert_same_tensors,
    assert_views_equal,
    both_blocks_train,
    distance,
    far,
    logits,
    tensors_of,
    trainable,
    unnamed_base,
    views,
)
from torch import nn

import gradroute as gr
from gradroute.protocol import routed_layers

pytestmark = unnamed_base
LLAMA, BF16 = Case("llama"), Case("llama", torch.bfloat16)
KEEP = gr.RouteMask.zones(["keep"] * len(X))


def with_second(name: str = "second", seed: int = 1) -> PeftModel:
    """Two routed adapters of other values; "default" is active."""
    model = LLAMA.model()
    model.add_adapter(name, LLAMA.config())
    model.set_adapter(name)
    randomize_blocks(model, seed, std=0.2)
    model.set_adapter("default")
    return model


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
    with pytest.raises(gr.FileFormatError, match="base model that it was trained on"):
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
    except gr.TargetError:
        return
    model.set_adapter("branch")
    assert {layer.stop_gradient for layer in routed_layers(model).values()} == {"branch"}
    model.set_adapter("default")
    assert {layer.stop_gradient for layer in routed_layers(model).values()} == {"parameters"}


def test_an_option_set_after_the_config_was_made_is_refused_for_a_second_adapter() -> None:
    model, late = LLAMA.model(), LLAMA.config()
    late.use_dora = True
    with pytest.raises(gr.TargetError, match="`use_dora"):
        model.add_adapter("second", late)
    assert list(model.peft_config) == ["default"]


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged:UserWarning")
@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
def test_an_adapter_that_was_added_while_merged_remembers_the_unmerged_base(tmp_path: Path) -> None:
    model = LLAMA.model()
    model.merge_adapter()
    model.add_adapter("second", LLAMA.config())
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    gr.load_quarantined(LLAMA.base(), tmp_path / "second")


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
    with pytest.raises(gr.RouteError, match=r"one active adapter. Found \['default', 'second'\].*Fix"):
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
    gr.set_route(model, KEEP)
    logits(model)
    gr.clear_route(model)
    model.set_adapter("plain")
    assert far(logits(model), LLAMA.views().base)


def test_a_route_over_a_plain_adapter_raises() -> None:
    model = with_plain()
    model.set_adapter("plain")
    with pytest.raises(gr.RouteError, match=r"Found \['plain'\]; with a quarantine: \['default'\].*Fix"):
        with gr.route(model, KEEP):
            model(X)
    with pytest.raises(gr.RouteError, match="'plain'"):
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
    with pytest.raises(gr.TargetError, match=r"'routed' should have a quarantine in `.*q_proj`. Found plain LoRA.*Fix"):
        use(model)


# What PEFT does to scalings, dtypes and gradients of an adapter


def test_rescaling_an_adapter_rescales_both_blocks() -> None:
    model, layer = LLAMA.model(), None
    with rescale_adapter_scale(model, 0.5):
        layer = next(iter(routed_layers(model).values()))
        assert (layer.deployed.scaling, layer.quarantine.scaling) == (1.0, 0.75)
        assert distance(logits(model), LLAMA.views().on) > 0.2
    assert_views_equal(model, LLAMA.views())
    layer.set_scale("default", 2.0)
    assert (layer.deployed.scaling, layer.quarantine.scaling) == (4.0, 3.0)
    layer.scale_layer(0.5)
    assert (layer.deployed.scaling, layer.quarantine.scaling) == (2.0, 1.5)
    layer.unscale_layer()
    assert (layer.deployed.scaling, layer.quarantine.scaling) == (2.0, 1.5)


def test_without_casts_of_the_input_both_blocks_are_still_seen() -> None:
    model = BF16.model()
    with disable_input_dtype_casting(model):
        assert_views_equal(model, BF16.views())


def test_lora_plus_gives_both_Bs_the_higher_rate() -> None:
    model = LLAMA.model()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name.split(".")[-3]: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert found == {"lora_A": 1e-3, "lora_B": 16e-3, "lora_A_quarantine": 1e-3, "lora_B_quarantine": 16e-3}


@pytest.mark.parametrize(
    "make",
    [
        lambda model: create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=2, weight_decay=0.0, loraplus_weight_decay=0.0
        ),
        pytest.param(
            lambda model: create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=0.1),
            marks=pytest.mark.xfail(
                strict=True,
                reason='LoRA-FA keeps its moments under the name before "lora": both blocks of a layer share them',
            ),
        ),
    ],
    ids=["LoRA+", "LoRA-FA"],
)
def test_an_optimizer_of_peft_moves_no_deployed_block_on_routed_rows(
    make: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    model = Case("llama", options={"r_quarantine": 3}).model().train()
    optimizer, before = make(model), tensors_of(model)
    for _ in range(2):
        optimizer.zero_grad()
        with gr.route(model, gr.RouteMask.zones(["route"] * len(X))):
            model(X, labels=X).loss.backward()
        optimizer.step()
    after = tensors_of(model)
    assert any(not torch.equal(after[name], before[name]) for name, _ in gr.quarantine_parameters(model))
    assert [name for name, _ in gr.deployed_parameters(model) if not torch.equal(after[name], before[name])] == []


def test_the_count_of_trainable_parameters_includes_both_blocks() -> None:
    model = LLAMA.model()
    both = [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for _, p in both)


@pytest.mark.parametrize("trainable_", [True, False])
def test_is_trainable_decides_over_both_blocks(trainable_: bool, tmp_path: Path) -> None:
    model = LLAMA.model()
    model.save_pretrained(tmp_path)
    config = gr.QuarantineLoraConfig.from_pretrained(tmp_path)
    for loaded in (
        gr.load_quarantined(LLAMA.base(), tmp_path, is_trainable=trainable_),
        PeftModel.from_pretrained(LLAMA.base(), tmp_path, config=config, is_trainable=trainable_),
    ):
        both = [*gr.deployed_parameters(loaded), *gr.quarantine_parameters(loaded)]
        assert {p.requires_grad for _, p in both} == {trainable_}


def test_an_adapter_loaded_for_inference_draws_no_dropout(tmp_path: Path) -> None:
    case = Case("llama", options={"lora_dropout": 0.5})
    case.model().save_pretrained(tmp_path)
    loaded = gr.load_quarantined(case.base(), tmp_path, is_trainable=False)
    assert_views_equal(loaded, case.views())


def test_one_dropout_mask_serves_both_blocks() -> None:
    """With A and B of the quarantine the negative of the deployed block's, both contributions cancel or add up."""
    case = Case("llama", options={"lora_dropout": 0.5, "r_quarantine": 3})
    model = case.fresh()
    with torch.no_grad():
        for layer in routed_layers(model).values():
            layer.deployed.B.normal_()
            layer.quarantine.A.copy_(layer.deployed.A)
            layer.quarantine.B.copy_(-layer.deployed.B)
    with gr.ablate_quarantine(model):
        assert far(logits(model), case.views().base)
    model.train()
    assert_near(logits(model), case.views().base)


# A combined, converted or swapped adapter


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_a_weighted_combination_has_both_blocks_or_is_refused(combination: str) -> None:
    """Its ablated view may not show what the parts' quarantines hold, and its on view may not lack it in silence."""
    model = with_second()
    try:
        model.add_weighted_adapter(["default", "second"], [1.0, 0.0], "both", combination_type=combination, svd_rank=8)
    except gr.GradRouteError:
        return
    model.set_adapter("both")
    assert distance(logits_ablated(model), LLAMA.views().ablated) < 1e-4
    assert distance(logits(model), LLAMA.views().on) < 1e-4


def logits_ablated(model: nn.Module) -> torch.Tensor:
    with gr.ablate_quarantine(model):
        return logits(model)


def test_an_adapter_without_intruder_dimensions_has_both_blocks_or_is_refused() -> None:
    intruders = pytest.importorskip("peft.tuners.lora.intruders")
    model = LLAMA.model()
    try:
        intruders.reduce_intruder_dimension(model, new_adapter_name="reduced", top_k=4, mitigation_lambda=1.0)
    except gr.GradRouteError:
        return
    model.set_adapter("reduced")
    assert all(layer.quarantine.B.any() for layer in routed_layers(model).values())


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already a LoRA adapter:UserWarning")
@pytest.mark.parametrize("view", [gr.ablate_quarantine, None], ids=["ablated", "on"])
def test_convert_to_lora_converts_the_view_or_is_refused(view: Callable[[nn.Module], Any] | None) -> None:
    model = LLAMA.model()
    seen = LLAMA.views().ablated if view else LLAMA.views().on
    with view(model) if view else nullcontext():
        config, tensors = peft.convert_to_lora(model, rank=8)
    converted = get_peft_model(LLAMA.base(), config).eval()
    peft.set_peft_model_state_dict(converted, tensors)
    assert_near(logits(converted), seen)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
@pytest.mark.parametrize("r_quarantine", [4, 2], ids=["same-rank", "lower-rank"])
def test_a_hotswapped_checkpoint_brings_both_blocks(r_quarantine: int, tmp_path: Path) -> None:
    source = Case("llama", options={"r_quarantine": r_quarantine})
    source.model(seed=1).save_pretrained(tmp_path)
    expected, model = views(source.model(seed=1)), LLAMA.model()
    assert far(expected.on, LLAMA.views().on)
    hotswap_adapter(model, tmp_path, adapter_name="default", torch_device="cpu")
    if r_quarantine != 4:
        # PEFT pads with zeros in place and knows of one rank: nothing runs that could raise, so check_model says it.
        assert "hot-swap" in gr.check_model(model)[0].reason
        return
    assert gr.check_model(model) == []
    swapped = views(model)
    assert_near(swapped.ablated, expected.ablated)
    assert_near(swapped.on, expected.on)


def test_a_model_prepared_for_hotswap_is_refused() -> None:
    """PEFT pads the deployed block to the target rank, and leaves the quarantine as it is."""
    model = LLAMA.model()
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config["default"])
    with pytest.raises(gr.RouteError, match="prepare_model_for_compiled_hotswap.*Fix"):
        logits(model)


def test_a_checkpoint_without_a_quarantine_is_not_loaded_over_one_in_silence(tmp_path: Path) -> None:
    model = LLAMA.model()
    gr.export_deployed(model, tmp_path)
    missing = model.load_adapter(tmp_path, "default").missing_keys
    assert {name for name in missing if "quarantine" not in name} == set()
    assert len(missing) == len(list(gr.quarantine_parameters(model)))


def test_loading_over_the_adapter_that_is_there_restores_both_blocks(tmp_path: Path) -> None:
    LLAMA.model().save_pretrained(tmp_path)
    model = LLAMA.model(seed=1)
    assert far(logits(model), LLAMA.views().on)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_views_equal(model, LLAMA.views())
    assert both_blocks_train(model)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments:UserWarning")
def test_load_adapter_under_a_new_name_cannot_be_routed_by_mistake(tmp_path: Path) -> None:
    """PEFT picks its own config class for a file, so this is the deployed block alone."""
    model = LLAMA.model()
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "loaded")
    model.set_adapter("loaded")
    with pytest.raises(gr.RouteError, match=r"\['loaded'\]; with a quarantine: \['default'\]"), gr.route(model, KEEP):
        model(X)


# One config, several models


def test_a_copied_config_makes_the_same_model() -> None:
    config = LLAMA.config()
    for again in (copy.deepcopy(config), dataclasses.replace(config), pickle.loads(pickle.dumps(config))):
        model = get_peft_model(LLAMA.base(), again).eval()
        randomize_blocks(model, std=0.2)
        assert_views_equal(model, LLAMA.views())


def test_one_config_for_two_base_models_does_not_mix_up_their_fingerprints(tmp_path: Path) -> None:
    config = LLAMA.config()
    first = randomize_blocks(get_peft_model(LLAMA.base(), config), std=0.2).eval()
    expected = views(first)
    try:
        get_peft_model(LLAMA.base(seed=1), config)
    except gr.GradRouteError:
        return
    first.save_pretrained(tmp_path)
    assert_views_equal(gr.load_quarantined(LLAMA.base(), tmp_path).eval(), expected)
