"""Interventions against reward hacking on the same seeds, labels and pairs, with their controls, in one table.

    python examples/studies/referee.py --quick                             # every arm once in each environment
    python examples/studies/referee.py --tune                              # three doses of each arm, on tuning seeds
    python examples/studies/referee.py                                     # 3 to 10 runs of each
    python examples/studies/referee.py --calibrate 400                     # false verdicts where nothing is better

Every run that has ended is a file in --out; what was killed goes on where it stopped. Writes `report.md`, `report.json`
and a figure for each environment to --out.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the studies share with the other examples lies there

from contest.calibration import write_calibration
from contest.entries import LABELS
from contest.jobs import Run, contest, tuning
from contest.report import write_report
from suite import RECIPE, run_all

from loopholes.base_model import load_base
from loopholes.environment import ENVIRONMENTS
from loopholes.names import NAMES, letter_of
from reporting.store import ResultError

ENVS = "shared-token,own-tokens"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The checked command line; anything wrong ends with one line and exit code 2, before any training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")  # type: ignore[method-assign]
    parser.add_argument("--envs", help=f"comma-separated, of {', '.join(NAMES)}; {ENVS} if not given")
    parser.add_argument("--labels", help=f"comma-separated, of {', '.join(LABELS)}; each of them if not given")
    parser.add_argument("--steps", type=int, help=f"GRPO steps; {RECIPE.steps} if not given")
    parser.add_argument("--quick", action="store_true", help="one run of each arm in each environment")
    parser.add_argument("--tune", action="store_true", help="three doses of each arm that has one, on tuning seeds")
    parser.add_argument("--report", action="store_true", help="run nothing: report on what lies in --out")
    calibrate = "train nothing: simulate N contests in which no arm is better, and write calibration.json"
    parser.add_argument("--calibrate", type=int, metavar="N", help=calibrate)
    parser.add_argument("--workers", type=int, help="processes of one thread; 2 if not given")
    parser.add_argument("--out", type=Path, default=Path("runs/referee"), help="folder; default %(default)s")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    modes = {"--quick": args.quick, "--tune": args.tune, "--report": args.report}
    chosen = [name for name, given in modes.items() if given] + ["--calibrate"] * (args.calibrate is not None)
    if len(chosen) > 1:
        parser.error(f"{', '.join([*modes, '--calibrate'])}: one of them at most")
    unread = {
        "--tune": ("labels",), "--report": ("workers", "no_progress"),
        "--calibrate": ("envs", "labels", "steps", "workers", "no_progress"),
    }  # fmt: skip
    for mode in chosen:
        for name in unread.get(mode, ()):
            if getattr(args, name) not in (None, False):
                parser.error(f"--{name.replace('_', '-')}: {mode} does not read it")
    defaults = {"envs": ENVS, "labels": ",".join(LABELS), "steps": RECIPE.steps, "workers": 2}
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    args.envs = [letter_of(name) for name in args.envs.split(",")]
    args.labels = args.labels.split(",")
    for name, known in (("envs", ENVIRONMENTS), ("labels", LABELS)):
        values = getattr(args, name)
        for value in values:
            if value not in known:
                parser.error(f"--{name}: unknown {value!r}; choose from {', '.join(known)}")
        if len(set(values)) < len(values):
            parser.error(f"--{name}: {','.join(values)} names something twice")
    if args.calibrate is not None and args.calibrate < 1:
        parser.error(f"--calibrate: expected a positive integer, found {args.calibrate}")
    if args.steps < RECIPE.refresh_every:
        parser.error(f"--steps: expected at least {RECIPE.refresh_every}, found {args.steps}")
    if args.workers < 1:
        parser.error(f"--workers: expected a positive integer, found {args.workers}")
    return args


def run_missing(runs: list[Run], workers: int, progress: Progress) -> None:
    """Train what has no result yet."""
    missing = [run for run in runs if not run.path.exists()]
    for env, base_seed in sorted({(run.job.env, run.job.base_seed) for run in missing}):
        load_base(ENVIRONMENTS[env], base_seed)
    bar = progress.add_task("runs", total=len(runs), completed=len(runs) - len(missing))
    run_all([run.train for run in missing], workers, lambda _: progress.advance(bar))


def main(argv: list[str]) -> None:
    """Run what has not been run, then report on it."""
    args = parse_arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(1)
    if args.calibrate is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_calibration(args.out / "calibration.json", args.calibrate, seed=0)
        console.print(f"wrote {args.out / 'calibration.json'}")
        return
    recipe = replace(RECIPE, steps=args.steps)
    everything = contest(recipe, args.envs, args.labels, args.out, quick=False)
    tuned = tuning(recipe, args.envs, args.out)
    wanted = tuned if args.tune else contest(recipe, args.envs, args.labels, args.out, quick=args.quick)
    try:
        # What does not fit is found before anything is trained.
        for run in everything + tuned:
            if run.path.exists():
                run.read()
    except ResultError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    if args.report and not any(run.path.exists() for run in everything):
        sys.exit(f"{Path(sys.argv[0]).name}: error: --report: no results in {args.out}")
    if not args.report:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, disable=args.no_progress or not console.is_terminal) as progress:
            run_missing(wanted, args.workers, progress)
    found = [(run, run.read()) for run in everything if run.path.exists()]
    doses = [(run, run.read()) for run in tuned if run.path.exists()]
    write_report(args.out, found, doses)
    trained = sum(entry["wall_s"] for _, entry in found + doses)
    console.print(
        f"{len(found)} runs and {len(doses)} of doses, {trained:.0f} s of training; wrote report.md, report.json and "
        f"figures to {args.out}"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("interrupted; the runs that had ended are kept, and the same command goes on")
