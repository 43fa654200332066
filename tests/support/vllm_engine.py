"""A vLLM engine on the CPU, beside a small model that it serves, and TRL trainers that sample from it."""

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {
    "CI": "true",  # TRL reports its use over the network, but not from continuous integration
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig

import gradroute as gr
from gradroute.integrations.trl import GradRouteGRPOTrainer

VOCAB = 288
# vLLM's own choice for a CPU is 128, as long as all prompts here together.
BLOCK = 32
OPTIONS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "block_size": BLOCK}


@cache
def base_folder() -> str:
    """A Llama of two layers, whose heads are as wide as vLLM's kernels need, and a tokenizer of one word per id."""
    folder = tempfile.mkdtemp()
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        head_dim=32, max_position_embeddings=512, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def base_model() -> Any:
    return LlamaForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)


def randomized(model: nn.Module, seed: int = 0) -> Any:
    """Blocks that are not zero, so that views differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in (*gr.deployed_parameters(model), *gr.quarantine_parameters(model)):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def engine(**options: Any) -> Any:
    from vllm import LLM

    return LLM(base_folder(), max_model_len=256, skip_tokenizer_init=True, **{**OPTIONS, **options})


def sampled(llm: Any, prompts: Any, requests: Any, tokens: int = 8) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy completions and their log-probabilities."""
    from vllm import SamplingParams

    plain = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=0, ignore_eos=True, detokenize=False)
    made = llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts], plain, lora_request=requests, use_tqdm=False
    )
    ids = [list(each.outputs[0].token_ids) for each in made]
    logps = [
        [found[token].logprob for found, token in zip(each.outputs[0].logprobs, row, strict=True)]
        for each, row in zip(made, ids, strict=True)
    ]
    return ids, logps


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(int(word[1:]) % 2 for word in text.split() if word.startswith("w"))) for text in completions]


def flags(completions: list[str], **_: Any) -> list[bool]:
    return [sum(map(ord, text)) % 3 == 0 for text in completions]


def trainer(folder: Path, cls: type = GradRouteGRPOTrainer, **options: Any) -> Any:
    """A routed trainer that samples by vLLM; `args_*` are for GRPOConfig."""
    settings = {key.removeprefix("args_"): options.pop(key) for key in list(options) if key.startswith("args_")}
    prompts = Dataset.from_dict({"prompt": ["w9 " * 70 + word for word in ("w20 w21", "w22", "w23", "w24")] * 4})
    defaults = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": 12, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "use_vllm": True, "vllm_max_model_length": 256, "gradient_checkpointing": False, "disable_tqdm": True,
        "learning_rate": 2e-2, "logging_steps": 1, "model_init_kwargs": {"dtype": "float32"},
        "dataloader_pin_memory": False, "per_device_eval_batch_size": 4, "seed": 0,
    }  # fmt: skip
    keywords = {
        "ablated_fraction": 0.5, "detector": flags, "detector_recall": 1.0, "engine": OPTIONS,
        "peft_config": gr.QuarantineLoraConfig(r=4, r_quarantine=3, lora_alpha=8, target_modules="all-linear"),
    }  # fmt: skip
    return cls(
        model=base_folder(),
        reward_funcs=reward,
        args=GRPOConfig(**{**defaults, **settings}),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(4)),
        **{**keywords, **options},
    )
