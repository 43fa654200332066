"""What PEFT's own tests ask of an adapter, asked of both blocks, for every case of the table."""

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.models import gradients
from support.peft_cases import (
    CASES,
    Case,
    X,
    assert_near,
    assert_same_tensors,
    assert_views_equal,
    both_blocks_train,
    distance,
    each_case,
    each_plain_case,
    far,
    logits,
    stock_from_pretrained,
    tensors_of,
    trainable,
    unnamed_base,
    views,
)
from torch import Tensor, nn

import gradroute as gr
from gradroute._protocol import RoutedLayer, routed_layers

pytestmark = [pytest.mark.touches_peft, unnamed_base]
KEEP, ROUTE = gr.RouteMask.zones(["keep"] * len(X)), gr.RouteMask.zones(["route"] * len(X))


# Save and load


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """The folder that `save_pretrained` of a case's model writes; written once."""
    folders: dict[str, Path] = {}

    def of_case(case: Case) -> Path:
        if repr(case) not in folders:
            folders[repr(case)] = tmp_path_factory.mktemp("saved")
            case.model().save_pretrained(folders[repr(case)])
        return folders[repr(case)]

    return of_case


Saved = Callable[[Case], Path]


@each_case
def test_load_quarantined_restores_both_blocks_bitwise(case: Case, saved: Saved) -> None:
    loaded = gr.load_quarantined(case.base(), saved(case)).eval()
    assert_same_tensors(tensors_of(loaded), tensors_of(case.model()))
    assert_views_equal(loaded, case.views())
    assert both_blocks_train(loaded)


@each_plain_case
def test_from_pretrained_with_our_config_restores_both_blocks_bitwise(case: Case, saved: Saved) -> None:
    config = gr.QuarantineLoraConfig.from_pretrained(saved(case))
    options = {"autocast_adapter_dtype": case.autocast_adapter_dtype, "is_trainable": True}
    loaded = PeftModel.from_pretrained(case.base(), saved(case), config=config, **options).eval()
    assert_same_tensors(tensors_of(loaded), tensors_of(case.model()))
    assert_views_equal(loaded, case.views())
    assert both_blocks_train(loaded)


@each_case
def test_stock_from_pretrained_loads_the_deployed_block_alone(case: Case, saved: Saved) -> None:
    stock = stock_from_pretrained(case.base(), saved(case), autocast_adapter_dtype=case.autocast_adapter_dtype)
    assert not any(isinstance(module, RoutedLayer) or "quarantine" in name for name, module in stock.named_modules())
    deployed = {name: tensor for name, tensor in tensors_of(case.model()).items() if "quarantine" not in name}
    assert_same_tensors(tensors_of(stock), deployed)
    if case.exact_scaling:
        assert torch.equal(logits(stock), case.views().ablated)
    else:
        assert_near(logits(stock), case.views().ablated)


@each_case
def test_saving_changes_nothing_and_what_was_loaded_is_saved_as_the_same_files(
    case: Case, saved: Saved, tmp_path: Path
) -> None:
    model = case.model()
    before = tensors_of(model)
    for name in ("once", "twice"):
        model.save_pretrained(tmp_path / name)
        assert files_in(tmp_path / name) == files_in(saved(case))
    assert_same_tensors(tensors_of(model), before)
    gr.load_quarantined(case.base(), saved(case)).save_pretrained(tmp_path / "again")
    assert len(load_file(saved(case) / "adapter_model.safetensors")) >= 4 * len(routed_layers(model))
    assert files_in(tmp_path / "again") == files_in(saved(case))


def files_in(folder: Path) -> dict[str, object]:
    """Weights as bytes, the config as sorted JSON: PEFT writes sets in the order of their hashes."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_fingerprint"]
    unordered = {name: sorted(value) if isinstance(value, list) else value for name, value in config.items()}
    return {"config": unordered, "weights": (folder / "adapter_model.safetensors").read_bytes()}


# Merge


@each_case
def test_merging_keeps_the_output_and_unmerging_restores_the_weights_bitwise(case: Case) -> None:
    model = case.model()
    seen, before = case.views(), tensors_of(model)
    model.merge_adapter()
    assert not torch.equal(tensors_of(model)[f"{first_layer(model)}.base_layer.weight"], weight(before, model))
    assert_near(logits(model), seen.on)
    model.unmerge_adapter()
    assert_same_tensors(tensors_of(model), before)
    assert_views_equal(model, seen)


@each_case
def test_merge_and_unload_gives_a_plain_model_of_the_on_view(case: Case) -> None:
    model, seen = case.model(), case.views()
    assert_plain(plain := model.merge_and_unload(), like=case.base())
    assert_near(logits(plain), seen.on)


@each_case
def test_merge_deployed_gives_a_plain_model_of_the_ablated_view(case: Case) -> None:
    model, seen = case.model(), case.views()
    assert_plain(plain := gr.merge_deployed(model), like=case.base())
    assert_near(logits(plain), seen.ablated)


@each_plain_case
def test_unload_gives_the_base_model_back(case: Case) -> None:
    plain = case.model().unload()
    assert_plain(plain, like=case.base())
    assert_same_tensors(tensors_of(plain), tensors_of(case.base()))


def first_layer(model: nn.Module) -> str:
    return next(iter(routed_layers(model)))


def weight(tensors: dict[str, Tensor], model: nn.Module) -> Tensor:
    return tensors[f"{first_layer(model)}.base_layer.weight"]


def assert_plain(model: nn.Module, like: nn.Module) -> None:
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in like.named_modules()]
    assert not hasattr(model, "peft_config")


# Disable


@each_case
def test_disabled_adapters_give_the_base_output_and_everything_comes_back(case: Case) -> None:
    model = case.model()
    seen, flags, expected = case.views(), trainable(model), logits(case.base())
    assert any(flags.values())
    for switch in (gr.disable_adapters, lambda model: model.disable_adapter()):
        with switch(model):
            assert torch.equal(logits(model), expected)
        assert trainable(model) == flags
        with pytest.raises(KeyError), switch(model):
            raise KeyError
        assert trainable(model) == flags
        assert_views_equal(model, seen)


# Half precision


@each_plain_case
def test_views_survive_a_cast_to_half_precision(case: Case) -> None:
    model, seen = case.model(), case.views()
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(model).to(dtype)
        assert {parameter.dtype for parameter in cast.parameters()} == {dtype}
        for now, then in zip(views(cast), seen, strict=True):
            assert now.dtype == dtype
            assert distance(now, then) < 0.2


@each_case
def test_it_is_as_close_to_the_exact_output_as_one_stock_lora_of_both_ranks(case: Case) -> None:
    """Absorbing everything is LoRA of rank r + r_quarantine: the same up to 1e-6, and no less exact in bfloat16."""
    model = case.model()
    seen, stock = case.views(), concatenated(model, case)
    exact = logits(copy.deepcopy(model).double())
    assert far(exact, seen.base)
    for ours in (seen.on, logits_with_grad(model)):
        if case.dtype == torch.float32:
            torch.testing.assert_close(ours, logits(stock), rtol=0, atol=1e-6 * ours.abs().max())
        assert distance(exact, ours) <= 1.5 * distance(exact, logits(stock)) + 1e-6


def concatenated(model: nn.Module, case: Case) -> PeftModel:
    """Stock LoRA with A = [A_d; A_q], B = [s_d B_d, s_q B_q], and scaling 1."""
    layers = {name.removeprefix("base_model.model."): layer for name, layer in routed_layers(model).items()}
    ranks = {name: len(layer.deployed.A) + len(layer.quarantine.A) for name, layer in layers.items()}
    config = LoraConfig(
        target_modules=list(layers), rank_pattern=ranks, alpha_pattern=ranks,
        fan_in_fan_out=case.architecture == "gpt2", modules_to_save=case.options.get("modules_to_save"),
    )  # fmt: skip
    stock = get_peft_model(case.base(), config, autocast_adapter_dtype=case.autocast_adapter_dtype).eval()
    with torch.no_grad():
        for name, layer in layers.items():
            lora, blocks = stock.base_model.model.get_submodule(name), (layer.deployed, layer.quarantine)
            lora.lora_A["default"].weight.copy_(torch.cat([block.A for block in blocks]))
            lora.lora_B["default"].weight.copy_(torch.cat([block.scaling * block.B for block in blocks], dim=1))
        for name, parameter in stock.named_parameters():
            if ".modules_to_save." in name:
                parameter.copy_(model.get_parameter(name))
    return stock


def logits_with_grad(model: nn.Module) -> Tensor:
    output: Tensor = model(X).logits
    assert output.requires_grad
    return output.detach()


# Training


@each_case
@pytest.mark.parametrize("mask", [ROUTE, KEEP], ids=["route", "keep"])
def test_a_routed_step_trains_one_block_and_leaves_the_other_bitwise(case: Case, mask: gr.RouteMask) -> None:
    model = case.model().train()
    blocks = {"deployed": dict(gr.deployed_parameters(model)), "quarantine": dict(gr.quarantine_parameters(model))}
    trained, untouched = ("quarantine", "deployed") if mask is ROUTE else ("deployed", "quarantine")
    before = tensors_of(model)
    with gr.route(model, mask):
        model(X, labels=X).loss.backward()
    assert all(parameter.grad.any() for parameter in blocks[trained].values())
    torch.optim.SGD(model.parameters(), lr=10.0).step()
    after = tensors_of(model)
    assert [name for name in blocks[untouched] if not torch.equal(after[name], before[name])] == []
    assert [name for name in blocks[trained] if torch.equal(after[name], before[name])] == []
    frozen = [name for name in before if ".lora_" not in name and ".modules_to_save." not in name]
    assert all(torch.equal(after[name], before[name]) for name in frozen)


@each_case
def test_gradient_checkpointing_changes_no_gradient(case: Case) -> None:
    model, mask = case.model().train(), gr.RouteMask.zones(["keep", "absorb", "route"])
    expected, forwards = routed_gradients(model, mask)
    assert forwards == 1
    model.enable_input_require_grads()
    # transformers 5 renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    for reentrant in (True, False):
        enable({"use_reentrant": reentrant})
        found, forwards = routed_gradients(model, mask)
        assert forwards == 2, "nothing was recomputed"
        assert_same_tensors(found, expected)


def routed_gradients(model: nn.Module, mask: gr.RouteMask) -> tuple[dict[str, Tensor], int]:
    """Every gradient of one step, and how often the first routed layer ran forward."""
    model.zero_grad()
    calls: list[int] = []
    layer = next(iter(routed_layers(model).values()))
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)  # of dropout
    with gr.route(model, mask):
        model(X, labels=X, use_cache=False).loss.backward()
    handle.remove()
    return gradients(model), len(calls)


# Copies


@each_plain_case
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_both_blocks_and_shares_nothing(case: Case, how: str) -> None:
    model, expected = case.model(), case.views()
    copied = copy.deepcopy(model) if how == "deepcopy" else pickled(model)
    assert_same_tensors(tensors_of(copied), tensors_of(model))
    assert_views_equal(copied, expected)
    assert trainable(copied) == trainable(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert_views_equal(model, expected)


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copied: nn.Module = torch.load(buffer, weights_only=False)
    return copied


def test_a_copy_made_inside_a_view_or_route_is_in_neither() -> None:
    model, expected = CASES[0].model(), CASES[0].views()
    with torch.no_grad(), gr.ablate_quarantine(model), gr.route(model, ROUTE):
        logits(model)
        copies = [copy.deepcopy(model), pickled(model)]
    for copied in copies:
        assert_views_equal(copied, expected)
        assert not any(layer.has_open_route for layer in routed_layers(copied).values())
