"""What rollouts from vLLM cost, and whether they are those of `generate`: a real model, routed by TRL.

    python examples/studies/vllm_rollouts.py prepare FOLDER     # SmolLM2-135M as the study warms it up, as a checkpoint
    python examples/studies/vllm_rollouts.py sync FOLDER        # the parts of a sync, in milliseconds
    python examples/studies/vllm_rollouts.py train FOLDER       # the same run by vLLM and by `generate`

`sync` and `train` take any checkpoint. The tasks are those of `grpo_smollm.py`, variant `plain`.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
sys.path.insert(0, str(Path(__file__).parents[1]))  # what the studies share with the other examples lies there

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import GRPOConfig

import gradroute as gr
from gradroute.integrations.trl import GradRouteGRPOTrainer
from gradroute.integrations.vllm import EngineViews, lora_options
from smollm.environment import VARIANTS, Prompt, grade, is_monitored

ENVIRONMENT = VARIANTS["plain"]


class Clock(TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.seconds.append(-time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds[-1] += time.perf_counter()


def prepare(arguments: argparse.Namespace) -> None:
    """A checkpoint that an engine loads, with its tokenizer."""
    from smollm.base_model import cache_folder, load_base  # noqa: PLC0415 - needs what an engine's environment lacks

    model, _codec = load_base(ENVIRONMENT)
    model.save_pretrained(arguments.folder)
    (source,) = (path for path in cache_folder().glob("smollm2-135m-*") if path.is_dir())
    for path in source.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            (Path(arguments.folder) / path.name).write_bytes(path.read_bytes())


def milliseconds(what: Callable[[], Any], times: int = 5) -> float:
    """Median of a few calls."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        what()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def sync(arguments: argparse.Namespace) -> None:
    """Times each part of `EngineViews.sync`, beside two exports without what is worked out once."""
    from vllm import LLM  # noqa: PLC0415 - `prepare` runs without it

    model = AutoModelForCausalLM.from_pretrained(arguments.folder, dtype=torch.float32)
    model = gr.attach(model, r=arguments.r, r_quarantine=arguments.r)
    llm = LLM(arguments.folder, dtype=arguments.dtype, enforce_eager=True, max_model_len=512, **lora_options(model))
    start = time.perf_counter()
    views = EngineViews(model, llm)
    print(f"made, with its first sync {1000 * (time.perf_counter() - start):.0f} ms")
    print(f"sync {milliseconds(views.sync):.0f} ms, of which")
    plain, dtype = views._plain, views._dtype()
    for view, blocks in (("on", ("deployed", "quarantine")), ("ablated", ("deployed",))):
        factors = plain.factors(blocks, dtype)
        size = sum(t.numel() * t.element_size() for pair in factors.values() for t in pair)
        with tempfile.TemporaryDirectory(dir="/dev/shm") as there:
            fold = milliseconds(lambda blocks=blocks: plain.factors(blocks, dtype))
            write = milliseconds(lambda factors=factors, there=there: plain.write(Path(there), factors, {}))
            load = []
            for i in range(5):
                path = Path(there) / f"{view}-{i}"
                plain.write(path, factors, {})
                loaded: list[Any] = []
                load.append(milliseconds(lambda path=path, i=i, loaded=loaded, view=view: loaded.append(
                    views._load(f"bench-{view}-{i}", path)), times=1))  # fmt: skip
                views._unload(loaded[0])
        print(f"  {view:8} {size / 1e6:5.1f} MB: fold {fold:.0f} ms, write {write:.0f} ms, "
              f"load in vLLM {statistics.median(load):.0f} ms")  # fmt: skip
    with tempfile.TemporaryDirectory(dir="/dev/shm") as there:
        walked = milliseconds(lambda: (gr.export_full(model, f"{there}/a"), gr.export_deployed(model, f"{there}/b")))
    print(f"export_full and export_deployed, with the walks that a sync leaves out: {walked:.0f} ms")


def train(arguments: argparse.Namespace) -> None:
    """One run by each: seconds a step, rewards, and how far the log-probabilities are from the trainer's."""
    for engine in ("vllm", "generate"):
        clock = Clock()
        made = trainer(arguments, engine == "vllm")
        made.add_callback(clock)
        made.train()
        steps = [entry for entry in made.state.log_history if "loss" in entry]
        rewards = [float(entry["reward"]) for entry in steps]
        figures = {"seconds": [round(s, 1) for s in clock.seconds], "rewards": rewards}
        for name in ("sampling/logp_difference_on", "sampling/logp_difference_ablated"):
            figures[name] = [float(entry[name]) for entry in steps if name in entry]
        # The first step makes the engine's check and warms up.
        print(f"{engine}: median {statistics.median(clock.seconds[1:]):.1f} s a step, mean reward "
              f"{statistics.mean(rewards):.3f}; {json.dumps(figures)}", flush=True)  # fmt: skip


def trainer(arguments: argparse.Namespace, vllm: bool) -> Any:
    """A routed trainer whose detector flags hacks of the monitored markers."""
    draw = Random(0)
    prompts = [ENVIRONMENT.prompt(draw) for _ in range(512)]
    by_text = {prompt.text: prompt for prompt in prompts}

    def of(given: list[Any]) -> list[Prompt]:
        return [by_text[prompt[-1]["content"]] for prompt in given]

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        return [grade(p, c[-1]["content"]).reward for p, c in zip(of(prompts), completions, strict=True)]

    def detector(prompts: list[Any], completions: list[Any], **_: Any) -> list[bool]:
        known = is_monitored(of(prompts))
        grades = [grade(p, c[-1]["content"]) for p, c in zip(of(prompts), completions, strict=True)]
        return [grade.hacked and seen for grade, seen in zip(grades, known, strict=True)]

    settings = GRPOConfig(
        tempfile.mkdtemp(), max_steps=arguments.steps, per_device_train_batch_size=16, num_generations=8,
        gradient_accumulation_steps=2, max_completion_length=12, learning_rate=1e-4, bf16=False, report_to="none",
        disable_tqdm=True, save_strategy="no", logging_steps=1, dataloader_pin_memory=False, use_cpu=True,
        gradient_checkpointing=False, use_vllm=vllm, vllm_max_model_length=256,
        model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    return GradRouteGRPOTrainer(
        model=arguments.folder, reward_funcs=reward, args=settings, detector=detector, ablated_fraction=0.25,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": p.text}]} for p in prompts]),
        peft_config=gr.QuarantineLoraConfig(r=arguments.r, target_modules="all-linear"),
        **({"engine": {"dtype": arguments.dtype, "enforce_eager": True}} if vllm else {}),
    )  # fmt: skip


COMMANDS = {"prepare": prepare, "sync": sync, "train": train}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The checked command line; each command has the options that it reads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        own = commands.add_parser(name, help=command.__doc__.splitlines()[0], allow_abbrev=False)
        own.add_argument("folder", help="a checkpoint")
        if name != "prepare":
            own.add_argument("--r", type=int, default=16, help="rank of each block; default %(default)s")
            own.add_argument("--dtype", default="float32", help="of the engine; default %(default)s")
        if name == "train":
            own.add_argument("--steps", type=int, default=6, help="default %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    given = parse_arguments(sys.argv[1:])
    COMMANDS[given.command](given)
