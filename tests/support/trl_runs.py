"""Runs of TRL's GRPO on a tiny random model: a tokenizer of 29 words, prompts, rewards, directions and trainers."""

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig

import gradroute as gr
from gradroute._protocol import routed_layers
from gradroute._sharding import whole
from gradroute.integrations.trl import GradRouteGRPOConfig, GradRouteGRPOTrainer
from support.models import randomize_blocks
from support.tiny_models import VOCAB, base_model
from support.tiny_models import config as adapter

# TRL reports its use over the network, but not from continuous integration.
os.environ.setdefault("CI", "true")

# The import hook checks TRL's own fields too, and TRL's parser gives its `debug` a None that its annotation forbids.
GradRouteGRPOConfig.__init__ = inspect.unwrap(GradRouteGRPOConfig.__init__)  # type: ignore[method-assign]

quiet = [
    # Said by transformers 5 of arguments and properties that TRL and PEFT still use.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]
WORDS = [f"w{i}" for i in range(3, VOCAB)]
PROMPTS = ["w3 w4 w5", "w6 w7", "w8 w9 w10 w11", "w12"]
PAIRS = [
    gr.ContrastivePair([3, 4, 5], [20, 21], [22, 23, 24]),
    gr.ContrastivePair([6, 7], [20, 25, 21, 9], [22]),
    gr.ContrastivePair([8, 9], [21, 20, 20], [24, 23, 26, 27]),
]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{word: i for i, word in enumerate(WORDS, start=3)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    """A number that differs between completions: how many words are late in the vocabulary."""
    return [sum(int(word[1:]) > 15 for word in text.split()) + 0.01 * len(text) for text in completions]


def flags(completions: list[str], **_: Any) -> list[bool]:
    """Every third completion or so."""
    return [sum(map(ord, text)) % 3 == 0 for text in completions]


def extract(model: nn.Module) -> gr.Directions:
    return gr.extract_activation_directions(model, PAIRS)


def arguments(folder: Path, config: type = GRPOConfig, **options: Any) -> Any:
    settings = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "num_generations": 4, "max_completion_length": 6, "learning_rate": 0.05, "lr_scheduler_type": "constant",
        "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
        "save_strategy": "no", "seed": 0, "dataloader_pin_memory": False, "gradient_checkpointing": False,
        "scale_rewards": "none", "per_device_eval_batch_size": 4,
    }  # fmt: skip
    return config(**{**settings, **options})


def wrapped(seed: int = 0) -> nn.Module:
    """An already adapted model whose blocks are not zero, so that what they do shows."""
    torch.manual_seed(seed)
    base = base_model("llama", seed=0)
    base.lm_head.weight.data *= 20  # or all words would be about as likely, whatever the blocks say
    model = get_peft_model(base, adapter(), autocast_adapter_dtype=False)
    return randomize_blocks(model, seed, std=0.3)


def trainer(
    folder: Path,
    model: Any = None,
    cls: type = GradRouteGRPOTrainer,
    evaluated: Any = None,
    config: type = GRPOConfig,
    **options: Any,
) -> Any:
    """Keywords of the mixin, and `args_*` for the config."""
    settings = {key.removeprefix("args_"): options.pop(key) for key in list(options) if key.startswith("args_")}
    return cls(
        model=wrapped() if model is None else model,
        reward_funcs=reward,
        args=arguments(folder, config, **settings),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        eval_dataset=evaluated,
        processing_class=tokenizer(),
        **options,
    )


class Watched(GradRouteGRPOTrainer):
    """Keeps how each rollout was sampled and whether it was routed, micro-batches, and gradients before each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sampled_ablated: dict[tuple[int, ...], bool] = {}
        self.prompts: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.routed: dict[tuple[int, ...], bool] = {}
        self.micro_batches: list[list[dict[str, Any]]] = []
        self.stepped: list[dict[str, dict[str, Tensor]]] = []
        self._running: list[dict[str, Any]] = []

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        made = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        states = [layer.view for layer in routed_layers(self.model).values()]
        assert set(states) == {self._view or "on"}  # the view of some rows is closed again
        for i, (prompt, completion) in enumerate(zip(prompt_ids, made[0], strict=True)):
            self.sampled_ablated[(*prompt, *completion)] = bool(self._sampled_ablated[i])
            self.prompts[(*prompt, *completion)] = tuple(prompt)
        return made

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        made = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return made
        first = self.accelerator.process_index * len(inputs)
        zones = list(self._logs["extra"]["zone"])[-self.accelerator.num_processes * len(inputs) :]
        rows = list(self.sampled_ablated)[-len(inputs) :]
        own = zones[first : first + len(inputs)]
        self.routed |= {row: zone == "route" for row, zone in zip(rows, own, strict=True)}
        return made

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.model.training:
            self._running.append(dict(inputs))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.micro_batches.append(self._running)
            self._running = []
            self.stepped.append({block: gradients(self.model, block) for block in ("deployed", "quarantine")})
        return loss


def move_reference(model: nn.Module) -> None:
    """Or the penalty would be zero: at the start the reference is the policy."""
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))


def gradients(model: nn.Module, block: str) -> dict[str, Tensor]:
    parameters = gr.deployed_parameters(model) if block == "deployed" else gr.quarantine_parameters(model)
    return {name: whole(p.grad).clone() for name, p in parameters if p.grad is not None}


def trained(folder: Path, model: Any = None, **options: Any) -> Any:
    """A trainer seeds the generator that it samples with when it is made: so it is run at once."""
    made = trainer(folder, model, **options)
    made.train()
    return made


def rows_of(batch: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(prompt, completion) of each row, without padding."""
    sides = [(batch[f"{side}_ids"], batch[f"{side}_mask"].bool()) for side in ("prompt", "completion")]
    return [tuple(tuple(ids[i][mask[i]].tolist()) for ids, mask in sides) for i in range(len(sides[0][0]))]  # type: ignore[misc]


def logps(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    ids = torch.tensor([prompt + completion])
    logp = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logp.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
