"""What is read from private names of PEFT does what is taken for granted; run on the newest and the lowest version."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.tuners.lora.layer import Linear as LoraLinear
from support.models import Tower
from support.peft_cases import Case
from torch import nn

from gradroute.adapters.peft import _private

pytestmark = pytest.mark.touches_peft


def test_the_factory_is_called_for_every_target_and_can_still_get_pefts_own_layer() -> None:
    called = []

    def factory(
        target: nn.Module, adapter: str, config: LoraConfig, *, target_name: str, **options: object
    ) -> nn.Module:
        called.append(target_name)
        return _private.build_own_layer(target, adapter, config, target_name=target_name, **options)

    config = LoraConfig(r=2, target_modules=["lower", "upper"])
    _private.inject_by(config, factory)
    model = get_peft_model(Tower(), config)
    assert called == ["lower", "upper"]
    assert type(model.base_model.model.lower) is LoraLinear
    assert config._custom_modules == {nn.Module: factory}


def test_linears_take_blocks_and_embeddings_do_not() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(4, 3), nn.Linear(3, 3)

    model = get_peft_model(Both(), LoraConfig(r=2, target_modules=["embedding", "linear"])).base_model.model
    assert _private.takes_blocks(model.linear)
    assert not _private.takes_blocks(model.embedding)


@pytest.mark.parametrize("name", _private.QUANTISED)
def test_the_quantised_layers_are_where_they_are_looked_for(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    assert _private.quantised_class(name).__module__ == "peft.tuners.lora.bnb"


def test_an_adapter_takes_the_type_of_its_base_weight() -> None:
    model = get_peft_model(Tower().double(), LoraConfig(r=2, target_modules=["lower"]))
    layer = model.base_model.model.lower
    layer.lora_A["default"].float()
    _private.move_to_base(layer, "default")
    assert layer.lora_A["default"].weight.dtype == torch.float64


def test_methods_that_combine_adapters_have_the_names_that_are_refused() -> None:
    assert _private.combining() is None
    assert {LoraModel.add_weighted_adapter.__name__, reduce_intruder_dimension.__name__} == set(_private.COMBINING)


def test_a_layer_says_whether_adapters_are_disabled_and_merged() -> None:
    model = Case("llama").model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert (layer.disable_adapters, layer.merged, layer.merged_adapters) == (False, False, [])
    with model.disable_adapter():
        assert layer.disable_adapters
    model.merge_adapter()
    assert (layer.merged, layer.merged_adapters) == (True, ["default"])
