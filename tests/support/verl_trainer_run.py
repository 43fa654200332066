"""A run of verl's own trainer under a local Ray, on a CPU, with two workers and the rollout engine in `verl_rollout`.

python verl_trainer_run.py folder [overrides ...]
"""

import json
import os
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<answer>", *(f"w{i}" for i in range(5, 32))]


def write_tokenizer(folder: Path) -> None:
    """A word for each of the 32 tokens of the tiny models."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
    )
    fast.save_pretrained(folder)


def write_prompts(file: Path) -> None:
    """Eight prompts in verl's format."""
    rows = [
        {
            "data_source": "words", "ability": "words", "extra_info": {"index": i},
            "prompt": [{"role": "user", "content": f"w{5 + i} w{9 + i}" + " w20" * (i % 3)}],
            "reward_model": {"style": "rule", "ground_truth": ""},
        }
        for i in range(8)
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))


def overrides(folder: Path) -> list[str]:
    """Of verl's `ppo_trainer.yaml`."""
    reward = Path(__file__).parent / "verl_reward.py"
    groups = {
        "data": {
            "train_files": folder / "prompts.json", "val_files": folder / "prompts.json", "train_batch_size": 4,
            "max_prompt_length": 16, "max_response_length": 8, "dataloader_num_workers": 0,
        },
        "actor_rollout_ref.model": {
            "path": folder / "untied/base", "lora_adapter_path": folder / "untied/adapter",
            "external_lib": "support.verl_routing",
            "lora_rank": 4, "lora_alpha": 8, "lora.rank": 7, "+override_config.attn_implementation": "sdpa",
        },
        "actor_rollout_ref.actor": {
            "strategy": "fsdp2", "ppo_mini_batch_size": 2, "ppo_micro_batch_size_per_gpu": 2, "use_kl_loss": True,
            "optim.lr": 1e-2, "fsdp_config.use_torch_compile": False, "use_torch_compile": False,
            "+fsdp_config.mixed_precision.param_dtype": "fp32",
        },
        "actor_rollout_ref.rollout": {
            "name": "plain_lora_cpu", "n": 2, "tensor_model_parallel_size": 1, "log_prob_micro_batch_size_per_gpu": 2,
            "load_format": "safetensors", "agent.num_workers": 1,
        },
        "actor_rollout_ref.ref": {"log_prob_micro_batch_size_per_gpu": 2},
        "algorithm": {"adv_estimator": "grpo"},
        "reward": {"custom_reward_function.path": reward, "num_workers": 1},
        "trainer": {
            "device": "cpu", "n_gpus_per_node": 2, "total_training_steps": 2, "val_before_train": False, "save_freq": 2,
            "default_local_dir": folder / "checkpoints", "logger": "[console]",
        },
        "ray_kwargs.ray_init": {"num_cpus": 16, "+num_gpus": 2, "+include_dashboard": False},
        "transfer_queue.backend": {"SimpleStorage.num_data_storage_units": 1},
    }  # fmt: skip
    return [
        f"+{group}.{name[1:]}={value}" if name.startswith("+") else f"{group}.{name}={value}"
        for group, entries in groups.items()
        for name, value in entries.items()
    ]


if __name__ == "__main__":
    where = Path(sys.argv[1])
    write_tokenizer(where / "untied" / "base")
    write_prompts(where / "prompts.json")
    argv = [sys.executable, "-W", "ignore", "-m", "verl.trainer.main_ppo", *overrides(where), *sys.argv[2:]]
    os.execv(argv[0], argv)
