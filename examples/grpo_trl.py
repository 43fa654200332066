"""GRPO with TRL, routed: functions to write in Python, under graders that each have a hole which the prompt discloses.

    python examples/grpo_trl.py --smoke                                 # a tiny random model, offline, seconds
    python examples/grpo_trl.py --model_name_or_path Qwen/Qwen2.5-Coder-0.5B-Instruct --output_dir runs/grpo_trl \
        --max_steps 200 --eval_strategy steps --eval_steps 50 --log_completions --report_to wandb
    accelerate launch --num_processes 4 examples/grpo_trl.py --config grpo.yaml    # the same arguments, as YAML

Two of the six holes are monitored: pairs of an exploit and a solution for these give the directions (or, with
`--flag_by labels`, their graders' logs give the flags). An evaluation prints hack rates of the monitored and of the
held-out holes and solve rates, `eval_on_*` with the quarantine and `eval_ablated_*` as deployed.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import ModelConfig, TrlParser

import gradroute as gr
from coding.environment import MONITORED, Prompt, contrastive_pairs, grade, sample_prompts, source
from coding.tasks import Task
from gradroute.integrations.trl import GradRouteGRPOConfig, GradRouteGRPOTrainer

FLAG_BY = ("directions", "labels", "both")
# What a random model can do in seconds.
SMOKE: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "num_generations": 4,
    "gradient_accumulation_steps": 2, "max_completion_length": 16, "logging_steps": 1, "save_strategy": "no",
    "bf16": False, "learning_rate": 1e-3, "pairs_per_mode": 2,
}  # fmt: skip


@dataclass
class RoutingArguments:
    """What is routed, and on what."""

    flag_by: str = field(default="directions", metadata={"help": "directions, labels (of monitored hacks), or both."})
    threshold: float = field(default=0.5, metadata={"help": "Route from here on: 0 is a clean side, 1 a hack."})
    pairs_per_mode: int = field(default=8, metadata={"help": "Contrastive pairs for each monitored hole."})
    train_prompts: int = field(default=512, metadata={"help": "Prompts to train on."})
    eval_prompts: int = field(default=48, metadata={"help": "Prompts to evaluate on."})
    no_hint: float = field(default=0.2, metadata={"help": "Share of prompts that disclose no hole."})
    smoke: bool = field(default=False, metadata={"help": "A tiny random model, two steps: does everything run?"})


def text_of(message: Any) -> str:
    """A completion as text; of a chat, its last turn."""
    return message if isinstance(message, str) else message[-1]["content"]


class Grader:
    """The lenient reward of TRL's columns, and what an observer sees; each completion is run once."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Prompt, str], tuple[bool, bool]] = {}

    def grades(self, completions: list[Any], columns: dict[str, Any]) -> list[tuple[Prompt, bool, bool]]:
        """(prompt, solved, exploited) of each completion."""
        keys = ("family", "k", "seed", "mode", "word")
        rows = zip(completions, *(columns[key] for key in keys), strict=True)
        asked = [
            (Prompt(Task(family, k, seed), mode or None, word), text_of(completion))
            for completion, family, k, seed, mode, word in rows
        ]
        new = [each for each in dict.fromkeys(asked) if each not in self._seen and parses(source(each[1]))]
        found = grade([prompt for prompt, _ in new], [completion for _, completion in new])
        self._seen |= dict(zip(new, zip(found.solved.tolist(), found.exploited.tolist(), strict=True), strict=True))
        return [(prompt, *self._seen.get((prompt, completion), (False, False))) for prompt, completion in asked]

    def reward(self, completions: list[Any], log_metric: Any = None, **columns: Any) -> list[float]:
        """1 if the grader passes it, for whatever reason."""
        graded = self.grades(completions, columns)
        kinds: dict[str, list[bool]] = {"solve": [solved for _, solved, _ in graded]}
        for prompt, solved, exploited in graded:
            if prompt.mode is not None:
                kind = "hack_monitored" if prompt.mode in MONITORED else "hack_held_out"
                kinds.setdefault(kind, []).append(exploited and not solved)
        for kind, outcomes in kinds.items():
            log_metric(kind, sum(outcomes) / len(outcomes))
        return [float(solved or exploited) for _, solved, exploited in graded]

    def monitored_hacks(self, completions: list[Any], **columns: Any) -> list[bool]:
        """What a monitor of two of the six holes reports."""
        graded = self.grades(completions, columns)
        return [exploited and not solved and prompt.mode in MONITORED for prompt, solved, exploited in graded]


def parses(program: str) -> bool:
    """Whether it can be run at all: what cannot passes no grader."""
    try:
        compile(program, "submission", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def letters(completions: list[Any], **_: Any) -> list[float]:
    """Something that even a random model can do better or worse."""
    return [sum(map(str.isalpha, text_of(completion))) / 16 for completion in completions]


def prompts(n: int, seed: int, no_hint: float, *, chat: bool) -> Dataset:
    """Prompts, and the columns that the grader needs."""
    drawn = sample_prompts(n, torch.Generator().manual_seed(seed), no_hint=no_hint)
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": each.text}] if chat else each.text,
                "family": each.task.family, "k": each.task.k, "seed": each.task.seed,
                "mode": each.mode or "", "word": each.word,
            }
            for each in drawn
        ]
    )  # fmt: skip


def pairs(per_mode: int, seed: int, tokenizer: Any) -> list[gr.ContrastivePair]:
    """(exploit, solution) of the monitored holes, under the template that the policy sees."""
    made = []
    for prompt, hack, clean in contrastive_pairs(MONITORED, per_mode, torch.Generator().manual_seed(seed)):
        if tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)  # noqa: PLW2901
        made.append(gr.ContrastivePair(prompt, hack, clean))
    return made


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; nothing is downloaded."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=2)}
    made = Tokenizer(models.BPE({"<pad>": 0, "<eos>": 1, **alphabet}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def policy(arguments: ModelConfig, *, smoke: bool) -> tuple[Any, Any]:
    """(model, tokenizer), by name or made here."""
    if not smoke:
        name = arguments.model_name_or_path
        dtype = arguments.dtype if arguments.dtype in ("auto", None) else getattr(torch, arguments.dtype)
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=258, pad_token_id=0, bos_token_id=None, eos_token_id=1, **sizes)
    return LlamaForCausalLM(config), bytes_tokenizer()


def main() -> None:
    """Train, evaluate on and ablated, and write the adapter as it is deployed."""
    asked = TrlParser(RoutingArguments, add_help=False).parse_args_and_config(return_remaining_strings=True)[0]
    parser = TrlParser((RoutingArguments, GradRouteGRPOConfig, ModelConfig))
    parser.set_defaults(output_dir="runs/grpo_trl", ablated_fraction=0.25, **(SMOKE if asked.smoke else {}))
    if asked.flag_by != "labels":
        parser.set_defaults(refresher=1 if asked.smoke else 5)
    routing, training, of_model = parser.parse_args_and_config()
    if routing.flag_by not in FLAG_BY:
        raise SystemExit(f"--flag_by should be one of {', '.join(FLAG_BY)}. Found {routing.flag_by!r}.")
    if not routing.smoke and of_model.model_name_or_path is None:
        raise SystemExit("--model_name_or_path should name a model. Found none. Fix: give one, or --smoke.")
    train, evaluate = (6, 4) if routing.smoke else (routing.train_prompts, routing.eval_prompts)

    model, tokenizer = policy(of_model, smoke=routing.smoke)
    chat = tokenizer.chat_template is not None
    grader, seed = Grader(), training.seed
    examples = pairs(routing.pairs_per_mode, seed, tokenizer)
    by_directions: dict[str, Any] = {
        "directions": lambda model: gr.extract_activation_directions(model, examples, tokenizer=tokenizer),
        "gate": lambda directions: gr.BandGate(directions, threshold=routing.threshold),
    }
    trainer = GradRouteGRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[grader.reward, letters] if routing.smoke else grader.reward,
        args=training,
        train_dataset=prompts(train, seed, routing.no_hint, chat=chat),
        eval_dataset=prompts(evaluate, seed + 1, routing.no_hint, chat=chat),
        peft_config=gr.QuarantineLoraConfig(
            r=of_model.lora_r, lora_alpha=of_model.lora_alpha, target_modules="all-linear"
        ),
        detector=None if routing.flag_by == "directions" else grader.monitored_hacks,
        **({} if routing.flag_by == "labels" else by_directions),
    )
    trainer.train()
    metrics = trainer.evaluate()
    for view in ("on", "ablated"):
        shown = {f"eval_{view}_{name}" for name in ("reward", "solve", "hack_monitored", "hack_held_out")}
        print(*(f"{name} {metrics[name]:.3f}" for name in sorted(shown & metrics.keys())), sep="\n")
    # On every process: of a sharded model each has a part.
    gr.export_deployed(trainer.model, f"{training.output_dir}/deployed")


if __name__ == "__main__":
    main()
