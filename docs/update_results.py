"""Writes the tables and first sentences of the research pages, and more, from committed files; `--check` only compares.

    python docs/update_results.py

`results/first-run.json` is what `python examples/grpo_loopholes.py` wrote; the README's picture is drawn of it.

A block begins with `<!-- table: NAME ... -->` and ends with `<!-- end -->`; what is in between is replaced.
"""

import json
import math
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

DOCS = Path(__file__).parent
WRITTEN = (
    DOCS / "results.md", DOCS / "directions-study.md", DOCS / "real-model.md", DOCS / "reasoning-gym.md",
    DOCS / "referee.md", DOCS / "staleness.md", DOCS / "exactness.md", DOCS / "howto" / "sharded.md",
    DOCS / "howto" / "inoculation.md", DOCS.parent / "README.md",
)  # fmt: skip
SUMMARISED = ("vanilla", "clean", "weak", "shuffle", "random-oriented", "route")
sys.path[:0] = [str(DOCS), str(DOCS.parent), str(DOCS.parent / "examples"), str(DOCS.parent / "examples" / "studies")]

import findings
from contest import calibration
from contest import report as contest_report
from contest.interventions import paragraphs
from contest.verdicts import verdict_table as contest_verdicts
from directions_tables import left_out_table, read_study, transfer_table

from benchmarks import sharding
from loopholes.arms import ARMS, groups
from loopholes.conclusion import conclusion
from loopholes.environment import MODES
from loopholes.grpo import Recipe
from loopholes.names import letter_of
from loopholes.report import plot_curves
from procedural import tables as procedural
from published.seeds import interval
from reporting.arm_data import of_arm
from reporting.markdown import markdown_table
from reporting.score_view import score_view_table
from reporting.staleness import difference_table, loss_table, share_table, staleness_table
from reporting.suite_report import COLUMNS, cell, draw_table, one_block_table, read_report, table, verdict_table
from smollm import report as smollm_report
from smollm import score_view as smollm_tables
from smollm.screening import screen_table

DEPLOYED = [column for column in COLUMNS if column[0] == "ablated" and column[1] != "solve_no_hint"]
STALENESS = {"rates": staleness_table, "differences": difference_table, "shares": share_table}
BLOCK = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def loopholes(file: str, env: str) -> str:
    """Rates of every arm in an environment."""
    return table(read_report(DOCS / "results" / file), env)


def judged(file: str, env: str) -> str:
    """Verdicts of an environment."""
    return verdict_table(read_report(DOCS / "results" / file), env)


def draws(file: str, env: str) -> str:
    """Random directions one by one."""
    return draw_table(read_report(DOCS / "results" / file), env)


def first_run() -> str:
    """The sentences with which the main job ends."""
    run = json.loads((DOCS / "results" / "first-run.json").read_text(encoding="utf-8"))
    said = conclusion(run["runs"], Recipe.steps, run["config"]["steps"])
    return "```text\n" + "\n".join(line for each in said for line in textwrap.wrap(each, 118)) + "\n```"


def summary(file: str, env: str) -> str:
    """The deployed view of the arms that the question takes."""
    results = read_report(DOCS / "results" / file)
    rows = []
    for arm in SUMMARISED:
        runs = of_arm(results, env, arm).values()
        cells = [cell([entry[view][rate] for entry in runs]) for view, rate in DEPLOYED]
        rows.append([f"{arm}: {ARMS[arm].about}", str(len(runs)), *cells])
    return markdown_table(["arm", "runs", *(COLUMNS[column] for column in DEPLOYED)], rows)


def rivals(env: str, arms: str, *files: str) -> str:
    """The deployed view of `arms` in these reports, and the on view's held-out hacks."""
    columns = [*DEPLOYED, ("on", "hack_held_out")]
    rows = []
    for path in (DOCS / "results" / file for file in files):
        results = read_report(path)
        for arm in arms.split(","):
            runs = of_arm(results, env, arm).values()
            if runs:
                cells = [cell([entry[view][rate] for entry in runs]) for view, rate in columns]
                rows.append([arm, str(len(runs)), *cells])
                if len(files) > 1:
                    rows[-1].insert(0, setting(path))
    header = ["arm", "runs", *(COLUMNS[column] for column in columns)]
    return markdown_table(["setting", *header] if len(files) > 1 else header, rows)


def side_by_side(env: str, arms: str, *files: str) -> str:
    """The deployed view of `arms`, and the on view's hacks, in the runs of the first file; others add arms to it."""
    results = {job: run for file in reversed(files) for job, run in read_report(DOCS / "results" / file).items()}
    seeds = {(job.base_seed, job.seed) for job in read_report(DOCS / "results" / files[0]) if job.env == env}
    columns = [*DEPLOYED, ("on", "hack_monitored"), ("on", "hack_held_out")]
    rows = []
    for arm in arms.split(","):
        runs = [run for job, run in of_arm(results, env, arm).items() if (job.base_seed, job.seed) in seeds]
        rates = [[run[view][rate] for run in runs] for view, rate in columns]
        cells = [f"{fmean(each):.2f}, {min(each):.2f} to {max(each):.2f}" for each in rates]
        rows.append([arm, str(len(runs)), *cells])
    return markdown_table(["arm", "runs", *(COLUMNS[column] for column in columns)], rows)


def thresholds(arms: str, *files: str) -> str:
    """The deployed view of `arms` by environment and threshold of log ratios; each file as ENVIRONMENT:FILE."""
    rows = []
    for name, file in (each.split(":") for each in files):
        env = letter_of(name)
        path = DOCS / "results" / file
        nats = json.loads(path.read_text(encoding="utf-8"))["recipe"]["explained_nats"]
        for arm in arms.split(","):
            runs = of_arm(read_report(path), env, arm).values()
            cells = [cell([entry[view][rate] for entry in runs]) for view, rate in DEPLOYED]
            rows.append([f"`{name}`", f"{nats:g}", arm, str(len(runs)), *cells])
    rows.sort(key=lambda row: (row[0], row[2], float(row[1])))
    return markdown_table(["environment", "nats", "arm", "runs", *(COLUMNS[column] for column in DEPLOYED)], rows)


def arms() -> str:
    """What each arm does, by what it is for."""
    rows = [[f"`{arm}`", group, ARMS[arm].about] for group, members in groups().items() for arm in members]
    return markdown_table(["arm", "group", "what it does"], rows)


def one_block(file: str, env: str) -> str:
    """Whether a second block was earned in an environment."""
    return one_block_table(read_report(DOCS / "results" / file), env)


def stale(file: str, env: str, part: str) -> str:
    """Refreshed arms against frozen ones: `rates`, `differences` or `shares` of the gradient."""
    return STALENESS[part](read_report(DOCS / "results" / file), env)


def losses(env: str, *files: str) -> str:
    """What first directions would cost, by their overlap with fresh ones, in several reports together."""
    return loss_table(env, *(read_report(DOCS / "results" / file) for file in files))


def sweep(env: str, arms: str, *files: str) -> str:
    """Rates of `arms` in several reports, by what each report was run with."""
    rows = []
    reports = [DOCS / "results" / file for file in files]
    for path in reports:
        results = read_report(path)
        for arm in arms.split(","):
            runs = list(of_arm(results, env, arm).values())
            if runs:
                cells = [
                    cell([entry[view][rate] for entry in runs]) for view, rate in COLUMNS if rate != "solve_no_hint"
                ]
                rows.append([setting(path), arm, str(len(runs)), *cells])
    titles = [title for (_, rate), title in COLUMNS.items() if rate != "solve_no_hint"]
    return markdown_table(["setting", "arm", "runs", *titles], rows)


def setting(path: Path) -> str:
    """What a report's recipe says of labels and monitored modes."""
    recipe = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    if recipe["monitored"]:
        return "held out: " + ", ".join(mode for mode in MODES if mode not in recipe["monitored"])
    return f"recall {recipe['recall']:g}, false positives {recipe['false_positive_rate']:g}"


def referee(part: str, env: str = "") -> str:
    """A part of the contest, of an environment where it has one."""
    contest, doses = contest_report.read_report(DOCS / "results" / "referee.json")
    if part == "paragraphs":
        return paragraphs(contest, ("N", "C"))
    if part == "negative":
        return contest_report.negative_table(contest)
    if part == "doses":
        return contest_report.dose_table(doses)
    if part == "calibration":
        return calibration.calibration_table(DOCS / "results" / "referee-calibration.json")
    make = {"table": contest_report.table, "controls": contest_report.control_table, "verdicts": contest_verdicts}
    return make[part](contest, env)


def split_digits() -> str:
    """Certificate errors of the bottom half, by setting."""
    rows = []
    runs = _runs("published/split_digits.json")
    for setting in dict.fromkeys(run["setting"] for run in runs):
        cells = []
        for measure in ("MAE", "MSE"):
            chosen = [r for r in runs if (r["setting"], r["output"], r["measure"]) == (setting, "bottom", measure)]
            cells += [interval([run[digits] for run in chosen]) for digits in ("0-4", "5-9")]
        rows.append([setting, str(len({run["seed"] for run in runs})), *cells])
    return markdown_table(["setting", "seeds", "MAE, 0-4", "MAE, 5-9", "MSE, 0-4", "MSE, 5-9"], rows)


def absorption() -> str:
    """Losses and leakage after ablation, by share of the forget data that is labelled."""
    columns = ["forget", "forget_calibrated", "retain", "leakage", "leakage_calibrated"]
    rows = []
    # The baseline's runs are the curve on which leakage is read off, not a row of their own.
    runs = [run for run in _runs("published/absorption.json") if run["scheme"] != "baseline"]
    for scheme, recall in dict.fromkeys((run["scheme"], run.get("recall")) for run in runs):
        chosen = [run for run in runs if (run["scheme"], run.get("recall")) == (scheme, recall)]
        values = [[run[name] for run in chosen if run.get(name) is not None] for name in columns]
        name = scheme if recall is None else f"{scheme}, {recall:.0%} labelled"
        rows.append([name, str(len(chosen)), *(interval(each) if len(each) > 1 else "-" for each in values)])
    return markdown_table(["scheme", "seeds", *(name.replace("_", ", ") for name in columns)], rows)


def directions(file: str, *left_out: str) -> str:
    """AUROC of left-out `pairs` or `categories`; without either, from one category to another."""
    study = read_study(DOCS / "results" / file)
    return markdown_table(*(left_out_table(study, *left_out) if left_out else transfer_table(study)))


def smollm(variant: str, part: str, file: str = "smollm.json") -> str:
    """A table of a study on SmolLM2: `rates`, `criteria`, `verdicts`, `gate`, `runs_table`."""
    make: Callable[..., str] = getattr(smollm_report, part)
    return make(smollm_report.read_report(DOCS / "results" / file), variant)


def score_view(env: str, ablated: str, sampled: str) -> str:
    """The activation gate that scores rollouts ablated, against the one that scores them as sampled."""
    return score_view_table(*(read_report(DOCS / "results" / file) for file in (ablated, sampled)), env, "route")


def smollm_score_view(variant: str, ablated: str, sampled: str) -> str:
    """The same on SmolLM2."""
    reports = (smollm_report.read_report(DOCS / "results" / file) for file in (ablated, sampled))
    return smollm_tables.score_view_table(*reports, variant, "route")


def smollm_screening() -> str:
    """Directions on the warmed-up models, before any training."""
    return screen_table(json.loads((DOCS / "results" / "smollm-screening.json").read_text(encoding="utf-8")))


def reasoning_gym(part: str, *what: str) -> str:
    """Holes of other people's scorers: `holes`, `reach` and `runs`, from the file of each."""
    file = {"holes": "scan"}.get(part, part)
    if part == "reach":
        file, *what = f"reach-{what[0]}", *what[1:]
    found = json.loads((DOCS / "results" / f"reasoning-gym-{file}.json").read_text(encoding="utf-8"))
    table: Callable[..., procedural.Table] = getattr(procedural, f"{part}_table")
    return markdown_table(*table(found, *what))


def sharded() -> str:
    """Errors of sharded engines, by part."""
    engines = json.loads((DOCS / "results" / "sharded.json").read_text(encoding="utf-8"))
    parts = list(dict.fromkeys(part for figures in engines.values() for part in figures))
    rows = []
    for engine, figures in engines.items():
        cells = [
            _error(figures[part]["error"], figures[part]["tolerance"]) if part in figures else "-" for part in parts
        ]
        rows.append([engine, *cells])
    return markdown_table(["engine", *parts], rows)


def _error(error: float, tolerance: float) -> str:
    """Rounded up: to one digit, and to a power of ten where rounding differs between machines."""
    if error == 0:
        return "bitwise"
    power = 10.0 ** math.floor(math.log10(error))
    return f"{power * (math.ceil(error / power) if error > 1e-9 else 10):.0e} ({tolerance:g})"


def sharding_plan() -> str:
    """What the quarantine, a refresh and a two-view sync add to sharded models that do not fit here."""
    return markdown_table(*sharding.table())


TABLES: dict[str, Callable[..., str]] = {
    "loopholes": loopholes, "verdicts": judged, "summary": summary, "staleness": stale, "losses": losses,
    "sweep": sweep, "draws": draws,
    "rivals": rivals, "one-block": one_block, "thresholds": thresholds, "arms": arms, "findings": findings.findings,
    "side-by-side": side_by_side,
    "split-digits": split_digits, "absorption": absorption, "directions": directions, "smollm": smollm,
    "smollm-screening": smollm_screening, "sharded": sharded, "sharding-plan": sharding_plan,
    "reasoning-gym": reasoning_gym, "first-run": first_run, "score-view": score_view, "referee": referee,
    "smollm-score-view": smollm_score_view,
}  # fmt: skip


def updated(text: str) -> str:
    """`text` with every block written again."""

    def replace(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        # Pages name an environment, result files have its letter.
        return f"{match[1]}\n{TABLES[name](*map(letter_of, arguments))}\n\n{match[3]}"

    return BLOCK.sub(replace, text)


def _runs(file: str) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads((DOCS / "results" / file).read_text(encoding="utf-8"))["runs"]
    return runs


def main() -> None:
    """Write, or with `--check` compare."""
    for path in WRITTEN:
        text = path.read_text(encoding="utf-8")
        if sys.argv[1:] != ["--check"]:
            path.write_text(updated(text), encoding="utf-8")
        elif updated(text) != text:
            sys.exit(f"{path.name} is not what the result files say; run {__file__}")
    if sys.argv[1:] != ["--check"]:
        plot_curves(DOCS / "curves.png", _runs("first-run.json"))


if __name__ == "__main__":
    main()
