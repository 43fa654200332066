"""The table of PEFT cases (model x config x dtype), and what tests compare of them.

A `Case` makes routed models with non-zero blocks; `views` returns what such a model computes with both blocks, with
the quarantine ablated, and without adapters, and asserts first that these differ.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import gradroute as gr
from support.models import randomize_blocks
from support.tiny_models import base_model, config, token_ids

X = token_ids()
unnamed_base = pytest.mark.filterwarnings("ignore:Could not find a config file in  - will assume:UserWarning")
"""peft 0.20 says this of a base model that was made from its config and so has no name."""


@dataclass(frozen=True)
class Case:
    """One row of the table; `options` go to the config, on top of ranks 3 and 4 and scalings 2 and 1.5."""

    architecture: str
    dtype: torch.dtype = torch.float32
    autocast_adapter_dtype: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def base(self, seed: int = 0) -> nn.Module:
        model = base_model(self.architecture, self.dtype, seed)
        if self.architecture == "moe":
            # The fused kernel wants rows of 16 bytes, which experts this narrow do not have in bfloat16.
            model.set_experts_implementation("eager")
        return model

    def config(self) -> Any:
        needed: dict[str, Any] = {"gpt2": {"fan_in_fan_out": True}, "moe": {"target_modules": ATTENTION}}.get(
            self.architecture, {}
        )
        return config(**{**needed, **self.options})

    def fresh(self) -> PeftModel:
        """As `get_peft_model` makes it: B = 0."""
        return get_peft_model(self.base(), self.config(), autocast_adapter_dtype=self.autocast_adapter_dtype).eval()

    def model(self, seed: int = 0) -> PeftModel:
        """With non-zero blocks; what PEFT trains beyond them differs from the base model, too."""
        model = self.fresh()
        randomize_blocks(model, seed, std=0.2)
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.data += (0.2 * noise).to(parameter.dtype)
        return model

    def views(self) -> "Views":
        """What `model()` computes; worked out once."""
        if repr(self) not in _VIEWS:
            _VIEWS[repr(self)] = views(self.model())
        return _VIEWS[repr(self)]

    @property
    def exact_scaling(self) -> bool:
        """Whether s_d is a power of two, so that scaling B or scaling B A x rounds alike."""
        return not {"alpha_pattern", "rank_pattern", "use_rslora"} & self.options.keys()

    def __str__(self) -> str:
        dtype = {torch.float32: "f32", torch.bfloat16: "bf16"}[self.dtype]
        named = [
            f"{k}={v}" if isinstance(v, int | float | str | None) else k
            for k, v in self.options.items()
            if k != "target_modules"
        ]
        return "-".join([self.architecture, dtype, *(["upcast"] if self.autocast_adapter_dtype else []), *named])


_VIEWS: dict[str, "Views"] = {}

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_UPPER_MLP = r"model\.layers\.1\.mlp\.(gate|up|down)_proj"
_RANKS = {"q_proj": 5, r"layers\.1\.self_attn\.o_proj": 2}
_ALPHAS = {"v_proj": 15, r"layers\.0\.mlp\.down_proj": 3}

CASES = [
    Case("llama"),
    Case("qwen3"),
    Case("gpt2"),
    Case("moe"),
    Case("llama", options={"r_quarantine": None, "rank_pattern": _RANKS}),
    Case("llama", options={"r_quarantine": 1, "alpha_pattern": _ALPHAS}),
    Case("qwen3", options={"use_rslora": True, "rank_pattern": _RANKS, "alpha_pattern": _ALPHAS}),
    Case("llama", options={"use_rslora": True, "r_quarantine": None, "lora_dropout": 0.1}),
    Case("llama", options={"modules_to_save": ["lm_head"]}),
    Case("llama", options={"stop_gradient": "branch", "target_modules": _UPPER_MLP}),
    Case("gpt2", options={"rank_pattern": {"c_attn": 5}, "alpha_pattern": {"c_fc": 15}, "lora_dropout": 0.1}),
    Case("gpt2", options={"modules_to_save": ["ln_f"], "r_quarantine": None}),
    Case("moe", options={"use_rslora": True, "modules_to_save": ["lm_head"]}),
    *(Case(name, torch.bfloat16) for name in ("llama", "gpt2", "moe")),
    Case("llama", torch.bfloat16, options={"rank_pattern": _RANKS, "use_rslora": True, "lora_dropout": 0.1}),
    Case("gpt2", torch.bfloat16, autocast_adapter_dtype=True),
    Case("llama", torch.bfloat16, True, options={"alpha_pattern": _ALPHAS, "modules_to_save": ["lm_head"]}),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_plain_case = pytest.mark.parametrize("case", [case for case in CASES if not case.options], ids=str)
"""Every architecture and dtype, without options: for what no option bears on."""


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X).logits


class Views(NamedTuple):
    on: Tensor
    ablated: Tensor
    base: Tensor


def views(model: nn.Module) -> Views:
    on = logits(model)
    with gr.ablate_quarantine(model):
        ablated = logits(model)
    with gr.disable_adapters(model):
        base = logits(model)
    seen = Views(on, ablated, base)
    assert far(on, ablated)
    assert far(on, base)
    assert far(ablated, base)
    return seen


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of a - b, as a share of that of a."""
    a, b = a.double(), b.double()
    return ((a - b).square().mean().sqrt() / a.square().mean().sqrt()).item()


def far(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs differ by more than rounding could explain in any case here."""
    return distance(a, b) > 0.5


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding of their dtype, which the norms of these tiny models amplify."""
    assert actual.dtype == expected.dtype
    apart = distance(actual, expected)
    assert apart < {torch.float64: 1e-12, torch.float32: 1e-5}.get(expected.dtype, 0.1)


def assert_views_equal(model: nn.Module, expected: Views) -> None:
    for actual, wanted in zip(views(model), expected, strict=True):
        assert torch.equal(actual, wanted)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)] == []


def trainable(model: nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def both_blocks_train(model: nn.Module) -> bool:
    return all(p.requires_grad for _, p in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)])


def stock_from_pretrained(base: nn.Module, path: Path, **arguments: Any) -> PeftModel:
    """What somebody without gradroute gets from one of its checkpoints; PEFT says that it ignores our settings."""
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .*'r_quarantine'.* are ignored"):
        return PeftModel.from_pretrained(base, path, **arguments)
