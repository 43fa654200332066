"""8-bit and 4-bit base models, loaded as users load them: routed, exact, mergeable and bitwise unmergeable."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.models import gradients, randomize_blocks
from support.tiny_models import config, llama, token_ids
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import gradroute as gr

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.touches_peft,
    pytest.mark.filterwarnings("ignore:.*(8-bit|4-bit) linear may get different generations:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*inputs will be cast from torch.float32 to float16:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
BITS = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}
ZONES = ["keep", "absorb", "route"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    # The packed 4-bit kernel for CPUs takes widths that are multiples of its blocks.
    llama(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    return folder


@pytest.fixture(params=BITS)
def base(request: pytest.FixtureRequest, saved: Path) -> nn.Module:
    quantised = BitsAndBytesConfig(**BITS[request.param])
    return AutoModelForCausalLM.from_pretrained(saved, quantization_config=quantised, dtype=torch.float32).eval()


@pytest.fixture
def model(base: nn.Module) -> nn.Module:
    return randomize_blocks(get_peft_model(base, config()), std=0.2).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def test_both_blocks_are_there_and_the_start_is_the_base_bitwise(base: nn.Module) -> None:
    before = logits(base)
    model = get_peft_model(base, config()).eval()
    names = {type(layer).__name__ for layer in gr._protocol.routed_layers(model).values()}
    assert names <= {"RoutedLinear8bitLt", "RoutedLinear4bit"}
    assert torch.equal(logits(model), before)


def test_views_differ_and_disabled_is_the_base(model: nn.Module) -> None:
    on = logits(model)
    with gr.ablate_quarantine(model):
        ablated = logits(model)
    with gr.disable_adapters(model):
        off = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), off)
    assert not torch.allclose(on, ablated, atol=1e-2)
    assert not torch.allclose(ablated, off, atol=1e-2)


def routed(model: nn.Module, zones: list[str], rows: slice = slice(None)) -> dict[str, Tensor]:
    model.zero_grad()
    with gr.route(model, gr.RouteMask.zones(zones)[rows]):
        model(token_ids()[rows]).logits.float().pow(2).sum().backward()
    return gradients(model)


def test_a_mixed_batch_is_the_sum_of_its_rows(model: nn.Module, request: pytest.FixtureRequest) -> None:
    mixed = routed(model, ZONES)
    assert any(not torch.allclose(mixed[name], g) for name, g in routed(model, ["absorb"] * 3).items())
    rows = [routed(model, ZONES, slice(i, i + 1)) for i in range(3)]
    # 8 bit rounds each activation by a scale of its token, in float16.
    rtol = 1e-2 if "8bit" in request.node.name else 1e-5
    for name, gradient in mixed.items():
        alone = sum(row[name] for row in rows)
        assert torch.linalg.norm(gradient - alone) <= rtol * torch.linalg.norm(alone)


def test_routed_rows_leave_the_deployed_block_alone_and_kept_rows_the_quarantine(model: nn.Module) -> None:
    deployed = {name for name, _ in gr.deployed_parameters(model)}
    for zone, untouched in (("route", True), ("keep", False)):
        for name, gradient in routed(model, [zone] * 3).items():
            assert gradient.any() != ((name in deployed) == untouched)


def test_unmerge_restores_codes_and_scales_bitwise(model: nn.Module) -> None:
    model.train()  # in eval mode bitsandbytes repacks 4-bit weights for the CPU, which rounds their scales
    on, before = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(3):
        model.merge_adapter()
        merged = logits(model)
        model.unmerge_adapter()
    assert not torch.equal(merged, on)
    assert torch.equal(logits(model), on)
    after: dict[str, Any] = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_merging_after_a_forward_on_the_cpu_shows_the_same_policy(model: nn.Module) -> None:
    on = logits(model)
    with gr.disable_adapters(model):
        off = logits(model)
    model.merge_adapter()
    # Quantised again, the sum of base and blocks is rounded; plain PEFT is off by more than the blocks do, with 4 bit.
    assert torch.linalg.norm(logits(model) - on) < 0.6 * torch.linalg.norm(on - off)


def test_oriented_starts_read_the_dequantised_weight(base: nn.Module) -> None:
    before = logits(base)
    model = get_peft_model(base, config()).eval()
    old = [p.clone() for _, p in gr.deployed_parameters(model)]
    gr.adapters.init.pissa_(model)
    assert any(not torch.equal(p, was) for (_, p), was in zip(gr.deployed_parameters(model), old, strict=True))
    assert torch.equal(logits(model), before)


def test_exports_carry_both_blocks_without_the_quantised_base(model: nn.Module, tmp_path: Path) -> None:
    gr.export_deployed(model, tmp_path / "deployed")
    gr.export_full(model, tmp_path / "full")
    sizes = {kind: (tmp_path / kind / "adapter_model.safetensors").stat().st_size for kind in ("deployed", "full")}
    assert sizes["deployed"] < sizes["full"]
