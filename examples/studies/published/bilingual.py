"""Two synthetic languages, a tiny Llama, and its training with one language routed into the quarantine.

    labelled forget rows: route      labelled retain rows: keep      unlabelled rows: absorb    (`gr.schemes.sgtm_mask`)

Weights are random and frozen; what is learnt is in the blocks, which sit on every linear, the head included. Evaluated
with the quarantine on and ablated, the latter also calibrated: an ablated model may call the forget language's words
impossible without having forgotten how they follow each other, so a bias on the logits is fitted to it (as in SGTM).
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import gradroute as gr

SHARED, OWN = 8, 12
VOCABULARY = 1 + SHARED + 2 * OWN
SUCCESSORS = torch.tensor([0.55, 0.25, 0.15, 0.05])  # entropy 1.11 nats: no model has a lower loss


@dataclass(frozen=True)
class Recipe:
    """A batch has 3 retain rows to 1 forget row; of the retain rows, the share `labelled_retain` is labelled."""

    steps: int = 200
    batch_size: int = 64
    length: int = 16
    lr: float = 1e-2
    r: int = 16
    r_quarantine: int = 8
    labelled_retain: float = 0.25
    held_out: int = 512

    @property
    def forget_rows(self) -> int:
        """Rows of the forget language in a batch."""
        return self.batch_size // 4

    @property
    def forget_tokens(self) -> int:
        """Predicted tokens of the forget language in the whole training data."""
        return self.steps * self.forget_rows * (self.length - 1)


@dataclass(frozen=True)
class Losses:
    """Nats per token on held-out rows.

    Args:
        forget, retain: quarantine ablated.
        forget_calibrated: the same as `forget` with a bias on the logits that was fitted to forget rows.
        forget_on, retain_on: quarantine on; for a baseline, which has none, as ablated.
    """

    forget: float
    retain: float
    forget_calibrated: float
    forget_on: float
    retain_on: float


class Language:
    """A Markov chain over words of its own and words that both languages use; each word has four successors."""

    def __init__(self, number: int, seed: int) -> None:
        generator = Generator().manual_seed(1000 * seed + number)
        first = 1 + SHARED + number * OWN
        words = torch.cat([torch.arange(1, 1 + SHARED), torch.arange(first, first + OWN)])
        self.successors = torch.zeros(VOCABULARY, len(SUCCESSORS), dtype=torch.long)
        # Sentences begin, after token 0, with words that only this language has.
        self.successors[0] = words[SHARED:][torch.randperm(OWN, generator=generator)[: len(SUCCESSORS)]]
        for word in words.tolist():
            self.successors[word] = words[torch.randperm(len(words), generator=generator)[: len(SUCCESSORS)]]

    def sample(self, rows: int, length: int, generator: Generator) -> Tensor:
        """(rows, length) tokens, the first of them 0."""
        tokens = torch.zeros(rows, length, dtype=torch.long)
        choice = torch.multinomial(SUCCESSORS.expand(rows, -1), length, replacement=True, generator=generator)
        for i in range(1, length):
            tokens[:, i] = self.successors[tokens[:, i - 1]].gather(1, choice[:, i : i + 1])[:, 0]
        return tokens


def build_model(seed: int, recipe: Recipe) -> LlamaForCausalLM:
    """Random frozen weights with both blocks around every linear."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=recipe.length, tie_word_embeddings=False, initializer_range=0.1,
        pad_token_id=None, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
    blocks = {"r": recipe.r, "r_quarantine": recipe.r_quarantine, "lora_alpha": float(recipe.r)}
    gr.attach(model, target_modules=r".*(_proj|lm_head)", seed=seed, **blocks)
    return model


def logits_of(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """(rows, vocabulary, length - 1), as `cross_entropy` takes them."""
    logits: Tensor = model(tokens[:, :-1], use_cache=False).logits
    return logits.transpose(1, 2)


def loss_of(model: LlamaForCausalLM, tokens: Tensor, recipe: Recipe) -> Tensor:
    """Not the mean over rows: a row weighs the same however many others of its batch were filtered out."""
    losses = cross_entropy(logits_of(model, tokens), tokens[:, 1:], reduction="none")
    return losses.mean(1).sum() / recipe.batch_size


def train(seed: int, recipe: Recipe, *, recall: float | None = None, share: float = 1.0) -> Losses:
    """Train one model and evaluate it.

    Args:
        seed: of languages, weights and data: one seed has the same rows in the same order, whatever the arm.
        recipe: sizes and rates.
        recall: share of the forget rows that are labelled; None trains the baseline, the deployed block alone.
        share: of the forget rows that the baseline sees.
    """
    retain, forget = Language(0, seed), Language(1, seed)
    model, generator = build_model(seed, recipe), Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=recipe.lr, fused=True)
    is_forget = torch.arange(recipe.batch_size) < recipe.forget_rows
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        rows = [
            forget.sample(recipe.forget_rows, recipe.length, generator),
            retain.sample(recipe.batch_size - recipe.forget_rows, recipe.length, generator),
        ]
        tokens, luck = torch.cat(rows), torch.rand(recipe.batch_size, generator=generator)
        if recall is None:
            kept = ~is_forget | (luck < share)
            tokens, mask = tokens[kept], gr.RouteMask.zones(torch.zeros(int(kept.sum()), dtype=torch.long))
        else:
            labelled = luck < torch.where(is_forget, recall, recipe.labelled_retain)
            mask = gr.schemes.sgtm_mask(is_forget & labelled, unlabelled=~labelled)
        with gr.route(model, mask):
            loss_of(model, tokens, recipe).backward()
        optimizer.step()
        optimizer.zero_grad()
    return evaluate(model, forget, retain, recipe, seed)


def evaluate(model: LlamaForCausalLM, forget: Language, retain: Language, recipe: Recipe, seed: int) -> Losses:
    """Both views on both languages, on rows that were not trained on."""
    generator = Generator().manual_seed(seed + 10**6)
    fitting, *held_out = (
        language.sample(recipe.held_out, recipe.length, generator) for language in (forget, forget, retain)
    )
    with torch.no_grad():
        on = [cross_entropy(logits_of(model, tokens), tokens[:, 1:]).item() for tokens in held_out]
        with gr.ablate_quarantine(model):
            logits = [logits_of(model, tokens) for tokens in (fitting, *held_out)]
    ablated = [cross_entropy(x, tokens[:, 1:]).item() for x, tokens in zip(logits[1:], held_out, strict=True)]
    bias = fitted_bias(logits[0], fitting[:, 1:])
    calibrated = cross_entropy(logits[1] + bias, held_out[0][:, 1:]).item()
    return Losses(ablated[0], ablated[1], calibrated, on[0], on[1])


def fitted_bias(logits: Tensor, targets: Tensor) -> Tensor:
    """(vocabulary, 1): the bias with the lowest mean loss; a convex problem, plus a ridge of 1e-4 for unseen words."""
    bias = torch.zeros(VOCABULARY, 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(logits + bias, targets) + 1e-4 * bias.square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    return bias.detach()
