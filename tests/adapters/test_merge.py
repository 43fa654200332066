"""Merging: what it shows, what it refuses to show, and the base weights it leaves behind."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from support.models import randomize_blocks
from support.peft_cases import (
    Case,
    X,
    assert_near,
    assert_same_tensors,
    assert_views_equal,
    distance,
    logits,
    tensors_of,
    unnamed_base,
    views,
)
from support.tiny_models import config, llama
from torch import Tensor, nn

import gradroute as gr
from gradroute._protocol import routed_layers

pytestmark = [pytest.mark.touches_peft, unnamed_base]
LLAMA, BF16 = Case("llama"), Case("llama", torch.bfloat16)
ROWS = torch.tensor([True, False, True])
View = Callable[[nn.Module], AbstractContextManager[object]]

ROUTED: dict[str, View] = {
    "route": lambda model: gr.route(model, gr.RouteMask.zones(["keep", "absorb", "route"])),
    "ablated rows": lambda model: gr.ablate_quarantine(model, rows=ROWS),
    "disable_adapters": gr.disable_adapters,
}
each_view_without_one_weight = pytest.mark.parametrize("what", ROUTED)


def injected(case: Case = LLAMA) -> nn.Module:
    return randomize_blocks(inject_adapter_in_model(case.config(), case.base()), std=0.2).eval()


def attached() -> nn.Module:
    return randomize_blocks(gr.attach(LLAMA.base(), r=3, r_quarantine=4, lora_alpha=6), std=0.2).eval()


# PEFT's merge: the present view, and no other


@each_view_without_one_weight
def test_what_one_weight_cannot_hold_is_not_merged(what: str) -> None:
    model = LLAMA.model()
    before = tensors_of(model)
    with (
        pytest.raises(gr.errors.RouteError, match=rf"one merged weight cannot show (a )?{what}.*Fix"),
        ROUTED[what](model),
    ):
        model.merge_adapter()
    assert_same_tensors(tensors_of(model), before)
    assert not any(layer.merged for layer in routed_layers(model).values())
    assert_views_equal(model, LLAMA.views())


@each_view_without_one_weight
def test_a_merged_model_does_not_pretend_to_show_it(what: str) -> None:
    model = LLAMA.model()
    model.merge_adapter()
    with (
        pytest.raises(gr.errors.RouteError, match=rf"one merged weight cannot show (a )?{what}.*Fix"),
        ROUTED[what](model),
    ):
        model(X)
    assert_near(logits(model), LLAMA.views().on)


@pytest.mark.parametrize("merged", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shown", [0.0, 0.5, 1.0])
def test_merged_at_one_scale_it_shows_that_scale_and_raises_at_another(merged: float, shown: float) -> None:
    model = LLAMA.model()
    with gr.ablate_quarantine(model, merged):
        expected = logits(model)
        model.merge_adapter()
    if merged == shown:
        with gr.ablate_quarantine(model, shown):
            assert_near(logits(model), expected)
    else:
        with pytest.raises(gr.errors.RouteError, match=f"at scale {merged:g} and cannot show it at {shown:g}. Fix"):
            with gr.ablate_quarantine(model, shown):
                model(X)
    model.unmerge_adapter()
    assert_views_equal(model, LLAMA.views())


def test_peft_disabling_a_merged_model_unmerges_it() -> None:
    model = LLAMA.model()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), LLAMA.views().base)
    assert_views_equal(model, LLAMA.views())


def test_merging_twice_changes_nothing_more() -> None:
    model = LLAMA.model()
    model.merge_adapter()
    once = tensors_of(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert_same_tensors(tensors_of(model), once)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert_views_equal(model, LLAMA.views())


def test_the_merged_weight_is_the_base_plus_both_deltas() -> None:
    for case in (LLAMA, Case("gpt2"), Case("llama", options={"use_rslora": True})):
        model = case.model()
        layers = routed_layers(model)
        expected = {name: layer.base_weight() + delta(layer) for name, layer in layers.items()}
        model.merge_adapter()
        for name, layer in layers.items():
            torch.testing.assert_close(layer.base_weight(), expected[name], rtol=1e-6, atol=1e-7)


def delta(layer: object) -> Tensor:
    total = sum(block.scaling * block.B @ block.A for block in (layer.deployed, layer.quarantine))
    return total.detach()


@pytest.mark.slow
@pytest.mark.parametrize("safe", [False, True])
def test_a_hundred_merges_in_bf16_leave_the_weights_bitwise(safe: bool) -> None:
    model = BF16.model()
    before = tensors_of(model)
    for _ in range(100):
        model.merge_adapter(safe_merge=safe)
        model.unmerge_adapter()
    assert_same_tensors(tensors_of(model), before)
    assert_views_equal(model, BF16.views())


def test_a_hundred_merges_of_stock_lora_in_bf16_drift() -> None:
    """What the test above would see if the delta were subtracted."""
    model = get_peft_model(BF16.base(), LoraConfig(r=3, target_modules="all-linear"), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    before = tensors_of(model)
    for _ in range(100):
        model.merge_adapter()
        model.unmerge_adapter()
    drifted = [name for name, tensor in tensors_of(model).items() if not torch.equal(tensor, before[name])]
    assert len(drifted) == len([name for name in before if ".base_layer." in name])


@pytest.mark.parametrize("unload", [lambda m: m.unload(), lambda m: m.merge_and_unload(), gr.merge_deployed])
def test_what_is_unloaded_are_the_layers_that_were_there(unload: Callable[[nn.Module], nn.Module]) -> None:
    base = LLAMA.base()
    modules = {name: id(module) for name, module in base.named_modules()}
    parameters = {name: id(parameter) for name, parameter in base.named_parameters()}
    model = randomize_blocks(get_peft_model(base, config()), std=0.2)
    plain = unload(model)
    assert plain is base
    assert {name: id(module) for name, module in plain.named_modules()} == modules
    assert {name: id(parameter) for name, parameter in plain.named_parameters()} == parameters


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
def test_a_merge_that_fails_leaves_the_layer_and_can_be_undone() -> None:
    model = LLAMA.model()
    before = tensors_of(model)
    name, broken = list(routed_layers(model).items())[7]
    with torch.no_grad():
        broken.lora_B_quarantine["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(tensors_of(model)[f"{name}.base_layer.weight"], before[f"{name}.base_layer.weight"])
    assert not broken.merged
    assert any(layer.merged for layer in routed_layers(model).values()), "nothing was merged before it"
    model.unmerge_adapter()
    with torch.no_grad():
        broken.lora_B_quarantine["default"].weight.copy_(before[f"{name}.lora_B_quarantine.default.weight"])
    assert_same_tensors(tensors_of(model), before)
    model.merge_adapter(safe_merge=True)
    assert_near(logits(model), LLAMA.views().on)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("options", [{}, {"target_modules": ["lm_head", "v_proj"]}], ids=["linears", "head"])
def test_a_merged_model_saves_both_blocks_and_no_merged_weight(options: dict[str, object], tmp_path: Path) -> None:
    case = Case("llama", options=options)
    model = case.model()
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert_views_equal(gr.load_quarantined(case.base(), tmp_path).eval(), case.views())


def test_a_merged_adapter_is_not_deleted() -> None:
    model = LLAMA.model()
    model.merge_adapter()
    for layer in routed_layers(model).values():
        with pytest.raises(gr.errors.RouteError, match=r"adapter 'default' is merged. Fix: unmerge before"):
            layer.delete_adapter("default")
    assert_near(logits(model), LLAMA.views().on)
    model.unmerge_adapter()
    assert_views_equal(model, LLAMA.views())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("default")


def test_a_merged_model_can_be_moved_to_another_dtype_and_unmerged() -> None:
    model = LLAMA.model()
    model.merge_adapter()
    model.to(torch.float64)
    model.unmerge_adapter()
    assert_same_tensors(tensors_of(model), tensors_of(LLAMA.model().to(torch.float64)))


@pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")
def test_merge_and_unload_of_what_was_merged_in_another_view_raises() -> None:
    """PEFT finds nothing left to merge, and would hand out the view of then as that of now."""
    model = LLAMA.model()
    with gr.ablate_quarantine(model):
        model.merge_adapter()
    with pytest.raises(gr.errors.RouteError, match="at scale 0"):
        model.merge_and_unload()


# merge_deployed

MAKERS: dict[str, Callable[[], nn.Module]] = {"get_peft_model": LLAMA.model, "injected": injected, "attached": attached}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@each_maker
def test_merge_deployed_is_the_ablated_view_in_plain_modules(make: Callable[[], nn.Module]) -> None:
    model = make()
    ablated = views(model).ablated
    plain, like = gr.merge_deployed(model), LLAMA.base()
    assert_near(logits(plain), ablated)
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in like.named_modules()]
    assert tensors_of(plain).keys() == tensors_of(like).keys()


@each_maker
def test_a_merged_model_is_adapted_again_as_any_plain_one(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    plain = gr.merge_deployed(make())
    assert not hasattr(plain, "peft_config")
    plain.save_pretrained(tmp_path)
    assert_near(logits(type(plain).from_pretrained(tmp_path).eval()), logits(plain))
    again = get_peft_model(plain, config(r=2))
    assert {len(layer.deployed.A) for layer in routed_layers(again).values()} == {2}


@pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")
@pytest.mark.parametrize("make", [LLAMA.model, injected], ids=["get_peft_model", "injected"])
def test_merge_deployed_of_a_merged_model_does_not_ship_the_quarantine(make: Callable[[], nn.Module]) -> None:
    model = make()
    for layer in routed_layers(model).values():
        layer.merge()
    try:
        plain = gr.merge_deployed(model)
    except gr.errors.RouteError as error:
        assert re.search("merged.*Fix", str(error))  # noqa: PT017  either is right: to refuse, or to unmerge first
        return
    assert_near(logits(plain), LLAMA.views().ablated)


@each_maker
@pytest.mark.parametrize(
    "view",
    [gr.ablate_quarantine, gr.disable_adapters, ROUTED["route"], ROUTED["ablated rows"]],
    ids=["ablated", "disabled", "route", "rows"],
)
def test_merge_deployed_inside_a_view_or_route_is_refused(make: Callable[[], nn.Module], view: View) -> None:
    model = make()
    before = tensors_of(model)
    with pytest.raises(gr.errors.RouteError, match=r"merge_deployed\(model\) inside.*Fix: leave it first"), view(model):
        gr.merge_deployed(model)
    assert_same_tensors(tensors_of(model), before)


@each_maker
def test_merge_deployed_refuses_blocks_that_are_not_finite(make: Callable[[], nn.Module]) -> None:
    model = make()
    name, parameter = next(iter(gr.deployed_parameters(model)))
    with torch.no_grad():
        parameter[0, 0] = float("nan")
    before = {n: t for n, t in tensors_of(model).items() if n != name}
    with pytest.raises(gr.GradRouteError, match=r"finite.*Fix"):
        gr.merge_deployed(model)
    assert_same_tensors({n: t for n, t in tensors_of(model).items() if n != name}, before)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning")
@pytest.mark.parametrize("make", ["get_peft_model", "attached"])
def test_a_tied_head_among_the_targets_is_not_merged(make: str) -> None:
    base = llama(tie_word_embeddings=True).eval()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    targets = ["q_proj", "lm_head"]
    if make == "attached":
        model = gr.attach(base, r=3, lora_alpha=6, target_modules=targets)
    else:
        model = get_peft_model(base, config(target_modules=targets)).eval()
    randomize_blocks(model, std=0.2)
    before, seen = tensors_of(model), views(model)
    with pytest.raises(gr.errors.TargetError, match=r"`.*lm_head` is shared with `.*embed_tokens.weight`.*Fix"):
        gr.merge_deployed(model)
    assert_same_tensors(tensors_of(model), before)
    assert_views_equal(model, seen)


def test_a_tied_head_that_is_not_targeted_is_no_obstacle() -> None:
    model = get_peft_model(llama(tie_word_embeddings=True).eval(), config(target_modules=["q_proj", "v_proj"]))
    ablated = views(randomize_blocks(model, std=1.0).eval()).ablated
    plain = gr.merge_deployed(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert_near(logits(plain), ablated)


def test_merging_in_bf16_rounds_once() -> None:
    for make in (BF16.model, lambda: injected(BF16)):
        model = make()
        layers = {name.removeprefix("base_model.model."): layer for name, layer in routed_layers(model).items()}
        exact = {
            name: layer.base_weight().double()
            + layer.deployed.scaling * (layer.deployed.B.double() @ layer.deployed.A.double())
            for name, layer in layers.items()
        }
        plain = gr.merge_deployed(model)
        for name, weight in exact.items():
            assert distance(weight, plain.get_submodule(name).weight) < 0.003


def test_modules_that_peft_saves_are_part_of_the_merged_model() -> None:
    case = Case("llama", options={"modules_to_save": ["lm_head"]})
    model = case.model()
    trained = model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").clone()
    plain = gr.merge_deployed(model)
    assert torch.equal(plain.lm_head.weight, trained)
    assert not torch.equal(plain.lm_head.weight, case.base().lm_head.weight)
    also = injected(case)
    with torch.no_grad():
        also.lm_head.modules_to_save["default"].weight.copy_(trained)
    merged = gr.merge_deployed(also)
    assert_near(logits(merged), logits(plain))
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
