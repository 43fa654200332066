"""Bad checkpoint files: the error names what is wrong, and the model is as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import randomize_blocks
from support.peft_cases import (
    Case,
    assert_same_tensors,
    assert_views_equal,
    logits,
    stock_from_pretrained,
    tensors_of,
    unnamed_base,
)
from support.tiny_models import base_model
from torch import Tensor, nn

import gradroute as gr

pytestmark = [pytest.mark.touches_peft, unnamed_base]
LLAMA = Case("llama")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("good")
    LLAMA.model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def found_in(model: nn.Module) -> dict[str, Any]:
    """Everything about a model, but the values of its tensors, that a load could change."""
    return {
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
        "random": torch.get_rng_state().tolist(),
    }


def assert_refused(
    model: nn.Module, folder: Path, match: str, error: type[Exception] = gr.errors.FileFormatError
) -> None:
    """The load raises `error` with `match`, and the model, some flags of which are unusual, is as it was."""
    model.get_parameter(next(name for name, _ in model.named_parameters())).requires_grad_(False)
    next(module for name, module in model.named_modules() if name).train()
    before, tensors = found_in(model), tensors_of(model)
    with pytest.raises(error, match=match):
        gr.load_quarantined(model, folder)
    after = found_in(model)
    assert [key for key in before if after[key] != before[key]] == []
    assert_same_tensors(tensors_of(model), tensors)


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def change_config(**fields: Any) -> Callable[[Path], None]:
    """Set fields; None removes one."""

    def spoil(folder: Path) -> None:
        config = {**json.loads((folder / CONFIG).read_text()), **fields}
        (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return spoil


def keep_bytes(name: str, count: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:count]) and None


def scaled(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[3].fill_(value)


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights truncated": (keep_bytes(WEIGHTS, 5000), rf"{WEIGHTS}` should be a safetensors file"),
    "weights truncated in the header": (keep_bytes(WEIGHTS, 100), rf"{WEIGHTS}` should be a safetensors file"),
    "weights empty": (keep_bytes(WEIGHTS, 0), rf"{WEIGHTS}` should be a safetensors file"),
    "weights missing": (lambda folder: (folder / WEIGHTS).unlink(), rf"{WEIGHTS}`"),
    "weights are a pickle": (lambda f: torch.save({"a": torch.ones(1)}, f / WEIGHTS), rf"{WEIGHTS}` should be a safe"),
    "folder missing": (shutil.rmtree, "adapter_config.json`"),
    "tensor missing": (
        change_tensors(lambda t: t.pop(f"{QUERY}.lora_B_quarantine.weight")),
        r"`model.layers.0.self_attn.q_proj` should have .*lora_B_quarantine.*Found",
    ),
    "module missing": (
        change_tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith(QUERY)]),
        r"missing.*self_attn.q_proj",
    ),
    "quarantine missing": (
        change_tensors(lambda t: [t.pop(name) for name in list(t) if "quarantine" in name]),
        "should hold a quarantine block. Found none",
    ),
    "tensor added": (change_tensors(lambda t: t.update({f"{QUERY}.extra": torch.ones(2)})), r"unknown.*extra"),
    "module added": (
        change_tensors(lambda t: t.update({n.replace("layers.0", "layers.7"): v.clone() for n, v in t.items()})),
        r"`model.layers.7.*Found none in this LlamaForCausalLM",
    ),
    "shape of A": (
        change_tensors(lambda t: t.update({f"{QUERY}.lora_A.weight": torch.ones(3, 15)})),
        r"`model.layers.0.self_attn.q_proj` should be A \(r, 16\).*\(3, 15\)",
    ),
    "shape of B": (
        change_tensors(lambda t: t.update({f"{QUERY}.lora_B_quarantine.weight": torch.ones(16, 5)})),
        r"q_proj.*lora_B_quarantine \(16, 5\)",
    ),
    "rank other than the config's": (
        change_tensors(
            lambda t: t.update(
                {
                    f"{QUERY}.lora_A_quarantine.weight": torch.ones(5, 16),
                    f"{QUERY}.lora_B_quarantine.weight": torch.ones(16, 5),
                }
            )
        ),
        r"q_proj.*(5|4)",
    ),
    "nan": (change_tensors(scaled(f"{QUERY}.lora_A.weight", float("nan"))), r"q_proj.lora_A.weight` should be finite"),
    "inf": (
        change_tensors(scaled(f"{QUERY}.lora_B_quarantine.weight", float("inf"))),
        r"q_proj.lora_B_quarantine.weight` should be finite",
    ),
    "integers": (
        change_tensors(lambda t: t.update({f"{QUERY}.lora_A.weight": torch.ones(3, 16, dtype=torch.int64)})),
        r"q_proj.lora_A.*float",
    ),
    "config missing": (lambda folder: (folder / CONFIG).unlink(), rf"{CONFIG}` should be the config .* in JSON"),
    "config truncated": (keep_bytes(CONFIG, 300), rf"{CONFIG}` should be the config .* in JSON"),
    "config empty": (keep_bytes(CONFIG, 0), rf"{CONFIG}` should be the config .* in JSON"),
    "config in bytes": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), rf"{CONFIG}` should be the config"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[1, 2]"), rf"{CONFIG}`"),
    "config is a number": (lambda f: (f / CONFIG).write_text("3"), rf"{CONFIG}`"),
    "config of plain LoRA": (
        change_config(quarantine_format=None, r_quarantine=None, base_fingerprint=None, stop_gradient=None),
        rf"{CONFIG}`: .*should hold a quarantine. Found plain LORA",
    ),
    "config of a later format": (
        change_config(quarantine_format=2),
        "`quarantine_format` .*should be 1. Found 2.*Fix",
    ),
    "config of no format": (change_config(quarantine_format="x"), "`quarantine_format` .*should be 1. Found 'x'"),
    "option of a later peft": (
        change_config(use_hyperlora=True, gamma=0.5),
        r"\['gamma', 'use_hyperlora'\], which this peft does not know",
    ),
    "option that is refused": (change_config(use_dora=True), rf"{CONFIG}`.*`use_dora=True` cannot be used"),
    "rank is no number": (change_config(r="three"), rf"{CONFIG}`|r"),
    "rank of the quarantine is zero": (change_config(r_quarantine=0), rf"{CONFIG}`.*`r_quarantine`"),
    "type of another method": (change_config(peft_type="IA3"), rf"{CONFIG}`.*IA3"),
    "targets of another model": (change_config(target_modules=["c_attn"]), "c_attn|q_proj"),
    "fewer targets": (change_config(target_modules=["q_proj"]), r"unknown"),
    "fingerprint is no mapping": (change_config(base_fingerprint=[1]), "base_fingerprint"),
    "fingerprint without values": (
        change_config(base_fingerprint={"model.layers.0.self_attn.q_proj": {"dtype": "float32"}}),
        "base_fingerprint|fingerprint",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_bad_file_is_named_and_the_model_left_as_it_was(what: str, folder: Path) -> None:
    spoil, match = SPOILT[what]
    spoil(folder)
    assert_refused(LLAMA.base(), folder, match)


def test_a_good_load_after_a_bad_one_works(good: Path, folder: Path) -> None:
    base = LLAMA.base()
    for spoil in (SPOILT["tensor added"][0], SPOILT["weights truncated"][0]):
        spoil(folder)
        with pytest.raises(gr.errors.FileFormatError):
            gr.load_quarantined(base, folder)
    assert_views_equal(gr.load_quarantined(base, good).eval(), LLAMA.views())


def test_a_later_option_that_is_switched_off_is_no_obstacle(folder: Path) -> None:
    change_config(use_hyperlora=False, hyper_config=[])(folder)
    assert_views_equal(gr.load_quarantined(LLAMA.base(), folder).eval(), LLAMA.views())


# Another model than the one it was trained on


def test_other_weights_of_the_same_shapes_are_refused(good: Path) -> None:
    assert_refused(LLAMA.base(seed=1), good, "base model that it was trained on. Found another `.*`.*Fix")


def test_one_other_layer_is_enough(good: Path) -> None:
    base = LLAMA.base()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight.add_(0.01)
    assert_refused(base, good, "Found another `model.layers.1.mlp.up_proj`")


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "moe"])
def test_another_architecture_is_refused(architecture: str, good: Path) -> None:
    assert_refused(base_model(architecture, seed=1), good, "Found|cannot be loaded")


def test_another_module_is_refused(good: Path) -> None:
    assert_refused(nn.Sequential(nn.Linear(4, 4)), good, "made for a model with a module `model.layers.0.*Sequential")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_same_base_in_another_dtype_is_accepted_and_another_base_is_not(dtype: torch.dtype, good: Path) -> None:
    loaded = gr.load_quarantined(LLAMA.base().to(dtype), good).eval()
    saved = load_file(good / WEIGHTS)
    for name, tensor in tensors_of(loaded).items():
        if ".lora_" in name:
            torch.testing.assert_close(tensor.float(), saved[name.replace(".default", "")], rtol=0.01, atol=1e-3)
    with torch.no_grad():
        logits(loaded)
    assert_refused(LLAMA.base(seed=1).to(dtype), good, "base model that it was trained on")


def test_a_checkpoint_of_bf16_loads_onto_float32_of_the_same_base(tmp_path: Path) -> None:
    Case("llama", torch.bfloat16).model().save_pretrained(tmp_path)
    gr.load_quarantined(LLAMA.base(), tmp_path)
    assert_refused(LLAMA.base(seed=1), tmp_path, "base model that it was trained on")


# Models that have adapters, and checkpoints of stock PEFT


def test_a_model_with_adapters_is_refused(good: Path) -> None:
    for model in (LLAMA.model(), get_peft_model(LLAMA.base(), LoraConfig(target_modules=["q_proj"]))):
        assert_refused(model, good, r"should be a base model. Found adapters.*Fix", gr.errors.TargetError)
    assert_refused(gr.attach(LLAMA.base(), r=2), good, "should be a base model", gr.errors.TargetError)


def test_a_plain_lora_checkpoint_is_refused_with_the_fix(tmp_path: Path) -> None:
    get_peft_model(LLAMA.base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert_refused(LLAMA.base(), tmp_path, "should hold a quarantine. Found plain LORA.*Fix: load it with peft.PeftMod")


def test_an_export_is_a_plain_lora_checkpoint(tmp_path: Path) -> None:
    gr.export_full(LLAMA.model(), tmp_path)
    assert_refused(LLAMA.base(), tmp_path, "should hold a quarantine")


def test_a_pickled_checkpoint_is_refused(tmp_path: Path) -> None:
    LLAMA.model().save_pretrained(tmp_path, safe_serialization=False)
    assert_refused(LLAMA.base(), tmp_path, rf"{WEIGHTS}` should be a safetensors file")


def test_from_pretrained_with_our_config_refuses_another_base(good: Path) -> None:
    config = gr.QuarantineLoraConfig.from_pretrained(good)
    with pytest.raises(gr.errors.FileFormatError, match="base model that it was trained on"):
        PeftModel.from_pretrained(LLAMA.base(seed=1), good, config=config)


def test_stock_peft_is_no_worse_off_for_our_settings(good: Path) -> None:
    assert torch.equal(logits(stock_from_pretrained(LLAMA.base(), good)), LLAMA.views().ablated)


# What a load leaves behind


def test_a_load_draws_no_random_numbers_and_freezes_the_base(good: Path) -> None:
    base = LLAMA.base()
    state = torch.get_rng_state()
    loaded = gr.load_quarantined(base, good)
    assert torch.equal(torch.get_rng_state(), state)
    blocks = {name for name, _ in [*gr.deployed_parameters(loaded), *gr.quarantine_parameters(loaded)]}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == blocks
    assert loaded.get_base_model() is base


def test_a_base_that_was_changed_is_saved_with_its_new_fingerprint(good: Path, tmp_path: Path) -> None:
    """What was loaded onto a base in bf16 and saved is a checkpoint of that base, and still refuses others."""
    loaded = gr.load_quarantined(LLAMA.base().bfloat16(), good)
    loaded.save_pretrained(tmp_path)
    gr.load_quarantined(LLAMA.base().bfloat16(), tmp_path)
    assert_refused(LLAMA.base(seed=1).bfloat16(), tmp_path, "base model that it was trained on")


def test_the_fingerprint_names_every_layer_with_a_few_of_its_values(good: Path) -> None:
    fingerprint = json.loads((good / CONFIG).read_text())["base_fingerprint"]
    layers = {name for name, module in LLAMA.base().named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    assert fingerprint.keys() == layers
    for name, entry in fingerprint.items():
        weight = LLAMA.base().get_submodule(name).weight.detach()
        assert entry["dtype"] == "float32"
        assert entry["values"][0] == weight.view(-1)[0].item()
        assert entry["values"][-1] == weight.view(-1)[-1].item()
        assert 2 <= len(entry["values"]) <= 8


def test_a_name_for_the_adapter_can_be_chosen(good: Path) -> None:
    loaded = gr.load_quarantined(LLAMA.base(), good, adapter_name="policy").eval()
    assert loaded.active_adapter == "policy"
    assert_views_equal(loaded, LLAMA.views())
    randomize_blocks(loaded, seed=1)
    assert not torch.equal(logits(loaded), LLAMA.views().on)
