"""What Hugging Face's methods would do wrong to an attached model is refused, and possible again after `detach`."""

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from support.models import Tower, randomize_blocks
from support.tiny_models import base_model, llama
from torch import nn
from transformers import LlamaForCausalLM

import gradroute as gr

pytestmark = pytest.mark.touches_peft

IDS = torch.arange(1, 17).reshape(2, 8)


def attached() -> nn.Module:
    return randomize_blocks(gr.attach(base_model("llama"), r=2), std=0.2)


@pytest.mark.corner("`save_pretrained` on an attached model", "an error that says what to save")
def test_save_pretrained_is_refused_and_right_after_merging(tmp_path: Path) -> None:
    model = attached()
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(gr.GradRouteError, match="does not know.*Fix: merge_deployed"):
            each.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    merged = gr.merge_deployed(model)
    merged.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, merged(IDS).logits)


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    model = attached()
    copied = copy.deepcopy(model)
    del model
    with pytest.warns(gr.GradRouteWarning, match="does not know"):
        copied.save_pretrained(tmp_path, is_main_process=True)  # as a Trainer calls it
    assert (tmp_path / "model.safetensors").exists()


def test_who_says_what_to_save_may(tmp_path: Path) -> None:
    model = attached()
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.corner("`merge_and_unload` on an attached model", "an error that names `merge_deployed`")
def test_merge_and_unload_points_to_merge_deployed() -> None:
    for model in (attached(), gr.attach(Tower(), r=2)):
        with pytest.raises(gr.GradRouteError, match=r"Fix: gradroute\.merge_deployed"):
            model.merge_and_unload()


@pytest.mark.corner("the vocabulary is enlarged over a routed head", "an error with the fix")
@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_is_not_enlarged_over_a_routed_head(tied: bool) -> None:
    model = gr.attach(llama(tie_word_embeddings=tied), r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(gr.errors.TargetError, match="resize_token_embeddings.*Fix: resize first"):
        model.resize_token_embeddings(40)
    assert isinstance(gr.detach(model).resize_token_embeddings(40), nn.Embedding)


def test_the_vocabulary_is_enlarged_next_to_a_plain_head() -> None:
    model = gr.attach(llama(), r=2, target_modules=["q_proj"])
    model.resize_token_embeddings(40)
    assert model(torch.tensor([[39]])).logits.shape[-1] == 40


def test_detach_leaves_no_signpost_and_no_model_outlives_its_last_use() -> None:
    model = base_model("llama")
    before = set(model.__dict__)
    gr.detach(gr.attach(model, r=2))
    assert set(model.__dict__) == before
    plain = gr.attach(Tower(), r=2)
    gone = weakref.ref(plain)
    gc.disable()
    try:
        del plain
        assert gone() is None
    finally:
        gc.enable()
