"""The slow reference of the exactness matrix, and the cases that are compared with it.

    y    = base(x) + s_d B_d A_d x + m s_q B_q A_q x           in plain autograd, in float64, s = lora_alpha / r
    dA_d = sum over rows of g_d * (the row's own, ungated dA_d), and so on: each row runs alone, in a batch of one

Nothing of the library computes here; only the parameters of a routed layer are read, by name. For gates per token every
token gets copies of A and B as leaves of its own, with the same values. An ordinary backward then gives each token its
own parameter gradient, which is weighted afterwards as that of a row is: no rule of differentiation is replaced.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch
from support.models import randomize_blocks
from support.tiny_models import VOCAB, base_model, peft_model
from torch import Tensor, nn

import gradroute as gr
from gradroute._protocol import RoutedLayer

ARCHITECTURES = ("llama", "qwen3", "gpt2", "moe")
LORA_ALPHA = 6.0  # of tiny_models.config
ROWS, SEQ = 3, 6
BLOCKS = ("deployed", "quarantine")

Gradients = dict[str, Tensor]


class Rows(Protocol):
    """Inputs that can be taken apart into rows."""

    rows: int
    tokens: int

    def row(self, i: int) -> Any: ...

    def real(self, i: int) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """Token ids (batch, seq) and one weight per row: loss = sum of weight * log-probability of the row's tokens."""

    ids: Tensor
    weights: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.ids.shape[0]

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    def real(self, i: int) -> Tensor:
        """True at the tokens of row i that are not padding."""
        mask = torch.ones_like(self.ids) if self.attention_mask is None else self.attention_mask
        return mask[i].bool()

    def row(self, i: int) -> "Batch":
        """One row alone, without its padding."""
        return Batch(self.ids[i : i + 1, self.real(i)], self.weights[i : i + 1])


def batch(seed: int = 0, rows: int = ROWS, seq: int = SEQ) -> Batch:
    ids = torch.randint(3, VOCAB, (rows, seq), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, torch.linspace(1.3, -0.2, rows))


def left_padded_batch() -> Batch:
    """Rows of 6, 4 and 5 tokens."""
    full = batch()
    real = torch.arange(SEQ)[None] >= torch.tensor([0, 2, 1])[:, None]
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    return replace(full, ids=full.ids * real, attention_mask=real.long(), position_ids=positions)


def rows_mask() -> gr.RouteMask:
    return gr.RouteMask.zones(["keep", "absorb", "route"])


def weighted_rows_mask() -> gr.RouteMask:
    return gr.RouteMask.weights(m=[0.7, 0.0, 1.3], g_d=[0.25, -1.5, 0.0], g_q=[2.0, 0.5, -0.75])


def tokens_mask(rows: int = ROWS, seq: int = SEQ) -> gr.RouteMask:
    return gr.RouteMask.zones(torch.randint(0, 3, (rows, seq), generator=torch.Generator().manual_seed(1)))


def weighted_tokens_mask(rows: int = ROWS, seq: int = SEQ) -> gr.RouteMask:
    m, g_d, g_q = torch.randn(3, rows, seq, generator=torch.Generator().manual_seed(2))
    return gr.RouteMask.weights(m=m, g_d=torch.where(g_d < -0.5, 0.0, g_d), g_q=g_q)


MASKS: dict[str, Callable[[], gr.RouteMask]] = {
    "zones per row": rows_mask,
    "weights per row": weighted_rows_mask,
    "zones per token": tokens_mask,
    "weights per token": weighted_tokens_mask,
}


def routed_model(
    architecture: str, adapters: str, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any
) -> nn.Module:
    """One of the tiny models with both blocks, non-zero: through PEFT or through `attach`."""
    if adapters == "PEFT":
        return looped_experts(peft_model(architecture, dtype, seed, **options))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if architecture == "moe" else "all-linear"
    model = base_model(architecture, dtype, seed)
    gr.attach(model, **{"r": 3, "r_quarantine": 4, "lora_alpha": LORA_ALPHA, "target_modules": targets, **options})
    return looped_experts(randomize_blocks(model, seed, std=0.2))


def looped_experts(model: nn.Module) -> nn.Module:
    """Run experts one by one: the grouped matrix product has no float64, and wants rows of 16 bytes."""
    if model.config.model_type == "qwen3_moe":
        model.set_experts_implementation("eager")
    return model


def weighted_logps(logits: Tensor, batch: Batch) -> Tensor:
    """Sum over rows of weight * log-probability of the row's real tokens, each given those before it."""
    logps = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    token_logps = logps.gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    real = torch.stack([batch.real(i) for i in range(batch.rows)])
    return torch.where(real[:, :-1], token_logps, 0.0).sum(1) @ batch.weights.to(token_logps)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    keywords = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    return weighted_logps(model(input_ids=batch.ids, use_cache=False, **keywords).logits, batch)


Loss = Callable[[nn.Module, Any], Tensor]


class PlainLayer(nn.Module):
    """y = base(x) + s_d B_d A_d x + m s_q B_q A_q x for one row x (1, tokens, d_in)."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = layer.base_layer
        self.values = {n: p.detach().to(dtype) for n, p in layer.named_parameters() if n.startswith("lora_")}

    def begin_row(self, m: Tensor, per_token: bool) -> None:
        """Fresh leaves for a row with these m; `per_token` gives them an axis of tokens in front, of equal copies."""
        self.m, self.token_axis = m, "t" if per_token else ""
        copies = (len(m),) if per_token else ()
        self.leaves = {n: v.expand(*copies, *v.shape).clone().requires_grad_() for n, v in self.values.items()}

    def forward(self, x: Tensor) -> Tensor:
        deployed, quarantine = (self._branch(x, block) for block in BLOCKS)
        return self.base(x) + deployed + self.m[:, None].to(quarantine) * quarantine

    def _branch(self, x: Tensor, block: str) -> Tensor:
        A, B = (leaf for name, leaf in self.leaves.items() if block_of(name) == block)
        bottleneck = torch.einsum(f"bti,{self.token_axis}ri->btr", x, A)
        return LORA_ALPHA / A.shape[-2] * torch.einsum(f"btr,{self.token_axis}or->bto", bottleneck, B)


def block_of(name: str) -> str:
    """The block that a parameter belongs to."""
    return "quarantine" if "quarantine" in name else "deployed"


class TwoPass:
    """A copy of `model` in `dtype` with a plain layer in the place of each routed one."""

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> None:
        self.model = copy.deepcopy(model).to(dtype).requires_grad_(False)
        routed = {name: m for name, m in self.model.named_modules() if isinstance(m, RoutedLayer)}
        self.layers = {name: PlainLayer(layer, dtype) for name, layer in routed.items()}
        for name, layer in self.layers.items():
            if name == "":
                self.model = layer
            else:
                parent, _, child = name.rpartition(".")
                setattr(self.model.get_submodule(parent), child, layer)
        assert self.layers

    def gradients(
        self, batch: Rows, mask: gr.RouteMask | None, loss: Loss = loss_of, per_token: bool | None = None
    ) -> Gradients:
        """Routed gradients of `loss(model, batch)` for both blocks, by name; without a mask, unrouted ones."""
        mask = gr.RouteMask.zones(["absorb"] * batch.rows) if mask is None else mask
        per_token = mask.m.ndim == 2 if per_token is None else per_token
        total: Gradients = {}
        for i in range(batch.rows):
            m, g_d, g_q = (
                gate[i].double().expand(batch.tokens)[batch.real(i)] for gate in (mask.m, mask.g_d, mask.g_q)
            )
            for layer in self.layers.values():
                layer.begin_row(m, per_token)
            loss(self.model, batch.row(i)).backward()
            for layer_name, layer in self.layers.items():
                for name, leaf in layer.leaves.items():
                    assert leaf.grad is not None
                    gradient, gate = leaf.grad.double(), g_q if block_of(name) == "quarantine" else g_d
                    weighted = torch.einsum("t,tab->ab", gate, gradient) if per_token else gate[0] * gradient
                    full_name = f"{layer_name}.{name}".removeprefix(".")
                    total[full_name] = total.get(full_name, torch.zeros_like(weighted)) + weighted
        return total


@cache
def reference(architecture: str, adapters: str, dtype: torch.dtype = torch.float64) -> TwoPass:
    """The two passes of `routed_model(architecture, adapters, dtype)`, in float64 whatever the model's type."""
    return TwoPass(routed_model(architecture, adapters, dtype))


def expected_gradients(two_pass: TwoPass, batch: Rows, mask: gr.RouteMask, loss: Loss = loss_of) -> Gradients:
    """The reference's gradients, after a check that a model which ignores the mask would fail the comparison."""
    expected = two_pass.gradients(batch, mask, loss)
    assert relative_error(two_pass.gradients(batch, None, loss), expected) > 0.3
    return expected


def gradients(model: nn.Module) -> Gradients:
    """The gradients of both blocks in float64; a parameter without one is an error."""
    found = {}
    for name, parameter in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]:
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad.double()
    return found


def routed_gradients(model: nn.Module, batch: Rows, mask: gr.RouteMask, loss: Loss = loss_of) -> Gradients:
    """The gradients after a forward and backward inside `route`."""
    with gr.route(model, mask):
        loss(model, batch).backward()
    return gradients(model)


def added(*parts: Gradients, scale: float = 1.0) -> Gradients:
    """The sum of several steps' gradients, times `scale`."""
    return {name: scale * sum(part[name] for part in parts) for name in parts[0]}


def relative_error(found: Gradients, expected: Gradients) -> float:
    """The worst |found - expected| / |expected| over the blocks of all layers, A and B of a block taken together."""
    return _worst_error(found, expected, lambda name: name.replace("lora_A", "lora_*").replace("lora_B", "lora_*"))


def relative_error_of_blocks(found: Gradients, expected: Gradients) -> float:
    """The worse |found - expected| / |expected| of the two blocks, all layers taken together."""
    return _worst_error(found, expected, block_of)


def _worst_error(found: Gradients, expected: Gradients, part_of: Callable[[str], str]) -> float:
    assert found.keys() == expected.keys()
    parts: dict[str, list[str]] = {}
    for name in found:
        parts.setdefault(part_of(name), []).append(name)
    worst = 0.0
    for names in parts.values():
        difference = _norm(found[name] - expected[name] for name in names)
        size = _norm(expected[name] for name in names)
        if difference > 0:
            worst = max(worst, difference / size if size > 0 else float("inf"))
    return worst


def block_norms(gradients: Gradients) -> tuple[float, float]:
    """The norms of the deployed and of the quarantine gradient, over all layers."""
    deployed, quarantine = (_norm(g for name, g in gradients.items() if block_of(name) == block) for block in BLOCKS)
    return deployed, quarantine


def _norm(tensors: Any) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


@dataclass(frozen=True)
class LayerBatch:
    """The input (batch, seq, d_in) of one layer and the gradient (batch, seq, d_out) that comes to its output."""

    x: Tensor
    upstream: Tensor

    @property
    def rows(self) -> int:
        return self.x.shape[0]

    @property
    def tokens(self) -> int:
        return self.x.shape[1]

    def real(self, i: int) -> Tensor:
        return torch.ones(self.tokens, dtype=torch.bool)

    def row(self, i: int) -> "LayerBatch":
        return LayerBatch(self.x[i : i + 1], self.upstream[i : i + 1])


def routed_layer(architecture: str, adapters: str, dtype: torch.dtype = torch.float64) -> Any:
    """The first routed layer of a tiny model."""
    return next(m for m in routed_model(architecture, adapters, dtype).modules() if isinstance(m, RoutedLayer))


def layer_batch(layer: nn.Module, seed: int = 0, rows: int = ROWS, seq: int = SEQ) -> LayerBatch:
    W, generator = layer.base_weight(), torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(rows, seq, d, generator=generator, dtype=torch.float64).to(W) for d in W.T.shape)
    return LayerBatch(x, upstream)


def layer_loss(layer: nn.Module, batch: LayerBatch) -> Tensor:
    return (layer(batch.x) * batch.upstream).sum()
