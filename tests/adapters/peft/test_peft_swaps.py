"""Adapters that PEFT combines, converts, swaps or loads over another: both blocks come along, or it is refused."""

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
from peft import get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from support.llama_adapters import KEEP, LLAMA, with_second
from support.models import randomize_blocks
from support.peft_cases import (
    Case,
    X,
    assert_near,
    assert_views_equal,
    both_blocks_train,
    distance,
    far,
    logits,
    unnamed_base,
    views,
)
from torch import nn

import gradroute as gr
from gradroute._protocol import routed_layers

pytestmark = [pytest.mark.touches_peft, unnamed_base]


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
    with pytest.raises(gr.errors.RouteError, match="prepare_model_for_compiled_hotswap.*Fix"):
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
    with (
        pytest.raises(gr.errors.RouteError, match=r"\['loaded'\]; with a quarantine: \['default'\]"),
        gr.route(model, KEEP),
    ):
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
