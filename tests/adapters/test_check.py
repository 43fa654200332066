"""check_model says what is unsupported and why; parameter_summary counts both blocks; repr answers "what is this?"."""

import re
import warnings
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import convert_outputs_to_fp32
from peft import get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from support.models import Tower, routed_tower
from support.tiny_models import ARCHITECTURES, base_model, config, llama, moe_with_dense_layers, peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPConfig, CLIPModel, MambaConfig, MambaForCausalLM

import gradroute as gr
from gradroute._hashing import model_identity

pytestmark = pytest.mark.touches_peft


def found(model: nn.Module) -> dict[str, str]:
    return {finding.module: f"{finding.severity}: {finding.reason}" for finding in gr.check_model(model)}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_dense_models_have_no_findings_before_and_after(name: str) -> None:
    assert gr.check_model(base_model(name)) == []
    assert gr.check_model(peft_model(name)) == []


def test_an_attached_tower_has_no_findings() -> None:
    assert gr.check_model(routed_tower()) == []


def test_packed_experts_are_named() -> None:
    reasons = found(base_model("moe"))
    assert set(reasons) == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    assert all("gate_up_proj" in reason and "Fix:" in reason for reason in reasons.values())


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qweight = torch.zeros(2, 2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("part", "name", "word"),
    [
        (nn.MultiheadAttention(4, 2), "0", "out_proj"),
        (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), "0", "eval mode"),
        (Experts(), "0.experts", "rows are not known"),
        (Quantised(), "0", "quantised"),
    ],
)
def test_parts_that_cannot_be_targeted_are_named_with_the_reason(part: nn.Module, name: str, word: str) -> None:
    reasons = found(nn.Sequential(part, nn.Linear(4, 4)))
    assert word in reasons[name]
    assert "Fix:" in reasons[name]


def test_an_ordinary_convolution_is_no_pack_of_experts() -> None:
    assert found(nn.Sequential(nn.Conv1d(2, 2, 3))) == {}


def test_what_is_trained_past_the_masks_is_named() -> None:
    reasons = found(peft_model("llama", modules_to_save=["lm_head"]))
    assert [name for name, reason in reasons.items() if "trained by every row" in reason] == [
        "base_model.model.lm_head.modules_to_save.default.weight"
    ]
    model = routed_tower()
    model.lower.base_layer.weight.requires_grad_()
    assert "trained by every row" in found(model)["lower.base_layer.weight"]


def test_a_frozen_block_is_named() -> None:
    model = routed_tower()
    model.upper.lora_B_quarantine.requires_grad_(False)
    assert "quarantine block is frozen" in found(model)["upper"]


def test_a_block_that_is_not_finite_or_elsewhere_is_named() -> None:
    model = routed_tower()
    with torch.no_grad():
        model.upper.lora_A[0, 0] = torch.nan
    model.lower.lora_B = nn.Parameter(model.lower.lora_B.to("meta"))
    model.lower.lora_A = nn.Parameter(model.lower.lora_A.to("meta"))
    reasons = found(model)
    assert "deployed block is not finite" in reasons["upper"]
    assert "meta" in reasons["lower"]


def test_a_rank_that_is_zero_on_both_sides_and_a_layer_on_two_devices_are_named() -> None:
    model = routed_tower()
    with torch.no_grad():
        model.upper.lora_A_quarantine[1] = 0.0
        model.upper.lora_B_quarantine[:, 1] = 0.0
    model.lower.base_layer.to("meta")
    reasons = found(model)
    assert "error: its quarantine block has a rank that is zero in A and B" in reasons["upper"]
    assert "error: its parts are on ['cpu', 'meta']" in reasons["lower"]


def spoil_two_adapters(model: nn.Module) -> None:
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])


def spoil_merge(model: nn.Module) -> None:
    model.merge_adapter()


def spoil_sticky_route(model: nn.Module) -> None:
    gr.adapters.set_route(model, gr.RouteMask.zones(["keep"]))


def enable_checkpointing(model: nn.Module) -> None:
    # The name before and since transformers 5.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def spoil_checkpointing(model: nn.Module) -> None:
    enable_checkpointing(model)
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = lambda function, *args: function(*args)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (spoil_two_adapters, "one active adapter"),
        (spoil_merge, "merged"),
        (spoil_sticky_route, "route is open"),
        (spoil_checkpointing, "torch.utils.checkpoint"),
    ],
)
def test_states_in_which_routing_cannot_work_are_errors(spoil: Callable[[nn.Module], None], word: str) -> None:
    model = peft_model("llama")
    spoil(model)
    errors = [finding for finding in gr.check_model(model) if finding.severity == "error"]
    assert errors
    assert all(word in str(finding) for finding in errors)


def test_a_small_linear_that_is_sharded_on_its_own_is_an_error() -> None:
    model = peft_model("llama")
    small = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    small.__class__ = type("FSDPLinear", (nn.Linear,), {})  # what fully_shard(small) does to its class
    (finding,) = gr.check_model(model)
    assert "sharded on its own" in finding.reason


def test_torch_checkpointing_is_no_finding() -> None:
    model = peft_model("llama")
    enable_checkpointing(model)
    assert gr.check_model(model) == []
    assert checkpoint.__module__ == "torch.utils.checkpoint"


def test_an_open_view_is_a_warning_and_gone_after_its_block() -> None:
    model = routed_tower()
    with gr.ablate_quarantine(model):
        assert "ablated view" in found(model)["lower"]
    assert gr.check_model(model) == []


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")
def test_a_targeted_tied_head_is_a_warning() -> None:
    model = gr.attach(llama(tie_word_embeddings=True), r=2, target_modules=["q_proj", "lm_head"])
    assert "shared with the input embeddings" in found(model)["lm_head"]
    assert gr.check_model(gr.attach(llama(tie_word_embeddings=True), r=2, target_modules=["q_proj"])) == []


def test_plain_lora_in_place_of_a_quarantine_is_an_error() -> None:
    model = peft_model("llama")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.__class__ = LoraLinear  # PEFT's own class, as for a layer that another adapter made first
    assert any("plain LoRA" in str(finding) for finding in gr.check_model(model))


def test_the_summary_counts_each_block_once_and_the_rest_apart() -> None:
    model = routed_tower()
    summary = gr.parameter_summary(model)
    # r = 2 and r_quarantine = 3 on (5 -> 6) and (6 -> 4): r (d_in + d_out) each.
    assert (summary.layers, summary.deployed, summary.quarantine) == (2, 2 * (11 + 10), 3 * (11 + 10))
    assert summary.total == sum(p.numel() for p in model.parameters())
    assert not summary.trained_elsewhere
    assert repr(summary).startswith(
        "trainable params: 105 (deployed 42 + quarantine 63 in 2 layers) || all params: 169"
    )
    model.upper.lora_A.requires_grad_(False)
    model.lower.base_layer.bias.requires_grad_()
    summary = gr.parameter_summary(model)
    assert (summary.deployed, summary.trained_elsewhere) == (42 - 12, {"lower.base_layer.bias": 6})
    assert "6 elsewhere: lower.base_layer.bias" in repr(summary)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_summary_agrees_with_peft(name: str) -> None:
    model = peft_model(name, modules_to_save=["lm_head"] if name == "llama" else None)
    summary = gr.parameter_summary(model)
    trainable, total = model.get_nb_trainable_parameters()
    assert summary.deployed + summary.quarantine + sum(summary.trained_elsewhere.values()) == trainable
    assert summary.total == total


def test_a_model_without_routed_layers_has_no_summary() -> None:
    with pytest.raises(gr.GradRouteError, match="get_peft_model"):
        gr.parameter_summary(Tower())


def test_repr_of_a_routed_peft_layer_names_both_ranks_and_the_view() -> None:
    model = peft_model("llama", rank_pattern={"q_proj": 2})
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert re.search(r"RoutedLoraLinear\(\s*default: r=2, r_quarantine=4\n", repr(layer))
    with gr.ablate_quarantine(model):
        assert "view=ablated" in repr(layer)
    assert repr(gr.check_model(base_model("moe"))[0]).startswith("Finding(module='model.layers.0.mlp.experts'")


def test_the_base_model_has_one_identity_however_it_is_adapted() -> None:
    base = base_model("llama")
    identity = model_identity(base)
    assert identity != model_identity(base_model("llama", seed=1))
    for adapted in (
        gr.attach(base_model("llama"), r=2),
        peft_model("llama"),
        peft_model("llama", modules_to_save=["lm_head"]),
    ):
        assert model_identity(adapted) == identity
    model = peft_model("llama")
    model.add_adapter("other", config())
    assert model_identity(model) == identity


# What was found in use


class Router(nn.Linear):
    """As Llama 4's: a linear that returns scores and logits."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return logits.sigmoid(), logits


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Mixture(nn.Module):
    def __init__(self, router: type[nn.Linear]) -> None:
        super().__init__()
        self.router, self.up_proj = router(4, 4), nn.Linear(4, 4)


def test_a_linear_that_returns_more_than_one_tensor_is_refused_before_it_runs() -> None:
    assert "a router" in found(Mixture(Router))["router"]
    with pytest.raises(gr.errors.TargetError, match=r"`router`, a Router, .*Fix: .*target_modules=\['up_proj'\]"):
        gr.attach(Mixture(Router), r=2)
    with pytest.raises(gr.errors.TargetError, match="`router` is a Router.*Fix: exclude_modules"):
        get_peft_model(Mixture(Router), config(target_modules=["router", "up_proj"]))
    assert isinstance(gr.attach(Mixture(Scaled), r=2).router, gr.QuarantineLoRA)


def test_a_model_of_two_towers_is_walked() -> None:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(text_config={**tower, "vocab_size": 32}, vision_config={**tower, "image_size": 8, "patch_size": 4})
    )
    assert gr.check_model(model) == []
    assert gr.check_model(gr.attach(model, r=2)) == []


def fused_mlp(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """As of a fused-LoRA patch: reads the weights of the layers and calls none."""
    return self.down_proj.base_layer(self.up_proj.base_layer(x))


@pytest.mark.corner("a fused kernel replaced the `forward` of one object", "`check_model` names it")
@pytest.mark.parametrize(
    "make", [lambda: peft_model("llama"), lambda: gr.attach(llama(), r=2)], ids=["PEFT", "attached"]
)
def test_a_forward_that_was_replaced_on_one_object_is_named(make: Callable[[], nn.Module]) -> None:
    model = make()
    name, mlp = next((name, m) for name, m in model.named_modules() if name.endswith("layers.0.mlp"))
    mlp.forward = MethodType(fused_mlp, mlp)
    mlp.up_proj.forward = lambda x: x
    findings = {f.module: f for f in gr.check_model(model)}
    assert (findings[name].severity, findings[f"{name}.up_proj"].severity) == ("warning", "error")
    assert "`fused_mlp`" in findings[name].reason
    assert "3 of them" in findings[name].reason


def test_a_forward_that_wraps_the_models_own_is_no_finding() -> None:
    model = peft_model("llama")
    mixed = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward.__func__))
    model.forward = MethodType(mixed, model)  # what accelerate does for mixed precision
    add_hook_to_module(model.base_model.model, AlignDevicesHook())
    assert gr.check_model(model) == []


def test_attached_blocks_that_peft_would_not_load_are_a_warning() -> None:
    model = gr.attach(moe_with_dense_layers("qwen3_moe"), r=2)
    assert "export_deployed will refuse it" in found(model)[""]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert "" not in found(gr.attach(moe_with_dense_layers("qwen3_moe"), r=2, target_modules=targets))


def test_a_target_that_peft_refuses_is_warned_of_when_it_is_attached() -> None:
    base = MambaForCausalLM(MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=32))
    with pytest.warns(gr.GradRouteWarning, match="PEFT refuses to load an adapter on `backbone.*out_proj`.*Fix"):
        gr.attach(base, r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gr.attach(gr.detach(base), r=2, target_modules=["in_proj"])
