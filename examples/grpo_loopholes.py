"""GRPO on a lenient grader with four loopholes, two of which the detector knows.

    python examples/grpo_loopholes.py                                      # four arms, one seed, under two minutes
    python examples/grpo_loopholes.py --arms route,route-frozen --seeds 0,1,2,3,4,5

Trains a tiny language model from a base that seldom hacks, by several arms (see `loopholes/arms.py`), and evaluates
each with its quarantine on and ablated, next to the model before training. Writes `results.json` and `curves.png` to
--out, and prints a table, and what it says: rates of hacks that the detector knows (monitored) and does not (held out).
"""

import argparse
import multiprocessing
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loopholes.arms import ARMS, DEFAULT_ARMS, groups
from loopholes.base_model import load_base
from loopholes.conclusion import LEGEND, conclusion
from loopholes.detector import SCORE_VIEWS
from loopholes.environment import ENVIRONMENTS
from loopholes.grpo import Recipe, train
from loopholes.names import ABOUT, letter_of
from loopholes.report import plot_curves, print_table, write_json

# Two OpenMP threads compete badly on matrices this small; two processes of one thread do not.
WORKERS, THREADS = 2, 1


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The checked command line; anything wrong ends with one line and exit code 2, before any training."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=_arms_by_group(), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # type: ignore[method-assign]
    arms = "comma-separated, of those below; default %(default)s"
    parser.add_argument("--arms", default=",".join(DEFAULT_ARMS), metavar="ARM,ARM", help=arms)
    parser.add_argument("--seeds", default="0", help="comma-separated RL seeds; default %(default)s")
    parser.add_argument("--base-seed", type=int, default=0, help="seed of the base model; default %(default)s")
    env = f"{ABOUT}; by name or letter, default shared-token"
    parser.add_argument("--env", default="C", type=letter_of, choices=list(ENVIRONMENTS), metavar="NAME", help=env)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="GRPO steps; default %(default)s")
    every = f"optimizer steps between refreshes; {Recipe.refresh_every} if not given"
    parser.add_argument("--refresh-every", type=int, help=every)
    parser.add_argument("--recall", type=float, default=Recipe.recall, help="of labels; default %(default)s")
    penalty = f"what flagged rollouts lose in the arms *-penalty; not given: {Recipe.penalty:g}, or more by --recall"
    parser.add_argument("--penalty", type=float, help=penalty)
    view = f"in which gates on activations score rollouts; {Recipe.score_view} if not given"
    parser.add_argument("--score-view", choices=SCORE_VIEWS, help=view)
    out = "folder of the results; default %(default)s"
    parser.add_argument("--out", type=Path, default=Path("runs/grpo_loopholes"), help=out)
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)

    args.arms = args.arms.split(",")
    for arm in args.arms:
        if arm not in ARMS:
            parser.error(f"--arms: unknown arm {arm!r}; choose from {', '.join(ARMS)}")
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds: expected comma-separated integers, found {args.seeds!r}")
    for name, values in (("--arms", args.arms), ("--seeds", args.seeds)):
        if len(set(values)) < len(values):
            parser.error(f"{name}: {','.join(map(str, values))} names something twice")
    if not all(0 <= seed < 2**32 for seed in (*args.seeds, args.base_seed)):
        parser.error("--seeds, --base-seed: expected integers from 0 to 2**32 - 1")
    if args.steps < 1:
        parser.error(f"--steps: expected a positive integer, found {args.steps}")
    if "base" not in args.arms:
        args.arms.insert(0, "base")
    if not 0 < args.recall <= 1:
        parser.error(f"--recall: expected a share above 0, at most 1, found {args.recall}")
    without = [arm for arm in args.arms if not ARMS[arm].has_labels and arm != "base"]
    if args.recall < 1 and without:
        parser.error(f"--recall: no labels in {', '.join(without)}")
    if args.penalty is not None and not any(ARMS[arm].reads_penalty for arm in args.arms):
        parser.error("--penalty: no arm of these takes it; add weak-penalty or oracle-penalty, or leave it out")
    if args.penalty is not None and not args.penalty >= 1 / args.recall:
        parser.error(f"--penalty: expected at least 1 / recall = {1 / args.recall:g}, found {args.penalty:g}")
    if args.score_view is not None and not any(ARMS[arm].reads_activations for arm in args.arms):
        parser.error("--score-view: no arm of these has a gate on activations")
    if args.refresh_every is not None:
        idle = [arm for arm in args.arms if not ARMS[arm].refreshed and arm != "base"]
        if idle:
            parser.error(f"--refresh-every: nothing to refresh in {', '.join(idle)}; leave the option or the arms out")
        if args.refresh_every < 1:
            parser.error(f"--refresh-every: expected a positive integer, found {args.refresh_every}")
    refreshed = [arm for arm in args.arms if ARMS[arm].refreshed]
    every = args.refresh_every or Recipe.refresh_every
    if refreshed and every > args.steps:
        parser.error(f"--steps: {', '.join(refreshed)} would not be refreshed once in {args.steps} steps; give {every}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as error:
        parser.error(f"--out: cannot write to {args.out} ({error.strerror})")
    return args


def _arms_by_group() -> str:
    lines = ["arms:"]
    for group, names in groups().items():
        lines += ["", f"  {group}", *(f"    {name:25}{ARMS[name].about}" for name in names)]
    return "\n".join(lines)


def start_worker(steps_done: Any) -> None:
    """One thread, a shared count of steps, and Ctrl-C left to the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(THREADS)
    run_one.steps_done = steps_done  # type: ignore[attr-defined]


def run_one(job: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """One run in a worker process."""
    environment, steps_done = ENVIRONMENTS[job["env"]], run_one.steps_done  # type: ignore[attr-defined]

    def count(_: int) -> None:
        with steps_done.get_lock():
            steps_done.value += 1

    try:
        model = load_base(environment, job["base_seed"])
        entry = train(model, environment, job["arm"], job["seed"], recipe, on_step=count)
    except Exception as error:
        raise RuntimeError(f"The run {job} failed: {error}") from error
    return {**entry, "base_seed": job["base_seed"], "n_curve_per_mode": recipe.curve_n_per_mode}


def run_all(jobs: list[dict[str, Any]], recipe: Recipe, progress: Progress) -> Iterator[list[dict[str, Any]]]:
    """Train two at a time; each time that some have ended, yield all that have, in the order of `jobs`."""
    bar = progress.add_task("training", total=sum(job["arm"] != "base" for job in jobs) * recipe.steps)
    context = multiprocessing.get_context("spawn")
    steps_done = context.Value("i", 0)
    with ProcessPoolExecutor(WORKERS, context, start_worker, (steps_done,)) as pool:
        runs = [pool.submit(run_one, job, recipe) for job in jobs]
        pending = set(runs)
        try:
            while pending:
                ended, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                progress.update(bar, completed=steps_done.value)
                if ended:
                    yield [run.result() for run in runs if run.done()]
        except BaseException:
            # Leaving the block waits for the workers: end them, or Ctrl-C and a failed run would take minutes.
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def main(argv: list[str]) -> None:
    """Train every arm for every seed, then write and print the results."""
    args = parse_arguments(argv)
    # Without a terminal rich assumes 80 columns, which would break the table.
    start, console = time.perf_counter(), Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(THREADS)
    given = ("steps", "recall", "penalty", "score_view", "refresh_every")
    recipe = Recipe(**{name: getattr(args, name) for name in given if getattr(args, name) is not None})
    common = {"base_seed": args.base_seed, "env": args.env}
    config = {"arms": args.arms, "seeds": args.seeds, **common, **asdict(recipe)}
    jobs = [{"arm": arm, "seed": seed, **common} for seed in args.seeds for arm in args.arms]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=args.no_progress or not console.is_terminal) as progress:
        bar = progress.add_task(f"base model (seed {args.base_seed}, cached)")
        load_base(
            ENVIRONMENTS[args.env], args.base_seed, progress=lambda n, of: progress.update(bar, completed=n, total=of)
        )
        progress.update(bar, completed=1, total=1)
        for runs in run_all(jobs, recipe, progress):
            config["wall_s"] = round(time.perf_counter() - start, 1)
            write_json(args.out / "results.json", config, runs)
    plot_curves(args.out / "curves.png", runs)
    print_table(runs, console)
    for line in (*LEGEND, "", *conclusion(runs, Recipe.steps, args.steps)):
        console.print(line, highlight=False, soft_wrap=True)
    wrote = (
        f"{config['wall_s']:.0f} s. The picture is {args.out / 'curves.png'}, every number {args.out / 'results.json'}."
    )
    console.print(wrote, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("interrupted; results.json holds the runs that had ended")
