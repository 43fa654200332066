"""Small causal language models, pairs for them, gradient features by brute force, and directions made of numbers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import gradroute as gr
from gradroute.directions import Provenance
from support.models import randomize_blocks

# Under the hook beartype checks every argument, and draws from Python's generator which item of a list to look at.

VOCAB, D, R = 12, 6, 2
MODULES = ["q", "k", "v", "out"]

# Rollouts of 3 to 8 tokens, so that batches need padding.
PAIRS = [
    gr.ContrastivePair([1, 2, 3], [4, 5], [6, 7, 8]),
    gr.ContrastivePair([3, 9], [4, 10, 5, 2, 1], [6]),
    gr.ContrastivePair([2, 2, 8, 7], [5, 5, 4], [7, 6, 1, 3]),
    gr.ContrastivePair([11], [1, 4], [8, 8]),
]


class Mixer(nn.Module):
    """One attention layer in which q, k and v share their input; called with token ids alone, unlike Hugging Face."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in MODULES)
        self.head = nn.Linear(D, VOCAB)
        self.dropout = nn.Dropout(dropout)
        self.reentrant: bool | None = None

    def body(self, x: Tensor) -> Tensor:
        # No softmax: with one, the gradients of all keys add up to zero.
        attention = (self.q(x) @ self.k(x).mT / math.sqrt(D)).sigmoid().tril()
        x = x + self.dropout(attention @ self.v(x))
        return torch.tanh(self.out(x))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.reentrant is None:
            return self.head(self.body(x))
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


def routed_mixer(dtype: torch.dtype = torch.float64, seed: int = 0, dropout: float = 0.0) -> Mixer:
    """A mixer with non-zero rank 2 deployed and rank 3 quarantine blocks on all linears but the head."""
    torch.manual_seed(seed)
    model = Mixer(dropout).to(dtype)
    gr.attach(model, r=R, r_quarantine=3, lora_alpha=4.0, target_modules=MODULES)
    return randomize_blocks(model, seed)


def ids_only(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The `forward_fn` of a mixer; it is causal, so that padding on the right is not seen."""
    return model(input_ids)


def tiny_llama(seed: int = 0) -> nn.Module:
    """A randomly initialised Hugging Face model with non-zero blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    gr.attach(model, r=R, lora_alpha=4.0)
    return randomize_blocks(model, seed)


def extracted(seed: int = 0, **settings: object) -> gr.Directions:
    """Activation directions of a mixer whose quarantine is ablated."""
    model = routed_mixer(seed=seed)
    with gr.ablate_quarantine(model):
        return gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only, **settings)


def train_step(model: Mixer, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    """One optimizer step on random tokens."""
    ids = torch.randint(VOCAB, (4, 6), generator=torch.Generator().manual_seed(seed))
    cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_for(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    """AdamW over both blocks."""
    trained = [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]
    return torch.optim.AdamW([parameter for _, parameter in trained], lr=lr)


def completion_nll(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """Mean negative log-probability of one rollout's completion, token by token."""
    ids = [*prompt, *completion]
    logp = model(torch.tensor([ids]))[0].log_softmax(-1)
    positions = range(len(prompt), len(ids))
    return -sum((logp[t - 1, ids[t]] for t in positions), start=torch.tensor(0.0)) / len(completion)


@contextmanager
def explicit_gains(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Replace each layer's forward by its formula, with a diagonal gain of ones on the deployed bottleneck."""
    gains = {name: torch.ones(R, dtype=torch.float64, requires_grad=True) for name in names}

    def formula(layer: gr.QuarantineLoRA, gain: Tensor, x: Tensor) -> Tensor:
        deployed, quarantine = layer.deployed, layer.quarantine
        y = layer.base_layer(x) + deployed.scaling * ((x @ deployed.A.T * gain) @ deployed.B.T)
        return y + quarantine.scaling * (x @ quarantine.A.T @ quarantine.B.T)

    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        layer.forward = lambda x, layer=layer, gain=gains[name]: formula(layer, gain, x)
    try:
        yield gains
    finally:
        for layer in layers.values():
            del layer.forward


def gain_gradients(model: Mixer, loss_of_row: list) -> dict[str, Tensor]:
    """Per module (rows, r): the gradient of each row's own loss with respect to the gains; one backward per row."""
    with explicit_gains(model, MODULES) as gains:
        rows = [torch.autograd.grad(loss(), list(gains.values())) for loss in loss_of_row]
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(gains)}


MADE_OF_NUMBERS = Provenance(
    source="activation", feature="bottleneck", reduction="mean", estimator="mean_difference",
    pair_hash="0" * 64, model="1" * 64, view="ablated",
)  # fmt: skip


def scoring_directions(hack: list[float], clean: list[float]) -> gr.Directions:
    """Directions whose pair scores are the given numbers: one module, one feature, the row (1)."""
    features = {"m": torch.tensor(hack)[:, None]}, {"m": torch.tensor(clean)[:, None]}
    return gr.Directions({"m": torch.ones(1, 1)}, *features, MADE_OF_NUMBERS)


def random_directions(k: int = 1, seed: int = 0, widths: tuple[int, ...] = (4, 6), pairs: int = 3) -> gr.Directions:
    """k orthonormal float64 rows per module, modules m0, m1, ..., and pair features drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64)

    names = {f"m{i}": width for i, width in enumerate(widths)}
    rows = {name: torch.linalg.qr(normal(d, k)).Q.T.contiguous() for name, d in names.items()}
    hack, clean = ({name: normal(pairs, d) for name, d in names.items()} for _ in range(2))
    return gr.Directions(rows, hack, clean, MADE_OF_NUMBERS)
