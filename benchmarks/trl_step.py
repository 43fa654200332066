"""What a routed optimizer step costs in TRL: generation, scores, masks, loss, backward, optimizer; against a plain one.

    python benchmarks/trl_step.py [--pairs 5] [--hidden 576] [--layers 4] [--tokens 256] [--score-view sampled]

Both trainers train the same model, the plain one with LoRA of rank r + r_quarantine, with TRL's defaults (256 tokens,
checkpointing), and take turns, step by step, so that what else the machine does falls on both. Prints medians, and the
median of the ratios of pairs, of wall time and of the thread's processor time; with one thread the latter says more
where others use the machine. `score` is the activation gate alone; `refreshed` extracts the directions again every 5
steps as well; `ablated` samples a quarter of the rollouts without the quarantine as well.
"""

import argparse
import statistics
import tempfile
import threading
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import gradroute as gr
from gradroute.integrations.trl import GradRouteGRPOTrainer

VOCABULARY, PROMPT, ROLLOUTS, REFRESH_EVERY = 4096, 48, 16, 5


class TakesTurns(TrainerCallback):
    """Waits for its turn before a step, and passes it on after; keeps how long the step took."""

    def __init__(self, mine: threading.Semaphore, other: threading.Semaphore) -> None:
        self.mine, self.other, self.seconds = mine, other, []
        self.alone = False
        self._start = (0.0, 0.0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.alone:
            self.mine.acquire()
        self._start = clocks()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(tuple(now - then for now, then in zip(clocks(), self._start, strict=True)))
        self.other.release()


def clocks() -> tuple[float, float]:
    """Wall time, and processor time of this thread."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.thread_time()


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each number."""
    made = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="1", padding_side="left")


def words(n: int, seed: int) -> str:
    return " ".join(
        map(str, torch.randint(2, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist())
    )


def built(cls: type, folder: str, arguments: argparse.Namespace, **options: Any) -> Any:
    """A trainer with TRL's defaults, but for sizes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers, num_attention_heads=8, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    settings = GRPOConfig(
        folder, max_steps=arguments.pairs + 1, per_device_train_batch_size=ROLLOUTS // 2,
        gradient_accumulation_steps=2, num_generations=8, max_completion_length=arguments.tokens,
        generation_kwargs={"min_new_tokens": arguments.tokens}, bf16=False, report_to="none", disable_tqdm=True,
        save_strategy="no", logging_steps=1000, dataloader_pin_memory=False,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [words(PROMPT, seed) for seed in range(64)]})
    return cls(
        model=LlamaForCausalLM(config), processing_class=tokenizer(), args=settings, train_dataset=prompts,
        reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions], **options,
    )  # fmt: skip


def routed_options(arm: str, score_view: str) -> dict[str, Any]:
    def extract(model: Any) -> gr.Directions:
        return gr.extract_activation_directions(model, pairs, tokenizer=tokenizer())

    pairs = [gr.ContrastivePair(words(PROMPT, i), words(32, 100 + i), words(32, 200 + i)) for i in range(8)]
    options: dict[str, Any] = {
        "directions": extract,
        "gate": lambda directions: gr.BandGate(directions, window=10**9),
        "score_view": score_view,
    }
    more = {
        "score": {},
        "refreshed": {"refresher": REFRESH_EVERY},
        "ablated": {"refresher": REFRESH_EVERY, "ablated_fraction": 0.25},
    }
    return options | more[arm]


def interleaved(plain: Any, routed: Any) -> tuple[list[tuple[float, float]], ...]:
    """Seconds of each step of both, taken by turns; the first of each, which warms up, is left out."""
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    callbacks = [TakesTurns(turns[0], turns[1]), TakesTurns(turns[1], turns[0])]
    failed: list[BaseException] = []

    def run(trainer: Any, clock: TakesTurns, other: TakesTurns) -> None:
        try:
            trainer.add_callback(clock)
            trainer.train()
        except BaseException as error:
            failed.append(error)
            # The other one would wait for its next turn for ever.
            other.alone = True
            clock.other.release()

    threads = [
        threading.Thread(target=run, args=(trainer, clock, other))
        for trainer, clock, other in zip((plain, routed), callbacks, reversed(callbacks), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return tuple(callback.seconds[1:] for callback in callbacks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for name, default in (("pairs", 5), ("hidden", 576), ("layers", 4), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--arms", default="score,refreshed,ablated")
    parser.add_argument("--score-view", choices=("ablated", "sampled"), default="ablated")
    arguments = parser.parse_args()
    if arguments.pairs < REFRESH_EVERY and arguments.arms != "score":
        parser.error(f"--pairs: expected at least {REFRESH_EVERY}, or no refresh would come due; or --arms score")
    lora = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    both = lora | {"r": 32, "lora_alpha": 64}
    print(f"{arguments.pairs} pairs of steps, {ROLLOUTS} rollouts of {PROMPT} + {arguments.tokens} tokens, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    for arm in arguments.arms.split(","):
        with tempfile.TemporaryDirectory() as folder:
            plain = built(GRPOTrainer, folder, arguments, peft_config=LoraConfig(**both))
            config = gr.QuarantineLoraConfig(**lora)
            options = routed_options(arm, arguments.score_view)
            routed = built(GradRouteGRPOTrainer, folder, arguments, peft_config=config, **options)
            seconds = interleaved(plain, routed)
        for i, clock in enumerate(("wall", "processor")):
            each = [[step[i] for step in steps] for steps in seconds]
            ratios = [b / a for a, b in zip(*each, strict=True)]
            plain_s, routed_s = map(statistics.median, each)
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{arm:10} {clock:10} plain {plain_s:.2f} s, routed {routed_s:.2f} s, "
                  f"ratio {statistics.median(ratios):.3f} {spread}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
