"""What a quarantine cannot be combined with is refused: the message names it, says what was found, and the fix."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from support.models import Tower
from support.peft_cases import Case, X, assert_same_tensors, assert_views_equal, logits, tensors_of
from support.tiny_models import config
from torch import nn
from transformers import PreTrainedModel

import gradroute as gr

pytestmark = pytest.mark.touches_peft

LLAMA = Case("llama")
OPTIONS = {field.name for field in dataclasses.fields(LoraConfig)}


def found_in(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that adding an adapter could change."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
    }


# Options of the config

REFUSED: dict[str, Any] = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "lora_only",
    "target_parameters": ["mlp.down_proj.weight"],
    "trainable_token_indices": [1],
    "layer_replication": [(0, 2)],
    "megatron_config": {"tensor_model_parallel_size": 1},
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "velora_config": "VeloraConfig",
    "kasa_config": "KasaConfig",
    "monteclora_config": "MontecloraConfig",
    "use_bdlora": "BdLoraConfig",
    "arrow_config": "ArrowConfig",
}


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported:UserWarning")
@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_would_change_the_blocks_is_refused(option: str) -> None:
    if option not in OPTIONS:
        pytest.skip(f"this peft has no {option}")
    value = REFUSED[option]
    if isinstance(value, str) and value.endswith("Config"):
        value = getattr(peft.tuners.lora, value, None) or getattr(peft, value)
        value = value()
    LoraConfig(target_modules="all-linear", **{option: value})
    with pytest.raises(gr.errors.TargetError, match=rf"^`{option}(=|`).*cannot be used with a quarantine: "):
        config(**{option: value})


def test_a_variant_of_a_later_peft_is_refused_by_its_mark() -> None:
    """PEFT marks fields that switch a variant of LoRA on; a later one has fields that are not known here."""

    @dataclasses.dataclass
    class LaterConfig(gr.QuarantineLoraConfig):
        new_variant: bool = dataclasses.field(default=False, metadata={"is_lora_variant": True})

    LaterConfig(target_modules="all-linear")
    with pytest.raises(gr.errors.TargetError, match="`new_variant=True` cannot be used with a quarantine"):
        LaterConfig(target_modules="all-linear", new_variant=True)


@pytest.mark.parametrize("init", [False, "pissa", "pissa_niter_4", "olora", "orthogonal", "mica", "lora_ga"])
def test_a_start_that_is_not_zero_is_refused(init: object) -> None:
    with pytest.raises(gr.errors.TargetError, match=f'should be True or "gaussian". Found {init!r}.*Fix: oriented'):
        config(init_lora_weights=init)


@pytest.mark.parametrize("rank", [0, -1, 2.5, True, "4"])
def test_a_rank_of_the_quarantine_that_is_none_is_refused(rank: object) -> None:
    # Under the tests' import hook the annotation speaks first, where the type is another.
    with pytest.raises((gr.errors.TargetError, TypeError), match=r"r_quarantine"):
        config(r_quarantine=rank)


def test_a_stop_gradient_that_is_none_is_refused() -> None:
    with pytest.raises(gr.errors.TargetError, match='should be "parameters" or "branch". Found \'detach\''):
        config(stop_gradient="detach")


@pytest.mark.parametrize(
    ("option", "value"),
    [("use_dora", True), ("init_lora_weights", "pissa"), ("bias", "all"), ("lora_bias", True), ("r_quarantine", 0)],
)
def test_an_option_set_after_the_config_was_made_is_refused_too(option: str, value: object) -> None:
    base, made = LLAMA.base(), config()
    before, weights = found_in(base), tensors_of(base)
    setattr(made, option, value)
    with pytest.raises(gr.errors.TargetError, match=f"`{option}"):
        get_peft_model(base, made)
    assert found_in(base) == before
    assert_same_tensors(tensors_of(base), weights)


# Targets


class Mixed(nn.Module):
    """One module of each kind that LoRA can adapt, or that is easily named by mistake."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.embedding, self.norm = nn.Linear(4, 4), nn.Embedding(5, 4), nn.LayerNorm(4)
        self.conv, self.bilinear = nn.Conv2d(3, 3, 1), nn.Bilinear(4, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("embedding", "Embedding"),
        ("conv", "Conv2d"),
        ("attention", "MultiheadAttention"),
        ("attention.out_proj", "output projection of nn.MultiheadAttention"),
    ],
)
def test_a_target_that_would_be_plain_lora_is_refused_by_name(target: str, kind: str) -> None:
    model = Mixed()
    get_peft_model(Mixed(), LoraConfig(target_modules=[target]))
    before = found_in(model)
    with pytest.raises(gr.errors.TargetError, match=rf"^`{target}` is .*{kind}.*Fix: "):
        get_peft_model(model, config(target_modules=[target]))
    assert found_in(model) == before


@pytest.mark.parametrize("target", ["norm", "bilinear"])
def test_a_target_that_peft_cannot_adapt_is_refused(target: str) -> None:
    model = Mixed()
    before = found_in(model)
    with pytest.raises(ValueError, match="Target module .* is not supported"):
        get_peft_model(model, config(target_modules=[target]))
    assert found_in(model) == before


def test_every_linear_of_a_model_with_an_embedding_is_routed() -> None:
    model = get_peft_model(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4)), config())
    assert {name.split(".")[3] for name, _ in gr.quarantine_parameters(model)} == {
        "lora_A_quarantine",
        "lora_B_quarantine",
    }


def test_linears_that_an_encoder_layer_never_calls_are_refused() -> None:
    """In eval mode nn.TransformerEncoderLayer reads the weights of its linears: blocks there would not run."""
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval(), torch.randn(2, 3, 8)
    expected = base(x)
    with pytest.raises(gr.errors.TargetError, match=r"`.*linear1`.*TransformerEncoderLayer"):
        model = get_peft_model(base, config(target_modules=["linear1"]))
        for _, parameter in gr.deployed_parameters(model):
            parameter.data.normal_()
        assert not torch.equal(model.eval()(x), expected), "the blocks were ignored without a word"


def test_a_layer_next_to_an_encoder_layer_whose_name_ends_alike_is_no_part_of_it() -> None:
    """Of "0", an encoder layer, and "10", a tower, only the former reads its weights itself."""
    modules = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), *(nn.Identity() for _ in range(9)), Tower(8)]
    model = get_peft_model(nn.Sequential(*modules), config(target_modules=["lower", "upper"]))
    assert len(list(gr.deployed_parameters(model))) == 4


def test_packed_experts_are_refused_before_anything_is_changed() -> None:
    base = Case("moe").base()
    before = found_in(base)
    for targets in ("all-linear", ["q_proj", "down_proj"]):
        with pytest.raises(gr.errors.TargetError, match=r"experts packed into one parameter.*Fix: name the attention"):
            get_peft_model(base, config(target_modules=targets))
        assert found_in(base) == before


@pytest.mark.parametrize("option", ["target_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "use",
    [
        lambda model: gr.route(model, gr.RouteMask.zones(["keep"])),
        gr.ablate_quarantine,
        lambda model: list(gr.deployed_parameters(model)),
        lambda model: gr.export_full(model, "nowhere"),
    ],
    ids=["route", "ablate", "deployed_parameters", "export"],
)
@pytest.mark.filterwarnings("ignore:The following .* keys did not match any targeted module:RuntimeWarning")
def test_a_name_that_matches_nothing_raises_at_first_use(option: str, use: Callable[[nn.Module], object]) -> None:
    """PEFT takes a typo among several targets without a word, and says no last word to the config."""
    typo: dict[str, Any] = {"target_modules": ["q_proj", "v_porj"], "rank_pattern": {"v_porj": 4}}
    model = get_peft_model(LLAMA.base(), config(**{option: typo.get(option, {"v_porj": 4})}))
    with pytest.raises(gr.errors.TargetError, match=r"should match layers. Found \['v_porj'\].*'default'.*Fix"):
        use(model)


@pytest.mark.parametrize(
    ("option", "value"),
    [("layers_to_transform", [0, 7]), ("modules_to_save", ["lm_haed"])],
)
def test_other_names_that_match_nothing_raise_as_well(option: str, value: list[Any]) -> None:
    model = get_peft_model(LLAMA.base(), config(**{"target_modules": ["q_proj"], option: value}))
    with pytest.raises(gr.errors.TargetError, match=re.escape(str(value[-1]))):
        list(gr.deployed_parameters(model))


@pytest.mark.parametrize("options", [{"target_modules": ["q_porj"]}, {"target_modules": []}, {"r": 0}])
def test_what_peft_refuses_leaves_the_model_unchanged(options: dict[str, Any]) -> None:
    base = LLAMA.base()
    before, weights = found_in(base), tensors_of(base)
    with pytest.raises(ValueError, match="."):
        get_peft_model(base, config(**options))
    assert found_in(base) == before
    assert_same_tensors(tensors_of(base), weights)


# Arguments of the forward


@pytest.mark.parametrize("names", [["default"] * len(X), ["__base__"] * len(X)], ids=["default", "base"])
def test_adapter_names_are_refused(names: list[str]) -> None:
    model = LLAMA.model()
    with pytest.raises(
        gr.errors.RouteError, match=r"`adapter_names=` cannot be used.*Fix: ablate_quarantine\(model, rows="
    ):
        model(X, adapter_names=names)
    with pytest.raises(gr.errors.RouteError, match="`adapter_names=`"):
        model.generate(X, adapter_names=names, max_new_tokens=1)


@pytest.mark.parametrize("options", [{}], ids=["blocks"])
def test_a_forward_after_refused_adapter_names_runs(options: dict[str, Any]) -> None:
    case = Case("llama", options=options)
    model = case.model()
    hooks = found_in(model)["hooks"]
    with pytest.raises(gr.errors.RouteError, match="`adapter_names=`"):
        model(X, adapter_names=["default"] * len(X))
    assert found_in(model)["hooks"] == hooks
    assert_views_equal(model, case.views())


def test_alora_offsets_are_refused() -> None:
    with pytest.raises(gr.errors.RouteError, match="`alora_offsets=` cannot be used"):
        LLAMA.model()(X, alora_offsets=[1] * len(X))


# Models


def test_a_model_that_was_attached_is_not_given_to_peft_and_the_reverse() -> None:
    attached = gr.attach(LLAMA.base(), r=2)
    with pytest.raises(ValueError, match="."):
        list(gr.deployed_parameters(get_peft_model(attached, config(target_modules=["q_proj"]))))
    with pytest.raises(gr.errors.TargetError, match=r"has LoRA layers of PEFT already.*Fix"):
        gr.attach(LLAMA.model(), r=2)


@pytest.mark.parametrize("make", [LLAMA.model, lambda: inject_adapter_in_model(LLAMA.config(), LLAMA.base())])
def test_detach_is_for_attached_models(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(gr.errors.TargetError, match="blocks by attach"):
        gr.detach(make())


def test_the_head_is_routed_only_if_it_is_named() -> None:
    model = LLAMA.fresh()
    assert isinstance(model, PeftModel)
    assert isinstance(model.get_base_model(), PreTrainedModel)
    assert not any("lm_head" in name for name, _ in gr.deployed_parameters(model))
    named = get_peft_model(LLAMA.base(), config(target_modules=["lm_head"]))
    assert [name.split(".")[2] for name, _ in gr.deployed_parameters(named)] == ["lm_head"] * 2
    assert torch.equal(logits(named), LLAMA.views().base)
