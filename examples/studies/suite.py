"""Arms x seeds x base seeds x environments, two at a time, and one report on all of them.

    python examples/studies/suite.py --envs C --arms vanilla,route,shuffle,random --seeds 0,1,2 --out runs/suite

The model before training, `base`, is always among the arms. Every run that has ended is a file in --out; a suite that
was killed goes on where it stopped, and its report is the same as if it had not been. Writes `report.md`, `report.json`
and figures to --out.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the studies share with the other examples lies there

from loopholes.arms import ARMS
from loopholes.base_model import load_base
from loopholes.detector import SCORE_VIEWS
from loopholes.environment import ENVIRONMENTS, MODES
from loopholes.grpo import Recipe, train
from loopholes.names import NAMES, letter_of
from reporting.staleness import write_staleness
from reporting.store import Job, ResultError, read_result, stored_jobs, write_result
from reporting.suite_report import read_report, write_report

# Less often than the main job looks: the suite's figures show where a run went, not each turn.
RECIPE = Recipe(curve_every=25, curve_n_per_mode=32)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The checked command line; anything wrong ends with one line and exit code 2, before any training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # type: ignore[method-assign]
    parser.add_argument(
        "--envs",
        default="shared-token",
        help=f"comma-separated, of {', '.join(NAMES)}, or letters; default %(default)s",
    )
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated; default: all of them")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated RL seeds; default %(default)s")
    parser.add_argument("--base-seeds", default="0,1", help="comma-separated seeds of base models; default %(default)s")
    parser.add_argument("--steps", type=int, default=RECIPE.steps, help="GRPO steps; default %(default)s")
    parser.add_argument("--lr", type=float, default=RECIPE.lr, help="learning rate of LoRA; default %(default)s")
    parser.add_argument("--monitored", help=f"comma-separated modes that the detector knows, of {', '.join(MODES)}")
    parser.add_argument("--recall", type=float, default=1.0, help="of labels, in arms that have labels")
    parser.add_argument("--penalty", type=float, help=f"not given: {RECIPE.penalty:g}, or more if recall asks for it")
    nats = f"threshold of the arms *-explained and *-likelier, in nats; {RECIPE.explained_nats:g} if not given"
    parser.add_argument("--nats", type=float, help=nats)
    steps = f"in which the arms inoculated* train their quarantine; {RECIPE.inoculation_steps} if not given"
    parser.add_argument("--inoculation-steps", type=int, help=steps)
    view = f"in which gates on activations score rollouts: {' or '.join(SCORE_VIEWS)}; {RECIPE.score_view} if not given"
    parser.add_argument("--score-view", choices=SCORE_VIEWS, metavar="VIEW", help=view)
    parser.add_argument("--false-positive-rate", type=float, default=0.0, help="of labels, in arms that have labels")
    parser.add_argument("--teacher", default="0,0", help="demonstrations per group of 8, and for how many steps")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/suite"), help="folder; default %(default)s")
    parser.add_argument("--report", action="store_true", help="run nothing: report on all that lies in --out")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    args.envs = ",".join(map(letter_of, args.envs.split(",")))
    for name, known in (("envs", ENVIRONMENTS), ("arms", ARMS), ("monitored", MODES)):
        values = (getattr(args, name) or "").split(",") if getattr(args, name) is not None else None
        setattr(args, name, values)
        for value in values or ():
            if value not in known:
                parser.error(f"--{name}: unknown {value!r}; choose from {', '.join(known)}")
    for name in ("seeds", "base_seeds", "teacher"):
        text = getattr(args, name)
        try:
            setattr(args, name, [int(seed) for seed in text.split(",")])
        except ValueError:
            parser.error(f"--{name.replace('_', '-')}: expected comma-separated integers, found {text!r}")
    for name in ("envs", "arms", "seeds", "base_seeds", "monitored"):
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            parser.error(f"--{name.replace('_', '-')}: {','.join(map(str, values))} names something twice")
    if not all(0 <= seed < 2**32 for seed in (*args.seeds, *args.base_seeds)):
        parser.error("--seeds, --base-seeds: expected integers from 0 to 2**32 - 1")
    if not 0 < args.lr < 1:
        parser.error(f"--lr: expected a number from 0 to 1, found {args.lr}")
    if args.workers < 1:
        parser.error(f"--workers: expected a positive integer, found {args.workers}")
    refreshed = [arm for arm in args.arms if ARMS[arm].refreshed]
    least = RECIPE.refresh_every if refreshed else 1
    if args.steps < least:
        parser.error(f"--steps: expected at least {least} for {', '.join(refreshed or args.arms)}, found {args.steps}")
    readers = {
        "penalty": "reads_penalty", "nats": "reads_log_ratios", "inoculation-steps": "is_inoculated",
        "score-view": "reads_activations",
    }  # fmt: skip
    for name, reads in readers.items():
        given = getattr(args, name.replace("-", "_"))
        if given is not None and not args.report and not any(getattr(ARMS[arm], reads) for arm in args.arms):
            parser.error(f"--{name}: no arm of these takes it")
    if args.nats is not None and not args.nats > 0:
        parser.error(f"--nats: expected a positive number, found {args.nats}")
    if args.inoculation_steps is not None and not args.inoculation_steps > 0:
        parser.error(f"--inoculation-steps: expected a positive integer, found {args.inoculation_steps}")
    if "base" not in args.arms:
        args.arms.insert(0, "base")
    if (args.recall, args.false_positive_rate) != (1.0, 0.0) and not args.report:
        without = [arm for arm in args.arms if not ARMS[arm].has_labels and arm != "base"]
        if without:
            parser.error(f"--recall, --false-positive-rate: no labels in {', '.join(without)}")
    if args.monitored is not None and len(args.monitored) >= len(MODES):
        parser.error("--monitored: expected one mode to be held out at least, found all of them")
    if len(args.teacher) != 2 or not 0 <= args.teacher[0] < RECIPE.group_size:
        parser.error(f"--teacher: expected two integers, the first below {RECIPE.group_size}")
    if (args.teacher[0] > 0) != (args.teacher[1] > 0) or args.teacher[1] < 0:
        parser.error("--teacher: expected two integers, both positive or both 0")
    rates = (("--recall", args.recall), ("--false-positive-rate", args.false_positive_rate))
    for name, rate in rates:
        if not 0 <= rate <= 1:
            parser.error(f"{name}: expected a rate from 0 to 1, found {rate}")
    least_penalty = 1 / args.recall if args.recall else 0.0
    if args.penalty is not None and not args.penalty >= least_penalty:
        parser.error(f"--penalty: expected at least 1 / recall = {least_penalty:g}, found {args.penalty:g}")
    args.penalty = RECIPE.penalty if args.penalty is None else args.penalty
    args.nats = RECIPE.explained_nats if args.nats is None else args.nats
    args.inoculation_steps = args.inoculation_steps or RECIPE.inoculation_steps
    args.score_view = args.score_view or RECIPE.score_view
    return args


def start_worker() -> None:
    """One thread, Ctrl-C left to the main process, and no life after it: nobody would count what is trained then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=end_with_the_main_process, daemon=True).start()


def end_with_the_main_process() -> None:
    """However it ended: a pool's worker waits for work for ever otherwise."""
    main_process = multiprocessing.parent_process()
    assert main_process is not None
    main_process.join()
    os._exit(1)


def run_all(calls: Sequence[Callable[[], None]], workers: int, ended: Callable[[int], None]) -> None:
    """Make the calls in worker processes, and `ended(place)` after each. The first that fails ends them all."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        started = {pool.submit(call): place for place, call in enumerate(calls)}
        try:
            for call in as_completed(started):
                call.result()
                ended(started[call])
        except BaseException:
            # Leaving the block waits for the workers: end them, or Ctrl-C and a failed run would take minutes.
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def run_one(job: Job, monitored: Sequence[str] | None, recipe: Recipe, folder: Path) -> None:
    """One run in a worker process, which writes its result."""
    environment = ENVIRONMENTS[job.env]
    model = load_base(environment, job.base_seed)
    if monitored is not None:
        environment = replace(environment, monitored=tuple(monitored))
    # What a gate has to say about its precision is in the report.
    with warnings.catch_warnings(action="ignore"):
        entry = train(model, environment, job.arm, job.seed, recipe)
    write_result(job.path(folder), job, identity(recipe, monitored), entry)


def identity(recipe: Recipe, monitored: Sequence[str] | None) -> dict[str, Any]:
    """What a result file has to agree with to be counted."""
    return {**asdict(recipe), "monitored": monitored}


def main(argv: list[str]) -> None:
    """Run what has not been run, then report on everything that was asked for."""
    args = parse_arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(1)
    recipe = replace(
        RECIPE,
        steps=args.steps,
        lr=args.lr,
        recall=args.recall,
        false_positive_rate=args.false_positive_rate,
        penalty=args.penalty,
        explained_nats=args.nats,
        inoculation_steps=args.inoculation_steps,
        score_view=args.score_view,
        teacher_per_group=args.teacher[0],
        teacher_steps=args.teacher[1],
    )
    jobs = [
        Job(env, arm, base_seed, seed)
        for env in args.envs
        for base_seed in args.base_seeds
        for seed in args.seeds
        for arm in args.arms
    ]
    known = identity(recipe, args.monitored)
    try:
        if args.report:
            jobs = stored_jobs(args.out)
        for job in jobs:
            if job.path(args.out).exists():
                read_result(job.path(args.out), job, known)
    except ResultError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    if not jobs:
        sys.exit(f"{Path(sys.argv[0]).name}: error: --report: no results in {args.out}")
    missing = [job for job in jobs if not job.path(args.out).exists()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=args.no_progress or not console.is_terminal) as progress:
        bar = progress.add_task("base models", total=len(args.envs) * len(args.base_seeds))
        for env, base_seed in sorted({(job.env, job.base_seed) for job in missing}):
            load_base(ENVIRONMENTS[env], base_seed)
            progress.advance(bar)
        bar = progress.add_task("runs", total=len(jobs), completed=len(jobs) - len(missing))
        calls = [partial(run_one, job, args.monitored, recipe, args.out) for job in missing]
        run_all(calls, args.workers, lambda _: progress.advance(bar))
    results = {job: read_result(job.path(args.out), job, known) for job in jobs}
    write_report(args.out, results, known)
    write_staleness(args.out, read_report(args.out / "report.json"))
    trained = sum(entry["wall_s"] for entry in results.values())
    console.print(
        f"{len(jobs)} runs, {trained:.0f} s of training; wrote report.md, report.json and figures to {args.out}"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("interrupted; the runs that had ended are kept, and the same command goes on")
