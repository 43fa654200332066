"""The base model: a Llama of about 0.1M parameters, pretrained in process on an environment's corpus.

    loss = mean over completion tokens t of -log p(t | all tokens before it)

The weights are cached under the sha256 of all that they depend on: the environment, the seed, the source texts of this
file, `environment.py` and `language.py`, and the versions of torch and transformers. A change to any of them trains
anew.
"""

import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Generator
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from . import environment as environments
from . import language
from .environment import Environment
from .language import BOS, EOS, PAD, VOCABULARY
from .weight_cache import cache_folder, read_weights, write_weights

STEPS = 800
BATCH_SIZE = 128
LEARNING_RATE = 4e-3
WARM_UP = 20


def build_model(seed: int) -> LlamaForCausalLM:
    """A freshly initialised model; the global random state is left as found."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        # from the usual 0.02 some seeds have not learnt any of the tasks when the steps end
        initializer_range=0.1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        # not `torch.manual_seed`, which would seed the accelerators too
        torch.default_generator.manual_seed(seed)
        return LlamaForCausalLM(config)


def load_base(
    environment: Environment,
    seed: int,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LlamaForCausalLM:
    """The base model in eval mode, from the cache if it is there, else pretrained and then cached.

    `cache_dir` defaults to `gradroute-examples` in $XDG_CACHE_HOME or ~/.cache. `progress` is called with (done, total)
    after each pretraining step.
    """
    if cache_dir is None:
        cache_dir = cache_folder()
    path = Path(cache_dir) / f"base-{environment.name}-{seed}-{_cache_key(environment, seed)[:16]}.safetensors"
    model = build_model(seed)
    weights = read_weights(path)
    if weights is not None:
        model.load_state_dict(weights)
    else:
        _pretrain(model, environment, seed, progress)
        write_weights(path, model.state_dict())
    return model.eval()


def _pretrain(
    model: LlamaForCausalLM, environment: Environment, seed: int, progress: Callable[[int, int], None] | None
) -> None:
    generator = Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = LambdaLR(optimizer, _learning_rate_factor)
    model.train()
    for step in range(STEPS):
        sequences, mask = environment.corpus(BATCH_SIZE, generator)
        # what the corpus' authors write leaves the last column empty
        width = 1 + int(mask.any(dim=0).nonzero().max())
        sequences, predicted = sequences[:, :width], mask[:, 1:width]
        logits = model(sequences[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits[predicted], sequences[:, 1:][predicted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, STEPS)


def _learning_rate_factor(step: int) -> float:
    """Linear warm-up times cosine decay."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def _cache_key(environment: Environment, seed: int) -> str:
    """sha256 of all that the weights depend on; the source texts carry the recipe."""
    sources = [Path(file).read_text() for file in (__file__, environments.__file__, language.__file__)]
    parts = (repr(environment), seed, STEPS, torch.__version__, transformers.__version__, *sources)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
